"""The compiled core equals a full sort, and torch.optim.SGD, bit for bit, on every instruction set and any threads."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.cli import main
from pomona.native import core, library
from pomona.score import Score

needs_core = pytest.mark.skipif(not core.is_available(), reason=f"no compiled core: {core.why_not()}")

fast = settings(deadline=None)

ISAS = core.isas() if core.is_available() else ("none",)
INF, NAN = math.inf, math.nan

# Few distinct values, so that nearly every example has ties at the threshold.
TIED = st.sampled_from([0.0, -0.0, 1e-45, 1e-40, 0.5, -0.5, 1.0, 1.0, -2.0, 3e38, INF, -INF])
LAYERS = st.lists(st.lists(TIED, max_size=40), min_size=1, max_size=5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    if core.is_available():
        core.use_isa(ISAS[-1])
    yield
    if core.is_available():
        core.use_isa(ISAS[-1])


def keys_of(a: Tensor, b: Tensor | None = None) -> Tensor:
    score = a.float() if b is None else a.float() * b.float()
    return score.abs().view(torch.int32).flatten()


def check_select(keys: Sequence[Tensor], scores: core.Scores, k: int) -> core.KthLargest:
    joined = torch.cat(list(keys))
    ranked = joined.sort(descending=True).values
    threshold = core.KEY_MAX if k == 0 else max(1, int(ranked[k - 1]))
    s = core.select(scores, k)
    assert s.threshold == threshold
    assert s.num_greater == int((joined > threshold).sum())
    assert s.num_equal == int((joined == threshold).sum())
    assert s.num_infinite == int((joined == core.KEY_INFINITE).sum())
    assert s.num_nan == int((joined > core.KEY_INFINITE).sum())
    return s


def expected_mask(keys: Tensor, threshold: int, ties: int) -> Tensor:
    equal = keys == threshold
    allowed = equal if ties < 0 else equal & (equal.cumsum(0) <= ties)
    return (keys > threshold) | allowed


# Selection


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@fast
@given(layers=LAYERS, threads=st.integers(1, 4), data=st.data())
def test_select_equals_a_full_sort(
    isa: str, layers: Sequence[Sequence[float]], threads: int, data: st.DataObject
) -> None:
    core.use_isa(isa)
    torch.set_num_threads(threads)
    tensors = [torch.tensor(layer) for layer in layers]
    k = data.draw(st.integers(0, sum(map(len, layers))))
    check_select([keys_of(t) for t in tensors], core.Scores(tensors), k)


CROWDS = {
    "normal": lambda x: x,
    "ties": lambda x: (8 * x).round(),
    "all equal": torch.ones_like,
    "all zero": torch.zeros_like,
    "mostly zeros": lambda x: x.where(x > 1.6, -0.0),
    "two values": lambda x: x.sign(),
    "denormal": lambda x: x * 1e-42,
    "sorted": lambda x: x.sort().values,
    "wide": lambda x: (20 * x).exp(),
    "some infinite": lambda x: x.where(x < 2.0, INF),
    "some NaN": lambda x: x.where(x < 2.0, NAN),
    "misleading": lambda x: x.abs().sort(descending=True).values * (torch.arange(x.numel()) % 16 == 15),
}


@needs_core
@pytest.mark.parametrize("crowd", CROWDS)
def test_select_of_many_equals_a_full_sort(crowd: str) -> None:
    tensors = [CROWDS[crowd](torch.randn(n)) for n in (150_001, 3, 0, 40_000, 16_384)]
    keys, scores = [keys_of(t) for t in tensors], core.Scores(tensors)
    total = scores.total()
    found = [check_select(keys, scores, k) for k in (0, 1, total // 100, total // 10, total // 2, total)]
    for isa, threads in itertools.product(ISAS, (1, 3)):
        core.use_isa(isa)
        torch.set_num_threads(threads)
        assert core.select(scores, total // 10) == found[3]


@needs_core
def test_a_selection_usually_takes_one_pass() -> None:
    tensors = [torch.randn(100_000) for _ in range(4)]
    assert core.select(core.Scores(tensors), 40_000).num_passes == 1


@needs_core
def test_a_sample_that_misleads_costs_passes_only() -> None:
    # The k largest are together in 32 cache lines, of which a sample sees one or none.
    a = torch.rand(1 << 20)
    a[: 1 << 9] += 10.0
    s = check_select([keys_of(a)], core.Scores([a]), 100)
    assert s.num_passes <= 4


@needs_core
@pytest.mark.parametrize("right", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("left", DTYPES, ids=str)
def test_scores_are_products_rounded_once_in_float32(left: torch.dtype, right: torch.dtype | None) -> None:
    a = [(torch.randn(n, dtype=torch.float64) * 10.0 ** torch.randint(-9, 5, (n,))).to(left) for n in (3000, 17)]
    b = None if right is None else [torch.randn(x.numel(), dtype=torch.float64).to(right) for x in a]
    keys = [keys_of(x, None if b is None else y) for x, y in zip(a, b or a, strict=True)]
    for isa in ISAS:
        core.use_isa(isa)
        check_select(keys, core.Scores(a, b), 700)
        got, num = core.gather(core.Scores(a, b), 0, core.KEY_MAX, capacity=4000)
        assert num == 3017 and torch.equal(got.sort().values, torch.cat(keys).sort().values)


@needs_core
def test_every_half_becomes_its_float() -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        a = halves.view(dtype)
        masks, _ = core.mask(core.Scores([a]), [int(keys_of(torch.tensor(1e-7))[0])], [-1])
        assert torch.equal(masks[0], ~(a.float().abs() < 1e-7))
        assert core.num_nonfinite([a]) == int((~a.isfinite()).sum())
        check_select([keys_of(a)[~a.isnan()]], core.Scores([a[~a.isnan()]]), 1000)


@needs_core
def test_histogram_and_gather_agree_with_the_keys() -> None:
    a = torch.randn(50_000)
    a[7], a[8] = INF, NAN
    keys = keys_of(a)
    low, high, shift = 0x3E000000, 0x3F800000, 18
    inside = keys[(keys >= low) & (keys <= high)]
    for isa, threads in itertools.product(ISAS, (1, 2)):
        core.use_isa(isa)
        torch.set_num_threads(threads)
        h = core.histogram(core.Scores([a]), low, high, shift=shift)
        assert torch.equal(h.bins, torch.bincount((inside - low) >> shift, minlength=h.bins.numel()))
        assert (h.num_greater, h.num_infinite, h.num_nan) == (int((keys > high).sum()), 1, 1)
        some, num = core.gather(core.Scores([a]), low, high, capacity=10)
        assert (some.numel(), num) == (10, inside.numel()) and bool(((some >= low) & (some <= high)).all())


# Masks


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@fast
@given(layers=LAYERS, threads=st.integers(1, 4), data=st.data())
def test_mask_and_multiply_keep_the_first_ties(
    isa: str, layers: Sequence[Sequence[float]], threads: int, data: st.DataObject
) -> None:
    core.use_isa(isa)
    torch.set_num_threads(threads)
    tensors = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    keys = [keys_of(t) for t in tensors]
    thresholds = [data.draw(st.sampled_from([1, core.KEY_MAX, *(int(x) or 1 for x in k)])) for k in keys]
    ties = [data.draw(st.integers(-1, 10)) for _ in keys]
    masks, kept = core.mask(core.Scores(tensors), thresholds, ties)
    expected = [expected_mask(*row) for row in zip(keys, thresholds, ties, strict=True)]
    counts, equal = core.count(core.Scores(tensors), thresholds[0])
    assert (counts[0], equal[0]) == (int((keys[0] > thresholds[0]).sum()), int((keys[0] == thresholds[0]).sum()))
    assert all(torch.equal(m, e) for m, e in zip(masks, expected, strict=True))
    assert kept == [int(e.sum()) for e in expected]
    for dtype in DTYPES:
        targets = [torch.tensor(layer).to(dtype) for layer in layers]
        assert core.multiply_(core.Scores(tensors), thresholds, ties, targets) == kept
        for target, layer, m in zip(targets, layers, expected, strict=True):
            assert same(target, torch.tensor(layer).to(dtype).mul_(m))


@needs_core
def test_ties_are_counted_over_chunks_and_threads() -> None:
    w = torch.ones(100_000)
    for threads, ties in itertools.product((1, 4), (0, 1, 16_384, 16_385, 70_000, 200_000)):
        torch.set_num_threads(threads)
        target = w.clone()
        kept = core.multiply_(core.Scores([w]), [0x3F800000], [ties], [target])
        assert kept == [min(ties, 100_000)] == [int(target[:ties].sum())] == [int(target.sum())]


@needs_core
def test_a_target_may_be_a_factor_of_its_scores() -> None:
    w, g = torch.randn(40_000), torch.randn(40_000)
    threshold = core.select(core.Scores([w], [g]), 4000).threshold
    expected = g * expected_mask(keys_of(w, g), threshold, -1)
    core.multiply_(core.Scores([w], [g]), [threshold], [-1], [g])
    assert same(g, expected)


@needs_core
def test_masks_have_the_layout_of_their_tensors() -> None:
    a = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    masks, _ = core.mask(core.Scores([a]), [int(keys_of(torch.tensor(0.5))[0])], [-1])
    assert torch.equal(masks[0], a.abs() >= 0.5) and masks[0].stride() == a.stride()


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@fast
@given(
    layers=LAYERS, dtype=st.sampled_from(DTYPES), is_product=st.booleans(), threads=st.integers(1, 4), data=st.data()
)
def test_scores_inside_a_mask_are_those_of_a_masked_tensor(
    isa: str,
    layers: Sequence[Sequence[float]],
    dtype: torch.dtype,
    is_product: bool,
    threads: int,
    data: st.DataObject,
) -> None:
    core.use_isa(isa)
    torch.set_num_threads(threads)
    tensors = [torch.tensor(layer).to(dtype) for layer in layers]
    factors = [torch.tensor(layer[::-1]) for layer in layers] if is_product else None
    inside = [
        torch.tensor([data.draw(st.booleans()) for _ in layer], dtype=torch.bool) if len(layer) % 3 else None
        for layer in layers
    ]
    expected = [
        Score(a, None if factors is None else factors[i], mask).tensor()
        for i, (a, mask) in enumerate(zip(tensors, inside, strict=True))
    ]
    if any(bool(score.isnan().any()) for score in expected):  # 0 times infinity
        return
    scores = core.Scores(tensors, factors, inside)
    k = data.draw(st.integers(0, sum(len(layer) for layer in layers)))
    check_select([keys_of(score) for score in expected], scores, k)
    thresholds = [1] * len(layers)
    masks, _ = core.mask(scores, thresholds, [-1] * len(layers))
    assert all(torch.equal(mask, score > 0) for mask, score in zip(masks, expected, strict=True))


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@fast
@given(
    layers=st.lists(st.lists(st.one_of(TIED, st.just(NAN)), max_size=60), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_zeros_are_written_over_what_is_pruned(
    isa: str, layers: Sequence[Sequence[float]], dtype: torch.dtype, threads: int, data: st.DataObject
) -> None:
    core.use_isa(isa)
    torch.set_num_threads(threads)
    tensors = [torch.tensor(layer).to(dtype) for layer in layers]
    pruned = [torch.tensor([data.draw(st.booleans()) for _ in layer], dtype=torch.bool) for layer in layers]
    expected = [t.masked_fill(mask, 0.0) for t, mask in zip(tensors, pruned, strict=True)]
    lost = [torch.cat([t[mask].abs(), t.new_zeros(1)]).max() for t, mask in zip(tensors, pruned, strict=True)]
    versions = [t._version for t in tensors]
    largest = core.zero_(tensors, pruned)
    assert all(same(a, b) for a, b in zip(tensors, expected, strict=True))
    assert same(torch.tensor(largest, dtype=torch.float64), torch.stack(lost).double())
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))


@needs_core
@pytest.mark.parametrize("isa", ISAS)
@fast
@given(
    values=st.lists(st.one_of(TIED, st.just(NAN)), min_size=24, max_size=24),
    shape=st.sampled_from([(24,), (1, 24), (24, 1), (3, 8), (2, 3, 2, 2)]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_survey_counts_rows_and_finds_the_smallest(
    isa: str, values: Sequence[float], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    core.use_isa(isa)
    t = torch.tensor(values).to(dtype).view(shape)
    if len(shape) == 4:
        t = t.to(memory_format=torch.channels_last)
    assert core.has_rows(t)
    counts, smallest = core.survey(t)
    assert counts.tolist() == t.reshape(len(t), -1).count_nonzero(1).tolist()
    expected = t.abs().masked_fill(t == 0, INF).min()
    assert same(torch.tensor([smallest], dtype=torch.float64), expected.double().view(1))


@needs_core
def test_a_survey_of_many_rows_and_of_long_ones() -> None:
    for shape in ((3, 40_000), (40_000, 3), (1, 100_000), ()):
        t = torch.randn(shape) * (torch.rand(shape) < 0.3)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert core.survey(t)[0].tolist() == t.reshape(t.shape[0] if shape else 1, -1).count_nonzero(1).tolist()
    assert not core.has_rows(torch.randn(3, 4).t())
    assert not core.has_rows(torch.randn(3, 4)[:, ::2])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for those of NaNs."""
    nan = a.isnan()
    signs = torch.equal(a[~nan].signbit(), b[~nan].signbit())
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]) and signs


