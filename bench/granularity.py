"""What zeros that lie together cost in accuracy and are worth on a CPU: single weights, n:m, blocks, channels.

    python bench/granularity.py accuracy --data-dir DIR     LeNets on MNIST, three seeds
    python bench/granularity.py speed                       file size and latency of networks with random weights
    python bench/granularity.py table                       print the tables

All train by one recipe (compare-magnitude-global, shortened), from one dense network a seed; the granularity is all
that differs. Layers that not every granularity fits are left dense in all runs. Results go into
bench/results/granularity.json, in which what was not measured again is kept; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pomona
from nets import NETS, count, kernels, make
from pomona.benchmark.bench import export_onnx, write_network
from pomona.benchmark.paths import Case, relative_error
from pomona.benchmark.result import TOLERANCE
from pomona.benchmark.worker import Worker, take_turns
from pomona.budget import num_kept
from pomona.selection.top_k import top_k
from pomona.train.evaluate import evaluate
from pomona.train.progress import Progress
from pomona.train.recipe import load_recipe
from pomona.train.stages import train, train_base
from pomona.zoo.data import DATA
from pomona.zoo.models import build_model
from speed import machine, show

RESULT = Path(__file__).parent / "results" / "granularity.json"
DENSE = {"lenet-300-100": ["fc3"], "lenet-5": ["conv1", "fc2"]}  # a single input channel, or 10 outputs
VARIANTS = [
    (granularity, sparsity)
    for sparsity, of_m in ((0.5, "2:4"), (0.75, "1:4"))
    for granularity in ("weight", of_m, "1x4", "channel", "input channel")
]
TIMED = [(g, s) for g, s in VARIANTS if "channel" not in g] + [("weight", 0.9), ("1x4", 0.9)]
SPARSITIES = (0.5, 0.75, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "speed", "table"))
    parser.add_argument("--nets", nargs="+", help=f"accuracy: of {', '.join(DENSE)}; speed: of {', '.join(NETS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--length", type=float, default=0.15, help="share of the recipe's 10 + 30 epochs")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("runs/granularity"))
    options = parser.parse_args()
    if options.what == "accuracy":
        for row in accuracy(options):
            record("accuracy", row, ("net", "seed", "granularity", "sparsity"))
    if options.what == "speed":
        for net in options.nets or ["bert-mlp", "resnet-56"]:
            for row in speed(net):
                record("speed", row, ("net", "granularity", "sparsity"))
    table(read())


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"accuracy": [], "speed": []}
    return found


def record(part: str, row: dict[str, Any], keys: Iterable[str]) -> None:
    found = read()
    found[part] = [one for one in found[part] if any(one[key] != row[key] for key in keys)] + [row]
    found["machine"] = machine()
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


# accuracy


def accuracy(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    data = DATA["mnist"](options.data_dir)
    torch.set_num_threads(1)
    commit = machine()["commit"]
    for net in options.nets or DENSE:
        for seed in options.seeds:
            settings = [f"model={net}", f"seed={seed}", f"length={options.length}", "eval_every=100"]
            settings += [f"scope.exclude={json.dumps([f'{name}.weight' for name in DENSE[net]])}"]
            settings += ["method.every=25", "method.sparsity=0.5"]
            folder = options.out / f"{net}-{seed}"
            recipe = load_recipe("compare-magnitude-global", settings)
            base = train_base(recipe, data, folder / "base", threads=1, progress=Progress(quiet=True))
            for granularity, sparsity in VARIANTS:
                more = [f"method.granularity={granularity}", f"method.sparsity={sparsity}"]
                recipe = load_recipe("compare-magnitude-global", settings + more)
                where = folder / f"{granularity}-{sparsity}".replace(":", "of").replace(" ", "-")
                told = train(recipe, data, where, threads=1, progress=Progress(quiet=True), base=base, pictures=False)
                model = build_model(net, seed=0)
                model.load_state_dict(torch.load(where / "model.pt", weights_only=True))
                row = {"net": net, "seed": seed, "granularity": granularity, "sparsity": sparsity, "commit": commit}
                row |= {"length": options.length, "base": base.accuracy, "data": data.name}
                row |= {"accuracy": told["accuracy"]["final"], **sizes(model)}
                if "channel" in granularity:
                    smaller, _ = pomona.shrink(model, data.test_inputs[:8])
                    row["shrunk"] = sizes(smaller) | {"accuracy": evaluate(smaller, data).accuracy}
                print(json.dumps(row), flush=True)
                yield row


def sizes(model: torch.nn.Module) -> dict[str, int]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.pomona.safetensors"
        pomona.export(model, file)
        written = file.stat().st_size
    return {
        "weights": sum(p.numel() for p in weights),
        "nonzero": sum(int(p.count_nonzero()) for p in weights),
        "bytes": written,
    }


# speed


def speed(net: str) -> Iterator[dict[str, Any]]:
    """Networks with random weights, cut by magnitude, batch 1, one thread, in turns; CPU time, which others spare."""
    x = torch.randn(1, *NETS[net].shape, generator=torch.Generator().manual_seed(2))
    models = {("dense", 0.0): make(net)} | {(g, s): cut(make(net), g, s) for g, s in TIMED}
    for sparsity in SPARSITIES:
        hidden = cut(make(net), "input channel", sparsity, inner=net)
        models["channels, shrunk", sparsity] = pomona.shrink(hidden, x)[0].requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, Worker("pomona") as ours, Worker("onnxruntime") as theirs:
        rows, opened = [], []
        for (granularity, sparsity), model in models.items():
            counted = count(model, NETS[net].shape)
            row = {"net": net, "granularity": granularity, "sparsity": sparsity, **sizes(model)}
            rows.append(row | {"kept_macs": counted.kept_macs, "ms": {}})
            for worker in (ours, theirs) if granularity in ("dense", "channels, shrunk") else (ours,):
                key = f"{granularity}-{sparsity}"
                open_checked(worker, key, model, x, Path(folder) / f"{key}-{worker.path}".replace(":", "of"))
                opened.append((worker, key, rows[-1]))
        timings = take_turns([(worker, key) for worker, key, _ in opened], seconds=1.0)
        for (worker, _, row), timing in zip(opened, timings, strict=True):
            if isinstance(timing, Exception):
                raise timing
            row["ms"][worker.path] = 1e3 * timing.cpu
    yield from rows


def open_checked(worker: Worker, key: str, model: torch.nn.Module, x: torch.Tensor, folder: Path) -> None:
    """Open a network in a worker; its outputs must be the model's."""
    folder.mkdir()
    case = Case(str(folder / "inputs.npz"), str(folder / "net.pomona.safetensors"), str(folder / "net.onnx"))
    np.savez(case.inputs, **{"0": x.numpy()})
    write_network(case.file, model, [x])
    export_onnx(model, [x], case.onnx)
    answer = worker.ask("open", key=key, path=worker.path, case=dataclasses.asdict(case), threads=1, cpus=None)
    with np.load(answer["outputs"]) as outputs:
        error = relative_error([outputs["0"]], [model(x).numpy()])
    assert error < TOLERANCE, (worker.path, key, error)


