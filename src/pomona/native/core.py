"""The compiled core: exact selection over many tensors, and masked updates, without a temporary of the model's size.

This is a thin binding by ctypes; ``core/include/pomona.h`` documents what each function computes. The core is optional:
if the package was installed without a compiler, :func:`is_available` is false, :func:`why_not` gives the reason, and
callers take another path. ``POMONA_CORE=0`` in the environment switches it off; ``portable``, ``avx2`` or ``avx512``
limit it to an instruction set, which changes no result.

A score is identified by its *key*: the bits of the float32 ``|a b|`` or ``|a|``, read as int32. Keys have the order of
the scores; zero is 0, and NaNs are the largest. All tensors are on the CPU, dense, in float32, bfloat16, float16 or
float64. Tensors that belong together have the same order in memory (:func:`fits`), and "the first" of equal scores are
the first in that order. Every call uses up to ``torch.get_num_threads()`` threads; no result depends on how many.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.native.library import is_available as is_available
from pomona.native.library import isa as isa
from pomona.native.library import isas as isas
from pomona.native.library import load
from pomona.native.library import switched as switched
from pomona.native.library import use_isa as use_isa
from pomona.native.library import why_not as why_not

KEY_INFINITE = 0x7F800000  # the key of an infinity; those of NaNs are larger
KEY_MAX = 0x7FFFFFFF


_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_ERRORS = {
    -1: "a dtype that is none of float32, bfloat16, float16, float64",
    -2: "a size out of range",
    -3: "a null or misaligned pointer",
    -4: "an argument out of range",
    -5: "out of memory",
    -6: "an internal error",
}


class _KthLargest(ctypes.Structure):
    _fields_ = (
        ("num_greater", ctypes.c_int64),
        ("num_equal", ctypes.c_int64),
        ("num_infinite", ctypes.c_int64),
        ("num_nan", ctypes.c_int64),
        ("threshold", ctypes.c_int32),
        ("num_passes", ctypes.c_int32),
    )


class _Tally(ctypes.Structure):
    _fields_ = (
        ("num_greater", ctypes.c_int64),
        ("num_infinite", ctypes.c_int64),
        ("num_nan", ctypes.c_int64),
    )


def _declare(library: ctypes.CDLL) -> None:
    pointer, int64, int32, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int
    library.pomona_select.argtypes = (pointer, int64, int64, integer, pointer, pointer)
    library.pomona_histogram.argtypes = (pointer, int64, int32, int32, integer, pointer, int64, integer, pointer)
    library.pomona_gather.argtypes = (pointer, int64, int32, int32, pointer, int64, integer, pointer)
    library.pomona_count.argtypes = (pointer, int64, int32, pointer, pointer, integer)
    library.pomona_mask.argtypes = (pointer, int64, pointer, pointer, pointer, integer, pointer)
    library.pomona_multiply.argtypes = (pointer, int64, pointer, pointer, pointer, pointer, integer, pointer)
    library.pomona_finite.argtypes = (pointer, pointer, pointer, int64, integer, pointer)
    library.pomona_zero.argtypes = (pointer, pointer, pointer, pointer, int64, integer, pointer)
    library.pomona_survey.argtypes = (pointer, pointer, pointer, pointer, int64, integer, pointer, pointer)


@functools.cache
def _library() -> ctypes.CDLL:
    library = load()
    _declare(library)
    return library


def _check(status: int) -> None:
    if status == -5:
        raise MemoryError("pomona's core: out of memory")
    if status != 0:
        raise ValueError(f"pomona's core refuses its arguments: {_ERRORS.get(status, status)}")


def fits(first: Tensor, *others: Tensor) -> bool:
    """Whether the core can take these tensors together: on the CPU, dense, with the same order in memory."""
    if not first.is_cpu or first.dtype not in _TYPES or first.layout is not torch.strided:
        return False
    is_plain = first.is_contiguous()
    if not others:
        return is_plain or _is_permuted(first)
    for t in others:
        if not t.is_cpu or t.dtype not in _TYPES or t.layout is not torch.strided:
            return False
        if not (is_plain and t.is_contiguous() and t.shape == first.shape) and not _is_alike(first, t):
            return False
    return is_plain or _is_permuted(first)


def fits_mask(tensor: Tensor, mask: Tensor) -> bool:
    """Whether the core can take this tensor and this boolean mask of it."""
    is_known = mask.is_cpu and mask.dtype is torch.bool and mask.layout is torch.strided
    return is_known and fits(tensor) and _is_alike(tensor, mask)


def has_rows(tensor: Tensor) -> bool:
    """Whether the core can take this tensor, and its elements with one first index follow each other in memory."""
    return fits(tensor) and (not tensor.ndim or tensor.stride(0) * tensor.shape[0] >= tensor.numel())


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous()))


def _is_permuted(t: Tensor) -> bool:
    """Whether it is a contiguous tensor with its dimensions in another order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class Scores:
    """Scores ``|a b|``, or ``|a|`` without ``b``, as the functions below take them: addresses, not copies.

    Make them anew when a tensor may have moved, as gradients do at every step. All tensors must fit (:func:`fits`,
    :func:`fits_mask`).

    Args:
        a: the first factors.
        b: the second factors, if there are any.
        inside: masks of the tensors that are ranked inside a mask only; None for the others. Inside, a score is at
            least the smallest normal float32 number; outside it is zero.
    """

    def __init__(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor] | None = None,
        inside: Sequence[Tensor | None] | None = None,
    ) -> None:
        # Flat and without calls of our own: this is on the path of every step.
        values: list[int] = []
        types = _TYPES
        if inside is not None:
            seconds: Sequence[Tensor | None] = b or [None] * len(a)
            for x, factor, mask in zip(a, seconds, inside, strict=True):
                second = (0, 0) if factor is None else (factor.data_ptr(), types[factor.dtype])
                values += (x.data_ptr(), second[0], x.numel(), types[x.dtype], second[1])
                values.append(0 if mask is None else mask.data_ptr())
        elif b is None:
            for x in a:
                values += (x.data_ptr(), 0, x.numel(), types[x.dtype], 0, 0)
        else:
            for x, y in zip(a, b, strict=True):
                values += (x.data_ptr(), y.data_ptr(), x.numel(), types[x.dtype], types[y.dtype], 0)
        self.tensors = a, b, inside  # kept alive
        self.num = len(a)
        self.packed = _packer("PPqiiP", self.num).pack(*values)

    def total(self) -> int:
        """How many scores there are."""
        return sum(t.numel() for t in self.tensors[0])