# What is refused, and what runs where


@needs_core
def test_num_nonfinite() -> None:
    a, b = torch.randn(20_000), torch.randn(10).double()
    a[3], a[19_999], b[2] = INF, NAN, -INF
    assert core.num_nonfinite([a, b, torch.empty(0)]) == 3


@needs_core
def test_impossible_arguments_are_refused() -> None:
    scores = core.Scores([torch.ones(3)])
    with pytest.raises(ValueError, match="out of range"):
        core.select(scores, 4)
    with pytest.raises(ValueError, match="out of range"):
        core.mask(scores, [0], [-1])
    with pytest.raises(ValueError, match="KEY_MAX"):
        core.histogram(scores, 5, 4, shift=0)
    with pytest.raises(ValueError, match="a target for each of 1"):
        core.multiply_(scores, [1], [-1], [])
    with pytest.raises(KeyError):
        core.Scores([torch.ones(3, dtype=torch.int32)])
    with pytest.raises(ValueError, match="instruction set must be one of portable"):
        core.use_isa("abacus")


def test_fits_tells_what_lies_alike_in_memory() -> None:
    a = torch.randn(2, 3, 4, 4)
    last = a.to(memory_format=torch.channels_last)
    assert core.fits(a) and core.fits(a, a.bfloat16()) and core.fits(last, last.clone())
    assert not core.fits(a, last)
    assert not core.fits(a[:, ::2])
    assert not core.fits(a, a.to(torch.int32))
    assert not core.fits(a.to("meta"))
    assert not core.fits(torch.ones(3, 3).to_sparse())
    assert core.fits(torch.ones(3, 3).t()) and not core.fits(torch.ones(1).expand(3))


