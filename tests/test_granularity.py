"""What goes together: n of every m, blocks, channels; against numpy, and as every method keeps them."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import pomona
from pomona.budget import Budget, num_kept
from pomona.granularity import Block, Channel, NOfM, Single, canonical, parse
from pomona.schedule import Cosine, Cubic
from pomona.score import saliency
from pomona.selection import NonFiniteError
from pomona.selection.allocation import Allocation
from pomona.selection.groups import Seen, block_scores, violations
from pomona.selection.top_k import top_k
from pomona.train.recipe import load_recipe
from pomona.train.stage import RecipeError
from pomona.weight import Weight
from tests.oracles import granularity as oracle
from tests.problems import bits

fast = settings(deadline=None)

GROUPED = ["2:4", "1:4", "1:2", "3:4", "2:8", "1x4", "4x1", "2x2", "channel", "input channel"]
# Few distinct values, many zero: ties everywhere; eighths, whose squares and sums are exact.
TIED = st.sampled_from([0.0, 0.0, 0.125, 0.5, 0.5, 1.0, 1.0, 2.0])


@st.composite
def layers(draw: st.DrawFn, values: st.SearchStrategy[float] = TIED) -> list[np.ndarray]:
    """Arrays that all of GROUPED fit."""
    shapes = draw(st.lists(st.sampled_from([(4, 8), (8, 8), (4, 8, 3), (4, 16, 2, 1)]), min_size=1, max_size=3))
    return [np.array(draw(st.lists(values, min_size=(n := math.prod(s)), max_size=n))).reshape(s) for s in shapes]


def tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(a).float() for a in arrays]


def convnet(seed: int = 0) -> nn.Sequential:
    """8 -> 8 -> 12 channels, then 192 -> 8: 576 + 864 + 1,536 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(192, 8))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def start(method: pomona.Method, **options: Any) -> tuple[nn.Sequential, SGD, pomona.Pruner]:
    model = convnet()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    return model, optimizer, pomona.Pruner(model, optimizer, method, **options)


def harden(pruner: pomona.Pruner) -> pomona.Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these runs are short
        return pruner.harden()


def weights_of(shapes: Sequence[Sequence[int]]) -> list[Weight]:
    return [Weight(f"w{i}", torch.ones(*shape), torch.empty(0), {}, {}) for i, shape in enumerate(shapes)]


# the word


@pytest.mark.parametrize(
    ("written", "kind", "canonically"),
    [
        ("weight", Single(), "weight"),
        ("2:4", NOfM(2, 4), "2:4"),
        ("1x4", Block(1, 4), "1x4"),
        ((1, 4), Block(1, 4), "1x4"),
        ([16, 1], Block(16, 1), "16x1"),
        ("1x1", Single(), "weight"),
        ("channel", Channel(1), "channel"),
        ("input channel", Channel(2), "input channel"),
    ],
)
def test_what_the_word_means(written: Any, kind: object, canonically: str) -> None:
    assert parse(written) == kind
    assert canonical(written) == canonically
    assert pomona.Magnitude(0.5, granularity=written).granularity == canonically


@pytest.mark.parametrize("granularity", ["4:4", "5:4", "0:4", "filter", "2:", "0x4", (0, 1), "-1x2", ""])
def test_what_is_no_granularity_is_refused_with_what_there_is(granularity: Any) -> None:
    with pytest.raises(ValueError, match=r"0 < n < m|at least one output|must be \"weight\", \"n:m\" such as \"2:4\""):
        pomona.Magnitude(0.5, granularity=granularity)


@pytest.mark.parametrize("granularity", [None, 4, True, (1.0, 4), (True, 4), (1, 2, 3)])
def test_what_is_neither_text_nor_a_pair_of_integers_is_a_type_error(granularity: Any) -> None:
    with pytest.raises(TypeError, match="granularity must be"):
        pomona.Magnitude(0.5, granularity=granularity)


@pytest.mark.parametrize("make", [pomona.Magnitude, pomona.ADMM, pomona.GSM])
def test_a_sparsity_that_contradicts_n_of_m_is_an_error(make: Callable[..., pomona.Method]) -> None:
    with pytest.raises(
        ValueError, match=re.escape("keeps 2 of every 4 weights, so that sparsity must be 0.5, got 0.9")
    ):
        make(0.9, granularity="2:4")
    make(1 - 1 / 3, granularity="1:3")
    with pytest.raises(ValueError, match=re.escape("sparsity must be 1 - 1/3, got 0.66")):
        make(0.66, granularity="1:3")


