"""WeightMom against the project's reading of it in numpy (oracles/weightmom.py), and against what naive versions do."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch

import pomona
from pomona.methods.weightmom import WeightMom
from tests.oracles import weightmom
from tests.problems import Tensors, distance

SHAPES = [(8, 10), (5, 8), (3, 2, 3, 3)]
SCALES = (1.0, 0.05, 0.4)  # of the layers: no one threshold suits them all
STEPS, EVERY, WINDOW, PATIENCE, THETA = 48, 3, 6, 4, 0.6
LR = 0.05

# What float32 makes of weights and means in 48 steps: each of them rounds numbers below 4 to 2^-24 of themselves.
BOUND = 48 * 4 * 2.0**-24


def draw_weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(SHAPES, SCALES, strict=True)]


def draw_grads(step: int) -> list[np.ndarray]:
    """Noise on the scale of the layer, and a tenth of the weights swung to and fro, whose signed mean is small."""
    rng = np.random.default_rng(step)
    grads = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, SCALES, strict=True)]
    for g, scale in zip(grads, SCALES, strict=True):
        g.flat[::10] += 12 * scale * (1 if step % 6 < 3 else -1)
    return [g.astype(np.float32) for g in grads]


@cache
def train(
    momentum: float, weight_decay: float, importance: Literal["sparsity", "none"] = "sparsity"
) -> tuple[list[list[np.ndarray]], list[dict[str, list[np.ndarray]]]]:
    """Weights and states after each step."""
    model = Tensors(draw_weights())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=weight_decay)
    method = WeightMom(
        threshold=THETA, every=EVERY, window=WINDOW, patience=PATIENCE, importance=importance, min_density=0.0
    )
    pruner = pomona.Pruner(model, optimizer, method)
    weights, states = [], []
    for step in range(1, STEPS + 1):
        model.give(draw_grads(step))
        optimizer.step()
        weights.append(model.numpy())
        states.append(state_of(pruner))
    return weights, states


def state_of(pruner: pomona.Pruner) -> dict[str, list[np.ndarray]]:
    saved = pruner.state_dict()
    per_weight: list[dict[str, Any]] = list(saved["state"].values())
    state = {key: [state[key].numpy().copy() for state in per_weight] for key in per_weight[0]}
    return state | {key: [t.numpy().copy()] for key, t in saved["shared"].items()}


def oracle(
    momentum: float,
    weight_decay: float,
    importance: Literal["sparsity", "none"] = "sparsity",
    variant: weightmom.Variant = "reading",
) -> tuple[list[list[np.ndarray]], list[weightmom.State]]:
    weights = [w.astype(np.float64) for w in draw_weights()]
    state = weightmom.start(weights, variant)
    history, states = [], []
    for step in range(1, STEPS + 1):
        weightmom.step(
            weights,
            [g.astype(np.float64) for g in draw_grads(step)],
            state,
            lr=LR,
            momentum=momentum,
            weight_decay=weight_decay,
            threshold=THETA,
            every=EVERY,
            window=WINDOW,
            patience=PATIENCE,
            importance=importance,
            variant=variant,
        )
        history.append([w.copy() for w in weights])
        states.append(
            weightmom.State(
                [m.copy() for m in state.m],
                [k.copy() for k in state.count],
                [mask.copy() for mask in state.mask],
                [],
                state.num_steps,
                state.updates,
            )
        )
    return history, states


@pytest.mark.parametrize("importance", ["sparsity", "none"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)], ids=["plain", "momentum"])
def test_every_step_equals_the_reading(
    momentum: float, weight_decay: float, importance: Literal["sparsity", "none"]
) -> None:
    ours, our_states = train(momentum, weight_decay, importance)
    theirs, their_states = oracle(momentum, weight_decay, importance)
    for step in range(STEPS):
        assert distance(ours[step], theirs[step]) < BOUND
        mine, other = our_states[step], their_states[step]
        assert {int(n) for n in mine["updates"]} == {other.updates}
        for i, live in enumerate(other.mask):
            assert (mine["mask"][i] == live).all()
            assert (mine["count"][i] == other.count[i])[live].all()
            assert np.abs(mine["m"][i] - other.m[i])[live].max() < BOUND


def test_the_problem_prunes_at_several_updates_and_spares_most() -> None:
    """Else the comparison says little: every layer loses some weights, at no less than five different updates."""
    _, states = oracle(0.9, 0.01)
    live = [sum(int(mask.sum()) for mask in state.mask) for state in states]
    assert len(set(live)) > 5
    assert all(0.2 < mask.mean() < 0.95 for mask in states[-1].mask)


@pytest.mark.parametrize(
    "variant",
    [
        "gradient_momentum",
        "mean_of_signed",
        "half_bias_correction",
        "one_threshold",
        "importance_upside_down",
        "counts_steps",
        "absolute_threshold",
        "zeros_in_mean",
        "no_patience",
        "no_history",
        "counter_never_resets",
        "zeros_move",
    ],
)
def test_each_naive_variant_ends_elsewhere(variant: weightmom.Variant) -> None:
    """Each prunes other weights, or moves pruned ones, at some step."""
    ours, naive = train(0.9, 0.01)[0], oracle(0.9, 0.01, variant=variant)[0]
    assert max(distance(a, b) for a, b in zip(ours, naive, strict=True)) > 1000 * BOUND


def test_bias_correction_cannot_matter_to_a_relative_threshold() -> None:
    """It multiplies both sides of m < tau; only to correct one side is an error."""
    with_it, without = oracle(0.9, 0.01)[0][-1], oracle(0.9, 0.01, variant="no_bias_correction")[0][-1]
    assert distance(with_it, without) == 0.0


def run(
    method: WeightMom, values: list[np.ndarray], grads: list[list[np.ndarray]], lr: float = 0.1
) -> tuple[Tensors, pomona.Pruner, list[int]]:
    """The model, the pruner and how many weights are not zero after each step."""
    model = Tensors(values)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    pruner = pomona.Pruner(model, optimizer, method)
    nonzero = []
    for g in grads:
        model.give(g)
        optimizer.step()
        nonzero.append(sum(int(np.count_nonzero(w)) for w in model.numpy()))
    return model, pruner, nonzero


def test_weight_decay_alone_prunes_nothing() -> None:
    """All weights shrink to 1e-4 of themselves, and none below half the mean of its layer."""
    values = [np.linspace(1, 1.5, 20, dtype=np.float32).reshape(4, 5)]
    grads = [[np.zeros((4, 5), dtype=np.float32)]] * 60
    model = Tensors(values)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.5)
    pomona.Pruner(model, optimizer, WeightMom(threshold=0.5, every=1, window=4, patience=3))
    for g in grads:
        model.give(g)
        optimizer.step()
    (w,) = model.numpy()
    assert w.max() < 1e-3 and (w != 0).all()


def test_ten_steps_do_not_make_ten_updates() -> None:
    values = [np.array([[1.0, 1.0, 1.0, 1e-3]], dtype=np.float32)]
    grads = [[np.zeros((1, 4), dtype=np.float32)]] * 60
    method = WeightMom(threshold=0.5, every=5, window=4, patience=10)
    _, _, nonzero = run(method, values, grads)
    assert nonzero == [4] * 49 + [3] * 11  # ten updates, five steps each


def test_counters_do_not_run_over_before_the_history_is_complete() -> None:
    """A weight below its threshold for 300 updates is pruned at the first that may prune, though the state is uint8."""
    values = [np.array([[1.0, 1.0, 1.0, 1e-3]], dtype=np.float32)]
    grads = [[np.zeros((1, 4), dtype=np.float32)]] * 258
    _, _, nonzero = run(WeightMom(threshold=0.5, every=1, window=257, patience=10), values, grads)
    assert nonzero == [4] * 256 + [3, 3]


def test_a_layer_at_its_least_density_loses_no_more() -> None:
    """All but one weight of a layer are tiny, for 300 updates; a quarter of it stays."""
    value = np.full((4, 5), 1e-3, dtype=np.float32)
    value[0, 0] = 1.0
    value += 1e-6 * np.arange(20, dtype=np.float32).reshape(4, 5)
    grads = [[np.zeros((4, 5), dtype=np.float32)]] * 300
    model, _, nonzero = run(WeightMom(threshold=0.5, every=1, window=3, patience=2, min_density=0.25), [value], grads)
    assert nonzero[-1] == 5
    assert model.numpy()[0][0, 0] == 1.0


@pytest.mark.parametrize(
    "sparsity",
    [0.7, pomona.Linear(0.0, 0.7, steps=30), pomona.Cubic(0.0, 0.7, steps=30)],
    ids=["at once", "linear", "cubic"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_target_is_reached_exactly_and_nothing_comes_back(sparsity: pomona.Schedule | float, momentum: float) -> None:
    model = Tensors(draw_weights())
    total = sum(w.numel() for w in model.w)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=0.01)
    method = WeightMom(sparsity, every=EVERY, window=WINDOW, patience=PATIENCE)
    pruner = pomona.Pruner(model, optimizer, method)
    before = [np.ones(shape, dtype=bool) for shape in SHAPES]
    for step in range(1, STEPS + 1):
        model.give(draw_grads(step))
        optimizer.step()
        masks = state_of(pruner)["mask"]
        for mask, old, w in zip(masks, before, model.numpy(), strict=True):
            assert not (mask & ~old).any()
            assert not w[~mask].any()
        kept = sum(int(mask.sum()) for mask in masks)
        wanted = sparsity(step) if isinstance(sparsity, pomona.Schedule) else sparsity
        assert kept >= int((1 - wanted) * total + 1e-6)
        if step < EVERY * WINDOW:
            assert kept == total  # no history yet
        before = masks
    assert pruner.harden().nonzero == int(0.3 * total + 1e-6)
