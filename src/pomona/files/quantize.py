"""Quantization: weights share a codebook of few values, chosen for a small squared error. numpy only.

Zeros stay zeros and are not in the codebook. Quantised tensors decode to plain float tensors, and these should be
evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files.safetensors import DTYPES
from pomona.files.sparse import Sparse
from pomona.files.stored import FLOATS, Codebook, Stored, from_float32, to_float32

_BITS = (2, 3, 4, 8)
_TEXT = re.compile(
    r"(?P<kind>k-means|uniform):(?P<count>[0-9]{1,4})(?P<shared>:shared)?(:biases=(?P<biases>[0-9]{1,4}))?"
)
_SAMPLE = 1 << 16  # number of weights used in the search for a step


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are made to share values.

    Attributes:
        kind: "k-means", any `count` values; or "uniform", `count` multiples of one step.
        count: number of values, 2 to 256.
        shared: one codebook for the whole network instead of one per tensor.
        biases: number of values that all biases share, by k-means; 0: biases are rounded to half precision.
    """

    kind: str
    count: int
    shared: bool = False
    biases: int = 0

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """Read ``k-means:16`` (2 to 256 values) or ``uniform:4`` (2, 3, 4 or 8 bits), then ``:shared``, ``:biases=16``.

        Example:
            >>> Quantization.parse("k-means:8:shared")
            Quantization(kind='k-means', count=8, shared=True, biases=0)
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                "quantize must be 'k-means:COUNT' or 'uniform:BITS', optionally followed by ':shared' and "
                f"':biases=COUNT', got {text!r}"
            )
        count, biases = int(match["count"]), int(match["biases"] or 0)
        if match["kind"] == "k-means" and not 2 <= count <= 256:
            raise ValueError(f"quantize='k-means:COUNT' needs 2 to 256 values, got {count}")
        if match["kind"] == "uniform" and count not in _BITS:
            raise ValueError(f"quantize='uniform:BITS' needs {', '.join(map(str, _BITS))} bits, got {count}")
        if match["biases"] and not 2 <= biases <= 255:
            raise ValueError(f"quantize='...:biases=COUNT' needs 2 to 255 values, got {biases}")
        # With 8 bits two values are left out, so that zeros of a dense tensor have an index too.
        values = count if match["kind"] == "k-means" else min(1 << count, 254)
        return cls(match["kind"], values, match["shared"] is not None, biases)

    def __str__(self) -> str:
        size = self.count if self.kind == "k-means" else math.ceil(math.log2(self.count))
        return f"{self.kind}:{size}{':shared' * self.shared}{f':biases={self.biases}' if self.biases else ''}"


def quantize(tensors: Mapping[str, Stored], how: Quantization) -> dict[str, Stored]:
    """The same tensors with fewer distinct values.

    Float tensors of two or more dimensions get a codebook. Other floats of 32 or 64 bits, such as biases, are rounded
    to half precision unless that overflows. Everything else stays as it is, and tied tensors stay tied.
    """
    weights = {id(s): s for s in tensors.values() if s.dtype in FLOATS and len(s.shape) >= 2}
    parts = {key: _survivors(stored) for key, stored in weights.items()}
    if how.shared:
        codebook = _fit(np.concatenate([*parts.values(), np.zeros(0, np.float32)]), how)
        codebooks = dict.fromkeys(parts, codebook)
    else:
        codebooks = {key: _fit(values, how) for key, values in parts.items()}
    made = {key: _by_codebook(stored, codebooks[key]) for key, stored in weights.items()}
    if how.biases:
        biases = {
            id(s): s for n, s in tensors.items() if n.endswith("bias") and s.dtype in FLOATS and len(s.shape) == 1
        }
        values = [_survivors(stored) for stored in biases.values()]
        codebook = _fit(np.concatenate([*values, np.zeros(0, np.float32)]), Quantization("k-means", how.biases))
        made |= {key: _by_codebook(stored, codebook) for key, stored in biases.items()}
    for stored in tensors.values():
        made.setdefault(id(stored), half(stored))
    return {name: made[id(stored)] for name, stored in tensors.items()}


def _survivors(stored: Stored) -> NDArray[np.float32]:
    """The values that are not zero, as float32."""
    values = to_float32(stored.value.values if isinstance(stored.value, Sparse) else stored.value, stored.dtype)
    values = values.reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError(f"a tensor of shape {stored.shape} has values that are not finite, which cannot be quantised")
    survivors: NDArray[np.float32] = values[values != 0]
    return survivors


def _fit(values: NDArray[np.float32], how: Quantization) -> Codebook:
    if not values.size:
        return Codebook.table(np.zeros(1))
    if how.kind == "uniform":
        return Codebook.uniform(_step(values, how.count), how.count)
    centers = k_means(values, how.count)
    codebook = Codebook.table(centers, "F16")
    exact = np.abs(codebook.values - centers) <= np.abs(centers) * 2.0**-11  # neither too large nor too small for F16
    return codebook if exact.all() else Codebook.table(centers)


def k_means(values: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """At most `count` ascending values with the least squared error to `values`; nearly the least if these are many.

    Many values are first counted in bins. The best values for the means of the bins then start Lloyd's iteration over
    all values. Nothing is random.
    """
    ordered, times = np.unique(values.astype(np.float64), return_counts=True)
    if ordered.size <= count:
        return ordered
    if ordered.size <= _POINTS:
        return _best_values(ordered, times, count)
    bins = ((ordered - ordered[0]) * (_POINTS / (ordered[-1] - ordered[0]))).astype(np.int64)
    weights = np.bincount(bins, times)
    means = np.bincount(bins, times * ordered)[weights > 0] / weights[weights > 0]
    return _lloyd(ordered, times, _best_values(means, weights[weights > 0], count) if means.size > count else means)


_POINTS = 512  # dynamic programming over so many takes a tenth of a second


def _best_values(points: NDArray[np.float64], times: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The values with the least squared error, by dynamic programming over intervals of sorted points."""
    n = points.size
    num, first, second = (np.concatenate([[0.0], np.cumsum(times * power)]) for power in (points**0, points, points**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        of = [part[None, :] - part[:, None] for part in (num, first, second)]  # sums over points i ... j - 1
        cost = np.where(np.tri(n + 1, dtype=bool), np.inf, of[2] - of[1] ** 2 / of[0])
    best, cuts = cost[0], []
    for _ in range(count - 1):
        total = best[:, None] + cost
        cuts.append(total.argmin(0))
        best = total.min(0)
    end, values = n, []
    for cut in (*reversed(cuts), np.zeros(n + 1, np.int64)):
        start = int(cut[end])
        values.append((first[end] - first[start]) / (num[end] - num[start]))
        end = start
    return np.array(values[::-1])


def _lloyd(ordered: NDArray[np.float64], times: NDArray[np.int64], centers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move each center to the mean of the values nearest to it, until none moves."""
    sums = np.concatenate([[0.0], np.cumsum(ordered * times)])
    counts = np.concatenate([[0], np.cumsum(times)])
    for _ in range(300):
        edges = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        cuts = np.concatenate([[0], edges, [ordered.size]])
        sizes = np.diff(counts[cuts])
        moved = np.diff(sums[cuts])[sizes > 0] / sizes[sizes > 0]
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def _step(values: NDArray[np.float32], count: int) -> float:
    """The step with the least squared error, among steps that clip from no value to nearly all."""
    sample = np.abs(values[:: -(-values.size // _SAMPLE)]).astype(np.float64)
    half = count // 2
    widest = float(np.abs(values).max()) / half

    def error(step: float) -> float:
        return float(((np.clip(np.rint(sample / step), 1, half) * step - sample) ** 2).sum())

    coarse = min((widest * 2 ** (-i / 8) for i in range(48)), key=error)
    fine = min((coarse * 2 ** (i / 64) for i in range(-8, 9)), key=error)
    return max(fine, float(np.finfo(np.float32).tiny))


def _by_codebook(stored: Stored, codebook: Codebook) -> Stored:
    """Replace each value that is not zero by the nearest one in the codebook."""
    whole = to_float32(stored.dense(), stored.dtype)
    ordered = np.unique(codebook.values)
    edges = (ordered[1:].astype(np.float64) + ordered[:-1]) / 2
    nearest = ordered[np.searchsorted(edges, whole)]
    values = from_float32(np.where(whole != 0, nearest, np.float32(0)), stored.dtype)
    return Stored(stored.dtype, values, codebook)


def half(stored: Stored) -> Stored:
    """A 32-bit or 64-bit float tensor rounded to half precision unless that overflows; any other tensor unchanged."""
    if stored.dtype not in ("F32", "F64"):
        return stored
    with np.errstate(all="ignore"):
        values = stored.dense().astype(np.float16).astype(DTYPES[stored.dtype])
    if not np.isfinite(values).all():
        return stored
    return Stored(stored.dtype, values, "F16")
