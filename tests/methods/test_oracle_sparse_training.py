"""Magnitude, RigL and SET against the papers, rewritten in numpy (oracles/), and against what naive versions do."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pomona
from pomona.methods.magnitude import Magnitude
from pomona.methods.rigl import RigL
from pomona.methods.set import SET
from tests.oracles import magnitude, rigl
from tests.problems import Tensors, distance

# One ranking of layers of such unlike scale may empty one of them, which is what is to be compared.
pytestmark = pytest.mark.filterwarnings("ignore:.* starves layers")

SHAPES = [(8, 10), (5, 8), (4, 3, 3, 3)]
SCALES = (1.0, 0.5, 2.0)
TOTAL = 228
STEPS, EVERY, END = 30, 4, 20
LR = 0.05

# What float32 makes of the weights in 30 steps: each of them rounds numbers below 4 to 2^-24 of themselves.
BOUND = 30 * 4 * 2.0**-24

OPTIMIZERS = pytest.mark.parametrize(
    ("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.05)], ids=["plain", "momentum", "decay"]
)


def draw(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(SHAPES, SCALES, strict=True)]


def double(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [a.astype(np.float64) for a in arrays]


def masks_of(pruner: pomona.Pruner) -> list[np.ndarray]:
    per_weight: list[dict[str, Any]] = list(pruner.state_dict()["state"].values())
    return [state["mask"].numpy().copy() for state in per_weight]


def buffers_of(model: Tensors, optimizer: torch.optim.Optimizer, key: str) -> list[np.ndarray]:
    return [optimizer.state[p][key].numpy().copy() for p in model.w]


def furthest(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> float:
    """The largest distance at any step."""
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


RAMP = pomona.Cubic(0.1, 0.8, steps=20, begin=3)


def sparsity_at(step: int) -> float:
    return magnitude.ramp(step, initial=0.1, final=0.8, begin=3, steps=20)


@cache
def train_magnitude(
    momentum: float, weight_decay: float, begin: int = 3
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], pomona.Pruner]:
    """Weights and masks after each step."""
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=weight_decay)
    method = Magnitude(RAMP, every=EVERY, begin=begin, min_density=0.0)
    pruner = pomona.Pruner(model, optimizer, method)
    weights, masks = [], []
    for step in range(1, STEPS + 1):
        model.give(draw(step))
        optimizer.step()
        weights.append(model.numpy())
        masks.append(masks_of(pruner))
    return weights, masks, pruner


def oracle_magnitude(
    momentum: float,
    weight_decay: float,
    begin: int = 3,
    variant: magnitude.Variant = "paper",
    ramp: Any = None,
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    weights = double(draw(0))
    state = magnitude.start(weights, variant)
    history, masks = [], []
    for step in range(1, STEPS + 1):
        magnitude.step(
            weights,
            double(draw(step)),
            state,
            lr=LR,
            momentum=momentum,
            weight_decay=weight_decay,
            sparsity=(ramp or sparsity_at)(step),
            every=EVERY,
            begin=begin,
            variant=variant,
        )
        history.append([w.copy() for w in weights])
        masks.append([m.copy() for m in state.mask])
    return history, masks


@OPTIMIZERS
@pytest.mark.parametrize("begin", [1, 3])
def test_every_step_of_magnitude_equals_the_paper(momentum: float, weight_decay: float, begin: int) -> None:
    ours, our_masks, _ = train_magnitude(momentum, weight_decay, begin)
    paper, masks = oracle_magnitude(momentum, weight_decay, begin)
    assert furthest(ours, paper) < BOUND
    for mine, theirs in zip(our_masks, masks, strict=True):
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


def test_the_counts_follow_the_cubic_ramp() -> None:
    """Choices after steps 3, 7, 11, ...; the ramp is from 0.1 at step 3 to 0.8 at step 23."""
    _, masks, _ = train_magnitude(0.9, 0.05)
    kept = [sum(int(m.sum()) for m in mask) for mask in masks]
    sparsities = [0.8 - 0.7 * (1 - p) ** 3 for p in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0)]
    at_choice = [int((1 - s) * TOTAL + 1e-6) for s in sparsities]
    assert kept[2::4] == at_choice
    assert kept == [TOTAL] * 2 + [k for k in at_choice for _ in range(4)]


@pytest.mark.parametrize("variant", ["per_layer", "compounds", "largest_go", "zeros_move", "one_step_late"])
def test_each_naive_magnitude_ends_elsewhere(variant: magnitude.Variant) -> None:
    ours, _, _ = train_magnitude(0.9, 0.05)
    naive, _ = oracle_magnitude(0.9, 0.05, variant=variant)
    assert furthest(ours, naive) > 1000 * BOUND


def test_pruned_weights_that_return_end_elsewhere() -> None:
    """By gradients that reach them, or by momentum, just before a choice."""
    ours, _, _ = train_magnitude(0.9, 0.05)
    naive, _ = oracle_magnitude(0.9, 0.05, variant="returns")
    assert furthest(ours, naive) > 1000 * BOUND


def test_a_linear_ramp_ends_elsewhere() -> None:
    ours, _, _ = train_magnitude(0.9, 0.05)
    naive, _ = oracle_magnitude(0.9, 0.05, ramp=pomona.Linear(0.1, 0.8, steps=20, begin=3))
    assert furthest(ours, naive) > 1000 * BOUND


def test_a_uniform_allocation_ranks_each_layer_by_itself() -> None:
    """As the paper does: of layers of 80, 40 and 108 a half each, however unlike their weights are."""
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    pruner = pomona.Pruner(model, optimizer, Magnitude(0.5, every=3, allocation="uniform"))
    weights = double(draw(0))
    state = magnitude.start(weights, "per_layer")
    for step in range(1, 11):
        model.give(draw(step))
        optimizer.step()
        magnitude.step(
            weights,
            double(draw(step)),
            state,
            lr=LR,
            momentum=0.9,
            weight_decay=0.0,
            sparsity=0.5,
            every=3,
            variant="per_layer",
        )
        assert [int(m.sum()) for m in masks_of(pruner)] == [40, 20, 54]
    assert distance(model.numpy(), weights) < BOUND


def test_the_cut_at_the_end_of_magnitude_changes_nothing() -> None:
    _, masks, pruner = train_magnitude(0.9, 0.0)
    before = [p.detach().clone() for p in pruner.parameters().values()]
    assert pruner.harden().nonzero == sum(int(m.sum()) for m in masks[-1]) == int(0.2 * TOTAL + 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, pruner.parameters().values(), strict=True))


def train(
    method: RigL | SET, momentum: float, weight_decay: float, *, steps: int = STEPS
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Weights, masks and momentum after each step."""
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=weight_decay)
    pruner = pomona.Pruner(model, optimizer, method)
    weights, masks, buffers = [], [], []
    for step in range(1, steps + 1):
        model.give(draw(step))
        optimizer.step()
        weights.append(model.numpy())
        masks.append(masks_of(pruner))
        if momentum:
            buffers.append(buffers_of(model, optimizer, "momentum_buffer"))
    return weights, masks, buffers


