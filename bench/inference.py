"""How fast networks with zeros run on a CPU: Pomona's engine beside its peers, in turns, outputs compared first.

    python bench/inference.py build --venvs DIR     a virtual environment for each peer, as bench/peers/*.txt pin it
    python bench/inference.py run --venvs DIR       all of it, half an hour on a quiet machine
    python bench/inference.py run --venvs DIR --nets resnet-56 --batches 1 --threads 1 --only pomona "mnn sparse"
    python bench/inference.py table                 print the tables, and write them into bench/RESULTS-inference.md

Results go into bench/results/inference, a file for each network, batch and number of threads. ONNX Runtime takes its
turn in every round, so that all ratios have a common reference: what is run later with --only is compared with its own.
Dense runtimes, whose speed does not depend on zeros, run the network without a mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nets import NETS, count, make, mask_
from pomona.benchmark.bench import export_onnx, write_network
from pomona.benchmark.paths import Case, relative_error
from pomona.benchmark.result import TOLERANCE
from pomona.benchmark.worker import Worker, WorkerError, take_turns
from speed import machine, show

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "inference"
REPORT = HERE / "RESULTS-inference.md"
BEGIN, END = "<!-- tables: python bench/inference.py table -->", "<!-- end of the tables -->"
REFERENCE = "onnxruntime"

# path -> the environment it runs in; "" is this one.
DENSE = {
    "torch": "",
    "torch.compile": "",
    "openvino": "openvino",
    "mnn": "mnn",
    "onnxruntime int8": "onnxruntime",
    "openvino int8": "openvino",
}
SPARSE = {"mnn sparse": "mnn", "deepsparse": "deepsparse", "pomona": "", "pomona int16": ""}
PLACES = {REFERENCE: "onnxruntime"} | DENSE | SPARSE
PACKAGES = {"openvino": "openvino", "mnn": "MNN", "onnxruntime": "onnxruntime", "deepsparse": "deepsparse"}

NUM_CALIBRATED = 16  # samples, others than those that are timed

MASKS = ("dense", "uniform", "erk", "trained")
Mask = tuple[str, float]  # one of MASKS; sparsity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run", "table"))
    parser.add_argument("--venvs", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--masks", nargs="+", default=["dense", "uniform", "erk"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--state", nargs="*", default=[], metavar="NET=FILE", help="trained state dicts, with zeros")
    parser.add_argument("--only", nargs="+", default=[*DENSE, *SPARSE], choices=[*DENSE, *SPARSE])
    parser.add_argument("--skip", nargs="+", default=[], choices=[*DENSE, *SPARSE])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each path and mask, and 3 rounds at least")
    options = parser.parse_args()
    {"build": build, "run": run, "table": table}[options.what](options)


def build(options: argparse.Namespace) -> None:
    for pins in sorted((HERE / "peers").glob("*.txt")):
        venv = options.venvs / pins.stem
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        # Without dependencies: the files name all that is needed here, and DeepSparse would bring much more.
        command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)]
        subprocess.run(command, check=True)
        print(f"{venv}: {', '.join(pins.read_text().split())}")


def run(options: argparse.Namespace) -> None:
    wanted = [REFERENCE, *(name for name in options.only if name not in options.skip)]
    states = dict(text.split("=", 1) for text in options.state)
    show(["net", "batch", "threads", "mask", "kept MACs, %", "path", "ms", "x", "x CPU", "outputs"], head=True)
    for threads in options.threads:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            workers = {name: stack.enter_context(worker(name, options.venvs)) for name in wanted}
            for net in options.nets:
                masks: list[Mask] = [
                    (mask, sparsity) for mask in options.masks if mask != "dense" for sparsity in options.sparsities
                ]
                masks = [("dense", 0.0)] * ("dense" in options.masks) + masks + [("trained", 0.0)] * (net in states)
                for batch in options.batches:
                    file = RESULTS / f"{net}-b{batch}-t{threads}.json"
                    for mask in masks:
                        with tempfile.TemporaryDirectory(dir=folder) as inside:
                            row = measure(net, batch, threads, mask, workers, Path(inside), options, states.get(net))
                        merge(file, row, workers, options.venvs)


def worker(name: str, venvs: Path) -> Worker:
    python = str(venvs / PLACES[name] / "bin" / "python") if PLACES[name] else sys.executable
    return Worker(name, python=python, code="from openers import *; serve(OPENERS)", places=[HERE, HERE / "peers"])


def measure(
    net: str,
    batch: int,
    threads: int,
    mask: Mask,
    workers: dict[str, Worker],
    folder: Path,
    options: argparse.Namespace,
    state: str | None,
) -> dict[str, Any]:
    """One row: a network under a mask, by all paths that make sense for it."""
    kind, sparsity = mask
    names = [REFERENCE, *(DENSE if kind == "dense" else ()), *SPARSE]
    names = [name for name in names if name in workers and (name, kind) != ("mnn sparse", "dense")]
    model = make(net, torch.load(state, weights_only=True) if kind == "trained" and state else None)
    if kind in ("uniform", "erk"):
        mask_(model, kind, sparsity)
    counted = count(model, NETS[net].shape)
    if kind == "trained":
        sparsity = round(1 - counted.kept / counted.weights, 4)
    x = torch.randn(batch, *NETS[net].shape, generator=torch.Generator().manual_seed(2))
    right = [model(x).numpy()]
    case = write_case(net, model, x, folder, names)
    if any("int8" in name for name in names):
        workers[REFERENCE].ask("quantise", case=dataclasses.asdict(case))
    cpus = sorted(os.sched_getaffinity(0))[-threads:]
    paths: dict[str, Any] = {}
    opened = []
    for name in names:
        try:
            answer = workers[name].ask(
                "open", key="net", path=name, case=dataclasses.asdict(case), threads=threads, cpus=cpus
            )
        except WorkerError as error:
            paths[name] = {"why_not": str(error)}
            continue
        with np.load(answer["outputs"]) as outputs:
            error = relative_error([outputs[str(i)] for i in range(len(outputs.files))], right)
        paths[name] = {"error": error, "opened_in": answer["seconds"]}
        opened.append(name)
    times = take_turns([(workers[name], "net") for name in opened], seconds=options.seconds)
    for name, timing in zip(opened, times, strict=True):
        paths[name] |= {"why_not": str(timing)} if isinstance(timing, WorkerError) else dataclasses.asdict(timing)
    reference = paths[REFERENCE]
    for name in names:
        path = paths[name]
        path["is_wrong"] = "error" in path and " int" not in name and not path["error"] < TOLERANCE
        if "median" in path:
            path["ratio"] = reference["median"] / path["median"]
            path["cpu_ratio"] = reference["cpu"] / path["cpu"]
            cells = [f"{1e3 * path['median']:.4g}", f"{path['ratio']:.2f}", f"{path['cpu_ratio']:.2f}"]
        else:
            cells = ["-", "-", "-"]
        told = (
            path.get("why_not", "").partition("\n")[0]
            or ("WRONG, " if path["is_wrong"] else "") + f"error {path['error']:.1e}"
        )
        kept = f"{100 * counted.kept_macs / counted.macs:.1f}"
        show([net, batch, threads, f"{kind} {sparsity:g}", kept, name, *cells, told])
        workers[name].ask("close")
    return {
        "net": net,
        "batch": batch,
        "threads": threads,
        "mask": kind,
        "sparsity": sparsity,
        **dataclasses.asdict(counted),
        "paths": paths,
    }


def write_case(net: str, model: torch.nn.Module, x: torch.Tensor, folder: Path, names: Iterable[str]) -> Case:
    case = Case(
        inputs=str(folder / "inputs.npz"),
        file=str(folder / "net.pomona.safetensors"),
        onnx=str(folder / "net.onnx"),
        int8=str(folder / "int8.onnx"),
        source=f"nets:{net.replace('-', '_')}",
        state=str(folder / "state.pt"),
    )
    np.savez(case.inputs, **{"0": x.numpy()})
    torch.save(model.state_dict(), case.state)
    export_onnx(model, [x], case.onnx)
    if "pomona" in names or "pomona int16" in names:
        others = torch.randn(NUM_CALIBRATED, *NETS[net].shape, generator=torch.Generator().manual_seed(3))
        write_network(case.file, model, [x], calibrate=[others])
    return case


def merge(file: Path, row: dict[str, Any], workers: dict[str, Worker], venvs: Path) -> None:
    """Into the file's rows; of a row that is there, paths that ran now replace those that ran before."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = json.loads(file.read_text()) if file.exists() else {"rows": []}
    key = ("mask", "sparsity")
    old = [other for other in about["rows"] if all(other[k] == row[k] for k in key)]
    stamp = {"commit": machine()["commit"], "at": time.strftime("%Y-%m-%d %H:%M")}
    for path in row["paths"].values():
        path |= stamp
    if old:
        row["paths"] = old[0]["paths"] | row["paths"]
    rows = [other for other in about["rows"] if other not in old] + [row]
    versions = about.get("versions", {}) | {name: version(workers[name], name) for name in workers}
    words = [word.partition("=")[0] + "=FILE" if "=" in word else word for word in sys.argv[1:]]
    command = " ".join(["bench/inference.py", *words]).replace(str(venvs), "DIR")
    about = {"machine": machine(), "versions": versions, "command": command, "rows": rows}
    file.write_text(json.dumps(about, indent=1))


