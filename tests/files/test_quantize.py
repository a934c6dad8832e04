"""Weights that share values: near the best there are, zeros kept, nothing else touched."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.files.quantize import Quantization, k_means, quantize
from pomona.files.stored import Codebook, Stored, from_float32, to_float32

fast = settings(deadline=None)


def weights(count: int = 4000, keep: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.where(generator.random(count) < keep, generator.standard_normal(count), 0).astype(np.float32)


def error(values: np.ndarray, centers: np.ndarray) -> float:
    return float((np.abs(values[:, None].astype(float) - np.asarray(centers)[None]).min(1) ** 2).sum())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("k-means:16", Quantization("k-means", 16)),
        ("k-means:8:shared:biases=32", Quantization("k-means", 8, True, 32)),
        ("uniform:3", Quantization("uniform", 8)),
        ("uniform:8:biases=2", Quantization("uniform", 254, False, 2)),
    ],
)
def test_what_is_read_is_written_the_same(text: str, wanted: Quantization) -> None:
    assert Quantization.parse(text) == wanted
    assert str(wanted) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("k-means", "must be 'k-means:COUNT' or 'uniform:BITS'.* got 'k-means'"),
        ("kmeans:4", "must be"),
        ("k-means:4:biases", "must be"),
        ("k-means:1", "needs 2 to 256 values, got 1"),
        ("k-means:257", "needs 2 to 256 values, got 257"),
        ("uniform:16", "needs 2, 3, 4, 8 bits, got 16"),
        ("uniform:2:biases=256", "needs 2 to 255 values, got 256"),
    ],
)
def test_other_words_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Quantization.parse(text)


@fast
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=10), st.integers(2, 4))
def test_k_means_of_few_numbers_is_the_best_partition(numbers: list[int], count: int) -> None:
    """Of sorted numbers the best clusters are intervals: all of them are tried."""
    values = np.sort(np.array(numbers, np.float32))
    found = k_means(values, count)
    assert len(found) <= count and (np.diff(found) > 0).all()
    cuts = itertools.combinations(range(1, len(values)), min(count, len(values)) - 1)
    best = min(error(values, np.array([part.mean() for part in np.split(values, cut)])) for cut in cuts)
    assert error(values, found) <= best * (1 + 1e-6) + 1e-9  # means are of float32


def test_k_means_of_a_normal_distribution_is_that_of_lloyd_and_max() -> None:
    """Mean squared error 0.03454 of 8 and 0.009497 of 16 values (Max 1960, table I)."""
    values = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    for count, wanted in ((8, 0.03454), (16, 0.009497)):
        centers = k_means(values[:20_000], count)
        nearest = np.sort(centers)[np.searchsorted((centers[1:] + centers[:-1]) / 2, values)]
        assert float(((values - nearest) ** 2).mean()) == pytest.approx(wanted, rel=0.02)


def test_k_means_of_few_values_is_exact() -> None:
    assert k_means(np.array([3, 1, 3, 1, 2], np.float32), 3).tolist() == [1, 2, 3]
    assert k_means(np.array([3, 1], np.float32), 8).tolist() == [1, 3]


@pytest.mark.parametrize("how", ["k-means:8", "uniform:3", "k-means:8:shared", "uniform:4:shared", "uniform:8"])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_zeros_stay_and_every_weight_goes_to_the_nearest_value(how: str, dtype: str) -> None:
    array = from_float32(weights(3000, keep=0.5).reshape(3, 10, 100), dtype)
    made = quantize({"w": Stored(dtype, array)}, Quantization.parse(how))["w"]
    assert isinstance(made.storage, Codebook) and made.dtype == dtype and made.shape == (3, 10, 100)
    before, after = to_float32(array, dtype), to_float32(made.dense(), dtype)
    assert ((before == 0) == (after == 0)).all()
    values = to_float32(made.storage.of(dtype), dtype)
    assert len(np.unique(after[after != 0])) <= Quantization.parse(how).count
    best = np.abs(before[before != 0][:, None] - values[None]).min(1)
    assert np.allclose(np.abs(before - after)[before != 0], best, atol=2.0**-8)  # the dtype's rounding of the values


def test_uniform_values_are_multiples_of_one_step() -> None:
    made = quantize({"w": Stored("F32", weights().reshape(40, 100))}, Quantization.parse("uniform:3"))["w"]
    assert isinstance(made.storage, Codebook)
    step = made.storage.values[4]
    assert made.storage.values.tolist() == [np.float32(i * step) for i in (-4, -3, -2, -1, 1, 2, 3, 4)]
    # Of eight equidistant values with a gap around zero; without the gap 0.0374 is the best (Max 1960, table II).
    assert 0.03 < float(((made.dense() - weights().reshape(40, 100)) ** 2).mean()) < 0.06


def test_others_are_rounded_to_half_precision_or_left(recwarn: pytest.WarningsRecorder) -> None:
    tensors = {
        "bias": Stored("F32", np.array([0.1, 1e-9, 2], np.float32)),
        "double": Stored("F64", np.array([0.1])),
        "large": Stored("F32", np.array([1e6], np.float32)),
        "bfloat": Stored("BF16", np.array([0x3F80], np.uint16)),
        "steps": Stored("I64", np.array(3)),
    }
    made = quantize(tensors, Quantization.parse("k-means:4"))
    assert made["bias"].storage == made["double"].storage == "F16"
    assert made["bias"].dense().tolist() == np.array([0.1, 0, 2], np.float16).astype(np.float32).tolist()
    assert made["double"].dense().dtype == np.float64
    for name in ("large", "bfloat", "steps"):
        assert made[name] is tensors[name]
    assert not recwarn.list


def test_biases_can_share_a_codebook() -> None:
    tensors = {
        "a.weight": Stored("F32", weights().reshape(40, 100)),
        "a.bias": Stored("F32", weights(50)),
        "b.bias": Stored("F32", weights(60)),
        "norm.weight": Stored("F32", weights(60)),
    }
    made = quantize(tensors, Quantization.parse("k-means:8:biases=4"))
    assert made["a.bias"].storage is made["b.bias"].storage
    assert len(np.unique(np.concatenate([made["a.bias"].dense(), made["b.bias"].dense()]))) <= 4
    assert made["norm.weight"].storage == "F16"


def test_shared_is_one_codebook_and_tied_tensors_stay_tied() -> None:
    tied = Stored("F32", weights().reshape(40, 100))
    tensors = {"a": tied, "b": Stored("F32", 3 * weights().reshape(40, 100)), "again": tied}
    apart, together = (quantize(tensors, Quantization.parse(f"k-means:4{end}")) for end in ("", ":shared"))
    assert apart["a"] is apart["again"] and together["a"] is together["again"]
    assert apart["a"].storage is not apart["b"].storage and together["a"].storage is together["b"].storage


def test_half_precision_is_used_for_values_that_it_holds() -> None:
    for scale, dtype in ((1, "F16"), (1e7, "F32"), (1e-7, "F32")):
        made = quantize({"w": Stored("F32", scale * weights().reshape(40, 100))}, Quantization.parse("k-means:4"))["w"]
        assert isinstance(made.storage, Codebook) and made.storage.dtype == dtype


def test_nothing_but_zeros_and_nothing_at_all() -> None:
    for how in ("k-means:4", "uniform:2", "uniform:2:shared:biases=3"):
        for shape in ((3, 4), (0, 4)):
            made = quantize({"w": Stored("F32", np.zeros(shape, np.float32))}, Quantization.parse(how))["w"]
            assert made.dense().tolist() == np.zeros(shape).tolist()
    assert quantize({}, Quantization.parse("k-means:4:shared")) == {}


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize({"w": Stored("F32", np.full((2, 2), np.inf, np.float32))}, Quantization.parse("k-means:4"))
