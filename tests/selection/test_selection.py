"""Exact selection: equal to a full sort, whatever the scores, the sample, the chunks, the vehicle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pomona.native import core
from pomona.score import Score, magnitude, saliency
from pomona.selection import NonFiniteError, cpu, device, keys, kth_largest, ranks, select_largest
from pomona.selection.cpu import find_threshold
from pomona.selection.device import select_on_device
from pomona.selection.top_k import global_top_k, select
from tests import oracles

INF, NAN = math.inf, math.nan
NUM = 10_100


def lists(masks: Sequence[Tensor]) -> list[object]:
    return [mask.tolist() for mask in masks]


def sort(scores: Sequence[Tensor], k: int) -> list[object]:
    """Masks by a full sort."""
    return [mask.tolist() for mask in oracles.top_k_mask([score.numpy() for score in scores], k)]


@pytest.fixture(params=["core", "no core"], autouse=True)
def vehicle(request: pytest.FixtureRequest) -> Iterator[None]:
    with core.switched(request.param == "core"):
        if request.param == "core" and not core.is_available():
            pytest.skip(f"no compiled core: {core.why_not()}")
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the scores were hundreds of millions: many chunks, and a sample far smaller than all."""
    for module in (keys, cpu, ranks):
        monkeypatch.setattr(module, "CHUNK", 1 << 9)
    monkeypatch.setattr(cpu, "_NUM_BLOCKS", 1 << 6)
    monkeypatch.setattr(device, "_DEVICE_CHUNK", 1 << 9)
    yield


def _random(generator: torch.Generator) -> Tensor:
    return torch.rand(NUM, generator=generator)


