"""HOW MUCH stays, and WHERE: exactly k of all scores, the same for everybody who sees the same scores."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pomona
from pomona.budget import Budget, num_kept
from pomona.granularity import Granularity
from pomona.score import saliency
from pomona.selection.allocation import Allocation, allocate, check_allocation, erk
from pomona.selection.top_k import global_top_k, top_k
from tests import oracles
from tests.oracles import lamp as fair

INF, NAN = math.inf, math.nan

fast = settings(deadline=None)

# Few distinct values, most of them zero, so that nearly every example has ties at the threshold.
TIED = st.sampled_from([0.0, 0.0, 0.0, 1e-45, 0.5, 0.5, 1.0, 1.0, 2.0, INF])
LAYERS = st.lists(st.lists(TIED, max_size=8), min_size=1, max_size=5)


def tensors(layers: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(layer, dtype=torch.float32) for layer in layers]


def lists(masks: Sequence[Tensor]) -> list[object]:
    return [mask.tolist() for mask in masks]


def num_true(masks: Sequence[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


def agree(masks: Sequence[Tensor], expected: Sequence[oracles.Mask]) -> None:
    assert lists(masks) == [mask.tolist() for mask in expected]


# num_kept


@pytest.mark.parametrize(
    ("sparsity", "total", "kept"),
    [
        (1 - 1 / 60, 266_200, 4_436),  # GSM, LeNet-300-100
        (1 - 1 / 125, 430_500, 3_444),  # GSM, LeNet-5
        (1 - 1 / 300, 430_500, 1_435),  # GSM, LeNet-5; exactly 1,435 in arithmetic, 1,434.99... in floating point
        (0.9, 851_504, 85_150),  # GSM, ResNet-56
        (0.9, 1_001_616, 100_161),  # GSM, DenseNet-40
    ],
)
def test_published_budgets_of_gsm(sparsity: float, total: int, kept: int) -> None:
    assert num_kept(sparsity, total) == kept


@pytest.mark.parametrize(
    ("sparsity", "total", "kept"),
    [(0.9, 1000, 100), (0.9, 10, 1), (0.8, 5, 1), (0.99, 100, 1), (0.3, 10, 7), (0.9, 0, 0), (0.0, 7, 7), (0, 7, 7)],
)
def test_round_budgets_are_not_lost_to_floating_point(sparsity: float, total: int, kept: int) -> None:
    assert num_kept(sparsity, total) == kept


def test_a_broken_budget_is_rounded_down() -> None:
    assert [num_kept(0.9, total) for total in (9, 11, 19, 20)] == [0, 1, 1, 2]


@given(st.integers(1, 10**9).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
@settings(deadline=None)
def test_sparsity_written_as_a_fraction_gives_its_numerator_back(fraction: tuple[int, int]) -> None:
    kept, total = fraction
    assert num_kept(1 - kept / total, total) == kept


@pytest.mark.parametrize(
    ("sparsity", "told"),
    [
        (90.0, "sparsity must be in [0, 1), got 90.0 (did you mean 0.9?)"),
        (50, "sparsity must be in [0, 1), got 50 (did you mean 0.5?)"),
        (100.0, "sparsity must be in [0, 1), got 100.0"),
        (-0.1, "sparsity must be in [0, 1), got -0.1"),
        (NAN, "sparsity must be in [0, 1), got nan"),
        (INF, "sparsity must be in [0, 1), got inf"),
    ],
)
def test_sparsity_out_of_range_is_told_with_the_way_out(sparsity: float, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        num_kept(sparsity, 10)


def test_sparsity_one_is_not_mistaken_for_one_percent() -> None:
    with pytest.raises(ValueError, match=r"got 1\.0$"):
        num_kept(1.0, 10)


# global_top_k, by hand


def test_the_largest_of_all_tensors_together_are_kept() -> None:
    scores = [torch.tensor([[1.0, 9.0], [3.0, 4.0]]), torch.tensor([8.0, 2.0])]
    assert lists(global_top_k(scores, 3)) == [[[False, True], [False, True]], [True, False]]


def test_ties_are_kept_in_index_order() -> None:
    scores = tensors([[1.0, 5.0, 5.0], [5.0, 5.0, 7.0]])
    assert lists(global_top_k(scores, 3)) == [[False, True, True], [False, False, True]]
    assert lists(global_top_k(scores, 4)) == [[False, True, True], [True, False, True]]


def test_ties_everywhere_are_kept_from_the_front_across_tensors() -> None:
    scores = [torch.ones(2, 2), torch.ones(()), torch.ones(5)]
    assert lists(global_top_k(scores, 6)) == [[[True, True], [True, True]], True, [True, False, False, False, False]]


def test_index_order_is_of_the_tensor_as_seen_not_of_its_memory() -> None:
    transposed = torch.ones(3, 2).t()
    assert not transposed.is_contiguous()
    assert lists(global_top_k([transposed], 3)) == [[[True, True, True], [False, False, False]]]


@pytest.mark.parametrize("k", [0, 1, 100, 1000])
def test_of_all_zero_scores_none_is_kept(k: int) -> None:
    assert num_true(global_top_k([torch.zeros(30, 30), torch.zeros(100)], k)) == 0


def test_a_zero_is_not_kept_even_where_the_budget_is_not_used_up() -> None:
    scores = tensors([[0.0, 2.0, -0.0], [0.0, 1.0]])
    assert lists(global_top_k(scores, 4)) == [[False, True, False], [False, True]]


def test_the_smallest_subnormal_is_not_a_zero() -> None:
    assert lists(global_top_k(tensors([[0.0, 1e-45, 0.0]]), 2)) == [[False, True, False]]


def test_k_zero_keeps_none_and_k_all_keeps_all() -> None:
    scores = tensors([[1.0, 2.0], [3.0]])
    assert lists(global_top_k(scores, 0)) == [[False, False], [False]]
    assert lists(global_top_k(scores, 3)) == [[True, True], [True]]


def test_k_zero_keeps_not_even_infinity() -> None:
    assert lists(global_top_k(tensors([[INF, 1.0]]), 0)) == [[False, False]]


def test_infinite_scores_come_first_and_tie_in_index_order() -> None:
    scores = tensors([[1.0, INF], [INF, INF]])
    assert lists(global_top_k(scores, 2)) == [[False, True], [True, False]]
    assert lists(global_top_k(scores, 4)) == [[True, True], [True, True]]


def test_scalars_are_scores() -> None:
    masks = global_top_k([torch.tensor(3.0), torch.tensor(1.0), torch.tensor(2.0)], 2)
    assert lists(masks) == [True, False, True]
    assert [mask.shape for mask in masks] == [()] * 3


def test_empty_tensors_get_empty_masks() -> None:
    masks = global_top_k([torch.ones(0), torch.tensor([1.0, 2.0]), torch.ones(3, 0, 2)], 1)
    assert [mask.shape for mask in masks] == [(0,), (2,), (3, 0, 2)]
    assert masks[1].tolist() == [False, True]


@pytest.mark.parametrize("scores", [[], [torch.ones(0)], [torch.ones(0, 2), torch.ones(0)]])
@pytest.mark.parametrize("min_density", [0.0, 0.5])
def test_nothing_to_choose_from_is_fine(scores: list[Tensor], min_density: float) -> None:
    masks = global_top_k(scores, 0, min_density=min_density)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]


@pytest.mark.parametrize("min_density", [0.0, 0.25])
def test_masks_are_bool_and_scores_are_left_alone(min_density: float) -> None:
    scores = tensors([[3.0, 0.0, 2.0, 2.0], [1.0, 4.0, 0.0, 0.0]])
    copies = [score.clone() for score in scores]
    masks = global_top_k(scores, 3, min_density=min_density)
    assert all(mask.dtype is torch.bool for mask in masks)
    assert all(torch.equal(score, copy) for score, copy in zip(scores, copies, strict=True))


def test_scores_of_bfloat16_weights_tie_and_are_still_cut_to_exactly_k() -> None:
    w = torch.tensor([256.0, 257.0, 255.0, 256.5], dtype=torch.bfloat16)  # 8 bits: three of them are stored as 256
    score = saliency(w, torch.ones(4, dtype=torch.bfloat16)).tensor()
    assert score.tolist() == [256.0, 256.0, 255.0, 256.0]
    assert lists(global_top_k([score], 2)) == [[True, True, False, False]]


def test_many_scores_of_bfloat16_weights_are_cut_to_exactly_k() -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(60, 100, generator=generator).bfloat16() for _ in range(2))
    scores = list(torch.split(saliency(w, g).tensor(), 20))
    masks = global_top_k(scores, 600)
    assert len(set(torch.cat(scores).view(-1).tolist())) < 5_600  # of 6,000: ties are common
    assert num_true(masks) == 600
    agree(masks, oracles.top_k_mask([score.numpy() for score in scores], 600))


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("min_density", [0.0, 0.3])
def test_a_nan_score_is_refused_whatever_k_is(k: int, min_density: float) -> None:
    if min_density and k < 2:
        k = 2  # one for each tensor
    with pytest.raises(ValueError, match=r"^a score is NaN; check the gradients before selecting$"):
        global_top_k(tensors([[1.0, INF], [NAN, 0.0]]), k, min_density=min_density)


def test_scores_that_are_part_of_a_graph_are_ranked_like_any_other() -> None:
    w = torch.tensor([1.0, -3.0, 2.0], requires_grad=True)
    assert lists(global_top_k([w.abs()], 1)) == [[False, True, False]]


def test_half_precision_scores_are_ranked_like_any_other() -> None:
    assert lists(global_top_k([torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)], 1)) == [[False, True, False]]


# min_density, by hand


def test_a_floor_takes_from_the_smallest_of_the_others() -> None:
    scores = tensors([[9.0, 8.0, 7.0, 6.0], [1.0, 3.0, 2.0, 0.5]])
    assert lists(global_top_k(scores, 4)) == [[True] * 4, [False] * 4]
    assert lists(global_top_k(scores, 4, min_density=0.25)) == [[True, True, True, False], [False, True, False, False]]
    assert lists(global_top_k(scores, 4, min_density=0.5)) == [[True, True, False, False], [False, True, True, False]]


def test_a_floor_that_does_not_bind_changes_nothing() -> None:
    scores = tensors([[9.0, 1.0, 7.0], [8.0, 3.0, 2.0]])
    assert lists(global_top_k(scores, 4, min_density=0.3)) == lists(global_top_k(scores, 4))


def test_raising_one_layer_may_push_another_below_its_floor() -> None:
    scores = tensors([[9.0, 9.0, 9.0, 9.0], [8.0, 1.0], [2.0, 2.0]])  # the two largest are both of the first
    assert lists(global_top_k(scores, 5, min_density=0.5)) == [[True, True, True, False], [True, False], [True, False]]
    assert lists(global_top_k(scores, 4, min_density=0.5)) == [
        [True, True, False, False],
        [True, False],
        [True, False],
    ]


def test_any_floor_above_zero_keeps_every_layer_alive() -> None:
    scores = [torch.full((50,), 5.0), torch.tensor([1e-30, 2e-30]), torch.tensor(1e-40)]
    masks = global_top_k(scores, 10, min_density=1e-4)
    assert [int(mask.sum()) for mask in masks] == [8, 1, 1]
    assert masks[1].tolist() == [False, True]


def test_what_a_layer_of_zeros_cannot_use_of_its_floor_goes_to_the_others() -> None:
    scores = tensors([[0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    assert lists(global_top_k(scores, 4, min_density=0.5)) == [[False] * 4, [True] * 4]


def test_ties_inside_a_floor_are_kept_in_index_order() -> None:
    scores = tensors([[9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    assert lists(global_top_k(scores, 4, min_density=0.5)) == [[True, True, False, False], [True, True, False, False]]


def test_the_floor_is_rounded_up_but_not_by_a_rounding_error() -> None:
    assert math.ceil(0.07 * 100) == 8  # 7.000000000000001
    scores = [torch.ones(100), torch.full((100,), 2.0)]
    assert [int(mask.sum()) for mask in global_top_k(scores, 14, min_density=0.07)] == [7, 7]
    assert [int(mask.sum()) for mask in global_top_k(scores, 16, min_density=0.071)] == [8, 8]


def test_a_floor_of_one_keeps_everything() -> None:
    assert lists(global_top_k(tensors([[1.0, 2.0], [3.0]]), 3, min_density=1.0)) == [[True, True], [True]]


# errors


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range_is_told_with_the_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"^k must be in \[0, 3\], the number of scores, got {k}$"):
        global_top_k(tensors([[1.0, 2.0], [3.0]]), k)


def test_k_of_nothing_must_be_zero() -> None:
    with pytest.raises(ValueError, match=r"^k must be in \[0, 0\], the number of scores, got 1$"):
        global_top_k([], 1)


@pytest.mark.parametrize("min_density", [-0.1, 1.1, NAN, INF])
def test_min_density_out_of_range_is_told_with_the_range(min_density: float) -> None:
    with pytest.raises(ValueError, match=rf"^min_density must be in \[0, 1\], got {min_density}$"):
        global_top_k(tensors([[1.0, 2.0]]), 1, min_density=min_density)


def test_floors_above_the_budget_are_told_with_the_way_out() -> None:
    # ceil(1.5) + ceil(1)
    told = "min_density=0.5 alone keeps 3 of 5 scores, more than the budget of 2; lower min_density or the sparsity"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        global_top_k(tensors([[1.0, 2.0, 3.0], [4.0, 5.0]]), 2, min_density=0.5)


# properties


@given(LAYERS, st.data())
@fast
def test_equals_the_oracle(layers: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(map(len, layers))), label="k")
    scores = tensors(layers)
    agree(global_top_k(scores, k), oracles.top_k_mask([score.numpy() for score in scores], k))


@given(LAYERS, st.integers(1, 8), st.data())
@settings(deadline=None)
def test_equals_the_oracle_with_a_floor(layers: list[list[float]], eighths: int, data: st.DataObject) -> None:
    min_density = eighths / 8  # a multiple of 1/8 times a small integer is exact
    floors = sum(math.ceil(min_density * len(layer)) for layer in layers)
    k = data.draw(st.integers(floors, sum(map(len, layers))), label="k")
    scores = tensors(layers)
    expected = oracles.top_k_mask_with_floor([score.numpy() for score in scores], k, min_density)
    agree(global_top_k(scores, k, min_density=min_density), expected)


@given(LAYERS, st.data())
@fast
def test_exactly_k_are_kept_or_every_score_above_zero(layers: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(map(len, layers))), label="k")
    num_above_zero = sum(value > 0.0 for layer in layers for value in layer)
    assert num_true(global_top_k(tensors(layers), k)) == min(k, num_above_zero)


@given(LAYERS, st.data())
@fast
def test_every_kept_score_is_at_least_every_dropped_one(layers: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(map(len, layers))), label="k")
    joined = torch.cat(tensors(layers))
    kept = torch.cat(global_top_k(tensors(layers), k))
    smallest_kept = min(joined[kept].tolist(), default=INF)
    assert smallest_kept > 0.0
    assert smallest_kept >= max(joined[~kept].tolist(), default=0.0)


@given(LAYERS, st.data())
@fast
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(layers: list[list[float]], data: st.DataObject) -> None:
    small, large = sorted(data.draw(st.tuples(*[st.integers(0, sum(map(len, layers)))] * 2), label="budgets"))
    fewer, more = (torch.cat(global_top_k(tensors(layers), k)) for k in (small, large))
    assert not (fewer & ~more).any()


DISTINCT = st.lists(st.floats(0.0, 1e6, width=32), min_size=2, max_size=24, unique=True)


@given(DISTINCT, st.data())
@fast
def test_permuting_tensors_without_ties_permutes_their_masks(values: list[float], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4), label="cuts"))
    layers = [values[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    order = data.draw(st.permutations(range(len(layers))), label="order")
    k = data.draw(st.integers(0, len(values)), label="k")
    masks = global_top_k(tensors(layers), k)
    permuted = global_top_k(tensors([layers[i] for i in order]), k)
    assert lists(permuted) == lists([masks[i] for i in order])


@given(DISTINCT, st.data())
@fast
def test_permuting_scores_without_ties_permutes_the_mask(values: list[float], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(values))), label="order")
    k = data.draw(st.integers(0, len(values)), label="k")
    (mask,) = global_top_k(tensors([values]), k)
    (permuted,) = global_top_k(tensors([[values[i] for i in order]]), k)
    assert permuted.tolist() == [mask[i].item() for i in order]


@given(LAYERS, st.data())
@fast
def test_where_the_tensors_are_cut_does_not_matter(layers: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(map(len, layers))), label="k")
    joined = [value for layer in layers for value in layer]
    assert torch.cat(global_top_k(tensors(layers), k)).tolist() == global_top_k(tensors([joined]), k)[0].tolist()


# allocations


def test_uniform_gives_each_layer_its_share() -> None:
    assert allocate("uniform", [(10, 10), (20, 10), (5, 2, 2, 5)], 40) == [10, 20, 10]
    assert allocate("uniform", [(3,), (3,), (3,)], 4) == [2, 1, 1]  # thirds are equal: the first in order


# LeNet-300-100: epsilon (784 + 300) + epsilon (300 + 100) + epsilon (100 + 10) = 26,620 gives the last layer 1,837 of
# its 1,000 weights; it is kept whole, and epsilon = 25,620 / 1,484 for the others: 18,714.34 and 6,905.66 weights.
LENET300 = [(300, 784), (100, 300), (10, 100)]


def test_erk_of_lenet_300_100_by_hand() -> None:
    assert allocate("erk", LENET300, 26_620) == [18_714, 6_906, 1_000]
    epsilon = 25_620 / 1_484
    assert erk(LENET300, 26_620) == pytest.approx([epsilon * 1_084 / 235_200, epsilon * 400 / 30_000, 1.0], rel=1e-12)


def test_erk_of_convolutions_adds_up_all_four_dimensions() -> None:
    shapes = [(8, 4, 3, 3), (8, 8, 3, 3)]  # 18 of 288 and 22 of 576 times epsilon = 2
    assert erk(shapes, 80) == pytest.approx([36 / 288, 44 / 576], rel=1e-15)
    assert allocate("erk", shapes, 80) == [36, 44]


def test_erk_keeps_several_layers_whole_one_after_the_other() -> None:
    # 300 of 10,000 + 100 + 25 + 4: epsilon = 300 / 234 makes the last whole, for 5.1 > 4; then 296 / 230 the third,
    # 12.9 of 25, is not; at 700, 700 / 234 makes 12 and 29.9 whole, then 671 / 220 the second 61
    shapes = [(100, 100), (10, 10), (5, 5), (2, 2)]
    assert allocate("erk", shapes, 300) == [257, 26, 13, 4]  # 257.4, 25.7, 12.9
    assert allocate("erk", shapes, 700) == [610, 61, 25, 4]
    assert erk(shapes, 700)[2:] == [1.0, 1.0]


def test_erk_of_vectors_scalars_and_nothing() -> None:
    shapes = [(50, 50), (7,), (), (0, 3)]
    assert allocate("erk", shapes, 100) == [93, 6, 1, 0]  # epsilon = 100 / 108 gives 92.6, 6.5 and 0.9
    assert allocate("uniform", shapes, 2508) == [2500, 7, 1, 0]
    assert erk(shapes, 2508) == [1.0] * 4
    assert allocate("erk", [], 0) == allocate("uniform", [], 0) == []
    assert allocate("erk", [(0, 3)], 0) == [0]


def test_with_less_budget_no_layer_gets_more() -> None:
    """Largest remainders deal 10 as 4, 4, 2 but 11 as 5, 5, 1: a layer pruned before would have to grow again."""
    dealt = [allocate("uniform", [(6,), (6,), (2,)], k) for k in (10, 11, 12)]
    assert dealt == [[5, 4, 1], [5, 5, 1], [5, 5, 2]]


def test_no_layer_is_empty_while_the_budget_suffices() -> None:
    shapes = [(1000, 1000), (3, 3), (2, 1)]
    assert allocate("uniform", shapes, 100) == [98, 1, 1]
    assert allocate("uniform", shapes, 3) == [1, 1, 1]
    assert allocate("uniform", shapes, 2) == [1, 1, 0]


SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=6)
each_rule = pytest.mark.parametrize("allocation", ["uniform", "erk"])


@each_rule
@given(SHAPES, st.data())
@settings(deadline=None)
def test_counts_add_up_and_fit_and_grow_with_the_budget(
    allocation: Literal["uniform", "erk"], shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    k = data.draw(st.integers(0, sum(sizes)), label="k")
    counts = allocate(allocation, shapes, k)
    assert sum(counts) == k
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if k >= sum(size > 0 for size in sizes):
        assert all(count > 0 for count, size in zip(counts, sizes, strict=True) if size)
    if k < sum(sizes):
        more = allocate(allocation, shapes, k + 1)
        assert sorted(b - a for a, b in zip(counts, more, strict=True)) == [0] * (len(shapes) - 1) + [1]


@each_rule
@given(SHAPES, st.data())
@settings(deadline=None)
def test_counts_are_those_of_dealing_one_by_one(
    allocation: Literal["uniform", "erk"], shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    """In turn to the layer with the least (2 count + 1) / rate, empty ones first: Webster's rule, in fractions."""
    sizes = [math.prod(shape) for shape in shapes]
    rates = [sum(shape) if shape else 1 for shape in shapes] if allocation == "erk" else sizes
    k = data.draw(st.integers(0, sum(sizes)), label="k")
    counts = [0] * len(sizes)
    for _ in range(k):
        turns = {
            i: Fraction(2 * counts[i] + 1, rates[i]) if counts[i] else Fraction(0)
            for i in range(len(sizes))
            if counts[i] < sizes[i]
        }
        counts[min(turns, key=lambda i: (turns[i], i))] += 1
    assert allocate(allocation, shapes, k) == counts


