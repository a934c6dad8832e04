"""How fast networks with zeros run on a CPU: Pomona's engine beside its peers, taking turns, outputs compared first.

    python bench/inference.py build                 a virtual environment for each peer, with the pins of bench/peers
    python bench/inference.py build --peers mnn     only MNN's, anew
    python bench/inference.py run                   everything: half an hour on a quiet machine
    python bench/inference.py run --nets resnet-56 --batches 1 --threads 1 --only pomona "mnn sparse"
    python bench/inference.py table                 print the tables and write them into bench/RESULTS-inference.md

`build` runs a small network in each environment and compares its outputs with torch's. A peer that cannot be had is
reported with the reason and removed; the others are built all the same, and the exit status is 1.

Results go into bench/results/inference, one file per network, batch and number of threads. ONNX Runtime takes its turn
in every round, so that all ratios have a common reference: paths that run later, with --only, are compared with its
times of that run. Dense runtimes, whose speed does not depend on zeros, run the network without a mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nets import NETS, count, make, mask_
from peers.environments import PEERS, PINS, PeerError, build_environment, interpreter
from pomona.benchmark.bench import export_onnx, write_network
from pomona.benchmark.paths import Case, relative_error
from pomona.benchmark.result import TOLERANCE
from pomona.benchmark.worker import Worker, WorkerError, take_turns
from speed import machine, show

HERE = Path(__file__).resolve().parent
VENVS = HERE.parent / "build" / "peers"
RESULTS = HERE / "results" / "inference"
REPORT = HERE / "RESULTS-inference.md"
BEGIN, END = "<!-- tables: python bench/inference.py table -->", "<!-- end of the tables -->"
REFERENCE = "onnxruntime"

DENSE = ("torch", "torch.compile", "openvino", "mnn", "onnxruntime int8", "openvino int8")
SPARSE = ("mnn sparse", "deepsparse", "pomona", "pomona int16")
PEER_OF = {path: name for name, peer in PEERS.items() for path in peer.paths}  # the others run in this environment

NUM_CALIBRATED = 16  # samples, other than those that are timed
TRIED = "lenet-300-100"  # the network that a new environment has to run

MASKS = ("dense", "uniform", "erk", "trained")
Mask = tuple[str, float]  # one of MASKS; sparsity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "run", "table"))
    parser.add_argument("--venvs", type=Path, default=VENVS, help="folder of the environments (default: build/peers)")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS, help="those to build (default: all)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of results (default: bench/results/inference)"
    )
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--masks", nargs="+", default=["dense", "uniform", "erk"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95])
    parser.add_argument("--state", nargs="*", default=[], metavar="NET=FILE", help="trained state dicts with zeros")
    parser.add_argument("--only", nargs="+", default=[*DENSE, *SPARSE], choices=[*DENSE, *SPARSE])
    parser.add_argument("--skip", nargs="+", default=[], choices=[*DENSE, *SPARSE])
    parser.add_argument("--seconds", type=float, default=0.5, help="per path and mask; at least 3 rounds")
    options = parser.parse_args()
    {"build": build, "run": run, "table": table}[options.what](options)


def build(options: argparse.Namespace) -> None:
    failed = []
    for name in (name for name in PEERS if name in options.peers):  # in this order: ONNX Runtime quantises for others
        folder = options.venvs / name
        pins = PINS / f"{name}.txt"
        try:
            outputs = build_environment(folder, PEERS[name], pins, verify=partial(verify, name, options.venvs))
        except PeerError as error:
            failed.append(name)
            print(f"{name}: NOT BUILT: {error}", flush=True)
        else:
            print(f"{name}: built in {folder}: {outputs}", flush=True)
    if failed:
        sys.exit(f"not built: {', '.join(failed)}; `run` leaves them out")


def verify(name: str, venvs: Path) -> str:
    """Run a small network on every path of a peer: its versions, and how far the outputs are from torch's."""
    model = make(TRIED)
    mask_(model, "uniform", 0.9)
    x = torch.randn(1, *NETS[TRIED].shape, generator=torch.Generator().manual_seed(2))
    can_quantise = Path(interpreter(venvs / REFERENCE)).exists()
    paths = [path for path in PEERS[name].paths if can_quantise or not is_int8(path)]
    found = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        case = write_case(TRIED, model, x, folder, paths)
        try:
            if any(map(is_int8, paths)):
                stack.enter_context(worker(REFERENCE, venvs)).ask("quantise", case=dataclasses.asdict(case))
            for path in paths:
                process = stack.enter_context(worker(path, venvs))
                error = open_in(process, case, [model(x).numpy()], threads=1)["error"]
                # int8 is as exact as its calibration: it only has to compute something like the network.
                if not error < (1 if is_int8(path) else TOLERANCE):
                    raise PeerError(f"the outputs of {path} are wrong: relative error {error:.1e}")
                found.append(f"{path} {version(process, path)}, error {error:.1e}")
        except WorkerError as error:
            raise PeerError(f"a small network does not run on it: {error}") from None
    return "; ".join(found)


