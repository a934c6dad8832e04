"""ADMM against the paper, rewritten in numpy (oracles/admm.py), and against what naive versions do instead."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import pomona
from pomona.methods.admm import ADMM
from tests import oracles
from tests.oracles import admm
from tests.problems import Tensors, distance

# Most runs here are too short for the method to have done all.
pytestmark = pytest.mark.filterwarnings("ignore:harden.. at step .* comes early")

SHAPES = [(6, 4), (3, 6), (2, 3, 2, 2)]
COUNTS = [6, 9, 3]
DENSITIES = {"w.0": 6 / 24, "w.1": 9 / 18, "w.2": 3 / 24}
STEPS, EVERY, RHO, LR = 24, 5, 0.3, 0.05

# What float32 makes of W, Z and U in 24 steps: each of them rounds numbers below 8 to 2^-24 of themselves, and U adds
# up the errors of W and Z at four updates.
BOUND = 4 * 24 * 8 * 2.0**-24


def draw(seed: int, scales: tuple[float, ...] = (1.0, 0.2, 3.0)) -> list[np.ndarray]:
    """Layers of unlike scale, float32."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(SHAPES, scales, strict=True)]


def draw_start(share_of_zeros: float = 0.0) -> list[np.ndarray]:
    """The initial weights."""
    rng = np.random.default_rng(99)
    return [np.where(rng.random(w.shape) < share_of_zeros, np.float32(0), w) for w in draw(0)]


def draw_grads(step: int) -> list[np.ndarray]:
    """Gradients of a fifth of the size of the weights, so that the penalty matters."""
    return draw(step, (0.2, 0.04, 0.6))


