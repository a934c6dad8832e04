"""HOW a weight is ranked: scores are float32, >= 0, new, and survive half precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona import score
from tests.oracles import lamp as oracle


def magnitude(w: Tensor) -> Tensor:
    return score.magnitude(w).tensor()


def saliency(w: Tensor, g: Tensor) -> Tensor:
    return score.saliency(w, g).tensor()


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_magnitude_is_the_absolute_value() -> None:
    assert magnitude(torch.tensor([[-2.0, 0.5], [-0.0, 0.0]])).tolist() == [[2.0, 0.5], [0.0, 0.0]]


def test_saliency_is_the_absolute_product() -> None:
    w, g = torch.tensor([[-2.0, 0.5], [3.0, 0.0]]), torch.tensor([[4.0, -0.5], [2.0, 9.0]])
    assert saliency(w, g).tolist() == [[8.0, 0.25], [6.0, 0.0]]


def test_saliency_is_symmetric_in_weight_and_gradient() -> None:
    w, g = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([4.0, -0.5, 2.0])
    assert torch.equal(saliency(w, g), saliency(g, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    w, g = torch.tensor([-2.0, 0.5], dtype=dtype), torch.tensor([4.0, 8.0], dtype=dtype)
    for found, answer in [(magnitude(w), [2.0, 0.5]), (saliency(w, g), [8.0, 4.0])]:
        assert found.dtype is torch.float32
        assert found.tolist() == answer


def test_weights_and_gradients_may_differ_in_dtype() -> None:
    found = saliency(torch.tensor([-2.0]), torch.tensor([4.0], dtype=torch.bfloat16))
    assert found.dtype is torch.float32
    assert found.tolist() == [8.0]


def test_a_product_that_underflows_in_half_precision_is_still_a_score() -> None:
    tiny = torch.tensor([2.0**-14], dtype=torch.float16)
    assert (tiny * tiny).item() == 0.0  # the naive score: this weight could never be selected
    assert saliency(tiny, tiny).item() == 2.0**-28


def test_a_product_that_overflows_in_half_precision_is_still_finite() -> None:
    large = torch.tensor([2.0**15], dtype=torch.float16)
    assert torch.isinf(large * large).all()
    assert saliency(large, large).item() == 2.0**30


def test_bfloat16_scores_are_products_of_the_stored_values_rounded_nowhere() -> None:
    w = torch.tensor([1.0078125], dtype=torch.bfloat16)  # 1 + 2^-7, the next number after 1
    assert saliency(w, w).item() == 1.0078125**2  # 1 + 2^-6 + 2^-14: in float32, not in bfloat16


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 1, 1)])
def test_a_score_has_the_shape_of_the_weight(shape: tuple[int, ...]) -> None:
    w = torch.full(shape, -2.0)
    assert torch.equal(magnitude(w), torch.full(shape, 2.0))
    assert torch.equal(saliency(w, w), torch.full(shape, 4.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_new_tensors_and_leave_their_inputs_alone(dtype: torch.dtype) -> None:
    w, g = torch.tensor([-2.0, 0.5], dtype=dtype), torch.tensor([-4.0, 8.0], dtype=dtype)
    for found in (magnitude(w), saliency(w, g)):
        found.zero_()
    assert w.tolist() == [-2.0, 0.5]
    assert g.tolist() == [-4.0, 8.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_outside_of_autograd(dtype: torch.dtype) -> None:
    w = torch.nn.Parameter(torch.tensor([-2.0], dtype=dtype))
    g = torch.nn.Parameter(torch.tensor([4.0], dtype=dtype))
    assert not magnitude(w).requires_grad
    assert not saliency(w, g).requires_grad


def test_a_nan_gradient_gives_a_nan_score_for_the_budget_to_refuse() -> None:
    assert saliency(torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, torch.nan])).isnan().all()  # 0 * inf is NaN


def test_a_score_tells_its_size_without_being_computed() -> None:
    w = torch.ones(2, 3)
    assert (score.magnitude(w).shape, score.magnitude(w).numel(), score.magnitude(w).device) == ((2, 3), 6, w.device)


def test_a_gradient_of_another_shape_is_told() -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \(2,\) and \(3,\)"):
        score.saliency(torch.ones(2), torch.ones(3))


def test_inside_a_mask_a_zero_ranks_above_everything_outside() -> None:
    w = torch.tensor([[0.0, -3.0], [2.0, 1e-45]], dtype=torch.float64)
    inside = torch.tensor([[True, False], [True, True]])
    tiny = torch.finfo(torch.float32).tiny
    masked = score.Score(w, inside=inside)
    assert masked.tensor().tolist() == [[tiny, 0.0], [2.0, tiny]]
    assert masked.flat().piece(1, 3).tensor().tolist() == [0.0, 2.0]
    assert masked.take(torch.tensor([3, 2])).tensor().tolist() == [tiny, 2.0]


# One ranking of all layers

FEW = st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.25, 0.5, 1.0, 3.0, 3e4]), min_size=1, max_size=12)


def test_lamp_of_three_weights_by_hand() -> None:
    # 3, 4 and 12: of the largest all stays, 4 is 4 of the norm of (12, 4), and 3 is 3 of 13
    found = score.lamp(torch.tensor([[3.0, 12.0], [4.0, 0.0]]))
    assert found.view(-1).tolist() == pytest.approx([3 / 13, 1.0, 4 / 160**0.5, 0.0], rel=2**-18)


@given(FEW)
@settings(deadline=None)
def test_a_layers_scores_are_those_of_the_paper(values: list[float]) -> None:
    w = np.array(values, dtype=np.float32)
    found = score.lamp(torch.from_numpy(w)).double().square()
    # scores are rounded to 2^-18 of the largest, and lie above the smallest normal number where they are not 0
    assert np.allclose(found.numpy(), oracle.lamp(w), rtol=1e-4, atol=1e-37)


@given(values=FEW)
@settings(deadline=None)
def test_the_order_within_a_layer_stays_and_zero_stays_zero(values: list[float]) -> None:
    w = torch.tensor(values)
    ranked = score.lamp(w)
    places = torch.sort(w, descending=True, stable=True).indices
    assert bool((ranked[places].diff() <= 0).all())
    assert torch.equal(ranked > 0, w > 0)


def test_of_equal_weights_the_first_has_the_larger_score() -> None:
    assert score.lamp(torch.ones(4)).tolist() == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5])


def test_the_scale_of_a_layer_does_not_matter() -> None:
    w = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).abs()
    for power in (-100, -30, 100):  # a power of two rounds nothing
        assert torch.equal(score.lamp(w * 2.0**power), score.lamp(w))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 2, 2)])
def test_a_ranking_has_the_shape_of_the_layer(shape: tuple[int, ...]) -> None:
    for w in (torch.zeros(shape), torch.ones(shape)):
        before = w.clone()
        found = score.lamp(w)
        assert found.shape == shape and found.dtype is torch.float32 and torch.equal(w, before)
        assert bool(found.isfinite().all())


def test_what_is_not_finite_stays_and_spoils_no_other() -> None:
    found = score.lamp(torch.tensor([3.0, math.inf, math.nan, 4.0]))
    assert found[1] == math.inf and bool(found[2].isnan())
    assert torch.equal(found[[0, 3]], score.lamp(torch.tensor([3.0, 0.0, 0.0, 4.0]))[[0, 3]])


def test_a_weight_far_below_the_others_still_has_a_score() -> None:
    w = torch.tensor([1e30, 1e-30, 1e-45, 0.0])
    assert [value > 0 for value in score.lamp(w).tolist()] == [True, True, True, False]


def test_many_scores_are_summed_without_an_overflow() -> None:
    w = torch.ones(1 << 21)
    assert float(score.lamp(w)[-1]) == pytest.approx((1 << 21) ** -0.5)


@pytest.mark.parametrize("wrong", ["LAMP", "lamps", ""])
def test_an_unknown_score_is_told_with_those_there_are(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"score must be one of 'magnitude', 'lamp', .* got '{wrong}'"):
        score.check_scoring(wrong)


def test_what_is_neither_a_name_nor_a_function_is_told() -> None:
    with pytest.raises(TypeError, match="score must be a name such as 'lamp', or a function from a "):
        score.check_scoring(0.5)