@given(SHAPES, st.data())
@fast
def test_erk_densities_keep_the_budget_and_the_order_of_the_rule(
    shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    shapes = [shape for shape in shapes if math.prod(shape)]
    sizes = [math.prod(shape) for shape in shapes]
    k = data.draw(st.integers(0, sum(sizes)), label="k")
    densities = erk(shapes, k)
    assert sum(d * n for d, n in zip(densities, sizes, strict=True)) == pytest.approx(k, rel=1e-12, abs=1e-12)
    assert all(0.0 <= density <= 1.0 for density in densities)
    free = [d * n / (sum(s) or 1) for d, n, s in zip(densities, sizes, shapes, strict=True) if d < 1.0]
    assert free == pytest.approx([free[0]] * len(free), rel=1e-12) if free else True  # one epsilon for all
    whole = [n / (sum(s) or 1) for d, n, s in zip(densities, sizes, shapes, strict=True) if d == 1.0]
    assert max(whole, default=0.0) <= min(free, default=INF) * (1 + 1e-12)


@each_rule
def test_top_k_keeps_the_largest_of_each_layer(allocation: Literal["uniform", "erk"]) -> None:
    scores = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 30.0], [20.0, 40.0], [5.0, 6.0]])]
    # 5 of 10 are 2 and 3; by the kernel rule 4 and 5 ninths of 5, that is 2.2 and 2.8
    expected = [[[False, False], [True, True]], [[False, True], [True, True], [False, False]]]
    assert lists(top_k(scores, 5, allocation)) == expected