@functools.cache
def _packer(form: str, num: int) -> struct.Struct:
    return struct.Struct("@" + form * num)


def _pack(form: str, values: Sequence[int]) -> bytes:
    return _packer(form, len(values)).pack(*values)


@dataclass(frozen=True, slots=True)
class KthLargest:
    """The k-th largest of all scores, as a key, and how many scores are on either side of it."""

    threshold: int  # 1 if fewer than k scores are not zero: then all of those are kept
    num_greater: int  # keys above the threshold, at most k
    num_equal: int
    num_infinite: int  # of all scores
    num_nan: int
    num_passes: int  # over all scores
    greater: list[int]  # for each tensor the number of keys above the threshold
    equal: list[int]

    def num_ties(self, k: int) -> int:
        """How many of the scores equal to the threshold must be kept."""
        return min(self.num_equal, k - self.num_greater)


def select(scores: Scores, k: int) -> KthLargest:
    """Find the k-th largest of all scores together, exactly; 0 <= k <= number of scores."""
    out, counts = _KthLargest(), (ctypes.c_int64 * (2 * scores.num))()
    _check(
        _library().pomona_select(scores.packed, scores.num, k, torch.get_num_threads(), ctypes.byref(out), counts),
    )
    found = out.threshold, out.num_greater, out.num_equal, out.num_infinite, out.num_nan, out.num_passes
    return KthLargest(*found, greater=counts[0::2], equal=counts[1::2])