MANY = torch.arange(200_000.0)


def _select_of_many(k: int) -> int:
    return core.select(core.Scores([MANY]), k).threshold


@needs_core
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    expected = _select_of_many(1000)  # the parent's threads are there before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_select_of_many, [1000, 1000]).get(timeout=60) == [expected, expected]


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for anew."""
    monkeypatch.delenv("POMONA_CORE", raising=False)
    library._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library._load.cache_clear()


def test_the_environment_switches_it_off(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("POMONA_CORE", "0")
    assert not core.is_available() and core.why_not() == "POMONA_CORE=0"
    with pytest.raises(RuntimeError, match="core is not available: POMONA_CORE=0"):
        core.isa()


def test_the_environment_is_checked(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("POMONA_CORE", "no")
    with pytest.raises(ValueError, match="POMONA_CORE must be 0, 1 or one of portable, avx2, avx512, got 'no'"):
        core.is_available()


@needs_core
def test_the_environment_chooses_the_instruction_set(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("POMONA_CORE", "portable")
    assert core.isa() == "portable"


@needs_core
@pytest.mark.skipif(len(ISAS) == 3, reason="this machine has all instruction sets")
def test_an_instruction_set_that_is_not_here_is_refused(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("POMONA_CORE", "avx512")
    with pytest.raises(ValueError, match="does not have that instruction set"):
        core.is_available()


@needs_core
def test_a_library_that_was_built_for_another_version_is_not_used(afresh: pytest.MonkeyPatch) -> None:
    afresh.setattr(library, "__version__", "0.0.0")
    assert not core.is_available() and "reinstall pomona" in str(core.why_not())


def test_a_missing_or_broken_library_is_told(afresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    afresh.setattr(library, "library_path", lambda: tmp_path / "none.so")
    assert "not built" in str(core.why_not())
    (tmp_path / "none.so").write_text("not a library")
    library._load.cache_clear()
    assert "cannot be loaded" in str(core.why_not())


# pomona env


def test_env_names_versions_and_the_path_of_selection(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["torch"] == torch.__version__ and rows["threads"] == "1"
    assert rows["selection"].startswith("compiled core" if core.is_available() else "numpy; no compiled core: ")


def test_env_tells_why_there_is_no_core_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pomona.cli.env._EXTRAS", {"zoo": ("no-such-package",)})
    monkeypatch.setattr(core, "is_available", lambda: False)
    monkeypatch.setattr(core, "why_not", lambda: "it was eaten")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "numpy; no compiled core: it was eaten" in out
    assert "missing no-such-package (pip install 'pomona[zoo]')" in out