def double(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [a.astype(np.float64) for a in arrays]


def state_of(pruner: pomona.Pruner) -> dict[str, list[np.ndarray]]:
    per_weight: list[dict[str, Any]] = list(pruner.state_dict()["state"].values())
    return {key: [state[key].float().numpy().copy() for state in per_weight] for key in per_weight[0]}


@cache
def train(momentum: float, weight_decay: float, hold_zeros: bool = False) -> dict[str, list[list[np.ndarray]]]:
    """After each step: weights, Z, U and the gradients that SGD got."""
    model = Tensors(draw_start(0.4 if hold_zeros else 0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum, weight_decay=weight_decay)
    method = ADMM(densities=DENSITIES, rho=RHO, every=EVERY, hold_zeros=hold_zeros)
    pruner = pomona.Pruner(model, optimizer, method)
    history: dict[str, list[list[np.ndarray]]] = {"w": [], "z": [], "u": [], "grad": []}
    for step in range(1, STEPS + 1):
        model.give(draw_grads(step))
        optimizer.step()
        state = state_of(pruner)
        history["w"].append(model.numpy())
        history["z"].append(state["z"])
        history["u"].append(state["u"])
        history["grad"].append([p.grad.numpy().copy() for p in model.w])
    return history


def oracle(
    momentum: float, weight_decay: float, hold_zeros: bool = False, variant: admm.Variant = "paper"
) -> dict[str, list[list[np.ndarray]]]:
    weights = double(draw_start(0.4 if hold_zeros else 0.0))
    state = admm.start(weights, COUNTS, hold_zeros=hold_zeros, variant=variant)
    history: dict[str, list[list[np.ndarray]]] = {"w": [], "z": [], "u": [], "grad": []}
    for step in range(1, STEPS + 1):
        grads = double(draw_grads(step))
        admm.step(
            weights,
            grads,
            state,
            lr=LR,
            momentum=momentum,
            weight_decay=weight_decay,
            rho=RHO,
            every=EVERY,
            variant=variant,
        )
        history["w"].append([w.copy() for w in weights])
        history["z"].append([z.copy() for z in state.z])
        history["u"].append([u.copy() for u in state.u])
        history["grad"].append([a * (g + p) for a, g, p in zip(state.alive, grads, state.pulls, strict=True)])
    return history


def furthest(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> float:
    """The largest distance at any step."""
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("hold_zeros", [False, True])
@pytest.mark.parametrize(
    ("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.05)], ids=["plain", "momentum", "decay"]
)
def test_every_step_equals_the_paper(momentum: float, weight_decay: float, hold_zeros: bool) -> None:
    ours, paper = train(momentum, weight_decay, hold_zeros), oracle(momentum, weight_decay, hold_zeros)
    for key in ("w", "z", "u", "grad"):
        assert furthest(ours[key], paper[key]) < BOUND, key
    for mine, theirs in zip(ours["z"], paper["z"], strict=True):
        assert all(((a != 0) == (b != 0)).all() for a, b in zip(mine, theirs, strict=True))
        assert [np.count_nonzero(z) for z in mine] == COUNTS


def test_the_problem_moves_the_support_of_z() -> None:
    """Else the comparison says little: P(W + U) keeps other weights than P(W) did at the start, and U is not small."""
    paper = oracle(0.9, 0.05)
    moved = sum(int(((a != 0) & (b == 0)).sum()) for a, b in zip(paper["z"][0], paper["z"][-1], strict=True))
    assert moved >= 2
    assert max(np.abs(u).max() for u in paper["u"][-1]) > 0.5


@pytest.mark.parametrize(
    "variant",
    [
        "sqrt_norm",
        "unsquared_norm",
        "z_starts_as_w",
        "z_is_w",
        "start_edits_w",
        "u_attached",
        "u_starts_stepped",
        "penalty_beside_lr",
        "penalty_minus_u",
        "u_descends",
        "z_ignores_u",
        "no_decay",
        "momentum_restarts",
    ],
)
def test_each_naive_variant_ends_elsewhere(variant: admm.Variant) -> None:
    naive = oracle(0.9, 0.05, variant=variant)
    assert distance(train(0.9, 0.05)["w"][-1], naive["w"][-1]) > 100 * BOUND


@pytest.mark.parametrize("variant", ["rates_compound", "pulls_finished_layers"])
def test_each_naive_second_round_ends_elsewhere(variant: admm.Variant) -> None:
    """40 % of the weights are zero at the start and held there: l stays a share of all, and the second layer has no
    more than its l = 9 weights, so that it is free of the penalty."""
    naive = oracle(0.9, 0.05, hold_zeros=True, variant=variant)
    assert distance(train(0.9, 0.05, hold_zeros=True)["w"][-1], naive["w"][-1]) > 100 * BOUND


def test_ties_do_not_enlarge_z() -> None:
    """Weights of +-1 only, and no gradient: Z keeps six of 24, the first ones; by ``>= threshold`` it keeps all."""
    value = np.where(np.arange(24).reshape(6, 4) % 3 == 0, -1, 1).astype(np.float32)
    model = Tensors([value])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities={"w.0": 0.25}, rho=RHO, every=EVERY))
    naive = [value.astype(np.float64)]
    state = admm.start(naive, [6], variant="z_keeps_ties")
    paper = [value.astype(np.float64)]
    right = admm.start(paper, [6])
    zero = [np.zeros((6, 4), dtype=np.float32)]
    for _ in range(12):
        model.give(zero)
        optimizer.step()
        assert np.count_nonzero(state_of(pruner)["z"][0]) == 6
        admm.step(naive, zero, state, lr=LR, momentum=0, weight_decay=0, rho=RHO, every=EVERY, variant="z_keeps_ties")
        admm.step(paper, zero, right, lr=LR, momentum=0, weight_decay=0, rho=RHO, every=EVERY)
    assert distance(model.numpy(), paper) < BOUND
    assert distance(model.numpy(), naive) > 100 * BOUND


@pytest.mark.parametrize("rho", [0.0015, 0.3, 2.0])
def test_the_gradient_of_the_penalty_is_rho_times_the_difference_at_every_iteration(rho: float) -> None:
    """Also after ten updates of U: a U that is part of the graph makes it eleven times as large by then."""
    model = Tensors(draw_start())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities=DENSITIES, rho=rho, every=2))
    for _ in range(22):
        before = model.numpy()
        model.give([np.zeros_like(w) for w in before])
        optimizer.step()
        state = state_of(pruner)
        grads = [p.grad.numpy() for p in model.w]
        expected = [np.float32(rho) * (w - z + u) for w, z, u in zip(before, state["z"], state["u"], strict=True)]
        # rho, two sums and a product in float32, of numbers below 16 times rho
        assert distance(grads, expected) < 4 * 16 * rho * 2.0**-24


def test_rho_may_follow_a_schedule() -> None:
    """It changes with the ADMM iteration, as in the first author's later code, and not within."""
    ramp = pomona.Geometric(0.1, 0.2, steps=20)
    model = Tensors(draw_start())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pomona.Pruner(model, optimizer, ADMM(densities=DENSITIES, rho=ramp, every=EVERY))
    weights = double(draw_start())
    state = admm.start(weights, COUNTS)
    for step in range(1, STEPS + 1):
        model.give(draw_grads(step))
        optimizer.step()
        first = step - (step - 1) % EVERY  # step of this ADMM iteration
        rho = 0.1 * 2 ** (min(first, 20) / 20)
        admm.step(weights, double(draw_grads(step)), state, lr=LR, momentum=0, weight_decay=0, rho=rho, every=EVERY)
    assert distance(model.numpy(), weights) < BOUND