def test_a_schedule_must_end_at_n_of_m_and_be_highest_there() -> None:
    pomona.Magnitude(Cubic(0.0, 0.5, steps=9), granularity="2:4")
    with pytest.raises(ValueError, match=re.escape("must be 0.5 at its end, and highest there, got Cubic(")):
        pomona.Magnitude(Cubic(0.0, 0.75, steps=9), granularity="2:4")
    with pytest.raises(ValueError, match="highest there"):
        pomona.GSM(Cosine(0.75, 0.5, steps=9), granularity="2:4")


def test_shares_by_layer_contradict_n_of_m() -> None:
    with pytest.raises(ValueError, match="take allocation='uniform'"):
        pomona.RigL(0.5, granularity="2:4")
    with pytest.raises(ValueError, match=re.escape("granularity='2:4' needs sparsity=0.5, and no shares by layer")):
        pomona.ADMM(densities={"*": 0.5}, granularity="2:4")
    with pytest.raises(ValueError, match=re.escape("needs a budget, which threshold=0.3 is not")):
        pomona.WeightMom(threshold=0.3, every=1, granularity="1x4")


# selection


@given(layers(), st.sampled_from(["2:4", "1:4", "1:2", "3:4", "2:8"]), st.floats(0, 1))
@fast
def test_n_of_m_is_the_best_of_each_group_and_then_the_best_of_all(
    arrays: list[np.ndarray], granularity: str, share: float
) -> None:
    n, m = map(int, granularity.split(":"))
    total = sum(a.size for a in arrays)
    k = total * n // m + int(share * (total - total * n // m))
    got = top_k(tensors(arrays), k, granularity=granularity)
    for mask, expected in zip(got, oracle.n_of_m_masks(arrays, granularity, k), strict=True):
        assert mask.tolist() == expected.tolist()


@given(layers(), st.sampled_from(["1x4", "4x1", "2x2", "channel", "input channel"]), st.floats(0, 1), st.booleans())
@fast
def test_blocks_and_channels_are_those_of_the_largest_mean_square(
    arrays: list[np.ndarray], granularity: str, share: float, has_floor: bool
) -> None:
    k = int(share * sum(a.size for a in arrays))
    floor = 0.3 if has_floor else 0.0
    groups = [oracle.groups_of(a.shape, granularity) for a in arrays]
    if sum(math.ceil(floor * len(g)) * len(g[0]) for g in groups) > k:
        floor = 0.0
    expected = oracle.group_masks(arrays, granularity, k, floor)
    if "x" in granularity and k % 4:  # the k // 4 best blocks
        expected = oracle.group_masks(arrays, granularity, k - k % 4, floor)
    got = top_k(tensors(arrays), k, granularity=granularity, min_density=floor)
    for mask, wanted in zip(got, expected, strict=True):
        assert mask.tolist() == wanted.tolist()


@given(layers(st.floats(0, 2.0**100, width=32)), st.sampled_from(GROUPED), st.floats(0, 1))
@fast
def test_whatever_the_scores_groups_are_whole_and_none_that_is_kept_is_below_one_that_is_cut(
    arrays: list[np.ndarray], granularity: str, share: float
) -> None:
    total = sum(a.size for a in arrays)
    kind = parse(granularity)
    k = total * kind.n // kind.m if isinstance(kind, NOfM) else int(share * total)
    masks = top_k(tensors(arrays), k, granularity=granularity)
    assert sum(int(mask.sum()) for mask in masks) <= k
    assert violations(granularity, [~mask for mask in masks], weights_of([mask.shape for mask in masks])) == []
    kept, cut = [], []
    for a, mask in zip(arrays, masks, strict=True):
        for group in oracle.groups_of(a.shape, granularity):
            if isinstance(kind, NOfM):
                here = sorted((float(a[i]) for i in group if a[i] > 0), reverse=True)
                assert sorted((float(a[i]) for i in group if mask[i]), reverse=True) == here[: kind.n]
            else:
                square = math.fsum(float(a[i]) ** 2 for i in group) / len(group)
                (kept if mask[group[0]] else cut).append(square)
    if kept and cut and not isinstance(kind, Channel):  # of channels the next best may just be too large
        assert min(kept) >= max(cut) * (1 - 1e-4)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["2x2", "1x8", "channel", "input channel"]))
