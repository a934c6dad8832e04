"""What pruning costs: ratios, side by side in one run, against what a user would otherwise use.

    python bench/speed.py step --nets resnet-56 resnet-50 gpt-2 --compressions 2 10 100 --threads 1 2
    python bench/speed.py cut        one global magnitude cut of 138 million weights, against torch.nn.utils.prune
    python bench/speed.py growth     selection over 1 million to 1 billion weights
    python bench/speed.py scale      64 simulated ranks of 109 million weights each: one rank's time, what is sent
    python bench/speed.py memory     peak memory of each method above that of the bare optimizer
    python bench/speed.py pat --python VENV/bin/python     torchao.prototype.pat, installed there, on the same weights

Each prints a table and writes bench/results/speed/NAME.json. Candidates take turns; times are medians, of wall time and
of process CPU time, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pomona
from nets import resnet50
from pomona.distributed import Ranks, Shard
from pomona.methods import METHODS
from pomona.native import core
from pomona.selection import select_largest, select_over_ranks
from pomona.zoo.models import MODELS

RESULTS = Path(__file__).parent / "results" / "speed"
SETTINGS = {"lr": 1e-3, "momentum": 0.98, "weight_decay": 1e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(BENCHES))
    parser.add_argument("--nets", nargs="+", default=["resnet-56", "resnet-50", "gpt-2"])
    parser.add_argument("--compressions", nargs="+", type=float, default=[2, 10, 100])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=0, help="0: as many as a net's size allows")
    parser.add_argument("--only", nargs="*", default=[], help="names of candidates")
    parser.add_argument("--name", default="", help="of the file of results, if not that of the bench")
    parser.add_argument("--python", default="", help="pat: the interpreter that has torchao")
    options = parser.parse_args()
    rows = list(BENCHES[options.what](options))
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "command": " ".join(["bench/speed.py", *sys.argv[1:]]), "rows": rows}
    (RESULTS / f"{options.name or options.what}.json").write_text(json.dumps(about, indent=1))


def machine() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pomona": pomona.__version__,
        "core": core.isa() if core.is_available() else core.why_not(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }


def show(cells: list[object], *, head: bool = False) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    if head:
        print("|" + " --- |" * len(cells), flush=True)


# Networks


def gpt2() -> nn.Module:
    """The parameters of GPT-2's smallest form, 124 million; not to be called."""
    block = [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,)] + 4 * [(768,)]
    shapes = [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]
    return nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)