def count(scores: Scores, threshold: int) -> tuple[list[int], list[int]]:
    """Return for each tensor how many keys are greater than ``threshold``, and how many are equal to it."""
    greater, equal = (ctypes.c_int64 * scores.num)(), (ctypes.c_int64 * scores.num)()
    _check(
        _library().pomona_count(scores.packed, scores.num, threshold, greater, equal, torch.get_num_threads()),
    )
    return list(greater), list(equal)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many keys are in each bin, above the last bin, infinite, and NaN."""

    bins: Tensor  # int64
    num_greater: int
    num_infinite: int
    num_nan: int


def histogram(scores: Scores, low: int, high: int, *, shift: int) -> Histogram:
    """Count keys in [low, high] by bin, ``(key - low) >> shift``; there may be at most 65,536 bins."""
    if not (0 <= low <= high <= KEY_MAX and 0 <= shift <= 30):
        raise ValueError(f"0 <= low <= high <= KEY_MAX and 0 <= shift <= 30 must hold, got {low}, {high}, {shift}")
    bins = torch.empty(((high - low) >> shift) + 1, dtype=torch.int64)
    tally = _Tally()
    _check(
        _library().pomona_histogram(
            scores.packed,
            scores.num,
            low,
            high,
            shift,
            bins.data_ptr(),
            bins.numel(),
            torch.get_num_threads(),
            ctypes.byref(tally),
        )
    )
    return Histogram(bins, tally.num_greater, tally.num_infinite, tally.num_nan)


def gather(scores: Scores, low: int, high: int, *, capacity: int) -> tuple[Tensor, int]:
    """Return at most ``capacity`` of the keys in [low, high], int32 in any order, and how many there are in all."""
    keys = torch.empty(capacity, dtype=torch.int32)
    num = ctypes.c_int64()
    _check(
        _library().pomona_gather(
            scores.packed,
            scores.num,
            low,
            high,
            keys.data_ptr(),
            capacity,
            torch.get_num_threads(),
            ctypes.byref(num),
        )
    )
    return keys[: num.value], num.value


def mask(scores: Scores, thresholds: Sequence[int], num_ties: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Return for each tensor a new boolean mask of what is kept, and how many that are.

    The keys above the tensor's threshold (>= 1) are kept, and the first ``num_ties`` of the equal ones (-1: all).
    """
    masks = [torch.empty_like(a, dtype=torch.bool, requires_grad=False) for a in scores.tensors[0]]
    kept = (ctypes.c_int64 * scores.num)()
    _check(
        _library().pomona_mask(
            scores.packed,
            scores.num,
            _pack("i", thresholds),
            _pack("q", num_ties),
            _pack("P", [m.data_ptr() for m in masks]),
            torch.get_num_threads(),
            kept,
        )
    )
    return masks, list(kept)


def multiply_(
    scores: Scores, thresholds: Sequence[int], num_ties: Sequence[int], targets: Sequence[Tensor]
) -> list[int]:
    """Multiply each target by the mask that ``mask`` would return, and return how many of each are kept.

    The result is that of ``target.mul_(mask)``: a negative number becomes -0.0; an infinity or a NaN becomes NaN. A
    target may be one of the tensors that its scores are made of.
    """
    kept = (ctypes.c_int64 * scores.num)()
    if len(targets) != scores.num:
        raise ValueError(f"there must be a target for each of {scores.num} scores, got {len(targets)}")
    _check(
        _library().pomona_multiply(
            scores.packed,
            scores.num,
            _pack("i", thresholds),
            _pack("q", num_ties),
            _pack("P", [t.data_ptr() for t in targets]),
            _pack("i", [_TYPES[t.dtype] for t in targets]),
            torch.get_num_threads(),
            kept,
        )
    )
    return list(kept)


def num_nonfinite(tensors: Sequence[Tensor]) -> int:
    """Count the values of all tensors that are infinite or NaN."""
    num = ctypes.c_int64()
    _check(_library().pomona_finite(*_packed(tensors), len(tensors), torch.get_num_threads(), ctypes.byref(num)))
    return num.value


def zero_(tensors: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[float]:
    """Write +0.0 where ``pruned`` is True and return the largest magnitude that each tensor lost by it.

    It is 0 where nothing is pruned and NaN where a NaN was. Each mask must fit its tensor (:func:`fits_mask`).
    """
    if len(pruned) != len(tensors):
        raise ValueError(f"there must be a mask for each of {len(tensors)} tensors, got {len(pruned)}")
    largest = (ctypes.c_double * len(tensors))()
    _check(
        _library().pomona_zero(
            *_packed(tensors),
            _pack("P", [mask.data_ptr() for mask in pruned]),
            len(tensors),
            torch.get_num_threads(),
            largest,
        )
    )
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)  # autograd and caches see writes by their number
    return list(largest)


def survey(tensor: Tensor) -> tuple[Tensor, float]:
    """How many values of each row are not zero, and the smallest magnitude of those.

    Rows are what :func:`has_rows` says; a tensor without dimensions is one row. The magnitude is infinite where all
    values are zero, and NaN where one is NaN.
    """
    num_rows = len(tensor) if tensor.ndim else 1
    counts = torch.zeros(num_rows, dtype=torch.int64)
    smallest = ctypes.c_double()
    _check(
        _library().pomona_survey(
            *_packed([tensor]),
            _pack("q", [max(1, tensor.numel() // max(1, num_rows))]),
            1,
            torch.get_num_threads(),
            _pack("P", [counts.data_ptr()]),
            ctypes.byref(smallest),
        )
    )
    return counts, smallest.value


def _packed(tensors: Sequence[Tensor]) -> tuple[bytes, bytes, bytes]:
    """Addresses, sizes, types."""
    return (
        _pack("P", [t.data_ptr() for t in tensors]),
        _pack("q", [t.numel() for t in tensors]),
        _pack("i", [_TYPES[t.dtype] for t in tensors]),
    )
