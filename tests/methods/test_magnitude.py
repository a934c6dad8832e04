"""Magnitude pruning against the paper, rewritten in numpy (oracles/magnitude.py), and against cutting by hand."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import pomona
from pomona.budget import num_kept
from pomona.methods.magnitude import Magnitude
from pomona.schedule import Schedule, Value
from pomona.selection.allocation import Allocation, allocate
from tests.oracles import magnitude as oracle
from tests.problems import NUM_WEIGHTS, Tensors, batches, bits, distance, net, train

SHAPES = [(6, 4), (3, 6), (2, 3, 2, 2)]
SIZES = [24, 18, 24]
ALLOCATIONS = get_args(Allocation)


def draw(seed: int) -> list[np.ndarray]:
    """Layers of unlike scale, float32."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) * s).astype(np.float32) for shape, s in zip(SHAPES, (1.0, 0.2, 3.0), strict=True)]


def masks(pruner: pomona.Pruner) -> list[torch.Tensor]:
    return [state["mask"] for state in pruner.state_dict()["state"].values()]


def counts(pruner: pomona.Pruner) -> list[int]:
    return [int(mask.sum()) for mask in masks(pruner)]


def grad_steps(model: Tensors, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        model.give(draw(seed))
        optimizer.step()


# the paper


def run(method: Magnitude, variant: oracle.Variant = "paper", *, steps: int = 15) -> float:
    """The largest difference of a weight to the oracle's after any step, by the same gradients."""
    model = Tensors(draw(0))
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = SGD(model.parameters(), **settings)
    pomona.Pruner(model, optimizer, method)
    weights: list[np.ndarray] = [w.astype(np.float64) for w in draw(0)]
    state = oracle.start(weights, variant)
    distances = []
    for step in range(1, steps + 1):
        grads = draw(step)
        model.give(grads)
        optimizer.step()
        oracle.step(
            weights,
            [g.astype(np.float64) for g in grads],
            state,
            **settings,
            sparsity=pomona.schedule.value_at(method.sparsity, step),
            every=method.every,
            begin=method.begin,
            min_density=method.min_density,
            variant=variant,
        )
        distances.append(distance(model.numpy(), weights))
    return max(distances)


CUBIC = pomona.Cubic(0.2, 0.5, steps=8, begin=2)  # cuts after the steps 2, 5, 8, 11 and 14, the last being in vain


@pytest.mark.filterwarnings("ignore:.* starves layers")
@pytest.mark.parametrize(
    "method",
    [
        Magnitude(0.7, min_density=0.0),
        Magnitude(0.7, begin=5, min_density=0.0),
        Magnitude(CUBIC, every=3, begin=2, min_density=0.0),
        Magnitude(pomona.Cubic(0.2, 0.8, steps=8, begin=2), every=3, begin=2, min_density=0.1),
    ],
    ids=["at once", "later", "gradually", "with floors"],
)
def test_fifteen_steps_equal_the_paper(method: Magnitude) -> None:
    # float32 against float64: 15 steps of values around 10, each rounded to 2^-24 relative
    assert run(method) < 2e-5


@pytest.mark.parametrize("variant", [v for v in get_args(oracle.Variant) if v != "paper"])
def test_each_naive_variant_goes_elsewhere(variant: oracle.Variant) -> None:
    assert run(Magnitude(CUBIC, every=3, begin=2, min_density=0.0), variant) > 0.01


def test_the_sparsity_after_each_cut_is_the_formula_of_zhu_and_gupta() -> None:
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0, s_f = 0.8, t_0 = 2, n dt = 4 and dt = 1:
    # the sparsities are 0.8 times 0, 37/64, 7/8, 63/64, 1, and kept of 72 are 72, 38.7, 21.6, 15.3, 14.4, rounded down
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    method = Magnitude(pomona.Cubic(0.0, 0.8, steps=4, begin=2), every=1, begin=2)
    pruner = pomona.Pruner(model, optimizer, method)
    found = []
    for batch in batches(7):
        train(model, optimizer, [batch])
        found.append(sum(counts(pruner)))
        assert pruner.metrics()["sparsity"] == pytest.approx(1 - found[-1] / NUM_WEIGHTS, abs=1e-12)
    assert found == [72, 72, 38, 21, 15, 14, 14]


# by hand


def test_the_smallest_magnitudes_are_cut_after_the_first_step() -> None:
    model = nn.Linear(6, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, -1.0, 2.0, 0.5, -4.0, 2.5]])
    optimizer = SGD(model.parameters(), lr=1.0)
    pomona.Pruner(model, optimizer, Magnitude(0.5))
    model.weight.grad = torch.tensor([[0.0, -3.0, 0.0, 0.0, -3.0, 0.0]])  # the step makes -1 a 2 and -4 a -1
    optimizer.step()
    assert model.weight.tolist() == [[3.0, 2.0, 0.0, 0.0, 0.0, 2.5]]  # of the two that are 2 the earlier stays
    model.weight.grad = torch.ones(1, 6)
    optimizer.step()
    assert model.weight.tolist() == [[2.0, 1.0, 0.0, 0.0, 0.0, 1.5]]