def version(worker: Worker, name: str) -> str:
    package = PACKAGES.get(PLACES[name], "torch")
    if name.startswith("pomona"):
        return machine()["pomona"]
    return str(worker.ask("version", package=package)["version"])


def table(options: argparse.Namespace) -> None:
    """Print the tables, and put them into REPORT between its two marks."""
    text = io.StringIO()
    with redirect_stdout(text):
        for threads in options.threads:
            for batch in options.batches:
                rows = list(rows_of(options.nets, batch, threads))
                if not rows:
                    continue
                # One thread: CPU time, which other programs disturb less. Several: what a user waits for.
                by = "cpu_ratio" if threads == 1 else "ratio"
                kind = "CPU time" if threads == 1 else "wall time"
                print(f"\n### {threads} thread{'s' * (threads > 1)}, batch {batch}: times as fast, by {kind}\n")
                print_sparse(rows, by)
                print("\nDense, ms of wall time (times as fast):\n")
                print_dense(rows, by)
    print(text.getvalue())
    if REPORT.exists():
        before, rest = REPORT.read_text().split(BEGIN)
        REPORT.write_text(f"{before}{BEGIN}\n{text.getvalue()}\n{END}{rest.split(END)[1]}")


def rows_of(nets: Iterable[str], batch: int, threads: int) -> Iterator[dict[str, Any]]:
    for net in nets:
        file = RESULTS / f"{net}-b{batch}-t{threads}.json"
        if file.exists():
            rows = json.loads(file.read_text())["rows"]
            yield from sorted(rows, key=lambda row: (MASKS.index(row["mask"]), row["sparsity"]))