def _alike_neighbours(generator: torch.Generator) -> Tensor:
    """Each block of sixteen of a size of its own: the sample is worth a sixteenth of its length."""
    return (torch.rand(NUM // 16 + 1, generator=generator) * 8).exp().repeat_interleave(16)[:NUM]


def _one_block_of_large_ones(generator: torch.Generator) -> Tensor:
    """No sample of blocks shows it."""
    values = _random(generator)
    values[4_000:4_700] += 10.0
    return values


def _ten_values(generator: torch.Generator) -> Tensor:
    return (10.0 * _random(generator)).floor()


def _one_value(generator: torch.Generator) -> Tensor:
    return torch.ones(NUM)


def _all_zero(generator: torch.Generator) -> Tensor:
    return torch.zeros(NUM)


def _mostly_zero(generator: torch.Generator) -> Tensor:
    return _random(generator) * (_random(generator) < 0.05)


def _ascending(generator: torch.Generator) -> Tensor:
    return torch.arange(NUM, dtype=torch.float32)


def _descending(generator: torch.Generator) -> Tensor:
    return torch.arange(NUM, 0, -1, dtype=torch.float32)


def _subnormal(generator: torch.Generator) -> Tensor:
    return _random(generator) * 1e-39


def _infinite(generator: torch.Generator) -> Tensor:
    return _random(generator).masked_fill(_random(generator) < 0.3, INF)


MANY: list[Callable[[torch.Generator], Tensor]] = [
    _random,
    _alike_neighbours,
    _one_block_of_large_ones,
    _ten_values,
    _one_value,
    _all_zero,
    _mostly_zero,
    _ascending,
    _descending,
    _subnormal,
    _infinite,
]
each = pytest.mark.parametrize("draw", MANY, ids=lambda draw: draw.__name__.strip("_"))
COUNTS = (0, 1, 60, 700, 1_500, 5_050, 10_000, NUM)


@each
def test_the_same_are_kept_as_by_a_full_sort(draw: Callable[[torch.Generator], Tensor], small_chunks: None) -> None:
    scores = list(torch.split(draw(torch.Generator().manual_seed(1)), [3_000, 7_000, 0, 60, 40]))
    for k in COUNTS:
        assert lists(global_top_k(scores, k)) == sort(scores, k), k


@each
def test_other_devices_keep_the_same(draw: Callable[[torch.Generator], Tensor], small_chunks: None) -> None:
    scores = list(torch.split(draw(torch.Generator().manual_seed(1)), [3_000, 7_000, 0, 60, 40]))
    for k in COUNTS:
        chosen = select_on_device([Score(score) for score in scores], k)
        assert lists(chosen.masks()) == sort(scores, k), k
        assert [int(count) for count in chosen.counts] == [int(mask.sum()) for mask in chosen.masks()]


@each
def test_the_kth_largest_equals_sorting(draw: Callable[[torch.Generator], Tensor], small_chunks: None) -> None:
    values = draw(torch.Generator().manual_seed(0))
    descending = values.sort(descending=True).values
    for k in COUNTS[1:]:
        assert kth_largest([Score(values)], k) == descending[k - 1].item(), k
    assert kth_largest([Score(values)], NUM + 1) == 0.0


@each
def test_histograms_find_what_the_sample_does(draw: Callable[[torch.Generator], Tensor], small_chunks: None) -> None:
    scores = [Score(score) for score in torch.split(draw(torch.Generator().manual_seed(2)), [3_000, 7_000, 100])]
    for k in COUNTS[1:]:
        by_histograms = cpu._by_histograms(scores, k)
        found = find_threshold(scores, k)
        assert (found.key, found.greater, found.equal) == (
            by_histograms.key,
            by_histograms.greater,
            by_histograms.equal,
        )


@pytest.mark.parametrize("miss", ["too low", "too high", "too wide"])
def test_a_sample_that_misleads_changes_nothing(miss: str, monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    values = _random(torch.Generator().manual_seed(0))
    keys = np.sort(values.numpy()).view(np.int32)
    bracket = {"too low": (1, int(keys[50])), "too high": (int(keys[-50]), int(keys[-1])), "too wide": (1, 2**31 - 1)}
    monkeypatch.setattr(cpu, "_bracket", lambda scores, total, k: bracket[miss])
    for k in (100, 1_000, 9_000):
        assert lists(global_top_k([values], k)) == sort([values], k), k


VALUES = st.sampled_from([0.0, 0.0, -0.0, 1e-45, -1e-45, 1e-20, -0.5, 0.5, 1.0, -1.0, 2.0, 3e38, -INF, INF])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_of_any_dtypes_are_ranked_as_their_float32_products(data: st.DataObject) -> None:
    pairs = []
    for size in data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4)):
        w, g = (
            torch.tensor(data.draw(st.lists(VALUES, min_size=size, max_size=size)), dtype=torch.float64).to(
                data.draw(DTYPES)
            )
            for _ in range(2)
        )
        pairs.append((w, g))
    scores = [saliency(w, g) if data.draw(st.integers(0, 3)) else magnitude(w) for w, g in pairs]
    tensors = [score.tensor() for score in scores]
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors)))
    if any(t.isnan().any() for t in tensors):  # 0 times infinity
        with pytest.raises(NonFiniteError, match="NaN"):
            select(scores, k)
        return
    chosen = select(scores, k)
    assert lists(chosen.masks()) == sort(tensors, k)
    assert chosen.counts == [int(mask.sum()) for mask in chosen.masks()]


