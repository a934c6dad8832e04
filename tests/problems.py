"""Small problems: a network to step on, and two whose sparse answer is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pomona.layout import ROWS, register

Batch = tuple[Tensor, Tensor]

NUM_WEIGHTS = 72  # of net(), biases not counted


def net(seed: int = 0) -> nn.Sequential:
    """6 -> 8 -> 3 with biases: 48 + 24 weights."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model


def sparse_net(seed: int = 0) -> nn.Sequential:
    """`net` with every second weight zero, in the pattern of a chessboard, as another tool may have left it."""
    model = net(seed)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            rows, columns = layer.weight.shape
            black = (torch.arange(rows).unsqueeze(1) + torch.arange(columns)) % 2 == 0
            layer.weight[black] = 0.0
    return model


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Batches of 8 for `net`: a linear map to be learnt, plus noise."""
    generator = torch.Generator().manual_seed(1000 + seed)
    truth = torch.randn(6, 3, generator=generator)
    drawn = []
    for _ in range(count):
        x = torch.randn(8, 6, generator=generator)
        drawn.append((x, x @ truth + 0.1 * torch.randn(8, 3, generator=generator)))
    return drawn


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    x, y = batch
    loss: Tensor = (model(x) - y).square().mean()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> None:
    """The user's loop, one step a batch."""
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def bits(tree: Any) -> Any:
    """Tensors anywhere in dicts and lists as raw bytes: equal only if bitwise equal, so -0.0 is not 0.0."""
    if isinstance(tree, Tensor):
        raw = tree.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(tree.dtype), tuple(tree.shape), raw
    if isinstance(tree, Mapping):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(value) for value in tree]
    return tree


@dataclass(frozen=True)
class Regression:
    """Targets that few of the inputs explain; `start` is the least squares solution, all weights in use."""

    inputs: Tensor
    targets: Tensor
    start: Tensor
    support: frozenset[int]


def regression(seed: int) -> Regression:
    """6 of 40 inputs matter. The others are on a small scale, so that least squares gives them large weights."""
    generator = torch.Generator().manual_seed(seed)
    support = torch.randperm(40, generator=generator)[:6]
    scale = torch.full((40,), 0.05)
    scale[support] = 1.0
    x = torch.randn(100, 40, generator=generator) * scale
    w = torch.zeros(40)
    w[support] = 0.5 * torch.sign(torch.randn(6, generator=generator))
    y = (x @ w + 0.3 * torch.randn(100, generator=generator)).unsqueeze(1)
    return Regression(x, y, torch.linalg.lstsq(x, y).solution.T.contiguous(), frozenset(support.tolist()))


@dataclass(frozen=True)
class Teacher:
    """Targets made by a sparse two-layer network; `student` is twice as wide and dense."""

    inputs: Tensor
    targets: Tensor
    student: nn.Sequential
    wiring: list[list[int]]  # the inputs that each hidden unit of the teacher reads, sorted
    num_weights: int  # of the teacher that are not zero


def teacher(seed: int) -> Teacher:
    """16 inputs, of which four tanh units read three each, no input twice; four inputs matter to nobody."""
    generator = torch.Generator().manual_seed(seed)
    reads = torch.randperm(16, generator=generator)[:12].view(4, 3)
    hidden = torch.zeros(4, 16)
    for unit, places in zip(hidden, reads, strict=True):
        sign = torch.sign(torch.randn(3, generator=generator))
        unit[places] = sign * (0.8 + 0.4 * torch.rand(3, generator=generator))
    out = torch.sign(torch.randn(1, 4, generator=generator))
    x = torch.randn(256, 16, generator=generator)
    student = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        for p in student.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    wiring = sorted(sorted(places) for places in reads.tolist())
    return Teacher(x, torch.tanh(x @ hidden.T) @ out.T, student, wiring, num_weights=16)


def wiring(layer: nn.Linear) -> list[list[int]]:
    """The inputs that each living output of ``layer`` reads, sorted."""
    rows = [row.nonzero().view(-1).tolist() for row in layer.weight.detach()]
    return sorted(row for row in rows if row)


class Kernels(nn.ParameterList):
    """Bare parameters that are pruned by default."""


register(Kernels, **{"*": ROWS})


class Tensors(nn.Module):
    """Bare parameters, so that a test can hand out gradients of its own."""

    def __init__(self, values: list[np.ndarray]) -> None:
        super().__init__()
        self.w = Kernels([nn.Parameter(torch.tensor(v)) for v in values])

    def give(self, grads: list[np.ndarray]) -> None:
        for p, g in zip(self.w, grads, strict=True):
            p.grad = torch.tensor(g)

    def numpy(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.w]


def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The largest difference between entries of two lists of arrays."""
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
