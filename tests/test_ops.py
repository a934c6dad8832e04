"""What methods are made of: each operation by hand, at its edges, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.ops import (
    among,
    count,
    drop_buffers_,
    drop_gradients_,
    drop_weights_,
    generator,
    masks_of,
    random_scores,
    soft_threshold,
    sparsity_of,
    total,
)
from pomona.selection.top_k import global_top_k
from pomona.weight import Weight
from tests.problems import bits

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf

fast = settings(deadline=None)


def weight(value: Tensor, *buffers: Tensor) -> Weight:
    return Weight("w", value, value.clone(), {"lr": 0.1}, {}, optimizer_state=dict(enumerate(buffers)))


# soft_threshold


def test_soft_threshold_by_hand() -> None:
    v = torch.tensor([-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5])
    assert soft_threshold(v, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    assert v.tolist() == [-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5]


def test_its_zeros_have_no_sign() -> None:
    assert not soft_threshold(torch.tensor([-0.5, -1.0, -0.0]), 1.0).signbit().any()


def test_a_threshold_of_zero_is_a_copy_bit_for_bit() -> None:
    v = torch.tensor([-2.0, -0.0, 0.0, 1e-45, INF, NAN])
    copied = soft_threshold(v, 0.0)
    assert bits(copied) == bits(v)
    assert copied.data_ptr() != v.data_ptr()


def test_what_is_not_finite_is_not_hidden() -> None:
    thresholded = soft_threshold(torch.tensor([NAN, INF, -INF]), 1.0)
    assert thresholded.isnan().tolist() == [True, False, False]
    assert thresholded[1:].tolist() == [INF, -INF]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    thresholded = soft_threshold(torch.tensor([[-3.0, 0.5]], dtype=dtype), 1.0)
    assert thresholded.dtype is dtype
    assert thresholded.tolist() == [[-2.0, 0.0]]


@given(v=st.floats(-10, 10), threshold=st.floats(0, 10), other=st.floats(-10, 10))
@fast
def test_it_minimises_the_penalised_distance(v: float, threshold: float, other: float) -> None:
    def objective(w: float) -> float:
        return 0.5 * (w - v) ** 2 + threshold * abs(w)

    found = soft_threshold(torch.tensor(v, dtype=torch.float64), threshold).item()
    assert objective(found) <= objective(other) + 1e-12  # rounding of squares up to 200


# dropping


def test_dropping_writes_zeros_outside_the_masks_and_nothing_else() -> None:
    masks = [torch.tensor([True, False, True]), torch.tensor([[False, True]])]
    values = [torch.tensor([1.0, NAN, -0.0]), torch.tensor([[-INF, 4.0]])]
    for drop_, part in ((drop_weights_, "value"), (drop_gradients_, "grad")):
        weights = [weight(value.clone(), value.clone()) for value in values]
        drop_(weights, masks)
        first, second = (getattr(w, part) for w in weights)
        assert bits(first) == bits(torch.tensor([1.0, 0.0, -0.0]))
        assert bits(second) == bits(torch.tensor([[0.0, 4.0]]))
        untouched = {"value", "grad"} - {part}
        for w, value in zip(weights, values, strict=True):
            assert bits(getattr(w, *untouched)) == bits(value)
            assert bits(w.buffers[0]) == bits(value)


def test_dropping_buffers_clears_each_of_them_and_nothing_else() -> None:
    value = torch.tensor([1.0, 2.0])
    several, none = weight(value.clone(), torch.tensor([3.0, 4.0]), torch.tensor([-5.0, NAN])), weight(value.clone())
    drop_buffers_([several, none], [torch.tensor([True, False])] * 2)
    assert [b.tolist() for b in several.buffers] == [[3.0, 0.0], [-5.0, 0.0]]
    assert bits([w.value for w in (several, none)]) == bits([w.grad for w in (several, none)]) == bits([value] * 2)


def test_weights_that_are_views_are_dropped_in_place() -> None:
    base = torch.ones(2, 4)
    w = weight(base[:, ::2])
    drop_weights_([w], [torch.tensor([[True, False], [False, True]])])
    assert base.tolist() == [[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("drop_", [drop_weights_, drop_gradients_, drop_buffers_])
def test_a_mask_too_few_is_noticed(drop_: object) -> None:
    with pytest.raises(ValueError, match="zip"):
        drop_([weight(torch.ones(2))] * 2, [torch.tensor([True, False])])  # type: ignore[operator]


# masks


def test_sparsity_is_of_the_values_of_all_weights_together() -> None:
    values = [torch.tensor([1.0, -0.0]), torch.ones(2, 3), torch.zeros(4)]
    mask = torch.ones(2, dtype=torch.bool)
    weights = [Weight("w", value, value, {}, {"mask": mask}) for value in values]
    assert sparsity_of(weights) == 5 / 12
    assert masks_of(weights)[0] is mask


def test_among_ranks_zeros_inside_above_everything_outside() -> None:
    score = torch.tensor([0.0, 9.0, 0.0, 3.0, 1e-45, INF])
    mask = torch.tensor([True, False, True, True, True, False])
    ranked = among(score, mask)
    assert bool((ranked[mask] > 0).all()) and not ranked[~mask].any()
    assert ranked[3] == 3.0
    assert score.tolist() == [0.0, 9.0, 0.0, 3.0, 1.401298464324817e-45, INF]
    for k in range(5):
        (kept,) = global_top_k([ranked], k)
        assert int(kept.sum()) == k
        assert not (kept & ~mask).any()


@given(st.lists(st.tuples(st.sampled_from([0.0, 1e-45, 0.5, 1.0, INF]), st.booleans()), min_size=1), st.data())
@fast
def test_of_what_is_among_exactly_k_are_kept_and_they_are_the_largest(
    entries: list[tuple[float, bool]], data: st.DataObject
) -> None:
    score, mask = (torch.tensor(column) for column in zip(*entries, strict=True))
    k = data.draw(st.integers(0, int(mask.sum())), label="k")
    (kept,) = global_top_k([among(score, mask)], k)
    assert int(kept.sum()) == k
    assert not (kept & ~mask).any()
    smallest_kept = min(score[kept].tolist(), default=INF)
    assert smallest_kept >= max((s for s in score[mask & ~kept].tolist() if s > 1e-38), default=0.0)


def test_a_nan_among_them_is_not_hidden() -> None:
    assert among(torch.tensor([NAN, NAN]), torch.tensor([True, False])).isnan().tolist() == [True, False]


# random numbers


def drawn(seed: int, step: int, layer: int = 0) -> list[float]:
    numbers: list[float] = torch.rand(8, generator=generator(seed, step, CPU, layer=layer)).tolist()
    return numbers


def test_random_numbers_follow_from_seed_step_and_layer() -> None:
    keys = [(s, t, i) for s in (0, 1, 2**32, 2**64) for t in (1, 2, 10, 11, 2**32 + 1) for i in (0, 1, 10)]
    streams = {tuple(drawn(*key)) for key in keys}
    assert len(streams) == len(keys)
    assert drawn(3, 4, 5) == drawn(3, 4, 5)


def test_seed_and_step_are_not_interchangeable() -> None:
    assert drawn(1, 11) != drawn(11, 1) != drawn(1, 1, 1)


def test_seeds_stay_what_they_were() -> None:
    """A run that an older version began goes on with the masks that it would have drawn."""
    seeds = [generator(0, 1, CPU), generator(0, 1, CPU, layer=1), generator(7, 300, CPU, layer=2)]
    assert [g.initial_seed() for g in seeds] == [2256284430, 2158045147, 3790632040]


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    list(random_scores([weight(torch.ones(5, 5))], 0, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_scores_are_above_zero_and_different_for_each_weight() -> None:
    weights = [weight(torch.zeros(40, 25, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    first, second = random_scores(weights, seed=0, step=1)
    for score in (first, second):
        assert score.dtype is torch.float32
        assert score.shape == (40, 25)
        assert 0.0 < score.min() < 0.02 and 0.98 < score.max() <= 1.0
    assert int((first == second).sum()) < 5
    (again, _), (other, _) = random_scores(weights, 0, 1), random_scores(weights, 0, 2)
    assert torch.equal(again, first)
    assert int((other == first).sum()) < 5


def test_scores_of_a_layer_do_not_depend_on_the_sizes_of_the_others() -> None:
    _, after_small = random_scores([weight(torch.ones(2)), weight(torch.ones(9))], 0, 1)
    _, after_large = random_scores([weight(torch.ones(5000)), weight(torch.ones(9))], 0, 1)
    assert torch.equal(after_small, after_large)


def _weight(value: Tensor) -> Weight:
    return Weight("w", value, value, {}, {})


def test_counts_are_of_each_tensor() -> None:
    tensors = [torch.tensor([True, False, True]), torch.tensor([[0.0, -2.0]]), torch.zeros(0)]
    assert count(tensors, of=[_weight(t) for t in tensors]) == [2, 1, 0]


@given(st.lists(st.floats(0.0, 2.0**120, width=32), max_size=40))
@settings(deadline=None)
def test_a_total_is_the_true_sum_rounded_once(numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32)
    assert total([tensor], of=[_weight(tensor)]) == [math.fsum(numbers)]
    assert total([tensor.flip(0)], of=[_weight(tensor)]) == [math.fsum(numbers)]


def test_a_total_with_an_infinity_is_none() -> None:
    tensor = torch.tensor([1.0, math.inf])
    assert math.isnan(total([tensor], of=[_weight(tensor)])[0])
