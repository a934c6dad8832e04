"""A step of torchao.prototype.pat beside torch.optim.SGD; run by speed.py in an environment that has torchao.

Reads shapes, settings and number of repeats as JSON, writes rows as JSON.
"""

import contextlib
import json
import os
import statistics
import sys
import time

import torch

with contextlib.redirect_stderr(open(os.devnull, "w")):
    from torchao.prototype.pat.optim import PruneOptimizer

torch.set_num_threads(1)
asked = json.load(sys.stdin)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in asked["shapes"]]


def bare() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    mine = parameters()
    return mine, torch.optim.SGD(mine, **asked["settings"], fused=True)


def pat() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """An element-wise l1 proximal step, its documented way to unstructured sparsity."""
    mine = parameters()
    groups = [
        {"params": [p for p in mine if p.ndim > 1], "prox_type": "ProxLasso", "group_type": "ElemGrouper"},
        {"params": [p for p in mine if p.ndim == 1]},
    ]
    return mine, PruneOptimizer(torch.optim.SGD(groups, **asked["settings"], fused=True), reg_lambda=1e-4)


running = {"SGD": bare(), "torchao.prototype.pat (ProxLasso)": pat()}
times: dict[str, list[float]] = {name: [] for name in running}
for turn in range(asked["repeats"] + 1):
    for name, (mine, optimizer) in running.items():
        for p in mine:
            p.grad = 1e-3 * torch.randn(p.shape)
        start = time.perf_counter()
        optimizer.step()
        if turn:
            times[name].append(time.perf_counter() - start)
base = statistics.median(times["SGD"])
rows = [
    {"name": name, "wall": statistics.median(many), "ratio": statistics.median(many) / base}
    for name, many in times.items()
]
print(json.dumps(rows))