def test_top_k_over_all_layers_is_global_top_k() -> None:
    scores = tensors([[1.0, 2.0, 3.0], [10.0, 30.0, 20.0]])
    for min_density in (0.0, 1 / 3):
        expected = lists(global_top_k(scores, 3, min_density=min_density))
        assert lists(top_k(scores, 3, min_density=min_density)) == expected


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_top_k_by_layer_keeps_no_zero_and_gives_none_away(allocation: Literal["uniform", "erk"]) -> None:
    scores = [torch.tensor([[0.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])]
    assert [int(mask.sum()) for mask in top_k(scores, 4, allocation)] == [1, 2]


@pytest.mark.parametrize("k", [-1, 11])
def test_a_budget_out_of_range_is_told_with_the_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"^k must be in \[0, 10\], the number of weights, got {k}$"):
        allocate("erk", [(2, 2), (3, 2)], k)


def test_a_broken_budget_is_refused() -> None:
    with pytest.raises(TypeError):
        allocate("uniform", [(2, 2)], 1.5)  # type: ignore[arg-type]


def test_an_unknown_allocation_is_told_with_those_there_are() -> None:
    told = "allocation must be one of global, uniform, erk, got 'ERK'"
    with pytest.raises(ValueError, match=f"^{told}$"):
        check_allocation("ERK")
    with pytest.raises(ValueError, match=f"^{told}$"):
        top_k([torch.ones(2)], 1, "ERK")  # type: ignore[arg-type]
    assert [check_allocation(name) for name in get_args(Allocation)] == [None] * 3