def oracle(
    our_masks: list[list[np.ndarray]],
    momentum: float,
    weight_decay: float,
    *,
    end: int | None = END,
    is_set: bool = False,
    variant: rigl.Variant = "paper",
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], list[list[np.ndarray]], rigl.State]:
    """Weights, masks and momentum after each step. Of the library's masks RigL needs the first, SET all."""
    weights = double(draw(0))
    state = rigl.start(our_masks[0], variant)
    history, masks, buffers = [], [], []
    for step in range(1, STEPS + 1):
        rigl.step(
            weights,
            double(draw(step)),
            state,
            lr=LR,
            momentum=momentum,
            weight_decay=weight_decay,
            every=EVERY,
            end=end,
            drop=0.4,
            given=our_masks[step - 1] if is_set else None,
            variant=variant,
        )
        history.append([w.copy() for w in weights])
        masks.append([m.copy() for m in state.mask])
        buffers.append([np.zeros(0) if b is None else b.copy() for b in state.buffers])
    return history, masks, buffers, state


METHODS = pytest.mark.parametrize("method", [RigL, SET])


@cache
def train_rigl(momentum: float, weight_decay: float, end: int | None = END) -> Any:
    return train(RigL(0.7, every=EVERY, end=end, drop=0.4), momentum, weight_decay)


