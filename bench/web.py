"""The core in WebAssembly beside onnxruntime-web, one thread, in Node: the table of RESULTS-web.md.

    npm install --prefix build/web onnxruntime-web@1.30.0
    python bench/web.py --peers build/web

Networks have random weights and random masks with the same share of zeros in every layer, in a first convolution of
several layers at most half; the page's own network is as it is. onnxruntime-web runs them with their zeros, as fast as
without. Needs the package `onnx` beside Pomona's own, and Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pomona.files import pack
from pomona.files.sparse import Sparse
from pomona.files.stored import Stored
from pomona.files.unpack import read
from pomona.runtime.ranges import with_ranges
from pomona.runtime.readers.trace import trace
from pomona.zoo.models import build_model
from speed import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "web"
DIGITS = ROOT / "web" / "digits.pomona.safetensors"
LAYERS = {  # channels in, out, kernel, side
    "3x3 16-16 @32 (ResNet-56)": (16, 16, 3, 32),
    "3x3 32-32 @16 (ResNet-56)": (32, 32, 3, 16),
    "3x3 64-64 @8 (ResNet-56)": (64, 64, 3, 8),
    "3x3 64-64 @56 (ResNet-50)": (64, 64, 3, 56),
    "1x1 64-256 @56 (ResNet-50)": (64, 256, 1, 56),
    "3x3 256-256 @14 (ResNet-50)": (256, 256, 3, 14),
    "1x1 256-1024 @14 (ResNet-50)": (256, 1024, 1, 14),
    "1x1 512-512 @14 (MobileNet)": (512, 512, 1, 14),
}


class Nothing(nn.Module):
    """What a call costs by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


def prune_(model: nn.Module, sparsity: float) -> nn.Module:
    """Zeros at random places."""
    generator = torch.Generator().manual_seed(1)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for i, layer in enumerate(layers):
        is_stem = i == 0 and len(layers) > 1 and isinstance(layer, nn.Conv2d)
        share = min(sparsity, 0.5) if is_stem else sparsity
        weight = layer.weight.data
        kept = torch.rand(weight.shape, generator=generator).flatten().argsort()[round(share * weight.numel()) :]
        mask = torch.zeros(weight.numel()).index_fill(0, kept, 1).view_as(weight)
        weight.mul_(mask)
    return model.eval()


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {"one ReLU of 10": (Nothing(), (10,))}
    digits = build_model("lenet-5", seed=0)
    stored = read(DIGITS).tensors
    digits.load_state_dict({name: torch.from_numpy(np.array(tensor.dense())) for name, tensor in stored.items()})
    found["LeNet-5 of the page, 99.7 %"] = (digits.eval(), (1, 28, 28))
    for sparsity in (0.9, 0.95):
        percent = f"{100 * sparsity:.0f} %"
        for name, shape in (("lenet-300-100", (1, 28, 28)), ("lenet-5", (1, 28, 28)), ("resnet-56", (3, 32, 32))):
            found[f"{name}, {percent}"] = (prune_(build_model(name, seed=0), sparsity), shape)
        for name, (c, o, k, side) in LAYERS.items():
            found[f"{name}, {percent}"] = (prune_(nn.Conv2d(c, o, k, padding=k // 2), sparsity), (c, side, side))
    return found


def write(model: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """The network three times: as Pomona's file, as ONNX, and its input."""
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    graph, tensors = trace(model, x)
    others = torch.randn(16, *shape, generator=torch.Generator().manual_seed(3))
    graph = with_ranges(graph, tensors, others.numpy())
    stored = {name: Stored("F32", Sparse.from_dense(t) if (t == 0).mean() > 0.2 else t) for name, t in tensors.items()}
    pack.write(Path(f"{path}.pomona.safetensors"), stored, {}, graph.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), f"{path}.onnx", dynamo=False, input_names=["x"])
    x.numpy().tofile(f"{path}.input")
    Path(f"{path}.json").write_text(json.dumps({"shape": shape}))


def row(name: str, found: dict[str, Any], call: dict[str, float]) -> str:
    def cell(microseconds: float) -> str:
        return f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"

    keys = ("onnxruntime", "dense", "sparse", "int16")
    times = {key: found["microseconds"][key]["cpu"]["median"] for key in keys}
    macs = f"{found['denseMacs'] / 1e6:.3g} to {found['macs'] / 1e6:.3g}" if found["denseMacs"] else "-"
    ratio = times["onnxruntime"] / times["sparse"]
    net = (times["onnxruntime"] - call["onnxruntime"]) / (times["sparse"] - call["sparse"]) if found["denseMacs"] else 0
    fair = f"{net:.1f}" if net else "-"
    cells = " | ".join(cell(times[key]) for key in keys)
    return f"| {name} | {macs} | {cells} | {ratio:.1f} | {fair} | {times['onnxruntime'] / times['int16']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder where npm put onnxruntime-web")
    parser.add_argument("--samples", type=int, default=41)
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--out", type=Path, default=RESULTS / "results.json")
    options = parser.parse_args()
    wanted = {name: network for name, network in networks().items() if options.only in name}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (model, shape) in enumerate(wanted.values()):
            write(model, shape, Path(folder, str(i)))
        script, peers = Path(__file__).with_suffix(".mjs"), options.peers.absolute()
        command = [
            "node",
            "--single-threaded",
            "--no-liftoff",
            script,
            folder,
            peers,
            options.samples,
            *range(len(wanted)),
        ]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for name, line in zip(wanted, process.stdout, strict=True):
                results[name] = json.loads(line) | {"name": name}
                medians = {
                    key: round(times["cpu"]["median"], 1) for key, times in results[name]["microseconds"].items()
                }
                print(name, medians, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["bench/web.py", *sys.argv[1:]])
    about = {"machine": machine(), "command": command, "rows": list(results.values())}
    options.out.write_text(json.dumps(about, indent=1) + "\n")
    call = {key: value["cpu"]["median"] for key, value in results["one ReLU of 10"]["microseconds"].items()}
    columns = "onnxruntime-web, us | dense, us | sparse, us | int16, us | times as fast | without the call | int16"
    print(f"\n| network | 10^6 MACs | {columns} |")
    print("|" + " --- |" * 9)
    for name, found in results.items():
        print(row(name, found, call))


if __name__ == "__main__":
    main()