@pytest.mark.parametrize(
    ("budget", "shape", "kept", "reason"),
    [
        (Budget(0.8, "erk"), (10, 10), 40, "2x the network's share, by allocation='erk'"),
        (Budget(0.8, "erk"), (30, 10), 20, "0.33x the network's share, by allocation='erk'"),
        (Budget(0.8, "erk"), (30, 10), 0, "emptied by allocation='erk'"),
        (Budget(0.5, granularity="2:4"), (4, 8), 16, "2:4, as every layer"),
        (Budget(0.8, min_density=0.02), (64, 64), 82, "held at the floor min_density=0.02"),
        (Budget(0.8, min_density=0.02), (64, 64), 84, "0.1x the network's share, by allocation='global'"),
        # 2 % of 1,024 blocks of 4 are 21 blocks, and 2 % of 64 channels of 64 are 2 channels.
        (Budget(0.8, min_density=0.02, granularity=(1, 4)), (64, 64), 84, "held at the floor min_density=0.02"),
        (Budget(0.8, min_density=0.02, granularity="channel"), (64, 64), 128, "held at the floor min_density=0.02"),
        (Budget(0.8, min_density=0.02, granularity="channel"), (64, 64), 82, "0.1x the network's share, by "),
        (Budget(0.8, "uniform", min_density=0.2), (10, 10), 20, "1x the network's share, by allocation='uniform'"),
    ],
)
def test_the_reason_for_a_layers_count(budget: Budget, shape: tuple[int, ...], kept: int, reason: str) -> None:
    value = torch.zeros(shape)
    assert budget.why(pomona.Weight("w", value, value, {}, {}), kept, 0.2).startswith(reason)