def run(options: argparse.Namespace) -> None:
    wanted = present([REFERENCE, *(name for name in options.only if name not in options.skip)], options.venvs)
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
                    file = options.out / f"{net}-b{batch}-t{threads}.json"
                    for mask in masks:
                        with tempfile.TemporaryDirectory(dir=folder) as inside:
                            row = measure(net, batch, threads, mask, workers, Path(inside), options, states.get(net))
                        merge(file, row, workers, options.venvs)


def present(paths: list[str], venvs: Path) -> list[str]:
    """The paths whose environment is there; the others are left out, by name, but for the reference."""
    absent = {PEER_OF[path] for path in paths if path in PEER_OF and not Path(python_of(path, venvs)).exists()}
    way_out = f"python bench/inference.py build --venvs {venvs} --peers"
    if PEER_OF[REFERENCE] in absent:
        sys.exit(f"every row needs ONNX Runtime, and {venvs / REFERENCE} does not exist: {way_out} {REFERENCE}")
    for peer in sorted(absent):
        print(f"{peer} is left out: {venvs / peer} does not exist: {way_out} {peer}", file=sys.stderr)
    return [path for path in paths if PEER_OF.get(path) not in absent]


def python_of(path: str, venvs: Path) -> str:
    return interpreter(venvs / PEER_OF[path]) if path in PEER_OF else sys.executable


def worker(path: str, venvs: Path) -> Worker:
    code = "from openers import *; serve(OPENERS)"
    return Worker(path, python=python_of(path, venvs), code=code, places=[HERE, HERE / "peers"])


def open_in(worker: Worker, case: Case, right: list[np.ndarray], *, threads: int) -> dict[str, Any]:
    """Open the network of a case in the process of a path, and compare its outputs with the right ones."""
    cpus = sorted(os.sched_getaffinity(0))[-threads:]
    details = {"key": "net", "path": worker.path, "case": dataclasses.asdict(case), "threads": threads, "cpus": cpus}
    answer = worker.ask("open", **details)
    with np.load(answer["outputs"]) as outputs:
        error = relative_error([outputs[str(i)] for i in range(len(outputs.files))], right)
    return {"error": error, "opened_in": answer["seconds"]}


def is_int8(path: str) -> bool:
    return "int8" in path


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
    """One row: a network under a mask, on every path that makes sense for it."""
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
    case = write_case(net, model, x, folder, names)
    used = {name: workers[name] for name in names}
    paths = compare_and_time(used, case, [model(x).numpy()], threads=threads, seconds=options.seconds)
    kept = f"{100 * counted.kept_macs / counted.macs:.1f}"
    for name, path in paths.items():
        add_ratios(path, name, paths[REFERENCE])
        show([net, batch, threads, f"{kind} {sparsity:g}", kept, name, *cells_of(path)])
    return {
        "net": net,
        "batch": batch,
        "threads": threads,
        "mask": kind,
        "sparsity": sparsity,
        **dataclasses.asdict(counted),
        "paths": paths,
    }


