"""GSM against the paper, rewritten in numpy (oracles.py), and against what naive versions do instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pomona
from tests import oracles
from tests.problems import Tensors, distance

SHAPES = [(6, 4), (3, 6), (2, 3, 2, 2)]


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
    ["decoupled", "mask_update", "mask_momentum", "per_layer", "gradient_only", "magnitude_only"],
)
def test_each_naive_variant_ends_elsewhere(variant: str) -> None:
    ours, naive = train(steps=12, q=8, variant=variant)
    assert distance(ours, naive) > 0.01


@pytest.mark.parametrize("seed", [0, 1])
def test_threshold_zero_activates_nothing_more(seed: int) -> None:
    """With fewer than Q non-zero scores the authors' ``T >= threshold`` activates every weight."""
    rng = np.random.default_rng(seed)
    grad = rng.normal(size=(4, 6)).astype(np.float32)
    value = rng.normal(size=(4, 6)).astype(np.float32)
    value[1:] = 0.0  # dead rows: T = 0 although the gradient is not
    model = Tensors([value])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.5, min_density=0.0))
    model.give([grad])
    optimizer.step()
    assert (model.numpy()[0][1:] == 0.0).all()

    naive: list[np.ndarray] = [value.copy()]
    oracles.gsm_step(naive, [grad], [None], lr=1.0, momentum=0.9, weight_decay=0.1, q=12, variant="at_least_threshold")
    assert (naive[0][1:] != 0.0).all()


def test_all_zero_scores_leave_a_budget_of_100_of_1000_unused() -> None:
    model = Tensors([np.zeros((10, 100), dtype=np.float32)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    with pytest.warns(UserWarning, match="w.0 is zero throughout, and with zeros='paper' will stay so"):
        pruner = pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.9, zeros="paper"))
    model.give([np.ones((10, 100), dtype=np.float32)])
    optimizer.step()
    assert pruner.metrics()["active"] == 0
    assert not model.numpy()[0].any()


def test_biases_are_neither_masked_nor_counted() -> None:
    model = nn.Linear(10, 10)
    bias = model.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.99))
    model.weight.grad = torch.randn(10, 10)
    model.bias.grad = torch.full((10,), 1e-9)
    optimizer.step()
    assert pruner.metrics()["active"] == 1
    assert torch.equal(model.bias.detach(), bias - 1.0 * (1e-9 + 0.1 * bias))


def test_half_precision_products_do_not_underflow() -> None:
    """|w g| of 1e-4 and 1e-5 is 0 in float16, whose least number is 6e-8."""
    model = nn.Linear(4, 1, bias=False).to(torch.float16)
    model.weight.data = torch.tensor([[1e-4, 2e-4, 3e-4, 4e-4]], dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.5))
    model.weight.grad = torch.full((1, 4), 1e-5, dtype=torch.float16)
    optimizer.step()
    assert (model.weight.grad != 0).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_passive_weight_follows_the_decay_law(nesterov: bool) -> None:
    """One weight has all the gradient; the others decay as the exact recursion says, and near the exponent's law."""
    lrs = [0.01] * 400
    model = Tensors([np.array([[4.0, 1.0, -2.0]], dtype=np.float32)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.95, weight_decay=0.02, nesterov=nesterov)
    pruner = pomona.Pruner(model, optimizer, pomona.GSM(sparsity=2 / 3, min_density=0.0))
    for _ in lrs:
        model.give([np.array([[1e-3, 1e-6, 1e-6]], dtype=np.float32)])
        optimizer.step()
    shrunk = oracles.passive_weight(lrs, 0.95, 0.02, nesterov=nesterov)
    (value,) = model.numpy()
    assert value[0, 1] == pytest.approx(shrunk, rel=1e-4)  # float32 against float64 over 400 steps
    assert value[0, 2] == pytest.approx(-2 * shrunk, rel=1e-4)
    exponent = pruner.metrics()["decay_exponent"]
    assert exponent == pytest.approx(oracles.decay_exponent(lrs, 0.95, 0.02), rel=1e-12)
    assert shrunk == pytest.approx(np.exp(-exponent), rel=0.1)  # the law is first order in lr * decay


def test_sparsity_may_follow_a_schedule() -> None:
    model = Tensors([np.ones((10, 10), dtype=np.float32)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.GSM(sparsity=pomona.Linear(0.0, 0.9, steps=9)))
    active = []
    for step in range(11):
        model.give([np.random.default_rng(step).random((10, 10)).astype(np.float32) + 0.1])
        optimizer.step()
        active.append(pruner.metrics()["active"])
    assert active == [90, 80, 70, 60, 50, 40, 30, 20, 10, 10, 10]


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (90, r"sparsity must be in \[0, 1\), got 90 \(did you mean 0.9\?\)"),
        (-0.1, r"sparsity must be in \[0, 1\), got -0.1"),
        (float("nan"), r"sparsity must be in \[0, 1\), got nan"),
        (1.0, r"sparsity must be in \[0, 1\), got 1.0"),
        (pomona.Cubic(0.0, 1.0, steps=10), r"sparsity must be in \[0, 1\), got 1.0"),
    ],
)
def test_sparsity_out_of_range_is_refused(sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pomona.GSM(sparsity)


@pytest.mark.parametrize("min_density", [-0.1, 1.5, float("nan")])
def test_min_density_out_of_range_is_refused(min_density: float) -> None:
    with pytest.raises(ValueError, match=r"min_density must be in \[0, 1\]"):
        pomona.GSM(0.9, min_density)


@pytest.mark.parametrize("min_density", ["0.1", None, True])
def test_min_density_that_is_no_number_is_refused(min_density: object) -> None:
    with pytest.raises(TypeError, match="min_density must be a number"):
        pomona.GSM(0.9, min_density)  # type: ignore[arg-type]


def test_dampening_that_leaves_no_decay_is_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match="GSM needs dampening < 1, got SGD"):
        pomona.Pruner(model, optimizer, pomona.GSM(0.5))


@pytest.mark.parametrize("k", [1.5, 2.0, True, "3"])
def test_k_that_is_no_integer_is_refused(k: object) -> None:
    with pytest.raises(TypeError, match="k must be an integer"):
        pomona.global_top_k([torch.ones(4)], k)  # type: ignore[arg-type]


def test_decay_that_bfloat16_rounds_away_is_warned_of() -> None:
    model = nn.Linear(4, 4).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.99, weight_decay=5e-4)
    with pytest.warns(
        UserWarning, match="weight is torch.bfloat16, and a passive weight would lose a share of 0.0015 of"
    ):
        pomona.Pruner(model, optimizer, pomona.GSM(0.5))
    before = model.weight.detach().clone()
    for _ in range(200):  # no gradient: the exponent is 0.3, but each step rounds to nothing
        model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), None
        optimizer.step()
    assert torch.equal(model.weight, before)