@pytest.mark.parametrize(
    ("allocation", "kept"),
    [
        ("global", [1, 11]),  # the large weights are all in the second layer, and the floor keeps one of the first
        ("uniform", [4, 8]),  # 12 of 18 are two thirds of each
        ("erk", [5, 7]),  # 2 + 3 and 3 + 4
    ],
)
def test_where_the_budget_goes(allocation: Allocation, kept: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(4, 3, bias=False))
    model[0].weight.data = 0.1 + torch.arange(6.0).view(2, 3) / 100
    model[1].weight.data = 1.0 + torch.arange(12.0).view(3, 4)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, Magnitude(1 / 3, allocation=allocation))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert counts(pruner) == kept
    for layer, count in zip(model, kept, strict=True):
        largest = layer.weight.numel() - count
        assert layer.weight.flatten().nonzero().flatten().tolist() == list(range(largest, largest + count))


@pytest.mark.filterwarnings("ignore:.* starves layers")
def test_a_floor_keeps_a_layer_alive() -> None:
    reports = {}
    for min_density in (0.0, 0.25):
        model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False))
        for layer, scale in zip(model, (0.01, 1.0), strict=True):
            layer.weight.data = scale * (1.0 + torch.arange(8.0).view(2, 4))
        optimizer = SGD(model.parameters(), lr=0.1)
        pruner = pomona.Pruner(model, optimizer, Magnitude(0.5, min_density=min_density))
        reports[min_density] = pruner.harden(one_shot=True)
    assert [layer.nonzero for layer in reports[0.0].layers] == [0, 8]
    assert [layer.reason for layer in reports[0.0].layers] == [
        "emptied by allocation='global'",
        "2x the network's share, by allocation='global'",
    ]
    assert [layer.nonzero for layer in reports[0.25].layers] == [2, 6]
    assert reports[0.25].layers[0].reason == "held at the floor min_density=0.25"


# one cut, then fine-tuning

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": partial(Adam, lr=0.01, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@each_optimizer
def test_a_number_is_one_cut_and_fine_tuning_with_held_zeros(optimizer: Callable[..., Optimizer]) -> None:
    model = net()
    one = optimizer(model.parameters())
    pomona.Pruner(model, one, Magnitude(0.75, begin=5, every=4))
    train(model, one, batches(20))

    by_hand = net()
    two = optimizer(by_hand.parameters())
    train(by_hand, two, batches(5))
    both = torch.cat([p.detach().abs().flatten() for p in by_hand.parameters() if p.ndim > 1])
    threshold = both.sort(descending=True).values[17]
    with torch.no_grad():
        for p in by_hand.parameters():
            if p.ndim > 1:
                p[p.abs() < threshold] = 0.0
    pomona.hold(by_hand, two)
    train(by_hand, two, batches(20)[5:])
    assert bits(model.state_dict()) == bits(by_hand.state_dict())


def test_the_mask_of_one_cut_never_changes_though_survivors_pass_through_zero() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    optimizer = SGD(model.parameters(), lr=1.0)
    pruner = pomona.Pruner(model, optimizer, Magnitude(0.5, every=1))
    model.weight.grad = torch.tensor([[1e-3, 0.0, 0.0, 0.0]])
    optimizer.step()
    model.weight.grad = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    optimizer.step()
    assert model.weight[0, 1:].tolist() == [0.0, 0.0, 0.0]
    model.weight.grad = torch.tensor([[0.0, -1.0, -1.0, -1.0]])
    optimizer.step()
    assert model.weight[0, 1:].tolist() == [1.0, 0.0, 0.0]
    assert masks(pruner)[0].tolist() == [[True, True, False, False]]