@pytest.mark.parametrize("granularity", ["weight", (1, 4), "channel"])
def test_a_layer_held_at_its_floor_is_reported_so_for_groups_too(granularity: Granularity) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 16, bias=False))
    model[0].weight.data *= 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)
    pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(0.9, min_density=0.02, granularity=granularity))
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    assert pruner.harden().layers[0].reason == "held at the floor min_density=0.02"


def test_a_budget_of_all_weights_keeps_zeros_too() -> None:
    value = torch.tensor([0.0, 1.0, 0.0])
    weights = [pomona.Weight("w", value, value, {}, {})]
    for budget in (Budget(), Budget(0.0), Budget(0.0, "uniform", granularity="1x1")):
        selection = budget.keep([value], 1, of=weights)
        assert lists(selection.masks()) == [[True] * 3] and list(selection.counts) == [3]


def test_a_budget_follows_its_schedule() -> None:
    budget = Budget(pomona.Linear(0.0, 0.5, steps=10))
    assert [budget.num_kept(100, step) for step in (0, 5, 10, 99)] == [100, 75, 50, 50]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 90.0}, r"sparsity must be in \[0, 1\), got 90"),
        ({"sparsity": 0.9, "allocation": "ERK"}, "allocation must be one of global, uniform, erk, got 'ERK'"),
        ({"sparsity": 0.9, "min_density": 2.0}, r"min_density must be in \[0, 1\], got 2"),
        ({"sparsity": 0.9, "granularity": "2:4"}, "so that sparsity must be 0.5, got 0.9"),
        ({"sparsity": 0.9, "score": "LAMP"}, "score must be one of 'magnitude', 'lamp', or a function"),
        (
            {"sparsity": 0.9, "score": "lamp", "allocation": "erk"},
            "score='lamp' .* allocation='erk' gives each its share",
        ),
    ],
)
def test_a_budget_refuses_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