def compare_and_time(
    workers: dict[str, Worker], case: Case, right: list[np.ndarray], *, threads: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """What each path did: its error and its times, or why there are none."""
    try:
        if any(map(is_int8, workers)):
            workers[REFERENCE].ask("quantise", case=dataclasses.asdict(case))
    except WorkerError as error:
        sys.exit(f"ONNX Runtime cannot quantise the network: {error}; build its environment again")
    paths: dict[str, dict[str, Any]] = {}
    opened = []
    for name, process in workers.items():
        try:
            paths[name] = open_in(process, case, right, threads=threads)
            opened.append(name)
        except WorkerError as error:
            paths[name] = {"why_not": str(error)}
    times = take_turns([(workers[name], "net") for name in opened], seconds=seconds)
    for name, timing in zip(opened, times, strict=True):
        paths[name] |= {"why_not": str(timing)} if isinstance(timing, WorkerError) else dataclasses.asdict(timing)
    if "median" not in paths[REFERENCE]:
        sys.exit(f"every row needs ONNX Runtime, which failed: {paths[REFERENCE]['why_not']}")
    for name, path in paths.items():
        if "median" in path:  # the process of another may have ended
            workers[name].ask("close")
    return paths


def add_ratios(path: dict[str, Any], name: str, reference: dict[str, Any]) -> None:
    path["is_wrong"] = "error" in path and " int" not in name and not path["error"] < TOLERANCE
    if "median" in path:
        path["ratio"] = reference["median"] / path["median"]
        path["cpu_ratio"] = reference["cpu"] / path["cpu"]


def cells_of(path: dict[str, Any]) -> list[str]:
    """Milliseconds, both ratios and the outcome, as `run` prints them."""
    times = ["-", "-", "-"]
    if "median" in path:
        times = [f"{1e3 * path['median']:.4g}", f"{path['ratio']:.2f}", f"{path['cpu_ratio']:.2f}"]
    if "why_not" in path:
        return [*times, path["why_not"].partition("\n")[0]]
    return [*times, "WRONG, " * path["is_wrong"] + f"error {path['error']:.1e}"]


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
    """Add the row to the file's. If the file has it already, only the paths that ran now are replaced."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = json.loads(file.read_text()) if file.exists() else {"rows": []}
    key = ("mask", "sparsity")
    old = [other for other in about["rows"] if all(other[k] == row[k] for k in key)]
    stamp = {"commit": machine()["commit"], "at": time.strftime("%Y-%m-%d %H:%M")}
    for path in row["paths"].values():
        path |= stamp
    ran = [name for name, path in row["paths"].items() if "median" in path]
    if old:
        row["paths"] = old[0]["paths"] | row["paths"]
    rows = [other for other in about["rows"] if other not in old] + [row]
    versions = about.get("versions", {}) | {name: version(workers[name], name) for name in ran}
    words = [word.partition("=")[0] + "=FILE" if "=" in word else word for word in sys.argv[1:]]
    command = " ".join(["bench/inference.py", *words]).replace(str(venvs), "DIR")
    about = {"machine": machine(), "versions": versions, "command": command, "rows": rows}
    file.write_text(json.dumps(about, indent=1))


def version(worker: Worker, name: str) -> str:
    if name.startswith("pomona"):
        return machine()["pomona"]
    package = PEERS[PEER_OF[name]].package if name in PEER_OF else "torch"
    return str(worker.ask("version", package=package)["version"])


def table(options: argparse.Namespace) -> None:
    """Print the tables; those of the committed results also go into REPORT, between its two marks."""
    text = io.StringIO()
    with redirect_stdout(text):
        for threads in options.threads:
            for batch in options.batches:
                rows = list(rows_of(options.out, options.nets, batch, threads))
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
    if options.out == RESULTS:
        before, rest = REPORT.read_text().split(BEGIN)
        REPORT.write_text(f"{before}{BEGIN}\n{text.getvalue()}\n{END}{rest.split(END)[1]}")


def rows_of(folder: Path, nets: Iterable[str], batch: int, threads: int) -> Iterator[dict[str, Any]]:
    for net in nets:
        file = folder / f"{net}-b{batch}-t{threads}.json"
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
        # Rivals that compute in float32 are compared with Pomona's float32, dense int8 with the faster of its two.
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
                ratio_cell(*fp32),
                ratio_cell(*int8),
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


def ratio_cell(name: str, ratio: float) -> str:
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