@each_optimizer
def test_the_optimizer_forgets_what_is_cut(optimizer: Callable[..., Optimizer]) -> None:
    model = net()
    one = optimizer(model.parameters())
    pruner = pomona.Pruner(model, one, Magnitude(pomona.Linear(0.0, 0.75, steps=10), every=5))
    train(model, one, batches(12))
    for p, mask in zip(pruner.parameters().values(), masks(pruner), strict=True):
        buffers = {name: b for name, b in one.state[p].items() if torch.is_tensor(b) and b.shape == p.shape}
        buffers.pop("step_size", None)  # of Rprop, which has a least one
        assert buffers and bool((~mask).any())
        for buffer in buffers.values():
            assert not buffer[~mask].any()
            assert bool(buffer[mask].any())


# what is cut stays cut


@pytest.mark.filterwarnings("ignore:.* starves layers")
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@given(start=st.floats(0.0, 0.9), way=st.floats(0.0, 1.0), every=st.integers(1, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_counts_are_exact_and_masks_nested(
    allocation: Allocation, start: float, way: float, every: int, seed: int
) -> None:
    sparsity = pomona.Cubic(start, start + (0.9 - start) * way, steps=8)
    model = Tensors(draw(seed))
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    pruner = pomona.Pruner(model, optimizer, Magnitude(sparsity, every=every, allocation=allocation))
    last = [mask.clone() for mask in masks(pruner)]
    for step in range(1, 12):
        grad_steps(model, optimizer, range(seed + step, seed + step + 1))
        k = num_kept(sparsity(step - (step - 1) % every), sum(SIZES))
        assert sum(counts(pruner)) == k
        if allocation != "global":
            assert counts(pruner) == allocate(allocation, SHAPES, k)
        for p, before, now in zip(model.w, last, masks(pruner), strict=True):
            assert not (now & ~before).any()
            assert not p.detach()[~now].any()
            assert not p.grad[~before].any()  # type: ignore[index]
        last = [mask.clone() for mask in masks(pruner)]
    assert pruner.harden().nonzero == num_kept(sparsity(11), sum(SIZES))


@pytest.mark.parametrize("sparsity", [0.0, pomona.Cubic(0.0, 0.5, steps=10, begin=3)])
def test_a_layer_that_starts_at_zero_is_not_cut_for_that(sparsity: Value) -> None:
    model = net()
    nn.init.zeros_(model[2].weight)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, Magnitude(sparsity, every=1))
    model[2].weight.requires_grad_(False)  # no gradient yet: it is still zero when the first cut comes
    train(model, optimizer, batches(2))
    assert counts(pruner) == [48, 24]
    model[2].weight.requires_grad_(True)
    train(model, optimizer, batches(1))
    assert bool(model[2].weight.detach().any())


def test_a_schedule_of_ones_own_that_falls_in_between_brings_nothing_back() -> None:
    @dataclasses.dataclass(frozen=True)
    class Dip(Schedule):
        def __call__(self, step: int) -> float:
            return 0.25 if 5 < step < 10 else 0.75

    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, Magnitude(Dip(), every=1))
    train(model, optimizer, batches(4))
    before = bits(masks(pruner))
    train(model, optimizer, batches(4))
    assert bits(masks(pruner)) == before
    with pytest.warns(UserWarning, match="in the middle of a schedule"):
        assert pruner.harden().nonzero == 18


# harden


