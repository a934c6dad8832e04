"""GSM against the paper, rewritten in numpy (oracles.py), and against what naive versions do instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pomona
from tests import oracles

SHAPES = [(6, 4), (3, 6), (2, 3, 2, 2)]


class Tensors(nn.Module):
    """Bare parameters, so that a test can hand out gradients of its own."""

    def __init__(self, values: list[np.ndarray]) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.tensor(v)) for v in values])

    def give(self, grads: list[np.ndarray]) -> None:
        for p, g in zip(self.w, grads, strict=True):
            p.grad = torch.tensor(g)

    def numpy(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.w]


def draw(seed: int, *, scales: tuple[float, ...] = (1.0, 0.2, 3.0)) -> list[np.ndarray]:
    """Layers of unlike scale, float32; a fifth of the values rounded, so that ties and zeros occur."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, scales, strict=True)]
    return [np.where(rng.random(v.shape) < 0.2, np.round(v), v).astype(np.float32) for v in drawn]


def train(
    *,
    steps: int,
    q: int,
    momentum: float = 0.9,
    nesterov: bool = False,
    dampening: float = 0.0,
    lr: float = 0.05,
    weight_decay: float = 0.01,
    variant: str = "paper",
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same gradients through Pomona and through the oracle: (weights, oracle's weights)."""
    model = Tensors(draw(0))
    total = sum(v.size for v in draw(0))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        dampening=dampening,
        weight_decay=weight_decay,
    )
    pomona.Pruner(model, optimizer, pomona.GSM(sparsity=1 - q / total, min_density=0.0))
    weights: list[np.ndarray] = [v.astype(np.float64) for v in draw(0)]
    buffers: list[np.ndarray | None] = [None] * len(weights)
    for step in range(steps):
        grads = draw(step + 1)
        model.give(grads)
        optimizer.step()
        oracles.gsm_step(
            weights,
            [g.astype(np.float64) for g in grads],
            buffers,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            q=q,
            nesterov=nesterov,
            dampening=dampening,
            variant=variant,
        )
    return model.numpy(), weights


def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("q", [1, 8, 20, 50])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening"), [(0.9, False, 0.0), (0.99, True, 0.0), (0.9, False, 0.3)]
)
def test_twelve_steps_equal_the_paper(q: int, momentum: float, nesterov: bool, dampening: float) -> None:
    ours, paper = train(steps=12, q=q, momentum=momentum, nesterov=nesterov, dampening=dampening)
    # float32 against float64: 12 steps of values around 10, each rounded to 2^-24 relative
    assert distance(ours, paper) < 2e-5


@pytest.mark.parametrize(
    "variant",
    ["decoupled", "mask_update", "mask_momentum", "per_layer", "gradient_only", "magnitude_only", "at_least_threshold"],
)
def test_each_naive_variant_ends_elsewhere(variant: str) -> None:
    ours, naive = train(steps=12, q=8, variant=variant)
    assert distance(ours, naive) > 0.01