# What the weights are ranked by


def drawn(seed: int = 0, scales: Sequence[float] = (1.0, 0.02, 0.3)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(6, 8), (4, 12), (8, 4)]
    return [(rng.normal(size=shape) * scale).astype(np.float32) for shape, scale in zip(shapes, scales, strict=True)]


def weights_of(layers: Sequence[Any]) -> list[pomona.Weight]:
    values = [torch.as_tensor(layer) for layer in layers]
    return [pomona.Weight(f"w{i}", value, value, {}, {}) for i, value in enumerate(values)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_density", [0.0, 0.1])
def test_one_ranking_by_a_fair_score_keeps_what_the_oracle_does(seed: int, min_density: float) -> None:
    layers = drawn(seed)
    masks = Budget(0.75, score="lamp", min_density=min_density).survivors(weights_of(layers), 1).masks()
    scores = [fair.lamp(layer) for layer in layers]
    agree(masks, oracles.top_k_mask_with_floor(scores, 32, min_density))


def test_the_scale_of_a_layer_decides_nothing_with_a_fair_score() -> None:
    budget = Budget(0.75, score="lamp")
    plain, scaled = drawn(scales=(1.0, 1.0, 1.0)), drawn(scales=(1.0, 2.0**-9, 2.0**5))
    kept = [budget.survivors(weights_of(layers), 1) for layers in (plain, scaled)]
    assert lists(kept[0].masks()) == lists(kept[1].masks())
    assert min(kept[0].counts) > 4
    assert list(Budget(0.75).survivors(weights_of(scaled), 1).counts)[1] == 0


def test_by_lamp_no_layer_is_emptied_even_of_equal_weights() -> None:
    weights = weights_of([torch.ones(50, 2), torch.full((3, 1), 1e-6), torch.tensor([[1.0, 1e-9]])])
    assert list(Budget(1 - 3 / 105, score="lamp").survivors(weights, 1).counts) == [1, 1, 1]


def test_blocks_are_ranked_by_how_their_scores_relate() -> None:
    layers = drawn()
    masks = Budget(0.75, score="lamp", granularity="2x4").survivors(weights_of(layers), 1).masks()
    scores = [fair.lamp(fair.block_norms(layer, 2, 4)) for layer in layers]
    chosen = oracles.top_k_mask(scores, 4)
    agree(masks, [np.kron(mask, np.ones((2, 4))).astype(bool) for mask in chosen])


@pytest.mark.parametrize("granularity", ["channel", "input channel"])
def test_channels_are_ranked_by_how_their_scores_relate(granularity: Granularity) -> None:
    plain, scaled = drawn(scales=(1.0, 1.0, 1.0)), drawn(scales=(1.0, 2.0**-9, 2.0**5))
    budget = Budget(0.5, score="lamp", granularity=granularity)
    masks = [budget.survivors(weights_of(layers), 1).masks() for layers in (plain, scaled)]
    assert lists(masks[0]) == lists(masks[1])
    dim = 1 if granularity == "channel" else 0
    assert all(bool((mask.all(dim) == mask.any(dim)).all()) and bool(mask.any()) for mask in masks[0])


def test_on_the_way_to_2_of_4_what_is_left_is_ranked_by_a_fair_score() -> None:
    layers = drawn(scales=(1.0, 2.0**-9, 2.0**5))
    budget = Budget(pomona.Linear(0.0, 0.5, steps=10), score="lamp", granularity="2:4")
    kept = budget.survivors(weights_of(layers), 5)
    plain = budget.survivors(weights_of(drawn(scales=(1.0, 1.0, 1.0))), 5)
    assert lists(kept.masks()) == lists(plain.masks()) and sum(kept.counts) == 96
    assert list(budget.survivors(weights_of(layers), 10).counts) == [24, 24, 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fair_scores_of_other_precisions_are_exact_in_number(dtype: torch.dtype) -> None:
    weights = weights_of([torch.tensor(layer).to(dtype) for layer in drawn()])
    assert sum(Budget(0.75, score="lamp").survivors(weights, 1).counts) == 32


def test_inside_masks_a_zero_may_stay_and_what_is_outside_never() -> None:
    weights = weights_of([torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[0.0, 0.5]])])
    inside = [torch.tensor([[False, True, True]]), torch.tensor([[True, True]])]
    for score in ("magnitude", "lamp", by_position):
        masks = Budget(0.2, score=score).survivors(weights, 1, inside=inside).masks()  # type: ignore[arg-type]
        assert lists(masks) == [[[False, True, True]], [[True, True]]]