def print_sparse(rows: list[dict[str, Any]], by: str) -> None:
    dense = {row["net"]: row["paths"] for row in rows if row["mask"] == "dense"}
    head = ["network, mask", "sparsity", "kept MACs", "ONNX Runtime, ms", "fastest dense fp32", "dense int8"]
    show([*head, "MNN sparse", "DeepSparse", "Pomona", "Pomona int16", "ms of both", "behind"], head=True)
    for row in rows:
        if row["mask"] == "dense":
            continue
        paths, base = row["paths"], dense.get(row["net"], {})
        right = {name: path[by] for name, path in base.items() if "pomona" not in name and is_right(path, by)}
        fp32 = best_of({name: ratio for name, ratio in right.items() if "int8" not in name})
        int8 = best_of({name: ratio for name, ratio in right.items() if "int8" in name})
        # Who computes in float32 is compared with float32, dense int8 with the faster of both.
        mine, fixed = (paths[n][by] if is_right(paths.get(n), by) else 0.0 for n in ("pomona", "pomona int16"))
        rivals = {f"dense fp32, {fp32[0]}": (fp32[1], mine), f"dense {int8[0]}": (int8[1], max(mine, fixed))}
        sparse = [name for name in ("mnn sparse", "deepsparse") if is_right(paths.get(name), by)]
        rivals |= {name: (paths[name][by], mine) for name in sparse}
        behind = [f"{name} ({ratio / own:.2f}x)" for name, (ratio, own) in rivals.items() if own and ratio > own]
        show(
            [
                f"{row['net']}, {row['mask']}",
                f"{100 * row['sparsity']:.4g} %",
                f"{100 * row['kept_macs'] / row['macs']:.1f} %",
                ms(paths[REFERENCE]),
                told(*fp32),
                told(*int8),
                *(cell(paths.get(name), by) for name in SPARSE),
                " / ".join(ms(paths[name]) for name in ("pomona", "pomona int16") if "median" in paths.get(name, {})),
                "; ".join(behind) or "-",
            ]
        )


def print_dense(rows: list[dict[str, Any]], by: str) -> None:
    names = [REFERENCE, *DENSE, "deepsparse", "pomona", "pomona int16"]
    show(["network", *names], head=True)
    for row in rows:
        if row["mask"] == "dense":
            paths = row["paths"]
            cells = (
                f"{ms(paths[name])} ({cell(paths[name], by)})" if "median" in paths.get(name, {}) else "-"
                for name in names
            )
            show([row["net"], *cells])


def ms(path: dict[str, Any]) -> str:
    number = 1e3 * path["median"]
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def best_of(ratios: dict[str, float]) -> tuple[str, float]:
    name = max(ratios, key=lambda name: ratios[name], default="")
    return name, ratios.get(name, 0.0)


def told(name: str, ratio: float) -> str:
    return f"{ratio:.2f} ({name.removesuffix(' int8')})" if name else "-"


def is_right(path: dict[str, Any] | None, by: str) -> bool:
    return path is not None and by in path and not path["is_wrong"]


def cell(path: dict[str, Any] | None, by: str) -> str:
    if path is None:
        return "-"
    if by not in path:
        return "failed"
    return f"{path[by]:.2f}" + " (wrong)" * path["is_wrong"]


if __name__ == "__main__":
    main()