@fast
def test_the_score_of_a_group_depends_on_no_order_of_summation(seed: int, granularity: str) -> None:
    """Weights that change places within their groups change nothing, bit for bit."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((4, 8, 3)) * 10.0 ** rng.uniform(-20, 20, (4, 8, 3))).astype(np.float32)
    other = w.copy()
    for group in oracle.groups_of(w.shape, granularity):
        for i, j in zip(group, rng.permutation(len(group)), strict=True):
            other[i] = w[group[j]]
    kind = parse(granularity)
    if isinstance(kind, Block):
        one, another = (block_scores(Seen.of(torch.from_numpy(x), None), kind) for x in (w, other))
        assert torch.equal(one, another)
    for k in (30, 50, 70):
        a, b = (top_k([torch.from_numpy(x)], k, granularity=granularity)[0] for x in (w, other))
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-20, 1.0, 1e20, 1e38])
def test_scores_of_any_size_are_ranked(scale: float) -> None:
    """Where squares in float32 would be zero or infinite."""
    w = torch.ones(2, 8)
    w[1] = 3
    (mask,) = top_k([w * scale], 8, granularity="1x4")
    assert mask.tolist() == [[False] * 8, [True] * 8]
    (score,) = block_scores(Seen.of(w * scale, None), Block(1, 4))
    assert torch.allclose(score, (w * scale)[:, ::4], rtol=2**-18, atol=0)  # what the scores are rounded to


@pytest.mark.parametrize("granularity", GROUPED)
def test_infinities_rank_above_all_and_a_nan_is_refused(granularity: str) -> None:
    w = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    w[3, 3] = torch.inf
    (mask,) = top_k([w], 48, granularity=granularity)
    assert mask[3, 3]
    w[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="a score is NaN"):
        top_k([w], 48, granularity=granularity)


@pytest.mark.parametrize("granularity", GROUPED)
def test_a_group_of_zeros_is_never_kept(granularity: str) -> None:
    (mask,) = top_k([torch.zeros(8, 8)], 64, granularity=granularity)
    assert not mask.any()


def test_saliencies_are_grouped_too() -> None:
    w, g = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0, 5.0]])
    (mask,) = top_k([saliency(w, g)], 2, granularity="2:4")
    assert mask.tolist() == [[False, True, False, True]]


def test_in_a_convolution_groups_run_along_the_input_channels_at_each_place_of_the_kernel() -> None:
    w = torch.zeros(1, 4, 1, 2)
    w[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    w[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (mask,) = top_k([w], 4, granularity="2:4")
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]
    (mask,) = top_k([w], 4, granularity="1x2")
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts_are_ranked_as_float32(allocation: Allocation, dtype: torch.dtype) -> None:
    w = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for granularity in GROUPED:
        k = 432 if granularity == "3:4" else 288
        for one in (w, w.to(memory_format=torch.channels_last), w.transpose(2, 3).contiguous().transpose(2, 3)):
            (mask,) = top_k([one], k, allocation, granularity=granularity)
            assert torch.equal(mask, top_k([w.float()], k, allocation, granularity=granularity)[0])


def test_an_allocation_by_layer_deals_blocks_and_fills_shares_with_channels() -> None:
    ws = [torch.rand(8, 8, generator=torch.Generator().manual_seed(i)) * 10**i for i in range(3)]
    assert [int(m.sum()) for m in top_k(ws, 96, "uniform", granularity="1x4")] == [32, 32, 32]
    assert [int(m.sum()) for m in top_k(ws, 100, "uniform", granularity="channel")] == [32, 32, 32]
    assert [int(m.sum()) for m in top_k(ws, 144, "uniform", granularity="2:4")] == [48, 48, 48]


def test_fewer_than_n_of_m_cannot_be_asked_for() -> None:
    with pytest.raises(
        ValueError, match=re.escape("k must be >= 8, which granularity='2:4' keeps of 16 scores, got 7")
    ):
        top_k([torch.ones(2, 8)], 7, granularity="2:4")


# what does not fit


@pytest.mark.parametrize(
    ("granularity", "needs"),
    [
        ("2:4", "a number of inputs divisible by 4, which w0 (4 outputs, 6 inputs) does not have"),
        (
            "4x2",
            "a number of outputs divisible by 4 and a number of inputs divisible by 2, which w2 (3 outputs, 8 inputs)",
        ),
        (
            "3x1",
            "w0 (4 outputs, 6 inputs), w1 (4 outputs, 8 inputs), w3 (4 outputs, 8 inputs, kernel 3x3) do not have; "
            "leave them dense: Scope(exclude=['w0', 'w1', 'w3'])",
        ),
    ],
)
def test_layers_that_do_not_fall_into_groups_are_named_with_the_way_out(granularity: str, needs: str) -> None:
    with pytest.raises(ValueError, match=re.escape(needs)):
        Budget(0.5, "uniform", granularity=granularity).check_weights(
            weights_of([(4, 6), (4, 8), (3, 8), (4, 8, 3, 3)])
        )


def test_a_selection_among_scores_that_do_not_fit_is_refused_too() -> None:
    with pytest.raises(
        ValueError, match=re.escape("divisible by 4, which score 1 (2 outputs, 6 inputs) does not have")
    ):
        top_k([torch.ones(2, 8), torch.ones(2, 6)], 14, granularity="2:4")


def test_vectors_have_channels_and_no_input_channels() -> None:
    Budget(0.5, granularity="channel").check_weights(weights_of([(4, 6), (4,)]))
    with pytest.raises(ValueError, match=re.escape("needs outputs and inputs, which w1 (4) does not have")):
        Budget(0.5, granularity="input channel").check_weights(weights_of([(4, 6), (4,)]))


def test_a_layer_that_would_lose_every_channel_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("leaves w0 (4, 6) 4 weights, and a channel of it has 6; lower")):
        Budget(1 - 40 / 264, "uniform", granularity="channel").check_weights(weights_of([(4, 6), (40, 6)]))
    with pytest.raises(
        ValueError, match=re.escape("min_density=0.5 alone keeps 22 channels of 132 weights, more than the budget")
    ):
        Budget(1 - 40 / 264, min_density=0.5, granularity="channel").check_weights(weights_of([(4, 6), (40, 6)]))
    with pytest.raises(ValueError, match="leaves 148 weights for 3 layers, one channel each"):
        start(pomona.RigL(0.95, allocation="uniform", granularity="channel"))


@pytest.mark.parametrize(
    "method",
    [
        pomona.Magnitude(0.5, granularity="2:4"),
        pomona.ADMM(0.5, granularity="2:4"),
        pomona.GSM(0.5, granularity="2:4"),
        pomona.WeightMom(0.5, every=1, granularity="2:4"),
        pomona.RigL(0.5, allocation="uniform", granularity="2:4"),
        pomona.SET(0.5, allocation="uniform", granularity="2:4"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_method_refuses_layers_that_do_not_fit_before_it_trains(method: pomona.Method) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 6))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with pytest.raises(
        ValueError, match=re.escape("0.weight (8 outputs, 1 inputs, kernel 3x3) does not have; leave it dense: Scope(")
    ):
        pomona.Pruner(model, optimizer, method)
    pomona.Pruner(model, optimizer, method, scope=pomona.Scope(exclude=["0.weight"]))


def test_methods_without_a_budget_to_deal_know_no_granularity() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'granularity'"):
        pomona.GRDA(c=0.2, mu=0.6, granularity="2:4")  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match=re.escape("unknown key method.granularity")):
        load_recipe("compare-grda", ["method.granularity=2:4"])


# methods


def every_method(granularity: str, sparsity: float) -> list[pomona.Method]:
    return [
        pomona.Magnitude(Cubic(0.0, sparsity, steps=16), every=4, granularity=granularity),
        pomona.Magnitude(sparsity, allocation="uniform", granularity=granularity),
        pomona.ADMM(sparsity, every=5, granularity=granularity),
        pomona.WeightMom(sparsity, every=2, window=3, patience=2, granularity=granularity),
        pomona.GSM(sparsity, granularity=granularity),
        pomona.RigL(sparsity, every=4, allocation="uniform", granularity=granularity),
        pomona.SET(sparsity, every=4, allocation="uniform", granularity=granularity),
    ]


CASES = [
    (granularity, method)
    for granularity, sparsity in [("2:4", 0.5), ("1:4", 0.75), ("1x4", 0.75), ("channel", 0.5), ("input channel", 0.5)]
    for method in every_method(granularity, sparsity)
]


@pytest.mark.filterwarnings("ignore:.* starves layers")
@pytest.mark.parametrize(("granularity", "method"), CASES, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_every_method_ends_with_its_budget_in_whole_groups_and_keeps_them(
    granularity: str, method: pomona.Method
) -> None:
    model, optimizer, pruner = start(method)
    steps(model, optimizer, 20)
    report = harden(pruner)
    k = num_kept(method.sparsity if isinstance(method.sparsity, float) else method.sparsity.end, 2976)  # type: ignore[attr-defined]
    masks = {name: mask for name, mask in pruner.state_dict()["pruned"].items()}
    kept = sum(int((~mask).sum()) for mask in masks.values())
    assert kept == k or ("channel" in granularity and k - 192 < kept <= k)
    steps(model, optimizer, 5, seed=1)
    assert pruner.verify().nonzero <= kept
    assert report.granularity == granularity and f"granularity {granularity}" in str(report)
    if ":" in granularity:
        assert {layer.reason for layer in report.layers} == {f"{granularity}, as every layer"}
    for mask in masks.values():
        for group in oracle.groups_of(mask.shape, granularity):
            num = sum(bool(mask[i]) for i in group)
            if ":" in granularity:
                assert num >= len(group) - int(granularity[0])
            else:
                assert num in (0, len(group))


def test_magnitude_is_the_oracle_on_the_trained_weights() -> None:
    for granularity in ("2:4", "2x4", "channel"):
        model, optimizer, pruner = start(pomona.Magnitude(0.5, begin=50, granularity=granularity))
        steps(model, optimizer, 10)
        scores = [p.detach().abs().double().numpy() for p in pruner.parameters().values()]
        harden(pruner)
        if granularity == "2:4":
            expected = oracle.n_of_m_masks(scores, granularity, 1488)
        else:
            expected = oracle.group_masks(scores, granularity, 1488, 1e-4)
        for pruned, mask in zip(pruner.state_dict()["pruned"].values(), expected, strict=True):
            assert (~pruned).tolist() == mask.tolist()


def test_as_the_schedule_rises_groups_go_from_m_to_n_and_the_count_is_exact_at_every_cut() -> None:
    method = pomona.Magnitude(Cubic(0.0, 0.5, steps=20), every=2, granularity="2:4")
    model, optimizer, pruner = start(method)
    before = None
    for step in range(1, 25):
        steps(model, optimizer, 1, seed=step)
        masks = [state["mask"] for state in pruner.state_dict()["state"].values()]
        last_cut = step - (step - 1) % 2
        assert sum(int(m.sum()) for m in masks) == method.budget.num_kept(2976, last_cut)
        in_groups = torch.cat([m.movedim(1, -1).reshape(-1, 4).sum(1) for m in masks])
        assert int(in_groups.min()) >= 2
        if last_cut >= 20:
            assert set(in_groups.tolist()) == {2}
        if before is not None:
            assert all(bool((m <= b).all()) for m, b in zip(masks, before, strict=True))
        before = [m.clone() for m in masks]


def test_a_run_that_is_cut_on_the_way_to_n_of_m_does_not_verify() -> None:
    model, optimizer, pruner = start(pomona.Magnitude(Cubic(0.0, 0.5, steps=20), every=2, granularity="2:4"))
    steps(model, optimizer, 6)
    with pytest.warns(UserWarning, match="in the middle of a schedule"):
        pruner.harden()
    with pytest.raises(RuntimeError, match=r"[\d,]+ groups of 0.weight keep more than 2 of 4 weights"):
        pruner.verify()


@pytest.mark.parametrize("granularity", ["1x4", "channel"])
def test_groups_that_are_cut_in_part_do_not_verify(granularity: str) -> None:
    model, optimizer, pruner = start(pomona.Magnitude(0.5, granularity=granularity))
    steps(model, optimizer, 3)
    harden(pruner)
    state = pruner.state_dict()
    mask = state["pruned"]["4.weight"]
    place = tuple((~mask).nonzero()[0].tolist())
    model[4].weight.data[place] = 0.0
    mask[place] = True
    pruner.load_state_dict(state)
    what = "blocks of 1x4" if granularity == "1x4" else "channels"
    with pytest.raises(RuntimeError, match=f"1 {what} of 4.weight are cut in part"):
        pruner.verify()


@pytest.mark.parametrize("make", [pomona.RigL, pomona.SET], ids=["rigl", "set"])
@pytest.mark.parametrize("granularity", ["2:4", "2x2"])
def test_what_grows_keeps_the_groups_at_every_step(make: Any, granularity: str) -> None:
    model, optimizer, pruner = start(make(0.5, every=2, allocation="uniform", granularity=granularity))
    seen = []
    for step in range(9):
        steps(model, optimizer, 1, seed=step)
        masks = {name: ~state["mask"] for name, state in pruner.state_dict()["state"].items()}
        whole = weights_of([mask.shape for mask in masks.values()])
        assert violations(granularity, list(masks.values()), whole) == []
        assert sum(int((~m).sum()) for m in masks.values()) == 1488
        seen.append(bits(masks))
    assert len({str(one) for one in seen}) == 5  # drawn once, changed after steps 2, 4, 6, 8


def test_rigl_grows_in_each_group_by_the_largest_gradient() -> None:
    w = Weight("w", torch.tensor([[5.0, 1.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]]), torch.empty(0), {}, {})
    w.state["mask"] = w.value != 0
    from pomona.methods.drop_and_grow import drop_and_grow_

    drop_and_grow_(w, 0.5, torch.tensor([[0.0, 0.0, 1.0, 2.0, 9.0, 0.0, 9.0, 8.0]]), "2:4")
    # 1 and 3 go; in the first group the fourth comes at zero, in the second what went comes back with its value
    assert w.state["mask"].tolist() == [[True, False, False, True, True, True, False, False]]
    assert w.value.tolist() == [[5.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]]


def test_gsm_gives_gradients_to_the_most_salient_of_every_group() -> None:
    model, optimizer, pruner = start(pomona.GSM(0.5, granularity="2:4"))
    model(torch.randn(4, 8, 8, 8)).square().mean().backward()
    weight = model[4].weight
    t, grad = (weight * weight.grad).abs().detach().numpy(), weight.grad.clone()
    optimizer.step()
    (mask,) = oracle.n_of_m_masks([t], "2:4", t.size // 2)
    assert torch.equal(weight.grad, grad * torch.from_numpy(mask))
    assert int(pruner.metrics()["active"]) == 1488


def test_one_granularity_written_in_two_ways_is_one_state() -> None:
    model, optimizer, pruner = start(pomona.Magnitude(0.5, granularity=(1, 4)))
    steps(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    start(pomona.Magnitude(0.5, granularity="1x4"))[2].load_state_dict(state)
    with pytest.raises(ValueError, match="make it with the same method"):
        start(pomona.Magnitude(0.5, granularity="4x1"))[2].load_state_dict(state)


def test_a_recipe_says_it_in_the_same_word() -> None:
    recipe = load_recipe("compare-magnitude-global", ["method.granularity=2:4", "method.sparsity=0.5"])
    assert recipe.make_method(10).granularity == "2:4"
    with pytest.raises(RecipeError, match="n of every m with 0 < n < m"):
        load_recipe("compare-magnitude-global", ["method.granularity=3:2"])
    with pytest.raises(
        RecipeError, match=re.escape("keeps 2 of every 4 weights, so that sparsity must be 0.5 at its end")
    ):
        load_recipe("compare-magnitude-global", ["method.granularity=2:4", "method.sparsity=0.9"])


# what comes of it


def test_what_2_of_4_leaves_the_2_4_format_and_torch_take(tmp_path: Path) -> None:
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4, 32))
    optimizer = SGD(model.parameters(), lr=0.01)
    pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(0.5, granularity="2:4"))
    model(torch.randn(2, 64, 4, 4)).sum().backward()
    optimizer.step()
    harden(pruner)
    path = tmp_path / "net.2of4.safetensors"
    pomona.export(model, path)
    loaded = pomona.load(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    for weight in (model[0].weight, model[3].weight):
        # A convolution is a matrix of outputs by places of the kernel and input channels, these innermost.
        matrix = weight.detach().movedim(1, -1).reshape(weight.shape[0], -1).half()
        compressed, places = sparse_semi_structured_from_dense_cutlass(matrix)
        assert compressed.shape == (matrix.shape[0], matrix.shape[1] // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(compressed, places), matrix)


def chain(granularity: str, bias: bool = True) -> tuple[nn.Sequential, nn.Sequential, dict[str, int]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 5, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 30), nn.Tanh(), nn.Linear(30, 10),
    )  # fmt: skip
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = pomona.Magnitude(0.6, begin=3, granularity=granularity)
    pruner = pomona.Pruner(model, optimizer, method, scope=pomona.Scope(exclude=["9"]))
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 1, 16, 16)), torch.randint(10, (8,))).backward()
        optimizer.step()
    harden(pruner)
    pruner.verify()
    smaller, taken = pomona.shrink(model, torch.randn(2, 1, 16, 16))
    return model.eval(), smaller, taken


@pytest.mark.parametrize("granularity", ["channel", "input channel"])
def test_a_network_without_its_channels_is_a_smaller_dense_one_that_computes_the_same(granularity: str) -> None:
    model, smaller, taken = chain(granularity)
    assert set(taken) == ({"4", "7"} if granularity == "channel" else {"0"})
    for name, num in taken.items():
        assert smaller.get_submodule(name).weight.shape[0] == model.get_submodule(name).weight.shape[0] - num
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    images = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(smaller(images), model(images), atol=1e-5)
    if granularity == "channel":
        assert all(bool((p != 0).all()) for p in smaller.parameters() if p.ndim > 1)


def test_a_constant_that_no_bias_can_stand_for_stays() -> None:
    """Zeros around the input are not the constant; and a layer without a bias can take in none but zero."""
    images = torch.randn(2, 3, 8, 8)
    for padding, has_bias, value, goes in [
        (0, True, 1.0, 1),
        (1, True, 1.0, 0),
        (0, False, 1.0, 0),
        (1, False, -1.0, 1),
    ]:
        torch.manual_seed(0)
        second = nn.Conv2d(4, 4, 3, padding=padding, bias=has_bias)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), second).eval()
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = value
        smaller, taken = pomona.shrink(model, images)
        assert taken == ({"0": 1} if goes else {})
        assert torch.allclose(smaller(images), model(images), atol=1e-5)


def test_constants_are_followed_through_layers_in_whatever_order_they_were_made() -> None:
    """The second layer falls silent when the first one's constant is taken into its bias."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(5, 4)
            self.b = nn.Linear(4, 6)
            self.c = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.b(self.a(x).relu()).tanh())
            return y

    class Forwards(Backwards):
        def __init__(self) -> None:
            super().__init__()
            a, b, c = self.a, self.b, self.c
            del self.a, self.b, self.c
            self.c, self.b, self.a = c, b, a

    for kind in (Backwards, Forwards):
        model = kind()
        with torch.no_grad():
            model.a.weight[1] = 0
            model.a.bias[1] = 2.0
            model.b.weight[3] = 0
            model.b.weight[3, 1] = 1.0  # reads the constant alone
        smaller, taken = pomona.shrink(model, torch.randn(2, 5))
        assert taken == {"a": 1, "b": 1}
        x = torch.randn(9, 5)
        assert torch.allclose(smaller(x), model(x), atol=1e-6)


def test_what_is_a_constant_on_one_example_only_stays() -> None:
    """A softmax makes the silent channel depend on the others."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Linear(4, 3))
    model[0].weight.data[1] = 0
    assert pomona.shrink(model, torch.randn(1, 5))[1] == {}


def test_frozen_weights_shrink_too_and_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)
    model[2].weight[:, 2] = 0
    smaller, taken = pomona.shrink(model, torch.randn(1, 4))
    assert taken == {"0": 1}
    assert not any(p.requires_grad for p in smaller.parameters())