def cut(model: torch.nn.Module, granularity: str, sparsity: float, *, inner: str = "") -> torch.nn.Module:
    """The smallest go, but for layers that fit no group. ``inner``: only inputs that one layer makes for another."""
    layers = [layer for layer in kernels(model) if layer.weight.shape[1] % 4 == 0 and layer.weight.shape[0] % 2 == 0]
    if inner == "bert-mlp":
        layers = [model.down]
    elif inner:  # the second convolution of every block reads the first alone
        layers = [m for name, m in model.named_modules() if name.endswith("conv2")]
    weights = [layer.weight for layer in layers]
    k = num_kept(sparsity, sum(w.numel() for w in weights))
    for w, mask in zip(weights, top_k(weights, k, "uniform", granularity=granularity), strict=True):
        w.mul_(mask)
    return model


# tables


def table(found: dict[str, Any]) -> None:
    for net in dict.fromkeys(row["net"] for row in found["accuracy"]):
        mine = [row for row in found["accuracy"] if row["net"] == net]
        bases = {row["seed"]: row["base"] for row in mine}
        print(f"\n{net}, dense {spread(bases.values())}, {len(bases)} seeds\n")
        show(
            ["granularity", "zeros in scope", "accuracy", "weights not zero", "file, bytes", "without channels"],
            head=True,
        )
        for granularity, sparsity in VARIANTS:
            rows = [row for row in mine if (row["granularity"], row["sparsity"]) == (granularity, sparsity)]
            if not rows:
                continue
            means = {key: f"{statistics.mean(row[key] for row in rows):,.0f}" for key in ("nonzero", "bytes")}
            shrunk = "-"
            if all("shrunk" in row for row in rows):
                weights, written = (statistics.mean(row["shrunk"][key] for row in rows) for key in ("weights", "bytes"))
                shrunk = (
                    f"{weights:,.0f} weights, {written:,.0f} bytes, {spread(r['shrunk']['accuracy'] for r in rows)}"
                )
            share = f"{100 * sparsity:.0f} %"
            show(
                [granularity, share, spread(row["accuracy"] for row in rows), means["nonzero"], means["bytes"], shrunk]
            )
    for net in dict.fromkeys(row["net"] for row in found["speed"]):
        print(f"\n{net}\n")
        rows = [row for row in found["speed"] if row["net"] == net]
        (dense,) = (row for row in rows if row["granularity"] == "dense")
        show(["granularity", "zeros", "weights not zero", "file, MB", "Pomona, ms", "ONNX Runtime, ms", "x"], head=True)
        for row in sorted(rows, key=lambda row: row["sparsity"]):
            ms = [f"{row['ms'][path]:.2f}" if path in row["ms"] else "" for path in ("pomona", "onnxruntime")]
            ratio = f"{dense['ms']['onnxruntime'] / min(row['ms'].values()):.2f}"
            share = f"{100 * row['sparsity']:.0f} %"
            show([row["granularity"], share, f"{row['nonzero']:,}", f"{row['bytes'] / 1e6:.3f}", *ms, ratio])


def spread(values: Iterable[float]) -> str:
    known = list(values)
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


if __name__ == "__main__":
    main()