def test_harden_before_the_first_cut_cuts_by_magnitude() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, Magnitude(0.75, begin=50))
    train(model, optimizer, batches(3))
    assert pruner.metrics() == {"sparsity": 0.0}
    weights = torch.cat([p.detach().flatten() for p in pruner.parameters().values()])
    expected = torch.zeros_like(weights)
    largest = weights.abs().topk(18).indices
    expected[largest] = weights[largest]
    assert pruner.harden().nonzero == 18
    assert torch.equal(torch.cat([p.detach().flatten() for p in pruner.parameters().values()]), expected)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_harden_between_two_cuts_reaches_the_sparsity_of_its_step(allocation: Allocation) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsity = pomona.Linear(0.0, 0.75, steps=8)
    pruner = pomona.Pruner(model, optimizer, Magnitude(sparsity, every=5, allocation=allocation))
    train(model, optimizer, batches(9))
    assert sum(counts(pruner)) == num_kept(sparsity(6), 72) > 18
    assert pruner.harden().nonzero == 18
    assert pruner.verify().nonzero == 18


def test_a_trial_cut_leaves_no_trace() -> None:
    model, other = net(), net()
    for each, tried in ((model, True), (other, False)):
        optimizer = SGD(each.parameters(), lr=0.1, momentum=0.9)
        pruner = pomona.Pruner(each, optimizer, Magnitude(pomona.Linear(0.0, 0.75, steps=8), every=3))
        train(each, optimizer, batches(5))
        if tried:
            with pruner.trial_cut() as report:
                assert report.nonzero == num_kept(0.75 * 5 / 8, 72)
        train(each, optimizer, batches(5, seed=1))
    assert bits(model.state_dict()) == bits(other.state_dict())


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6, 7])
def test_a_run_resumed_around_a_cut_ends_where_the_unbroken_one_does(at: int) -> None:
    def begin(seed: int) -> tuple[nn.Sequential, SGD, pomona.Pruner]:
        model = net(seed)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        return model, optimizer, pomona.Pruner(model, optimizer, Magnitude(CUBIC, every=3, begin=3))

    whole, broken, resumed = begin(0), begin(0), begin(1)
    train(whole[0], whole[1], batches(12))
    train(broken[0], broken[1], batches(12)[:at])
    for there, here in zip(broken, resumed, strict=True):
        here.load_state_dict(copy.deepcopy(there.state_dict()))  # type: ignore[arg-type]
    train(resumed[0], resumed[1], batches(12)[at:])
    assert bits([part.state_dict() for part in resumed]) == bits([part.state_dict() for part in whole])


# errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"sparsity": 90}, "sparsity must be in [0, 1), got 90 (did you mean 0.9?)"),
        ({"sparsity": 1.0}, "sparsity must be in [0, 1), got 1.0"),
        ({"sparsity": pomona.Cubic(0.0, 1.0, steps=5)}, "sparsity must be in [0, 1), got 1.0"),
        ({"sparsity": 0.9, "every": 0}, "every must be >= 1, got 0"),
        ({"sparsity": 0.9, "begin": 0}, "begin must be >= 1, got 0"),
        ({"sparsity": 0.9, "min_density": 1.1}, "min_density must be in [0, 1], got 1.1"),
        ({"sparsity": 0.9, "min_density": float("nan")}, "min_density must be in [0, 1], got nan"),
        ({"sparsity": 0.9, "allocation": "even"}, "allocation must be one of global, uniform, erk, got 'even'"),
        (
            {"sparsity": pomona.Linear(0.9, 0.5, steps=5)},
            "sparsity must not fall, because a cut weight never returns, got Linear(start=0.9, end=0.5, steps=5, "
            "begin=0), from 0.9 to 0.5; swap its ends, or use GSM, whose weights return",
        ),
    ],
)
def test_what_is_out_of_range_is_told_with_the_way_out(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        Magnitude(**arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"sparsity": "0.9"}, "sparsity must be a number or a Schedule, got '0.9'"),
        ({"sparsity": 0.9, "every": 10.0}, "every must be an integer, got 10.0"),
        ({"sparsity": 0.9, "begin": True}, "begin must be an integer, got True"),
        ({"sparsity": 0.9, "min_density": None}, "min_density must be a number, got None"),
    ],
)
def test_what_is_of_the_wrong_kind_is_told(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(told)}$"):
        Magnitude(**arguments)


def test_floors_above_the_budget_are_refused_before_training() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"min_density=0.5 alone keeps 36 of 72 scores, more than the budget of 18"):
        pomona.Pruner(model, SGD(model.parameters(), lr=0.1), Magnitude(0.75, min_density=0.5))
