"""Feather against the paper, rewritten in numpy (oracles/feather.py), and against what naive versions do instead."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

import pomona
from pomona.selection.allocation import allocate
from tests.oracles import feather
from tests.oracles.magnitude import num_kept, ramp
from tests.oracles.masks import top_k_mask, top_k_mask_with_floor
from tests.problems import Tensors, bits, distance

# One ranking of layers of such unlike scale empties one of them, which is what is to be compared.
pytestmark = pytest.mark.filterwarnings("ignore:.* starves layers")

Where = Literal["global", "uniform", "floor"]

SHAPES = [(6, 4), (3, 6), (2, 3, 2, 2)]
SCALES = (1.0, 0.05, 0.5)  # the second layer would lose all its weights, were there no floor
TOTAL = 66
SEED = 25  # with which no weight comes near its threshold, as a test makes sure
STEPS, RAMP, SPARSITY, FLOOR = 16, 10, 0.7, 0.2
TRAINING = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
POWERS = (1.0, 2.0, 3.0, math.inf)

# What float32 makes of v in 16 steps. All of d = g + eta v, z and v stay below 8, so that every operation rounds by
# at most U. The momentum z collects, of two roundings a step, at most ten times their sum, and the learning rate makes
# 2 U of it; the product lr z and the step itself round once more, by less than 2 U together. Decay only forgets.
U = 8 * 2.0**-24
BOUND = STEPS * 4 * U

# T is a |v|, so the same holds for it. For w, let a = |v|^p - T^p, of which w is the p-th root. An error of BOUND in
# both v and T moves a by 2 p |v|^(p - 1) BOUND at most; and as a^(1/p) is concave, w moves by that over w^(p - 1), so
# by 2 p (|v| / w)^(p - 1) BOUND: a bound for each weight of its own, the looser the nearer |v| is to T. What float32
# makes of the powers themselves is a few roundings of |v|^p, small beside the 512 of BOUND.
MOST_STEEP = 8.0  # |v| / w of any weight with p = 3 in the problem below, as a test makes sure


def draw(step: int) -> list[np.ndarray]:
    """Weights (step 0) or gradients, on the scale of their layer, float32."""
    rng = np.random.default_rng([SEED, step])
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(SHAPES, SCALES, strict=True)]


def pruner_of(values: list[np.ndarray], method: pomona.Feather, **options: float) -> tuple[Tensors, SGD, pomona.Pruner]:
    model = Tensors(values)
    optimizer = SGD(model.parameters(), **(options or TRAINING))
    return model, optimizer, pomona.Pruner(model, optimizer, method)


def states(pruner: pomona.Pruner, key: str) -> list[np.ndarray]:
    return [state[key].numpy().copy() for state in pruner.state_dict()["state"].values()]


def method_of(where: Where, power: float, theta: float | None) -> pomona.Feather:
    return pomona.Feather(
        pomona.Cubic(0.0, SPARSITY, steps=RAMP),
        power=power,
        gradient_scale=theta,
        allocation="uniform" if where == "uniform" else "global",
        min_density=FLOOR if where == "floor" else 0.0,
    )


def sparsity_at(step: int) -> float:
    return ramp(step, initial=0.0, final=SPARSITY, begin=0, steps=RAMP)


def kept_at(step: int) -> int:
    return num_kept(sparsity_at(step), TOTAL)


@dataclass
class Moment:
    """After one step."""

    w: list[np.ndarray]
    v: list[np.ndarray]
    thresholds: list[float]

    def zeros(self) -> np.ndarray:
        return np.concatenate([w.ravel() == 0 for w in self.w])

    def bounds(self, power: float) -> list[np.ndarray]:
        """How far float32 may lead each w astray; a zero stays one."""
        if power == math.inf:
            return [np.full(w.shape, BOUND) for w in self.w]
        steepness = [np.abs(v) / np.where(w == 0, np.inf, np.abs(w)) for v, w in zip(self.v, self.w, strict=True)]
        return [np.maximum(BOUND, 2 * power * s ** (power - 1) * BOUND) for s in steepness]


@cache
def train(where: Where = "global", power: float = 3.0, theta: float | None = 0.5) -> list[Moment]:
    model, optimizer, pruner = pruner_of(draw(0), method_of(where, power, theta))
    moments = []
    for step in range(1, STEPS + 1):
        model.give(draw(step))
        optimizer.step()
        found = [float(t) for t in states(pruner, "threshold")]
        moments.append(Moment(model.numpy(), states(pruner, "v"), found))
    return moments


@cache
def oracle(
    where: Where = "global", power: float = 3.0, theta: float = 0.5, variant: feather.Variant = "paper"
) -> list[Moment]:
    weights: list[np.ndarray] = [w.astype(np.float64) for w in draw(0)]
    state = feather.start(weights, variant)
    moments = []
    for step in range(1, STEPS + 1):
        feather.step(
            weights,
            [g.astype(np.float64) for g in draw(step)],
            state,
            **TRAINING,
            sparsity=sparsity_at(step),
            power=power,
            theta=theta,
            min_density=FLOOR if where == "floor" else 0.0,
            counts=allocate("uniform", SHAPES, kept_at(step)) if where == "uniform" else None,
            variant=variant,
        )
        moments.append(Moment([w.copy() for w in weights], [v.copy() for v in state.v], list(state.thresholds)))
    return moments


def excess(ours: list[Moment], paper: list[Moment], other: list[Moment], power: float) -> float:
    """The largest difference of a weight of ours to the other's after any step, in multiples of the paper's bound."""
    return max(
        float((np.abs(w - x) / bound).max())
        for mine, right, theirs in zip(ours, paper, other, strict=True)
        for w, x, bound in zip(mine.w, theirs.w, right.bounds(power), strict=True)
    )


# the paper

each_way = pytest.mark.parametrize("where", get_args(Where))
each_theta = pytest.mark.parametrize("theta", [0.5, 1.0])


@each_way
@each_theta
@pytest.mark.parametrize("power", POWERS)
def test_sixteen_steps_equal_the_paper(where: Where, theta: float, power: float) -> None:
    ours, paper = train(where, power, theta), oracle(where, power, theta)
    for mine, right in zip(ours, paper, strict=True):
        assert distance(mine.v, right.v) < BOUND
        assert (mine.zeros() == right.zeros()).all()
    assert excess(ours, paper, paper, power) < 1.0


@each_way
@each_theta
def test_the_thresholds_equal_the_paper(where: Where, theta: float) -> None:
    """Those of layers without a weight that stays too."""
    for mine, right in zip(train(where, 3.0, theta), oracle(where, 3.0, theta), strict=True):
        assert mine.thresholds == pytest.approx(right.thresholds, rel=0.0, abs=BOUND)


@each_way
@each_theta
def test_no_weight_of_the_problem_is_near_its_threshold(where: Where, theta: float) -> None:
    """Else float32 might choose other zeros, and the bound for w would be worth nothing. (v is the same for all p.)"""
    for moment in oracle(where, 3.0, theta):
        assert max(float(np.abs(v).max()) for v in moment.v) < 8
        for v, w, threshold in zip(moment.v, moment.w, moment.thresholds, strict=True):
            gaps = np.abs(np.abs(v) - threshold)
            assert gaps[gaps > 0].min() > 4 * BOUND
            alive = w != 0
            assert not alive.any() or (np.abs(v)[alive] / np.abs(w)[alive]).max() < MOST_STEEP


@each_way
@each_theta
def test_the_problem_has_zeros_that_come_and_go(where: Where, theta: float) -> None:
    """Else the comparison says little. What v does is the same for all p, and so is where w is zero."""
    is_zero = [moment.zeros() for moment in oracle(where, 3.0, theta)]
    assert sum(int((~a & b).sum()) for a, b in pairwise(is_zero)) >= 20
    assert sum(int((a & ~b).sum()) for a, b in pairwise(is_zero)) >= 5
    assert [TOTAL - int(zero.sum()) for zero in is_zero] == [kept_at(step) for step in range(1, STEPS + 1)]


def test_the_ways_to_spread_the_zeros_differ_in_the_problem() -> None:
    counts = {where: [int((w != 0).sum()) for w in oracle(where)[-1].w] for where in get_args(Where)}
    assert counts["global"][1] == 0 and len(set(oracle("global")[-1].thresholds)) == 1
    assert counts["uniform"] == allocate("uniform", SHAPES, kept_at(STEPS))
    assert len(set(oracle("uniform")[-1].thresholds)) == 3
    first, second, third = oracle("floor")[-1].thresholds
    assert counts["floor"][1] == math.ceil(FLOOR * 18) and first == third > second > 0
    for where, other in (("global", "uniform"), ("global", "floor"), ("uniform", "floor")):
        assert excess(train(where), oracle(where), oracle(other), 3.0) > 100  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["global", "floor"])
def test_the_oracle_keeps_what_a_ranking_with_floors_keeps(where: Where) -> None:
    for step, moment in enumerate(oracle(where), 1):
        masks = top_k_mask_with_floor([np.abs(v) for v in moment.v], kept_at(step), FLOOR if where == "floor" else 0.0)
        assert all(((w != 0) == mask).all() for w, mask in zip(moment.w, masks, strict=True))


@pytest.mark.parametrize("variant", [v for v in get_args(feather.Variant) if v not in ("paper", "theta_on_any_zero")])
def test_each_naive_variant_goes_elsewhere(variant: feather.Variant) -> None:
    """`theta_on_any_zero` needs weights that are zero by themselves: see below."""
    assert excess(train(), oracle(), oracle(variant=variant), 3.0) > 100


def test_the_dense_weights_do_not_depend_on_the_power() -> None:
    """By the same gradients: they and the threshold are those of hard thresholding, bit for bit."""
    for moments in zip(*(train(power=power) for power in POWERS), strict=True):
        assert len({str(bits([torch.tensor(v) for v in moment.v])) for moment in moments}) == 1
        assert len({tuple(moment.thresholds) for moment in moments}) == 1


def test_hard_thresholding_gives_the_dense_weights_themselves() -> None:
    for moment in train(power=math.inf):
        for w, v in zip(moment.w, moment.v, strict=True):
            assert (w == np.where(w == 0, 0, v)).all()


def test_without_sparsity_it_is_sgd_bit_for_bit() -> None:
    plain = Tensors(draw(0))
    plainly = SGD(plain.parameters(), **TRAINING)
    model, optimizer, _ = pruner_of(draw(0), pomona.Feather(0.0))
    for step in range(1, STEPS + 1):
        for each, one in ((plain, plainly), (model, optimizer)):
            each.give(draw(step))
            one.step()
    assert bits(model.state_dict()) == bits(plain.state_dict())


def test_before_the_first_step_nothing_is_thresholded() -> None:
    model, _, pruner = pruner_of(draw(0), pomona.Feather(0.7))
    assert distance(model.numpy(), draw(0)) == 0.0
    thresholds = states(pruner, "threshold")
    assert [t.item() for t in thresholds] == [0.0] * 3
    assert all(t.dtype == np.float64 and t.ndim == 0 for t in thresholds)


# by hand


def test_two_steps_by_hand() -> None:
    """Cubes that are whole numbers less 2^3 = 8: 3^3 gives 19, 4^3 gives 56 and (-5)^3 gives -117."""
    start = [np.array([[1.0, 2.0, 3.0], [4.0, -5.0, 0.5]], dtype=np.float32)]
    model, optimizer, pruner = pruner_of(start, pomona.Feather(0.5, gradient_scale=0.5), lr=1.0)
    model.give([np.zeros((2, 3), dtype=np.float32)])
    optimizer.step()
    first = [[0.0, 0.0, 19 ** (1 / 3)], [56 ** (1 / 3), -(117 ** (1 / 3)), 0.0]]
    assert np.allclose(model.numpy()[0], first, rtol=1e-6, atol=0.0)
    # 1 is zero, so half of -8 reaches it: 5. 3 stays, and all of 1 reaches it: 2, as large as the threshold, which is
    # therefore the 2 that was there, and both go.
    model.give([np.array([[-8.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=np.float32)])
    optimizer.step()
    assert states(pruner, "v")[0].tolist() == [[5.0, 2.0, 2.0], [4.0, -5.0, 0.5]]
    assert states(pruner, "threshold")[0].item() == 2.0
    second = [[117 ** (1 / 3), 0.0, 0.0], [56 ** (1 / 3), -(117 ** (1 / 3)), 0.0]]
    assert np.allclose(model.numpy()[0], second, rtol=1e-6, atol=0.0)


def cut(method: pomona.Feather, *values: list[float]) -> tuple[list[np.ndarray], list[float]]:
    """The weights of these layers and their thresholds, after one step without a gradient."""
    model, optimizer, pruner = pruner_of([np.array([v], dtype=np.float32) for v in values], method, lr=0.1)
    model.give([np.zeros((1, len(v)), dtype=np.float32) for v in values])
    optimizer.step()
    return model.numpy(), [float(t) for t in states(pruner, "threshold")]


A, B = [8.0, 7.0, 6.0, 3.0], [2.5, 1.0, 1.5, 2.0]
WHOLE = [8.0, 7.0, 6.0, 5.0]  # all of it stays where half of both do


@pytest.mark.parametrize(
    ("a", "b", "min_density", "thresholds"),
    [
        pytest.param(WHOLE, B, 0.0, [2.5, 2.5], id="a layer that goes as a whole shares the threshold"),
        pytest.param(WHOLE, [-x for x in B], 0.25, [5.0, 2.0], id="a layer at its floor has its own"),
        pytest.param(A, B, 0.25, [3.0, 2.0], id="whatever sign"),
        pytest.param(A, [4.0, 1.0, 1.5, 2.0], 0.25, [3.0, 3.0], id="as many as the floor without it"),
        pytest.param(A, [4.0, 1.0, 1.5, 2.0], 0.5, [6.0, 1.5], id="a floor of two"),
    ],
)
def test_two_layers_by_hand(a: list[float], b: list[float], min_density: float, thresholds: list[float]) -> None:
    """Half of eight stay. Only a layer that would keep fewer than its floor gets a threshold of its own."""
    weights, found = cut(pomona.Feather(0.5, min_density=min_density), a, b)
    for w, v, threshold in zip(weights, (a, b), thresholds, strict=True):
        right = [math.copysign(max(abs(x) ** 3 - threshold**3, 0.0) ** (1 / 3), x) for x in v]
        assert np.allclose(w[0], right, rtol=1e-5, atol=0.0)
    assert found == thresholds


@pytest.mark.parametrize("power", POWERS)
def test_of_equals_at_the_threshold_the_first_stay(power: float) -> None:
    """Two of eight stay, and T is 2; the paper would have |v| <= T zero, and only one left."""
    (w,), (threshold,) = cut(pomona.Feather(0.75, power=power), [3.0, 2.0, -2.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    assert threshold == 2.0
    assert w[0].nonzero()[0].tolist() == [0, 1]
    assert w[0][1] == tied(2.0, power)


def moved_by(method: pomona.Feather, first: int = 2) -> float:
    """How much of its gradient reaches the smallest of 100 weights, in step `first`; no other precedes it."""
    value = (0.1 + np.arange(100, dtype=np.float32) / 128).reshape(10, 10)
    model, optimizer, pruner = pruner_of([value], method, lr=1.0)
    for _ in range(first - 1):
        model.give([np.zeros((10, 10), dtype=np.float32)])
        optimizer.step()
    grad = np.zeros((10, 10), dtype=np.float32)
    grad[0, 0] = 2.0**-6
    before = states(pruner, "v")[0]
    model.give([grad])
    optimizer.step()
    moved = (before - states(pruner, "v")[0]) / 2.0**-6
    assert not moved.ravel()[1:].any()
    return float(moved[0, 0])


@pytest.mark.parametrize(
    ("sparsity", "theta"),
    [
        (0.5, 1.0),
        (0.95, 1.0),
        (0.951, 0.5),
        (0.96, 0.5),
        (0.99, 0.5),
        (pomona.Cubic(0.0, 0.95, steps=1000), 1.0),
        (pomona.Cubic(0.0, 0.98, steps=100), 0.5),  # its end counts, not the few percent of the second step
        (pomona.Cubic(0.0, 0.98, steps=2), 0.5),
    ],
)
def test_above_95_percent_half_of_the_gradient_reaches_a_zero(sparsity: pomona.Schedule | float, theta: float) -> None:
    first = 2 if not isinstance(sparsity, pomona.Cubic) or sparsity.steps < 1000 else 20
    moved = moved_by(pomona.Feather(sparsity), first)
    assert moved == pytest.approx(theta, abs=2.0**-17)  # float32 rounds 0.1 - 1/64 by 2^-28, here in units of 1/64


@pytest.mark.parametrize("sparsity", [0.5, 0.98])
@pytest.mark.parametrize("theta", [0.0, 0.25, 1.0])
def test_a_gradient_scale_that_is_given_is_the_one_that_counts(sparsity: float, theta: float) -> None:
    moved = moved_by(pomona.Feather(sparsity, gradient_scale=theta))
    assert moved == pytest.approx(theta, abs=2.0**-17)


# zeros that no threshold made


@pytest.mark.parametrize("late", [0, 3], ids=["a ramp from the first step", "a ramp that starts later"])
def test_weights_that_start_at_zero_get_their_whole_gradient_at_first(late: int) -> None:
    """Theta is for what a threshold has zeroed. The gradients of the steps before the last leave the zeros alone."""
    values = draw(0)
    for v in values:
        v.flat[::3] = 0.0
    method = pomona.Feather(
        pomona.Cubic(0.0, 0.8, steps=2, begin=late), gradient_scale=0.5, allocation="uniform", min_density=0.0
    )
    found: dict[feather.Variant, float] = {}
    for variant in get_args(feather.Variant)[0], "theta_on_any_zero":
        model, optimizer, pruner = pruner_of(values, method)
        weights: list[np.ndarray] = [w.astype(np.float64) for w in values]
        state = feather.start(weights, variant)
        distances = []
        for step in range(1, late + 4):
            grads = draw(step)
            for g in grads:
                g.flat[::3] *= step >= late  # so that zeros are still there in the last step without a threshold
            model.give(grads)
            optimizer.step()
            sparsity = ramp(step, initial=0.0, final=0.8, begin=late, steps=2)
            counts = allocate("uniform", SHAPES, num_kept(sparsity, TOTAL))
            given = [g.astype(np.float64) for g in grads]
            feather.step(
                weights, given, state, **TRAINING, sparsity=sparsity, theta=0.5, counts=counts, variant=variant
            )
            distances.append(distance(states(pruner, "v"), state.v))
        found[variant] = max(distances)
    assert found["paper"] < BOUND
    assert found["theta_on_any_zero"] > 100 * BOUND


def test_where_more_may_stay_than_are_not_zero_the_threshold_is_zero_and_gradients_are_whole() -> None:
    start = [np.array([[1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=np.float32)]
    model, optimizer, pruner = pruner_of(start, pomona.Feather(0.5, gradient_scale=0.5), lr=1.0)
    model.give([np.zeros((1, 8), dtype=np.float32)])
    optimizer.step()
    assert states(pruner, "threshold")[0].item() == 0.0
    assert model.numpy()[0].tolist() == start[0].tolist()
    grad = np.zeros((1, 8), dtype=np.float32)
    grad[0, 3] = -4.0
    model.give([grad])
    optimizer.step()
    assert states(pruner, "v")[0].tolist() == [[1.0, -2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]]


# the operator

powers = st.sampled_from([1.0, 1.5, 2.0, 3.0, 5.0, math.inf])


def thresholded(v: np.ndarray, sparsity: float, power: float) -> tuple[np.ndarray, float]:
    """w and T after one step that leaves v as it is."""
    method = pomona.Feather(sparsity, power=power, min_density=0.0)
    model, optimizer, pruner = pruner_of([v], method, lr=0.1)
    model.give([np.zeros_like(v)])
    optimizer.step()
    assert states(pruner, "v")[0].tobytes() == v.tobytes()
    return model.numpy()[0], states(pruner, "threshold")[0].item()


def tied(v: float, power: float) -> float:
    """What is left of a weight that stays although another one of its size goes: the least there is."""
    return v if power == math.inf else math.copysign(float(np.finfo(np.float32).tiny), v)


def check_operator(v: np.ndarray, sparsity: float, power: float) -> None:
    """What holds of all v, with ties and without."""
    w, threshold = thresholded(v, sparsity, power)
    k = num_kept(sparsity, v.size)
    magnitude = np.abs(v.astype(np.float64))
    assert threshold == feather.largest_that_goes([v], k)
    (mask,) = top_k_mask([np.abs(v)], k)
    assert ((w != 0) == (mask & (magnitude > 0))).all()
    assert (np.sign(w) == np.where(w == 0, 0, np.sign(v))).all()
    assert (np.abs(w) <= magnitude * (1 + 2.0**-22)).all()
    by_size = np.abs(w).ravel()[np.lexsort((np.abs(w).ravel(), magnitude.ravel()))].astype(np.float64)
    assert (by_size[1:] >= by_size[:-1] * (1 - 2.0**-20)).all()  # powers in float32 need not rise at every step
    # v and T are exact here. Powers in float32 may be off by several roundings of |v|^p, and their root by 1 / w^(p-1)
    # of that, as in the bound above.
    right = feather.shrink(v.astype(np.float64), threshold, power)
    is_tied = mask & (magnitude == threshold) & (threshold > 0)
    right[is_tied] = [tied(float(x), power) for x in v[is_tied]]
    if power == math.inf:
        assert (w == right).all()
        return
    alive = right != 0
    big, small = magnitude[alive], np.abs(right[alive])
    bound = 8 * power * 2.0**-24 * big * (big / small) ** (power - 1)
    assert (np.abs(np.abs(w[alive]) - small) <= bound).all()


@given(
    seed=st.integers(0, 999),
    sparsity=st.floats(0.0, 0.99),
    power=powers,
    exponent=st.sampled_from([-60, -20, 0, 20, 60]),
)
@settings(deadline=None)
def test_the_operator_on_any_scale(seed: int, sparsity: float, power: float, exponent: int) -> None:
    """Also where the cube of a float32 is none: 2^-60 and 2^60 are weights like any other."""
    v = (np.random.default_rng(seed).normal(size=(5, 6)) * 2.0**exponent).astype(np.float32)
    assert len(set(np.abs(v).ravel().tolist())) == v.size
    check_operator(v, sparsity, power)
    w, _ = thresholded(v, sparsity, power)
    assert np.count_nonzero(w) == num_kept(sparsity, v.size)


@given(seed=st.integers(0, 999), sparsity=st.floats(0.0, 0.99), power=powers, levels=st.integers(0, 5))
@settings(deadline=None)
def test_the_operator_with_ties(seed: int, sparsity: float, power: float, levels: int) -> None:
    v = (np.random.default_rng(seed).integers(-levels, levels + 1, size=(5, 6)) / 4).astype(np.float32)
    check_operator(v, sparsity, power)


@given(seed=st.integers(0, 999), sparsity=st.floats(0.0, 0.99), power=powers)
@settings(deadline=None)
def test_the_operator_on_neighbours(seed: int, sparsity: float, power: float) -> None:
    """30 float32 in a row: what is one rounding above the threshold stays, though its power is hardly above T^p."""
    rng = np.random.default_rng(seed)
    first = np.float32(rng.uniform(0.5, 2.0)).view(np.int32)
    v = rng.permutation(np.arange(first, first + 30, dtype=np.int32)).view(np.float32).reshape(5, 6)
    check_operator(v * rng.choice(np.array([-1, 1], dtype=np.float32), size=v.shape), sparsity, power)
    w, _ = thresholded(v, sparsity, power)
    assert np.count_nonzero(w) == num_kept(sparsity, v.size)


# state


@each_way
@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_run_resumed_goes_on_bit_for_bit(where: Where, at: int) -> None:
    method = method_of(where, 3.0, 0.5)
    whole, broken, resumed = (pruner_of(draw(seed), method) for seed in (0, 0, 99))

    def go(model: Tensors, optimizer: SGD, steps: range) -> None:
        for step in steps:
            model.give(draw(step))
            optimizer.step()

    go(whole[0], whole[1], range(1, STEPS + 1))
    go(broken[0], broken[1], range(1, at + 1))
    for there, here in zip(broken, resumed, strict=True):
        here.load_state_dict(copy.deepcopy(there.state_dict()))  # type: ignore[arg-type]
    go(resumed[0], resumed[1], range(at + 1, STEPS + 1))
    assert bits([part.state_dict() for part in resumed]) == bits([part.state_dict() for part in whole])


@each_way
@pytest.mark.parametrize("power", POWERS)
def test_harden_changes_nothing_once_the_ramp_is_over(where: Where, power: float) -> None:
    model, optimizer, pruner = pruner_of(draw(0), method_of(where, power, None))
    for step in range(1, STEPS + 1):
        model.give(draw(step))
        optimizer.step()
    before = bits(model.state_dict())
    assert pruner.harden().nonzero == kept_at(STEPS) == pruner.verify().nonzero
    assert bits(model.state_dict()) == before


# errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("power", 0.5),
        ("power", 0.0),
        ("power", -3.0),
        ("power", math.nan),
        ("power", "3"),
        ("power", None),
        ("power", True),
        ("gradient_scale", -0.1),
        ("gradient_scale", 1.5),
        ("gradient_scale", math.nan),
        ("gradient_scale", "half"),
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", 90),
        ("sparsity", math.nan),
        ("sparsity", "0.9"),
        ("allocation", "even"),
        ("min_density", 1.1),
    ],
)
def test_what_is_out_of_range_is_told_by_name_and_value(name: str, value: Any) -> None:
    told = f"(?s){name}.*{re.escape(repr(value))}"
    with pytest.raises(
        TypeError if value is None or value in ("3", "half", "0.9") else (TypeError, ValueError), match=told
    ):
        pomona.Feather(**({"sparsity": 0.9} | {name: value}))


def test_a_ramp_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity.*1\.0"):
        pomona.Feather(pomona.Cubic(0.0, 1.0, steps=5))