def test_nothing_is_nan_where_w_equals_z() -> None:
    """As many weights as may stay, so that Z = W and U = 0: the plain gradient, and no 0 / 0 of a norm."""
    value = np.zeros((6, 4), dtype=np.float32)
    value[0] = [1, -2, 3, -4]
    value[1, :2] = [0.5, -0.5]
    model = Tensors([value])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities={"w.0": 0.25}, rho=RHO, every=2))
    for _ in range(7):
        model.give([np.zeros((6, 4), dtype=np.float32)])
        optimizer.step()
    assert (model.numpy()[0] == value).all()
    assert not state_of(pruner)["u"][0].any()
    assert pruner.harden().nonzero == 6
    assert (model.numpy()[0] == value).all()


def test_weights_of_which_fewer_than_may_stay_are_not_zero_are_left_alone() -> None:
    """The threshold is 0 then (section 3.6, item 8): nothing changes, and no zero is chosen to stay."""
    value = np.zeros((6, 4), dtype=np.float32)
    value[2, :3] = [1, 2, -3]
    model = Tensors([value])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities={"w.0": 0.5}, rho=RHO, every=2))
    for _ in range(5):
        model.give([np.zeros((6, 4), dtype=np.float32)])
        optimizer.step()
    assert (model.numpy()[0] == value).all()
    assert pruner.harden().nonzero == 3


def test_a_half_precision_model_has_its_state_in_float32() -> None:
    """rho (W - Z + U) and U itself are sums of unlike numbers: W is rounded to 2^-9, Z and U are not."""
    model = Tensors(draw_start()).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities=DENSITIES, rho=0.1, every=1))
    weights = [p.detach().float().numpy() for p in model.w]
    state = admm.start(double(weights), COUNTS)
    for step in range(12):
        before = [p.detach().float().numpy().copy() for p in model.w]
        if step:
            sums = [w + u for w, u in zip(before, state.u, strict=True)]
            state.z = admm.project(sums, COUNTS)
            state.u = [u + w - z for w, z, u in zip(before, state.z, state.u, strict=True)]
        for p in model.w:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        ours = state_of(pruner)
        assert distance(ours["z"], state.z) < 1e-4  # float32 against float64, of numbers up to 100
        assert distance(ours["u"], state.u) < 1e-4


# What stays, and masked retraining


def test_the_cut_keeps_the_largest_weights_and_not_the_support_of_z() -> None:
    model = Tensors(draw_start())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.05)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities=DENSITIES, rho=0.05, every=EVERY))
    for step in range(1, 9):  # three steps after the last update of Z
        model.give([25 * g for g in draw_grads(step)])
        optimizer.step()
    weights, z = model.numpy(), state_of(pruner)["z"]
    assert pruner.harden().nonzero == sum(COUNTS)
    masks = admm.cut(paper := [w.copy() for w in weights], COUNTS)
    assert distance(model.numpy(), paper) == 0.0
    assert [int(m.sum()) for m in masks] == COUNTS
    admm.cut(naive := [w.copy() for w in weights], COUNTS, z=z, variant="support_of_z")
    assert distance(model.numpy(), naive) > 100 * BOUND


@pytest.mark.parametrize("variant", ["keeps_ties", "drops_ties"])
def test_the_cut_keeps_the_exact_count_on_ties(variant: admm.CutVariant) -> None:
    value = np.ones((6, 4), dtype=np.float32)
    value[0, :3] = 2
    model = Tensors([value])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities={"w.0": 0.25}, every=EVERY))
    assert pruner.harden(one_shot=True).nonzero == 6
    admm.cut(paper := [value.copy()], [6])
    assert distance(model.numpy(), paper) == 0.0
    (naive,) = admm.cut([value.copy()], [6], variant=variant)
    assert naive.sum() == {"keeps_ties": 24, "drops_ties": 3}[variant]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_masked_retraining_equals_the_paper(weight_decay: float) -> None:
    """What was cut stays zero though momentum goes on, and of what stayed everything is trained, ties included."""
    values = [np.round(2 * w) / 2 for w in draw_start()]  # many ties, also at the cut
    model = Tensors(values)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=weight_decay)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities=DENSITIES, rho=RHO, every=EVERY))
    weights = double(values)
    state = admm.start(weights, COUNTS)
    settings: dict[str, float] = {"lr": LR, "momentum": 0.9, "weight_decay": weight_decay}
    for step in range(1, 8):
        model.give(draw_grads(step))
        optimizer.step()
        admm.step(weights, double(draw_grads(step)), state, rho=RHO, every=EVERY, **settings)
    pruner.harden()
    masks = admm.cut(weights, COUNTS)
    variants: tuple[admm.RetrainVariant, ...] = ("paper", "stale_momentum", "freezes_ties")
    ends = {v: ([w.copy() for w in weights], list(state.buffers)) for v in variants}
    for step in range(8, 18):
        model.give(draw_grads(step))
        optimizer.step()
        for variant, (copies, buffers) in ends.items():
            admm.retrain_step(copies, double(draw_grads(step)), buffers, masks, variant=variant, **settings)
    ours = model.numpy()
    assert distance(ours, ends["paper"][0]) < BOUND
    assert distance(ours, ends["stale_momentum"][0]) > 100 * BOUND
    assert distance(ours, ends["freezes_ties"][0]) > 100 * BOUND