@cache
def train_set(momentum: float, weight_decay: float, end: int | None = END) -> Any:
    return train(SET(0.7, every=EVERY, end=end, drop=0.4), momentum, weight_decay)


@OPTIMIZERS
@pytest.mark.parametrize("end", [END, None])
@METHODS
def test_every_step_equals_the_paper(
    method: type[RigL] | type[SET], end: int | None, momentum: float, weight_decay: float
) -> None:
    is_set = method is SET
    ours, our_masks, our_buffers = (train_set if is_set else train_rigl)(momentum, weight_decay, end)
    paper, masks, buffers, _ = oracle(our_masks, momentum, weight_decay, end=end, is_set=is_set)
    for step in range(STEPS):
        assert all((a == b).all() for a, b in zip(our_masks[step], masks[step], strict=True)), f"step {step + 1}"
        assert distance(ours[step], paper[step]) < BOUND, f"step {step + 1}"
        if momentum:  # outside the mask momentum moves nothing, and is cleared where a weight is grown
            mine = [b * m for b, m in zip(our_buffers[step], masks[step], strict=True)]
            theirs = [b * m for b, m in zip(buffers[step], masks[step], strict=True)]
            assert distance(mine, theirs) < 20 * BOUND  # momentum adds up ten steps of gradients up to 8


def test_the_problem_drops_grows_and_regrows() -> None:
    """Else the comparison says little: the last update grows old zeros, and some of what it just dropped."""
    _, masks, _ = train_rigl(0.9, 0.05, None)
    *_, state = oracle(masks, 0.9, 0.05, end=None)
    regrown = sum(int((d & g).sum()) for d, g in zip(state.dropped, state.grown, strict=True))
    fresh = sum(int((g & ~d).sum()) for d, g in zip(state.dropped, state.grown, strict=True))
    assert regrown >= 3 and fresh >= 10


@pytest.mark.parametrize(
    "variant",
    [
        "constant_drop",
        "drops_share_of_layer",
        "drops_over_layers",
        "drops_largest",
        "drops_smallest_gradient",
        "grows_smallest_gradient",
        "grows_by_masked_gradient",
        "grows_only_old_zeros",
        "regrown_start_at_zero",
        "regrown_lose_momentum",
        "grown_keep_momentum",
        "zeros_move",
        "goes_on_after_end",
        "skips_optimizer",
    ],
)
def test_each_naive_rigl_ends_elsewhere(variant: rigl.Variant) -> None:
    ours, masks, _ = train_rigl(0.9, 0.05)
    naive, *_ = oracle(masks, 0.9, 0.05, variant=variant)
    assert furthest(ours, naive) > 1000 * BOUND


@METHODS
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_first_masks_have_erdos_renyi_densities(method: type[RigL] | type[SET], sparsity: float) -> None:
    _, masks, _ = train(method(sparsity), 0.9, 0.0, steps=1)
    counts = [int(m.sum()) for m in masks[0]]
    assert sum(counts) == int((1 - sparsity) * TOTAL + 1e-6)
    densities = rigl.erdos_renyi(SHAPES, sparsity)
    for count, density, mask in zip(counts, densities, masks[0], strict=True):
        assert abs(count - density * mask.size) < 1


def test_erdos_renyi_densities_are_those_of_the_formula() -> None:
    """Two layers by hand: (10 + 10) / 100 = 0.2 and (4 + 2 + 3 + 3) / 72 = 1/6, so 20 eps + 12 eps = 0.2 * 172."""
    eps = 0.2 * 172 / 32
    assert rigl.erdos_renyi([(10, 10), (4, 2, 3, 3)], 0.8) == pytest.approx([0.2 * eps, eps / 6])
    # A layer that would exceed 1 is kept whole: 2 of (2, 1), so that the other gets 18 of 100.
    assert rigl.erdos_renyi([(10, 10), (2, 1)], 1 - 20 / 102) == pytest.approx([0.18, 1.0])


