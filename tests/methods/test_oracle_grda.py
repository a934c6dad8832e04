"""gRDA against the paper, rewritten in numpy (oracles/grda.py), and against what naive versions do instead."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import pomona
from pomona.methods.grda import GRDA
from tests.oracles import grda
from tests.problems import Tensors, distance

SHAPES = [(6, 4), (3, 6), (2, 3, 2, 2)]
SCALES = (1.0, 0.2, 0.5)
LRS = [0.1] * 8 + [0.01] * 8  # one drop, as on ImageNet
C, MU = 0.5, 0.6

# What float32 makes of v and w in 16 steps: each of them rounds numbers below 4 to 2^-24 of themselves.
BOUND = 16 * 4 * 2.0**-24


def draw(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(SHAPES, SCALES, strict=True)]


def pruner_of(model: Tensors, method: GRDA, lr: float) -> tuple[torch.optim.SGD, pomona.Pruner]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return optimizer, pomona.Pruner(model, optimizer, method)


def states(pruner: pomona.Pruner, key: str) -> list[torch.Tensor]:
    return [state[key] for state in pruner.state_dict()["state"].values()]


def train(lrs: list[float] = LRS, c: float = C, mu: float = MU) -> tuple[list[np.ndarray], pomona.Pruner]:
    """The weights after these steps."""
    model = Tensors(draw(0))
    optimizer, pruner = pruner_of(model, GRDA(c=c, mu=mu), lrs[0])
    for i, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        model.give(draw(i + 1))
        optimizer.step()
    return model.numpy(), pruner


def oracle(
    lrs: list[float] = LRS, c: float = C, mu: float = MU, variant: grda.Variant = "paper"
) -> tuple[list[np.ndarray], grda.State]:
    weights = [w.astype(np.float64) for w in draw(0)]
    state = grda.start(weights, variant)
    for i, lr in enumerate(lrs):
        grads = [g.astype(np.float64) for g in draw(i + 1)]
        grda.step(weights, grads, state, lr=lr, c=c, mu=mu, variant=variant)
    return weights, state


@pytest.mark.parametrize("mu", [0.501, 0.6, 0.7])
@pytest.mark.parametrize("c", [0.005, 0.5])
@pytest.mark.parametrize("lrs", [[0.1] * 16, LRS], ids=["constant", "dropped"])
def test_sixteen_steps_equal_the_paper(lrs: list[float], c: float, mu: float) -> None:
    ours, pruner = train(lrs, c, mu)
    paper, state = oracle(lrs, c, mu)
    assert distance(ours, paper) < BOUND
    assert distance([v.numpy() for v in states(pruner, "v")], state.v) < BOUND
    for threshold, n in zip(states(pruner, "threshold"), states(pruner, "n"), strict=True):
        assert threshold.item() == pytest.approx(state.threshold, rel=1e-14)  # float64 as well, but for its pow
        assert n.item() == state.n == 16


def test_the_problem_has_zeros_that_come_and_go() -> None:
    """Else the comparison says little: in 16 steps weights become zero, and zeros become weights again."""
    is_zero = [np.concatenate([w.ravel() == 0 for w in oracle(LRS[:k])[0]]) for k in range(1, 17)]
    gone = sum(int((~a & b).sum()) for a, b in pairwise(is_zero))
    back = sum(int((a & ~b).sum()) for a, b in pairwise(is_zero))
    assert gone >= 10 and back >= 5
    ours = np.concatenate([w.ravel() == 0 for w in train()[0]])
    assert (ours == is_zero[-1]).all()
    assert 10 < is_zero[-1].sum() < 56


def test_without_a_threshold_it_is_sgd_bit_for_bit() -> None:
    plain = Tensors(draw(0))
    optimizer = torch.optim.SGD(plain.parameters(), lr=LRS[0])
    for i, lr in enumerate(LRS):
        optimizer.param_groups[0]["lr"] = lr
        plain.give(draw(i + 1))
        optimizer.step()
    assert distance(train(c=0.0)[0], plain.numpy()) == 0.0


@pytest.mark.parametrize("setting", [{"momentum": 0.9}, {"weight_decay": 0.1}], ids=["momentum", "weight decay"])
def test_momentum_and_decay_which_the_paper_does_not_have_are_refused(setting: dict[str, float]) -> None:
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        pomona.Pruner(model, optimizer, GRDA(c=C, mu=MU))


@pytest.mark.parametrize(
    "variant",
    [
        "thresholds_weights",
        "thresholds_weights_by_increments",
        "threshold_times_lr",
        "threshold_of_current_lr",
        "counts_epochs",
        "restarts_count",
        "zero_start",
        "noise_start",
        "bfloat16_accumulator",
        "gradient_momentum",
        "decay_in_accumulator",
    ],
)
def test_each_naive_variant_ends_elsewhere(variant: grda.Variant) -> None:
    naive, _ = oracle(variant=variant)
    assert distance(train()[0], naive) > 1000 * BOUND


def test_a_float16_accumulator_is_told_apart() -> None:
    """Eleven bits round a weight of 2 by 1e-3 at most: less than other variants do, and far more than float32."""
    naive, _ = oracle(variant="float16_accumulator")
    assert distance(train()[0], naive) > 50 * BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_small_steps_add_up_under_half_precision_weights(dtype: torch.dtype) -> None:
    """1,000 steps of 1e-4 from 0.7: no single one moves a half-precision 0.7 by its rounding of 2^-12 or more."""
    model = Tensors([np.full((2, 2), 0.7, dtype=np.float32)]).to(dtype)
    start = model.w[0].detach().float().clone()
    optimizer, pruner = pruner_of(model, GRDA(c=1e-6, mu=0.51), 1e-4)
    for _ in range(1000):
        model.w[0].grad = torch.full((2, 2), -1.0, dtype=dtype)
        optimizer.step()
    (v,) = states(pruner, "v")
    # float32: 1,000 additions, each rounded to 2^-24 of numbers below 1
    assert torch.allclose(v, start + 0.1, rtol=0.0, atol=1000 * 2.0**-24)
    # the weight is v, less a threshold of 1e-6 at most, rounded once
    assert torch.allclose(model.w[0].detach().float(), start + 0.1, rtol=torch.finfo(dtype).eps, atol=1e-4)

    low = [np.full((2, 2), 0.7)]
    naive = grda.start(low)
    variant: grda.Variant = "bfloat16_accumulator" if dtype is torch.bfloat16 else "float16_accumulator"
    for _ in range(1000):
        grda.step(low, [np.full((2, 2), -1.0)], naive, lr=1e-4, c=1e-6, mu=0.51, variant=variant)
    assert np.abs(naive.v[0] - 0.7).max() < 0.01


def test_the_threshold_telescopes_to_the_closed_form_and_never_falls() -> None:
    lr, c, mu = 0.1, 5e-3, 0.55
    model = Tensors([np.ones((2, 2), dtype=np.float32)])
    optimizer, pruner = pruner_of(model, GRDA(c=c, mu=mu), lr)
    thresholds = []
    for step in range(60):
        if step == 40:
            optimizer.param_groups[0]["lr"] = lr / 100
        model.give([np.ones((2, 2), dtype=np.float32)])
        optimizer.step()
        thresholds.append(float(states(pruner, "threshold")[0]))
        if step < 40:
            expected = grda.closed_form(lr, step + 1, c=c, mu=mu)
            assert thresholds[-1] == pytest.approx(expected, rel=1e-12)  # 40 additions of float64
    assert thresholds == sorted(thresholds)
    after_drop = sum(grda.increment(lr / 100, n, c=c, mu=mu) for n in range(41, 61))
    assert thresholds[-1] - thresholds[39] == pytest.approx(after_drop, rel=1e-9)


def test_each_group_has_the_threshold_of_its_own_learning_rate() -> None:
    values = draw(0)
    model = Tensors(values)
    lrs = [0.1, 0.02, 0.3]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(model.w, lrs, strict=True)])
    pruner = pomona.Pruner(model, optimizer, GRDA(c=C, mu=MU))
    alone = [grda.start([w.astype(np.float64)]) for w in values]
    weights = [[w.astype(np.float64)] for w in values]
    for i in range(10):
        grads = draw(i + 1)
        model.give(grads)
        optimizer.step()
        for w, g, state, lr in zip(weights, grads, alone, lrs, strict=True):
            grda.step(w, [g.astype(np.float64)], state, lr=lr, c=C, mu=MU)
    assert distance(model.numpy(), [w for (w,) in weights]) < BOUND
    for threshold, state in zip(states(pruner, "threshold"), alone, strict=True):
        assert threshold.item() == pytest.approx(state.threshold, rel=1e-14)


@pytest.mark.parametrize(
    ("c", "mu", "epochs", "threshold"),
    [
        (1e-3, 0.501, 1, 1.985e-3),
        (1e-3, 0.501, 2, 2.809e-3),
        (1e-3, 0.55, 1, 2.375e-3),
        (1e-3, 0.55, 2, 3.477e-3),
        (1e-3, 0.65, 1, 3.427e-3),
        (1e-3, 0.65, 2, 5.378e-3),
        (5e-4, 0.4, 1, 6.85e-4),
        (5e-4, 0.51, 1, 1.026e-3),
        (5e-4, 0.7, 1, 2.058e-3),
    ],
)
def test_the_first_epochs_have_the_thresholds_of_the_authors_logs(
    c: float, mu: float, epochs: int, threshold: float
) -> None:
    """WRN-28-10 and VGG16 on CIFAR-10, 391 steps an epoch at learning rate 0.1 (section 2.4 of the fact sheet).

    Weights have hardly moved there, so with uniform weights within +-b the share of zeros is threshold / b.
    """
    bound = 0.0147
    rng = np.random.default_rng(0)
    model = Tensors([rng.uniform(-bound, bound, size=(100, 200)).astype(np.float32)])
    optimizer, pruner = pruner_of(model, GRDA(c=c, mu=mu), 0.1)
    model.w[0].grad = torch.zeros(100, 200)
    for _ in range(391 * epochs):
        optimizer.step()
    assert states(pruner, "threshold")[0].item() == pytest.approx(threshold, rel=5e-4)  # printed to four digits
    share = threshold / bound
    zeros = float((model.w[0] == 0).float().mean())
    assert zeros == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))  # four standard errors