def vgg16() -> nn.Module:
    """138 million parameters; not to be called."""
    sizes = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*convolutions, nn.Linear(25088, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    batch: tuple[int, ...] | None  # of images; None: no forward pass
    repeats: int


NETS = {
    "resnet-56": Net(MODELS["resnet-56"], (64, 3, 32, 32), 60),
    "resnet-50": Net(resnet50, (8, 3, 224, 224), 9),
    "gpt-2": Net(gpt2, None, 5),
}


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights and gradients with heavy tails, a scale for each layer and each row, and 1 % dead rows."""
    for parameter in model.parameters():
        for is_weight in (True, False):
            values = torch.randn(parameter.shape, generator=generator)
            values /= torch.rand(parameter.shape, generator=generator).add_(0.1).sqrt_()
            if parameter.ndim > 1:
                rows = (parameter.shape[0], *(1 for _ in parameter.shape[1:]))
                values *= torch.randn(rows, generator=generator).exp_() * math.exp(
                    float(torch.randn((), generator=generator))
                )
                values *= torch.rand(rows, generator=generator) > 0.01
            if is_weight:
                parameter.data.copy_(0.02 * values)
            else:
                parameter.grad = 1e-3 * values


# The peer: the selection of GSM's first implementation, from its description


def original_selection_(weights: list[nn.Parameter], k: int) -> None:
    """All weights and all gradients joined, a sorted top-k of |w g|, and a mask by >= threshold for each layer."""
    w = torch.cat([p.detach().view(-1) for p in weights])
    g = torch.cat([p.grad.view(-1) for p in weights if p.grad is not None])
    threshold = torch.topk((g * w).abs(), k, sorted=True).values[-1]
    for p in weights:
        assert p.grad is not None
        p.grad.mul_(((p.detach() * p.grad).abs() >= threshold).float())


# One optimizer step


@dataclass
class Candidate:
    name: str
    step: Callable[[], object]
    parameters: list[nn.Parameter]


def candidates(model: Callable[[], nn.Module], compression: float, only: list[str]) -> Iterator[Candidate]:
    sparsity = 1 - 1 / compression

    def wanted(name: str) -> bool:
        return not only or name in only or name == "SGD"

    def fresh() -> tuple[nn.Module, torch.optim.SGD]:
        net = model()
        fill(net, torch.Generator().manual_seed(0))
        return net, torch.optim.SGD(net.parameters(), **SETTINGS, fused=True)

    net, optimizer = fresh()
    yield Candidate("SGD", optimizer.step, list(net.parameters()))
    for name, with_core in (("GSM", True), ("GSM, no compiler", False)):
        if wanted(name) and (core.is_available() or not with_core):
            net, optimizer = fresh()
            pomona.Pruner(net, optimizer, pomona.GSM(sparsity, min_density=0.0))
            yield Candidate(name, using_core(optimizer.step, with_core), list(net.parameters()))
    if wanted("original"):
        net, optimizer = fresh()
        weights = [p for p in net.parameters() if p.ndim > 1]
        k = int(sum(p.numel() for p in weights) / compression)

        def step(weights: list[nn.Parameter] = weights, optimizer: torch.optim.SGD = optimizer) -> None:
            original_selection_(weights, k)
            optimizer.step()

        yield Candidate("original", torch.no_grad()(step), list(net.parameters()))


def using_core(step: Callable[[], object], wanted: bool) -> Callable[[], object]:
    def run() -> None:
        with core.switched(wanted):
            step()

    return run


def bench_step(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    head = ["net", "threads", "compression", "candidate", "ms", "x SGD", "x SGD, CPU time", "% of forward+backward"]
    show(list(head), head=True)
    for name in options.nets:
        net = NETS[name]
        for threads in options.threads:
            torch.set_num_threads(threads)
            whole = pass_time(net) if net.batch else None
            for compression in options.compressions:
                for row in compare(net, compression, options):
                    row |= {"net": name, "threads": threads, "compression": compression, "forward_backward": whole}
                    share = f"{100 * row['wall'] / whole:.2f}" if whole else "-"
                    times = (f"{1e3 * row['wall']:.2f}", f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}")
                    show([name, threads, f"{compression:g}x", row["name"], *times, share])
                    yield row


def pass_time(net: Net) -> float:
    model = net.make()
    images = torch.randn(net.batch or ())
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long)).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def compare(net: Net, compression: float, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    gc.collect()
    running = list(candidates(net.make, compression, options.only))
    pristine = [p.grad.clone() for p in running[0].parameters if p.grad is not None]
    wall: dict[str, list[float]] = {one.name: [] for one in running}
    cpu: dict[str, list[float]] = {one.name: [] for one in running}
    repeats = options.repeats or net.repeats
    for turn in range(repeats + 1):
        for one in running:
            for p, grad in zip(one.parameters, pristine, strict=True):
                p.grad = grad.clone()  # as a backward pass leaves them: new memory
            start, start_cpu = time.perf_counter(), time.process_time()
            one.step()
            if turn:
                wall[one.name].append(time.perf_counter() - start)
                cpu[one.name].append(time.process_time() - start_cpu)
    base, base_cpu = statistics.median(wall["SGD"]), statistics.median(cpu["SGD"])
    for one in running:
        mine = statistics.median(wall[one.name])
        yield {
            "name": one.name,
            "wall": mine,
            "ratio": mine / base,
            "cpu_ratio": statistics.median(cpu[one.name]) / base_cpu,
            "repeats": repeats,
        }


# One global cut


def bench_cut(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A process for each, for the peak of its memory."""
    show(["138 million weights to a tenth", "threads", "seconds", "memory above the model, MiB"], head=True)
    for threads in options.threads:
        for name in CUTS:
            if options.only and name not in options.only:
                continue
            code = f"import speed; speed.cut({name!r}, {threads})"
            row = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent))
            row |= {"name": name, "threads": threads}
            show([name, threads, f"{row['seconds']:.2f}", f"{row['memory']:,.0f}"])
            yield row