def by_position(w: pomona.Weight) -> Tensor:
    return torch.arange(w.value.numel(), dtype=torch.float32).view(w.value.shape)


def test_a_function_of_the_users_ranks_the_weights() -> None:
    weights = weights_of(drawn())
    masks = Budget(0.75, score=by_position).survivors(weights, 1).masks()
    agree(masks, oracles.top_k_mask([by_position(w).numpy() for w in weights], 32))
    (first, *_) = Budget(0.5, "uniform", score=by_position).survivors(weights, 1).masks()
    assert first.view(-1).tolist() == [False] * 24 + [True] * 24


@pytest.mark.parametrize(
    ("score", "kind", "message"),
    [
        (lambda w: 1.0, TypeError, "<lambda> must return a tensor of scores for w0, got 1.0"),
        (lambda w: w.value.sum(), ValueError, r"scores of the shape of w.value, \(6, 8\) for w0, .* got \(\) on cpu"),
        (lambda w: w.value, ValueError, r"<lambda> must return scores >= 0, got -[0-9.]+ for w0; the largest survive"),
        (lambda w: w.value.abs() * NAN, ValueError, "must return scores >= 0, got nan for w0"),
    ],
)
def test_what_a_function_returns_must_be_scores(score: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Budget(0.75, score=score).survivors(weights_of(drawn()), 1)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("lamp", "0.5x the network's share, by score='lamp'"),
        (by_position, "0.5x the network's share, by score='by_pos"),
    ],
)
def test_the_reason_names_the_score(score: Any, reason: str) -> None:
    (w,) = weights_of([np.ones((10, 10))])
    assert Budget(0.8, score=score).why(w, 10, 0.2).startswith(reason)


# Layers of which next to nothing is left

EVERY = ("sparsity", "allocation", "min_density", "granularity", "score")