# Where the l of the layers come from


def test_a_uniform_allocation_gives_every_layer_the_same_share() -> None:
    model = Tensors(draw_start())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(2 / 3, allocation="uniform", every=2))
    for step in range(1, 8):
        model.give(draw_grads(step))
        optimizer.step()
        assert [np.count_nonzero(z) for z in state_of(pruner)["z"]] == [8, 6, 8]


def test_a_global_allocation_projects_all_layers_together() -> None:
    """The paper's l are given; without any, the 22 largest |W + U| of all layers stay, chosen anew with each Z."""
    model = Tensors(draw_start())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = pomona.Pruner(model, optimizer, ADMM(2 / 3, min_density=0.1, every=2))
    u = [np.zeros_like(w) for w in draw_start()]
    for step in range(1, 12):
        before = model.numpy()
        model.give(draw_grads(step))
        optimizer.step()
        if step % 2 == 1:  # Z is chosen before steps 1, 3, 5, ...
            sums = [a + b for a, b in zip(before, u, strict=True)]
            masks = oracles.top_k_mask_with_floor([np.abs(v) for v in sums], 22, 0.1)
            z = state_of(pruner)["z"]
            assert all(((a != 0) == mask).all() for a, mask in zip(z, masks, strict=True))
            assert distance(z, [mask * v for mask, v in zip(masks, sums, strict=True)]) < BOUND
        u = state_of(pruner)["u"]
    assert pruner.harden().nonzero == 22


# A problem whose answer is known


def bowl() -> tuple[np.ndarray, np.ndarray]:
    """Curvature H and minimum m of 1/2 (w - m)^T H (w - m), in which the largest weights are those that matter least.

    Four weights of size 1 in curvature 1, and eight of size 2 in curvature 0.01; a little of H off the diagonal.
    """
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(12, 12)) * 0.001
    h = np.diag([1.0] * 4 + [0.01] * 8) + noise @ noise.T
    m = np.array([1.0] * 4 + [2.0] * 8) * np.sign(rng.normal(size=12))
    order = rng.permutation(12)
    return h[np.ix_(order, order)], m[order]


def test_the_best_support_of_a_convex_quadratic_is_found() -> None:
    """W-step by SGD, three updates of Z a hundred steps, then the cut; the magnitudes of the minimum mislead.

    A support is at rest if the multipliers outside it, |H m|/rho, stay below the weights inside. With rho between
    0.02 / 1 and 1 / 2 that is true of the best support only: 0.1 is in the middle of that.
    """
    h, m = bowl()
    best = admm.sparsest_minimum(h, m, 4)
    assert set(best) != set(np.argsort(-np.abs(m))[:4].tolist())

    model = Tensors([m.astype(np.float32).reshape(1, 12)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities={"w.0": 1 / 3}, rho=0.1, every=30))
    for _ in range(3000):
        w = model.numpy()[0][0].astype(np.float64)
        model.give([(h @ (w - m)).astype(np.float32).reshape(1, 12)])
        optimizer.step()
    assert pruner.harden().nonzero == 4
    (w,) = model.numpy()
    assert tuple(np.flatnonzero(w)) == best
    for _ in range(100):  # masked retraining
        model.give([(h @ (model.numpy()[0][0] - m)).astype(np.float32).reshape(1, 12)])
        optimizer.step()
    inside = list(best)
    expected = np.linalg.solve(h[np.ix_(inside, inside)], (h @ m)[inside])
    assert np.abs(model.numpy()[0][0][inside] - expected).max() < 1e-5