@METHODS
def test_masks_differ_between_seeds_and_steps_and_not_between_runs(method: type[RigL] | type[SET]) -> None:
    def first(seed: int) -> np.ndarray:
        _, masks, _ = train(method(0.7, seed=seed), 0.0, 0.0, steps=1)
        return np.concatenate([m.ravel() for m in masks[0]])

    assert (first(0) == first(0)).all()
    assert (first(0) != first(1)).sum() > 0.1 * TOTAL
    chosen = np.mean([first(seed) for seed in range(200)], axis=0)
    # Of the first layer each weight is as likely as the others: 200 draws, five standard errors.
    density = first(0)[:80].mean()
    assert np.abs(chosen[:80] - density).max() < 5 * np.sqrt(density * (1 - density) / 200)


def test_set_grows_at_random() -> None:
    """Where |g| is largest is grown by RigL, and by SET no more than by chance."""
    _, masks, _ = train_set(0.0, 0.0, None)
    hits, num_grown, expected = 0, 0, 0.0
    for step in range(EVERY, STEPS + 1, EVERY):
        grads = draw(step)
        for g, old, new in zip(grads, masks[step - 2], masks[step - 1], strict=True):
            fresh = new & ~old
            top = rigl.smallest(-np.abs(g), ~old, int(fresh.sum()))
            hits += int((fresh & top).sum())
            num_grown += int(fresh.sum())
            expected += fresh.sum() ** 2 / (~old).sum()
    assert num_grown > 50
    assert hits < expected + 4 * np.sqrt(expected)  # a few standard errors of a count


@METHODS
def test_a_gradient_of_zero_everywhere_keeps_the_count(method: type[RigL] | type[SET]) -> None:
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, method(0.7, every=2))
    counts = []
    for step in range(1, 7):
        model.give([np.zeros_like(g) for g in draw(step)])
        optimizer.step()
        counts.append([int(m.sum()) for m in masks_of(pruner)])
    assert counts == [counts[0]] * 6


@METHODS
def test_grown_weights_that_are_still_zero_count_as_active(method: type[RigL] | type[SET]) -> None:
    """At a learning rate of 0 they are the smallest |w| and the first to go; the number of active ones stays."""
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = pomona.Pruner(model, optimizer, method(0.7, every=2, drop=0.3))
    masks = []
    for step in range(1, 9):
        model.give(draw(step))
        optimizer.step()
        masks.append(masks_of(pruner))
    counts = [[int(m.sum()) for m in mask] for mask in masks]
    assert counts == [counts[0]] * 8
    for at_start, w in zip(masks[0], model.numpy(), strict=True):
        # One draw of smallest weights went at the first update; from then on zeros made way for zeros.
        num_dropped = int(0.3 * at_start.sum() + 1e-6)
        assert at_start.sum() - np.count_nonzero(w) == num_dropped


@METHODS
def test_adams_moments_are_cleared_where_a_weight_is_grown(method: type[RigL] | type[SET]) -> None:
    model = Tensors(draw(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.99))
    pruner = pomona.Pruner(model, optimizer, method(0.7, every=4, drop=0.4))
    for step in range(1, 5):
        old = masks_of(pruner)
        model.give(draw(step))
        optimizer.step()
    first, second = buffers_of(model, optimizer, "exp_avg"), buffers_of(model, optimizer, "exp_avg_sq")
    num_grown = 0
    for g, before, now, m, v in zip(draw(4), old, masks_of(pruner), first, second, strict=True):
        fresh = now & ~before
        num_grown += int(fresh.sum())
        assert m[fresh] == pytest.approx(0.1 * g[fresh], rel=1e-6)
        assert v[fresh] == pytest.approx(0.01 * g[fresh] ** 2, rel=1e-5)
    assert num_grown >= 10


@METHODS
def test_the_cut_at_the_end_is_the_mask(method: type[RigL] | type[SET]) -> None:
    model = Tensors(draw(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    pruner = pomona.Pruner(model, optimizer, method(0.7, every=3, drop=0.4))
    for step in range(1, 11):
        model.give(draw(step))
        optimizer.step()
    weights = model.numpy()
    assert pruner.harden().nonzero == int(0.3 * TOTAL + 1e-6)
    assert distance(weights, model.numpy()) == 0.0