def starved(budget: Budget, kept: Sequence[int], options: Sequence[str] = EVERY) -> str:
    return budget.starved(weights_of([np.ones((64, 64)), np.ones((64, 32)), np.ones((4, 64))]), kept, options=options)


def test_layers_at_a_floor_far_below_the_networks_share_are_told_with_the_ways_out() -> None:
    assert starved(Budget(0.9, min_density=1e-4), [637, 1, 2]) == (
        "1 of 3 layers keeps no more than the floor min_density=0.0001 of its weights: w1 1 of 2,048; one ranking on "
        "magnitudes is unfair to layers of small weights; take score='lamp', allocation='erk', a higher "
        "min_density, a lower sparsity, or leave it dense: Scope(exclude=['w1'])"
    )
    assert starved(Budget(0.9, min_density=1e-4), [638, 1, 1]).startswith(
        "2 of 3 layers keep no more than the floor min_density=0.0001 of their weights: w1 1 of 2,048, w2 1 of 256; "
    )


def test_emptied_layers_are_told_whatever_their_size() -> None:
    told = starved(Budget(0.999, min_density=0.0), [5, 1, 0])
    assert told.startswith("1 of 3 layers keeps none of its weights: w2 0 of 256; ")


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (Budget(0.9, min_density=1e-4), [500, 138, 2]),  # few, but more than the floor
        (Budget(0.995, min_density=1e-4), [20, 10, 2]),
        (Budget(0.98, min_density=1e-3), [118, 5, 5]),  # at the floor, which is no less than a tenth of 2 %
        (Budget(0.9, min_density=0.02), [593, 41, 6]),
        (Budget(0.999, min_density=1e-4), [4, 1, 1]),  # a tenth of the network's share is less than one weight
        (Budget(pomona.Linear(0, 0.9, steps=9), min_density=0.02), [4000, 41, 6]),  # still on its way to 0.9
        (Budget(0.9), [0, 0, 0]),  # nothing is left anywhere
        (Budget(), [4096, 2048, 256]),
    ],
)
def test_layers_that_keep_what_could_be_expected_are_not_told(budget: Budget, kept: list[int]) -> None:
    assert starved(budget, kept) == ""


def test_vectors_are_no_layers_that_starve() -> None:
    weights = weights_of([np.ones((64, 64)), np.ones(64)])
    assert Budget(0.5).starved(weights, [2080, 0], options=EVERY) == ""


def test_only_what_helps_and_can_be_chosen_is_advised() -> None:
    lamp = starved(Budget(0.9, min_density=1e-4, score="lamp"), [638, 1, 1])
    assert lamp.endswith(
        "; take a higher min_density, a lower sparsity, or leave them dense: Scope(exclude=['w1', 'w2'])"
    )
    uniform = starved(Budget(0.9, "uniform", min_density=1e-4, granularity="channel"), [576, 64, 0])
    assert uniform.endswith("take a lower sparsity, or leave it dense: Scope(exclude=['w2'])")
    of_no_sparsity = starved(Budget(), [638, 2, 0], ["sparsity"])
    assert of_no_sparsity.endswith("; leave it dense: Scope(exclude=['w2'])") and "take" not in of_no_sparsity
    many = Budget(0.5, min_density=0.0).starved(
        weights_of([np.ones((90, 90)), *[np.ones((2, 2))] * 7]), [4000, *[0] * 7], options=EVERY
    )
    assert "w5 0 of 4 and 2 more; " in many and "dense: Scope(exclude=['w1', 'w2', 'w3', 'w4', 'w5'])" in many


# Several matrices in one tensor


def stacked(layers: Sequence[Any]) -> pomona.Weight:
    value = torch.cat([torch.as_tensor(layer) for layer in layers])
    return pomona.Weight("in_proj", value, value, {}, {}, layout=pomona.layout.Layout(matrices=len(layers)))


@pytest.mark.parametrize("granularity", ["weight", "2x4", "channel"])
def test_each_matrix_of_a_tensor_is_ranked_as_if_alone(granularity: str) -> None:
    layers = [layer.reshape(6, 8) for layer in (drawn()[0], drawn(1)[0] * 0.01, drawn(2)[0] * 30)]
    budget = Budget(0.75, score="lamp", granularity=granularity)
    (together,) = budget.survivors([stacked(layers)], 1).masks()
    alone = budget.survivors(weights_of(layers), 1).masks()
    assert torch.equal(together, torch.cat(alone)) and all(bool(mask.any()) for mask in alone)


def test_a_starved_matrix_of_a_tensor_is_told_by_its_place() -> None:
    model = nn.MultiheadAttention(16, 2)
    with torch.no_grad():
        model.in_proj_weight[16:32] *= 1e-6  # the keys
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    pomona.Pruner(model, optimizer, pomona.Magnitude(0.5, score="lamp")).detach()
    pomona.Pruner(model, optimizer, pomona.Magnitude(0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    told = r"1 of 4 layers keeps no more .* in_proj_weight\[1\] 1 of 256; .*Scope\(exclude=\['in_proj_weight'\]\)"
    with pytest.warns(UserWarning, match=told):
        optimizer.step()
