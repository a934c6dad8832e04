"""WeightMom: what separates it from its neighbours, and each of its settings. Weights are led along written paths."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

import pomona
from pomona.methods.weightmom import WeightMom
from tests.problems import NUM_WEIGHTS, Kernels, batches, bits, net, train

# Most runs here are too short for the method to have done all.
pytestmark = pytest.mark.filterwarnings("ignore:harden.. at step .* comes early")

Layers = Sequence[Sequence[float]]


class Led:
    """Layers of weights that a test sets before each step; the optimizer itself would move nothing."""

    def __init__(self, method: WeightMom, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.model = Kernels([nn.Parameter(torch.ones(1, size, dtype=dtype)) for size in sizes])
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.pruner = pomona.Pruner(self.model, self.optimizer, method)

    def to(self, layers: Layers, *, steps: int = 1) -> Led:
        """Take ``steps`` steps with these weights."""
        for _ in range(steps):
            self.set(layers)
            for p in self.model:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
        return self

    def set(self, layers: Layers) -> None:
        for p, values in zip(self.model, layers, strict=True):
            p.data[0] = torch.tensor(values)

    def live(self) -> list[list[int]]:
        """Places of the weights that are not zero."""
        return [p.detach()[0].nonzero().view(-1).tolist() for p in self.model]

    def state(self, key: str) -> list[Tensor]:
        return [state[key][0] for state in self.pruner.state_dict()["state"].values()]

    def number(self, name: str) -> float:
        return self.pruner.metrics()[name]


def lead(method: WeightMom, *path: Layers) -> Led:
    led = Led(method, [len(layer) for layer in path[0]])
    for layers in path:
        led.to(layers)
    return led


# What separates it from its neighbours


def test_gradient_momentum_does_not_count() -> None:
    """A weight with all the gradient momentum but a small magnitude goes; a large one that nothing pulls at stays."""
    model = Kernels([nn.Parameter(torch.tensor([[0.1, 1.0, 1.0]]))])
    optimizer = SGD(model.parameters(), lr=1e-9, momentum=0.9)
    pomona.Pruner(model, optimizer, WeightMom(threshold=0.5, every=1, window=3, patience=2))
    for _ in range(2):
        model[0].grad = torch.tensor([[1e3, 0.0, 0.0]])
        optimizer.step()
    momentum = optimizer.state[model[0]]["momentum_buffer"]
    assert momentum.tolist() == [[1.9e3, 0.0, 0.0]]
    model[0].grad = torch.tensor([[1e3, 0.0, 0.0]])
    optimizer.step()
    assert model[0].tolist() == [[0.0, 1.0, 1.0]]


def test_an_oscillating_weight_stays() -> None:
    """Its mean is zero, that of its magnitude is not."""
    led = Led(WeightMom(threshold=0.5, every=1, window=4, patience=2), [3])
    for i in range(20):
        led.to([[(-1.0) ** i, 1.0, 0.1]])
    assert led.live() == [[0, 1]]


@pytest.mark.parametrize("target", [{"sparsity": 1 / 3}, {"threshold": 0.5}])
def test_the_magnitude_of_the_moment_does_not_count(target: dict[str, float]) -> None:
    """Small just now, large over the window: stays. Large just now, small over the window: goes."""
    small_before, small_now = [[0.1, 1.0, 1.0]], [[0.9, 0.01, 1.0]]
    led = lead(WeightMom(every=1, window=10, patience=3, **target), *[small_before] * 9, small_now)
    assert led.live() == [[1, 2]]


def test_the_final_cut_ranks_by_the_average() -> None:
    led = lead(WeightMom(sparsity=1 / 3, every=1, window=10), *[[[0.1, 1.0, 1.0]]] * 5, [[0.9, 0.01, 1.0]])
    assert led.live() == [[0, 1, 2]]
    led.pruner.harden()
    assert led.live() == [[1, 2]]


def test_before_the_first_update_the_final_cut_ranks_by_magnitude() -> None:
    led = Led(WeightMom(sparsity=0.5, every=10), [4, 4]).to([[4, 1, 3, 2], [50, 30, 10, 20]])
    assert led.pruner.harden().nonzero == 4
    assert led.live() == [[0, 2], [0, 1]]  # each layer against its own mean


# Average, patience and history


def test_the_average_is_that_of_the_magnitudes_after_the_step() -> None:
    led = lead(WeightMom(threshold=0.1, every=1, window=4), [[1.0, -2.0]], [[3.0, 2.0]])
    # m: a quarter, then 3/4 of it and a quarter of the next; all exact in binary
    assert led.state("m")[0].tolist() == [0.25 * 0.75 + 0.75, 0.5 * 0.75 + 0.5]
    assert led.number("updates") == 2


def test_steady_weights_do_not_look_small_while_the_average_fills() -> None:
    led = Led(WeightMom(threshold=0.9, every=1, window=50, patience=1), [3])
    for _ in range(60):
        led.to([[1.0, -1.0, 1.0]])
        assert led.number("waiting") == 0
    assert led.live() == [[0, 1, 2]]


@pytest.mark.parametrize(("window", "patience", "gone_after"), [(1, 1, 1), (1, 4, 4), (6, 4, 6), (6, 8, 8), (6, 1, 6)])
@pytest.mark.parametrize("target", [{"sparsity": 1 / 3}, {"threshold": 0.5}])
def test_nothing_goes_before_window_and_patience_are_over(
    window: int, patience: int, gone_after: int, target: dict[str, float]
) -> None:
    led = Led(WeightMom(every=1, window=window, patience=patience, **target), [3])
    live_counts = [len(led.to([[1.0, 0.1, 1.0]]).live()[0]) for _ in range(10)]
    assert live_counts == [3] * (gone_after - 1) + [2] * (11 - gone_after)


def test_updates_are_counted_and_not_steps() -> None:
    led = Led(WeightMom(threshold=0.5, every=5, window=2, patience=3), [3])
    led.to([[1.0, 0.1, 1.0]], steps=14)
    assert (led.number("updates"), led.number("waiting"), led.live()) == (2, 1, [[0, 1, 2]])
    led.to([[1.0, 0.1, 1.0]])
    assert (led.number("updates"), led.number("waiting"), led.live()) == (3, 0, [[0, 2]])


def test_what_happens_between_two_updates_is_not_seen() -> None:
    led = Led(WeightMom(threshold=0.5, every=2, window=2, patience=2), [3])
    for _ in range(10):
        led.to([[1.0, 0.01, 1.0]]).to([[1.0, 1.0, 1.0]])
    assert led.live() == [[0, 1, 2]]


def test_a_weight_that_recovers_starts_its_count_anew() -> None:
    low, high = [[1.0, 0.1, 1.0]], [[1.0, 1.0, 1.0]]
    led = lead(WeightMom(threshold=0.5, every=1, window=1, patience=3), low, low, high, low, low)
    assert led.state("count")[0].tolist() == [0, 2, 0]
    assert led.live() == [[0, 1, 2]]
    assert led.to(low).live() == [[0, 2]]


def test_the_count_saturates() -> None:
    """300 updates low while the history is gathered: 255 and not 300 - 256 = 44."""
    led = Led(WeightMom(threshold=0.5, every=1, window=301, patience=200), [2])
    led.to([[0.1, 1.0]], steps=300)
    assert led.state("count")[0].tolist() == [255, 0]
    assert led.live() == [[0, 1]]
    assert led.to([[0.1, 1.0]]).live() == [[1]]


# Threshold


def test_decay_that_shrinks_all_alike_prunes_nothing() -> None:
    led = Led(WeightMom(threshold=0.5, every=1, window=5, patience=2), [4])
    for step in range(100):
        led.to([[0.9**step * value for value in (1.0, 0.8, -1.2, 0.7)]])
    assert float(led.model[0].detach().abs().max()) < 1e-4
    assert led.live() == [[0, 1, 2, 3]]


def test_the_threshold_scales_with_each_layer() -> None:
    layers = [[1.0, 1.0, 0.3], [1e-3, 1e-3, 0.3e-3], [1e3, 1e3, 0.3e3]]
    led = lead(WeightMom(threshold=0.5, every=1, window=1, patience=1), layers)
    assert led.live() == [[0, 1]] * 3


def test_pruned_zeros_are_not_in_the_mean() -> None:
    """Without the ten small ones the mean is 7.7 and 3 is below its half; with ten zeros it stays at 1.8."""
    layers = [[10.0, 10.0, 3.0] + [0.1] * 10]
    led = lead(WeightMom(threshold=0.5, every=1, window=1, patience=1), layers)
    assert led.live() == [[0, 1, 2]]
    assert led.to(layers).live() == [[0, 1]]


DOCS = (Path(__file__).parents[2] / "docs/methods/weightmom.md").read_text(encoding="utf-8")
ENDS = re.findall(r"\| (0\.\d) \| ([\d.]+) % \| ([\d.]+) % \|", DOCS)


@pytest.mark.parametrize(("theta", "at_first", "in_the_end"), [tuple(map(float, row)) for row in ENDS])
def test_gaussian_weights_that_stand_still_end_as_the_docs_say(
    theta: float, at_first: float, in_the_end: float
) -> None:
    """The mean of the survivors rises as the small ones go, up to t = theta mean(|w|, |w| > t)."""
    normal, size = NormalDist(), 4000
    values = [[normal.inv_cdf((place + 0.5) / size) for place in range(size)]]
    led = lead(WeightMom(threshold=theta, every=1, window=1, patience=1), values)
    assert led.number("sparsity") == pytest.approx(2 * normal.cdf(theta * (2 / math.pi) ** 0.5) - 1, abs=1 / size)
    assert 100 * led.number("sparsity") == pytest.approx(at_first, abs=0.1)
    led.to(values, steps=60)
    t = 0.0
    for _ in range(200):
        t = theta * normal.pdf(t) / (1 - normal.cdf(t))
    assert led.number("sparsity") == pytest.approx(2 * normal.cdf(t) - 1, abs=8 / size)
    assert 100 * led.number("sparsity") == pytest.approx(in_the_end, abs=0.2)


def test_the_docs_have_that_table() -> None:
    assert [row[0] for row in ENDS] == ["0.1", "0.3", "0.5", "0.7"]


# Importance of layers

ALONE = {
    # After half of the first layer has gone: D / d = 1.5 and 0.75, so thresholds 0.31 and 0.65.
    "sparsity": [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]],
    # 0.46 and 0.49.
    "none": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]],
}


@pytest.mark.parametrize("importance", ["sparsity", "none"])
def test_by_sparsity_a_layer_sparser_than_the_others_is_spared(importance: Any) -> None:
    layers = [[1.0] * 7 + [0.4] + [0.01] * 8, [1.0] * 15 + [0.6]]
    led = lead(WeightMom(threshold=0.5, every=1, window=1, patience=1, importance=importance), layers)
    assert led.live() == [list(range(8)), list(range(16))]
    assert led.to(layers).live() == ALONE[importance]


@pytest.mark.parametrize("importance", ["sparsity", "none"])
def test_by_sparsity_the_target_too_falls_on_the_denser_layer(importance: Any) -> None:
    """Half of the first layer goes, then one more weight of either."""
    layers = [[1.0] * 7 + [0.4] + [0.01] * 8, [1.0] * 15 + [0.6]]
    ramp = pomona.Linear(8 / 32, 9 / 32, steps=1, begin=1)
    led = lead(WeightMom(ramp, every=1, window=1, patience=1, importance=importance), layers)
    assert led.live() == [list(range(8)), list(range(16))]
    led.to(layers)
    if importance == "sparsity":  # s = 0.4 / 0.925 * 1.5 = 0.65 and 0.6 / 0.975 * 0.75 = 0.46
        assert led.live() == [list(range(8)), list(range(15))]
    else:
        assert led.live() == [list(range(7)), list(range(16))]


def test_by_position_early_and_small_layers_are_spared() -> None:
    """Both ways (l n)^(-1/4) is 2^(1/4) apart, so theta 0.5 becomes 0.4585 and 0.5453 of the mean, which is 1."""
    method = WeightMom(threshold=0.5, every=1, window=1, patience=1, importance="position")
    spared = [1.55, 0.45, 1.53, 0.47]
    not_spared = [1.46, 0.54, 1.45, 0.55]
    assert lead(method, [spared, not_spared]).live() == [[0, 2, 3]] * 2
    assert lead(method, [not_spared * 4, spared]).live() == [[i for i in range(16) if i % 4 != 1], [0, 2, 3]]


def test_by_position_the_importances_have_the_geometric_mean_1() -> None:
    """One layer alone, or several of equal l n (12, 6, 4), have the plain threshold."""
    method = WeightMom(threshold=0.5, every=1, window=1, patience=1, importance="position")
    for sizes in ([10], [12, 6, 4]):
        below, above = 0.49, 0.51  # of the mean: the first weight makes up for the second
        layers = [[2.0 - below, below, 2.0 - above, above] + [1.0] * (size - 4) for size in sizes]
        expected = [[place for place in range(size) if place != 1] for size in sizes]
        assert lead(method, layers).live() == expected


# Target


def test_the_pruned_share_follows_the_target_patience_updates_later() -> None:
    """With one layer, in which no weight overtakes another."""
    values = [[float(value) for value in range(1, 101)]]
    ramp = pomona.Cubic(0.0, 0.9, steps=60)
    led = Led(WeightMom(ramp, every=3, window=2, patience=4), [100])
    wanted: list[int] = []
    for update in range(1, 31):
        led.to(values, steps=3)
        wanted.append(100 - pomona.budget.num_kept(ramp(3 * update), 100))
        pruned = 100 - len(led.live()[0])
        assert pruned == (wanted[-4] if update >= 4 else 0)
    assert pruned == 90
    assert led.number("sparsity") == pytest.approx(0.9, abs=1e-12)


def test_weights_that_are_zero_throughout_go_no_earlier_than_the_target_says() -> None:
    """A head initialised to zero may still learn."""
    led = lead(WeightMom(sparsity=0.25, every=1, window=1, patience=1), *[[[0.0] * 6 + [1.0, 2.0]]] * 3)
    assert [int(mask.sum()) for mask in led.state("mask")] == [6]
    assert led.pruner.harden().nonzero == 2


@pytest.mark.filterwarnings("ignore:.* starves layers")
def test_a_sparse_layer_that_falls_to_zero_is_ranked_last() -> None:
    """Its mean is 0 and its importance 32."""
    method = WeightMom(threshold=0.5, every=1, window=1, patience=1, min_density=0.0)
    led = lead(method, [[1.0] * 64, [1.0] + [1e-3] * 63])
    assert led.live() == [list(range(64)), [0]]
    led.to([[1.0] * 64, [0.0] * 64])
    assert led.number("sparsity") == 0.5
    assert led.to([[1.0] * 64, [1.0] * 64]).live() == [list(range(64)), []]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.97])
@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_the_budget_is_exact_whenever_it_is_hardened(sparsity: float, steps: int) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pomona.Pruner(model, optimizer, WeightMom(sparsity, every=2, window=3, patience=2))
    train(model, optimizer, batches(steps))
    kept = pomona.budget.num_kept(sparsity, NUM_WEIGHTS)
    assert pruner.harden(one_shot=steps == 0).nonzero == kept
    train(model, optimizer, batches(5, seed=1))
    assert pruner.verify().nonzero == kept


def test_ties_are_cut_to_the_exact_budget() -> None:
    """Without an importance all 20 scores are equal; the earlier ones stay, but for the floor of one a layer."""
    values = [[1.0] * 10, [-1.0] * 10]
    led = lead(WeightMom(sparsity=0.6, every=1, window=2, patience=2, importance="none"), *[values] * 4)
    assert led.live() == [list(range(7)), [0]]
    assert led.pruner.harden().nonzero == 8


def test_a_fixed_threshold_has_no_budget_and_hardens_to_its_mask() -> None:
    method = WeightMom(threshold=0.5, every=1, window=1, patience=1)
    led = lead(method, [[1.0, 0.1, 1.0, 0.6]])
    assert method.budget.num_kept(4, 1) == 4
    assert led.pruner.harden().nonzero == 3
    assert led.live() == [[0, 2, 3]]


# Floor


def test_min_density_holds_the_largest_of_each_layer() -> None:
    """With a threshold of ten times the mean every weight is low."""
    values = [[float(value) for value in (3, 9, 1, 7, 5, 2, 8, 4, 6, 10)], [3.0, 1.0, 2.0]]
    led = lead(WeightMom(threshold=10, every=1, window=2, patience=2, min_density=0.25), *[values] * 6)
    assert led.live() == [[1, 6, 9], [0]]  # ceil(2.5) and ceil(0.75)
    assert [layer.reason for layer in led.pruner.harden().layers] == ["held at the floor min_density=0.25"] * 2


def test_min_density_binds_the_target_too() -> None:
    """A layer of one large and nine tiny weights would keep one."""
    values = [[10.0] + [0.01] * 9, [1.0] * 30]
    kept = {}
    for floor in (0.0, 0.4):
        method = WeightMom(sparsity=0.5, every=1, window=1, patience=1, importance="none", min_density=floor)
        led = lead(method, *[values] * 3)
        kept[floor] = [len(places) for places in led.live()]
        assert led.pruner.harden().nonzero == 20
    assert kept == {0.0: [1, 19], 0.4: [4, 16]}


@pytest.mark.filterwarnings("ignore:.* starves layers")
def test_without_a_floor_a_layer_may_be_emptied_and_training_goes_on() -> None:
    values = [[1.0, 2.0], [1.0, 1.0, 1.0, 5.0]]
    method = WeightMom(threshold=1.1, every=1, window=1, patience=1, min_density=0.0)
    led = lead(method, *[values] * 5)
    assert led.live()[0] == []
    report = led.pruner.harden()
    assert report.layers[0].reason.startswith("emptied")


# Zeros

OPTIMIZERS: list[Callable[..., Optimizer]] = [
    partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    partial(Adam, lr=0.05, weight_decay=0.1, amsgrad=True),
    partial(AdamW, lr=0.05, weight_decay=0.1),
    partial(NAdam, lr=0.05),
    partial(RMSprop, lr=0.01, momentum=0.9),
]


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS, ids=lambda part: part.func.__name__)
def test_pruned_weights_stay_zero_and_the_optimizer_forgets_them(optimizer_of: Callable[..., Optimizer]) -> None:
    model = net()
    optimizer = optimizer_of(model.parameters())
    pruner = pomona.Pruner(model, optimizer, WeightMom(pomona.Linear(0, 0.8, steps=30), every=2, window=3, patience=2))
    masks = [state["mask"] for state in pruner.state_dict()["state"].values()]  # live ones
    weights = list(pruner.parameters().values())
    for batch in batches(45):
        before = [mask.clone() for mask in masks]
        train(model, optimizer, [batch])
        for p, mask, old in zip(weights, masks, before, strict=True):
            assert bits(p[~mask]) == bits(torch.zeros_like(p)[~mask])  # +0.0
            assert not bool(p.grad[~old].any())  # type: ignore[index]
            for buffer in optimizer.state[p].values():
                assert buffer.ndim == 0 or not bool(buffer[~mask].any())
    assert 14 <= pruner.report().nonzero <= 20  # the target is 14; some have not been low for long


def test_survivors_with_a_gradient_train_on() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, WeightMom(0.5, every=1, window=1, patience=1))
    train(model, optimizer, batches(3))
    weights = list(pruner.parameters().values())
    before = [p.detach().clone() for p in weights]
    train(model, optimizer, batches(1, seed=1))
    assert pruner.report().nonzero == 36
    for p, old in zip(weights, before, strict=True):
        assert bits(p) == bits(old - 0.1 * p.grad)  # type: ignore[operator]
    assert sum(int((p != old).sum()) for p, old in zip(weights, before, strict=True)) > 30


@pytest.mark.filterwarnings("ignore:harden.. in the middle of a schedule")
@settings(deadline=None)
@given(
    path=st.lists(st.lists(st.integers(-4, 4), min_size=17, max_size=17), min_size=3, max_size=12),
    target=st.one_of(
        st.floats(0.05, 3.0).map(lambda threshold: {"threshold": threshold}),
        st.floats(0.0, 0.8).map(lambda sparsity: {"sparsity": sparsity}),
        st.floats(0.0, 0.8).map(lambda sparsity: {"sparsity": pomona.Cubic(0.0, sparsity, steps=6)}),
    ),
    every=st.integers(1, 2),
    window=st.integers(1, 4),
    patience=st.integers(1, 4),
    importance=st.sampled_from(["sparsity", "position", "none"]),
    min_density=st.sampled_from([0.0, 0.01, 0.15]),
)
@pytest.mark.filterwarnings("ignore:.* starves layers")
def test_masks_only_shrink_and_never_beyond_target_and_floor(path: list[list[float]], **hyper: Any) -> None:
    target = hyper.pop("target")
    method = WeightMom(**target, **hyper)
    led = Led(method, [5, 12])
    floors = {0.0: [0, 0], 0.01: [1, 1], 0.15: [1, 2]}[hyper["min_density"]]
    before = [mask.clone() for mask in led.state("mask")]
    for step, values in enumerate(path, start=1):
        led.to([values[:5], values[5:]])
        masks = [mask.clone() for mask in led.state("mask")]
        assert not any(bool((now & ~then).any()) for now, then in zip(masks, before, strict=True))
        assert not any(bool(p[0][~mask].any()) for p, mask in zip(led.model, masks, strict=True))
        if step < hyper["every"] * max(hyper["window"], hyper["patience"]):
            assert num_true(masks) == 17
        assert all(int(mask.sum()) >= floor for mask, floor in zip(masks, floors, strict=True))
        if method.sparsity is not None:
            assert num_true(masks) >= method.budget.num_kept(17, step)
        before = masks
    led.pruner.harden()
    pruned = led.pruner.state_dict()["pruned"].values()
    budget = num_true(before) if method.sparsity is None else method.budget.num_kept(17, len(path))
    assert 17 - num_true(pruned) == budget


def num_true(masks: Iterable[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


# Resuming, half precision, metrics


def test_a_run_resumed_between_two_updates_is_the_same() -> None:
    def start(seed: int) -> tuple[nn.Module, Optimizer, pomona.Pruner]:
        model = net(seed)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = WeightMom(pomona.Linear(0, 0.7, steps=20), every=4, window=2, patience=2)
        return model, optimizer, pomona.Pruner(model, optimizer, method)

    data = batches(40)
    whole = start(0)
    for i, batch in enumerate(data):
        if i == 18:  # two steps after the fourth update, with weights pruned and weights waiting
            assert whole[2].metrics()["sparsity"] > 0 and whole[2].metrics()["waiting"] > 0
            file = io.BytesIO()
            torch.save([part.state_dict() for part in whole], file)
        train(whole[0], whole[1], [batch])
    file.seek(0)
    resumed = start(1)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[1], data[18:])
    assert bits([part.state_dict() for part in resumed]) == bits([part.state_dict() for part in whole])


def test_weights_loaded_after_the_pruner_are_the_ones_that_count() -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, WeightMom(sparsity=1 / 3, every=1))
    model.load_state_dict({"weight": torch.tensor([[3.0, 1.0, 2.0]])})
    model.weight.grad = torch.zeros(1, 3)
    optimizer.step()
    pruner.harden()
    assert model.weight.tolist() == [[3.0, 0.0, 2.0]]


def test_the_average_of_half_precision_weights_is_float32() -> None:
    """In bfloat16 a change of 1 % of a number is lost."""
    led = Led(WeightMom(threshold=0.5, every=1, window=100), [2], dtype=torch.bfloat16)
    led.to([[1.0, 1.0078125]], steps=300)
    (m,) = led.state("m")
    assert m.dtype is torch.float32
    # 300 roundings to 2^-24 relative
    assert (m / (1 - 0.99**300)).tolist() == pytest.approx([1.0, 1.0078125], rel=300 * 2**-24)
    assert {p.dtype for p in led.model} == {torch.bfloat16}


def test_metrics_count_what_is_pruned_and_what_waits() -> None:
    led = Led(WeightMom(threshold=0.5, every=1, window=1, patience=2), [4, 4])
    led.to([[1.0, 1.0, 1.0, 0.1], [1.0, 1.0, 0.1, 0.1]])
    assert led.pruner.metrics() == {"sparsity": 0.0, "waiting": 3.0, "updates": 1.0}
    led.to([[1.0, 1.0, 1.0, 0.1], [1.0, 0.1, 0.1, 1.0]])
    assert led.pruner.metrics() == {"sparsity": 0.25, "waiting": 1.0, "updates": 2.0}


def test_the_report_says_how_a_layer_came_to_its_share() -> None:
    led = lead(WeightMom(sparsity=0.5, every=1, window=1, patience=1), *[[[1.0] * 4 + [0.1] * 6, [1.0] * 8]] * 2)
    # Half of 18 stay: the four large ones of the first layer, and five of the eight ties of the second.
    assert [layer.reason for layer in led.pruner.harden().layers] == [
        "0.8x the network's share, by the running mean of |w|",
        "1.2x the network's share, by the running mean of |w|",
    ]


# Errors

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sparsity": 0.9, "threshold": 0.3}, ValueError, "either a target, sparsity=0.9, or a fixed threshold=0.3"),
    ({}, ValueError, "got sparsity=None and threshold=None"),
    ({"sparsity": 90}, ValueError, r"sparsity must be in \[0, 1\), got 90 \(did you mean 0.9\?\)"),
    ({"sparsity": pomona.Cubic(0.0, 1.0, steps=3)}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
    ({"sparsity": pomona.Linear(0.9, 0.5, steps=9)}, ValueError, "sparsity must not fall.* from 0.9 to 0.5; swap"),
    ({"sparsity": "0.9"}, TypeError, "sparsity must be a number or a Schedule"),
    *[
        ({"threshold": bad}, ValueError, "threshold must be > 0 and finite")
        for bad in (0, -0.1, float("nan"), float("inf"))
    ],
    *[({"threshold": bad}, TypeError, "threshold must be a number") for bad in ("1", True, pomona.Constant(0.3))],
    *[({"threshold": 0.3, "every": bad}, TypeError, "every must be an integer") for bad in (1.0, None, True)],
    ({"threshold": 0.3, "every": 0}, ValueError, "every must be >= 1, got 0"),
    *[({"threshold": 0.3, "window": bad}, TypeError, "window must be an integer") for bad in (2.5, "15", True)],
    ({"threshold": 0.3, "window": 0}, ValueError, "window must be >= 1, got 0"),
    *[({"threshold": 0.3, "patience": bad}, TypeError, "patience must be an integer") for bad in (2.5, None, True)],
    *[({"threshold": 0.3, "patience": bad}, ValueError, "patience must be >= 1, got") for bad in (0, -1)],
    ({"threshold": 0.3, "patience": 256}, ValueError, r"patience must be in \[1, 255\], got 256"),
    *[
        ({"threshold": 0.3, "importance": bad}, ValueError, "importance must be one of sparsity, position, none, got")
        for bad in ("size", None)
    ],
    *[
        ({"threshold": 0.3, "min_density": bad}, ValueError, r"min_density must be in \[0, 1\], got")
        for bad in (-0.1, 1.5, float("nan"))
    ],
    *[({"threshold": 0.3, "min_density": bad}, TypeError, "min_density must be a number") for bad in ("0", None, True)],
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_settings_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightMom(**{"every": 1, **arguments})


def test_every_must_be_given() -> None:
    with pytest.raises(TypeError, match="every"):
        WeightMom(0.9)  # type: ignore[call-arg]


def test_floors_beyond_the_budget_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"min_density=0\.2 alone keeps 15 of 72 scores, more than the budget of 7"):
        pomona.Pruner(model, SGD(model.parameters(), lr=0.1), WeightMom(0.9, every=1, min_density=0.2))
    pomona.Pruner(model, SGD(model.parameters(), lr=0.1), WeightMom(threshold=0.9, every=1, min_density=0.2))