@pytest.mark.parametrize("min_density", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_multiplying_equals_multiplying_by_the_masks(
    min_density: float, dtype: torch.dtype, small_chunks: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    ws = [torch.randn(size, generator=generator).to(dtype) for size in [(50, 40), (700,), (0,), (3, 5, 7)]]
    gs = [torch.randn(w.shape, generator=generator).to(dtype) for w in ws]
    ws[0][:25] *= 1e-3
    scores = [saliency(w, g) for w, g in zip(ws, gs, strict=True)]
    masks = global_top_k(scores, 900, min_density=min_density)
    expected = [g * mask for g, mask in zip(gs, masks, strict=True)]
    select(scores, 900, min_density=min_density).multiply_(gs)
    for g, right in zip(gs, expected, strict=True):
        assert torch.equal(g.signbit(), right.signbit())  # -3 times 0 is -0
        assert torch.equal(g, right)


@pytest.mark.parametrize("is_masked", [(True, True, True), (True, False, True)])
def test_selection_inside_masks_equals_that_of_the_masked_scores(is_masked: Sequence[bool], small_chunks: None) -> None:
    """Zeros inside a mask may be kept, nothing outside is; the masks are read where they lie, no score is stored."""
    generator = torch.Generator().manual_seed(0)
    ws = [torch.randn(size, generator=generator).relu_() for size in [(50, 40), (700,), (3, 5, 7)]]
    masks = [torch.rand(w.shape, generator=generator) < 0.7 for w in ws]
    scores = [Score(w, inside=mask if use else None) for w, mask, use in zip(ws, masks, is_masked, strict=True)]
    dense = [score.tensor() for score in scores]
    assert torch.equal(dense[0] > 0, masks[0])
    for k in (0, 300, 1_000, 1_800, 2_805):
        assert lists(global_top_k(scores, k)) == lists(global_top_k(dense, k)) == sort(dense, k)
        assert lists(select_on_device(scores, k).masks()) == sort(dense, k)
    ones = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    other = Score(ones, inside=torch.rand(2, 3, 4, 4, generator=generator) < 0.5)  # laid out in another way
    assert lists(global_top_k([other], 20)) == sort([other.tensor()], 20)


def test_a_kept_count_of_all_leaves_the_gradient_alone() -> None:
    g = torch.tensor([2.0, 3.0])
    select([saliency(torch.ones(2), g), magnitude(torch.zeros(2))], 3).multiply_([g, torch.ones(2)])
    assert g.tolist() == [2.0, 3.0]


def test_position_is_of_the_tensor_as_seen_not_of_its_memory() -> None:
    w = torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last)
    target = torch.ones_like(w)
    select([magnitude(w)], 100).multiply_([target])
    assert target.reshape(-1).nonzero().view(-1).tolist() == list(range(100))
    transposed = torch.ones(3, 5).t()
    assert global_top_k([transposed], 4)[0].reshape(-1).tolist() == [True] * 4 + [False] * 11


def test_infinite_scores_are_kept_and_counted() -> None:
    scores = [magnitude(torch.tensor([1.0, INF])), magnitude(torch.tensor([-INF, 2.0]))]
    for min_density in (0.0, 0.5):
        chosen = select(scores, 2, min_density=min_density)
        assert lists(chosen.masks()) == [[False, True], [True, False]]
        assert chosen.num_infinite == 2


def test_nothing_the_size_of_the_model_is_allocated() -> None:
    w, g = torch.randn(1 << 23), torch.randn(1 << 23)  # 32 MiB each
    with torch.profiler.profile(profile_memory=True) as profile:
        select([saliency(w, g)], 1 << 19).multiply_([g])
    largest = max((abs(event.cpu_memory_usage) for event in profile.events()), default=0)  # the core's are not torch's
    assert largest <= 4 << 20


def test_on_a_device_the_host_never_waits_and_nothing_depends_on_values() -> None:
    """Fake tensors have no values: whoever asks for one, as ``item()`` does, gets an exception."""
    with FakeTensorMode():
        w, g = torch.randn(40, 50), torch.randn(40, 50)
        chosen = select_on_device([saliency(w, g), magnitude(torch.randn(7))], 100)
        chosen.multiply_([g, torch.randn(7)])
        chosen.masks()
        assert len(chosen.counts) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_a_gpu_keeps_the_same(draw: Callable[[torch.Generator], Tensor]) -> None:
    scores = list(torch.split(draw(torch.Generator().manual_seed(0)), [3_000, 7_000, 100]))
    for k in COUNTS:
        masks = global_top_k([score.cuda() for score in scores], k)
        assert lists([mask.cpu() for mask in masks]) == sort(scores, k)


def test_a_nan_is_refused_wherever_it_is(small_chunks: None) -> None:
    for place in (0, 5_000, NUM - 1):
        values = torch.ones(NUM)
        values[place] = NAN
        with pytest.raises(NonFiniteError, match="NaN"):
            select_largest([Score(values)], 10)