def cut(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = vgg16()
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    before = peak()
    start = time.perf_counter()
    CUTS[name](model, optimizer)
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": peak() - before}))


def cut_by_pomona(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Cut, held from here on, and reported."""
    pomona.Pruner(model, optimizer, pomona.Magnitude(0.9)).harden()


def cut_by_selection(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    k = sum(w.numel() for w in weights) // 10
    select_largest([pomona.magnitude(w) for w in weights], k).multiply_(weights)


def cut_without_compiler(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with core.switched(False):
        cut_by_selection(model, optimizer)


def cut_by_torch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    from torch.nn.utils import prune

    layers = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.9)


CUTS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "torch.nn.utils.prune.global_unstructured": cut_by_torch,
    "pomona: Pruner(Magnitude).harden()": cut_by_pomona,
    "pomona: select and multiply": cut_by_selection,
    "pomona: the same, no compiler": cut_without_compiler,
}


def peak() -> float:
    """Of the memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Growth


def bench_growth(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    show(["weights", "threads", "core: ms", "ns per weight", "no compiler: ms", "ns per weight"], head=True)
    for millions in (1, 4, 16, 64, 256, 1000):
        generator = torch.Generator().manual_seed(0)
        sizes = [1_000_000] * millions
        w, g = (torch.empty(sum(sizes)).normal_(generator=generator) for _ in range(2))
        scores = [pomona.saliency(a, b) for a, b in zip(w.split(sizes), g.split(sizes), strict=True)]
        for threads in options.threads:
            torch.set_num_threads(threads)
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(3):
                for with_core in times:
                    with core.switched(with_core):
                        start = time.perf_counter()
                        select_largest(scores, sum(sizes) // 10)
                        times[with_core].append(time.perf_counter() - start)
            found = {with_core: statistics.median(many) for with_core, many in times.items()}
            row = {"weights": sum(sizes), "threads": threads, "core": found[True], "no_compiler": found[False]}
            cells = [f"{sum(sizes):,}", threads]
            for with_core in (True, False):
                cells += [f"{1e3 * found[with_core]:.1f}", f"{1e9 * found[with_core] / sum(sizes):.2f}"]
            show(cells)
            yield row


# Scale


def bench_scale(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seven billion weights on 64 ranks as one rank sees them; sums over the ranks are replaced by counting them.

    The other ranks are taken to hold the same as this one, so that a sum is 64 times this rank's part and the branches
    taken are those of a real run.
    """
    num_ranks, sent = 64, []

    class Simulated(Ranks):
        def _reduce_(self, numbers: Tensor, operation: Any) -> Tensor:
            sent.append(numbers.numel() * numbers.element_size())
            return numbers.mul_(num_ranks) if operation is torch.distributed.ReduceOp.SUM else numbers

    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    whole = [torch.Size((32000, 4096))] * 2 + [torch.Size(shape) for _ in range(32) for shape in shapes]
    ranks = Simulated((), torch.device("cpu"), num_ranks, 0)
    shards = [Shard(shape, (0, 0), ranks, True) for shape in whole]
    generator = torch.Generator().manual_seed(0)
    blocks = [[torch.randn(n // num_ranks, m, generator=generator) for _ in range(2)] for n, m in whole]
    scores = [pomona.saliency(w, g) for w, g in blocks]
    here, total = sum(score.numel() for score in scores), sum(shape.numel() for shape in whole)
    show(["weights", "tensors", "a rank's", "threads", "way", "ms", "sums", "bytes"], head=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for with_core in (True, False):
            times = []
            with core.switched(with_core):
                for _ in range(3):
                    sent.clear()
                    start = time.perf_counter()
                    select_over_ranks(scores, shards, total // 640 * 64).multiply_([g for _, g in blocks])
                    times.append(time.perf_counter() - start)
            way = "core" if with_core else "no compiler"
            row = {"weights": total, "here": here, "threads": threads, "way": way, "wall": statistics.median(times)}
            ms = f"{1e3 * row['wall']:.0f}"
            show([f"{total:,}", len(whole), f"{here:,}", threads, way, ms, len(sent), f"{sum(sent):,}"])
            yield row | {"sums": list(sent)}


# Memory


def bench_memory(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bytes a weight at the peak of training steps above those of the bare optimizer; each in its own process."""
    show(["method", "optimizer", "bytes a weight above the bare optimizer"], head=True)
    for name in [*METHODS]:
        peaks = {}
        for bare in (True, False):
            code = f"import speed; speed.train({name!r}, {bare})"
            output = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent)
            peaks[bare] = json.loads(output)
        extra = (peaks[False]["memory"] - peaks[True]["memory"]) * 2**20 / peaks[True]["weights"]
        show([name, peaks[True]["optimizer"], f"{extra:.1f}"])
        yield {"method": name, "optimizer": peaks[True]["optimizer"], "bytes_per_weight": extra}


def train(name: str, bare: bool) -> None:
    """Four steps of a chain of layers of 4 million weights each."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24)))
    momentum = {"momentum": 0.98, "weight_decay": 1e-4} if name == "gsm" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, **momentum)
    arguments: dict[str, Any] = {
        "grda": {"c": 1e-4},
        "admm": {"every": 2},
        "weightmom": {"every": 1},
        "magnitude": {"every": 2},
        "rigl": {"every": 2},
        "set": {"every": 2},
    }.get(name, {})
    if not bare:
        pomona.Pruner(model, optimizer, METHODS[name](**({} if name == "grda" else {"sparsity": 0.9}), **arguments))
    for _ in range(4):
        model(torch.randn(8, 2048)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    told = type(optimizer).__name__ + (" with momentum" if momentum else "")
    print(json.dumps({"memory": peak(), "weights": weights, "optimizer": told}))


# torchao's pruning-aware training


def bench_pat(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One step of torchao.prototype.pat on a network's weights, in the interpreter that has it, beside SGD there."""
    code = (Path(__file__).parent / "pat.py").read_text()
    show(["net", "candidate", "ms", "x SGD(fused=True)"], head=True)
    for name in options.nets:
        shapes = [list(p.shape) for p in NETS[name].make().parameters()]
        asked = json.dumps({"shapes": shapes, "settings": SETTINGS, "repeats": options.repeats or NETS[name].repeats})
        output = subprocess.run([options.python, "-c", code], input=asked, capture_output=True, text=True, check=True)
        for row in json.loads(output.stdout):
            show([name, row["name"], f"{1e3 * row['wall']:.2f}", f"{row['ratio']:.2f}"])
            yield row | {"net": name}


BENCHES = {
    "step": bench_step,
    "cut": bench_cut,
    "growth": bench_growth,
    "memory": bench_memory,
    "scale": bench_scale,
    "pat": bench_pat,
}

if __name__ == "__main__":
    main()
