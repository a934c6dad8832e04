"""Scores as *keys*, and passes over them a cacheful at a time.

Float32 numbers >= 0 order like their bits, read as int32: these are the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.native import core
from pomona.score import Score, rank_inside_

Keys = NDArray[np.int32]

LEVELS = ((20, 11), (10, 10), (0, 10))  # shift and bits of the histograms
INFINITY = 0x7F800000  # the key of infinity; those of NaN are larger
LAST = 0x7FFFFFFF

CHUNK = 1 << 18  # scores at a time: 1 MiB, which stays in a core's cache
NAN = "a score is NaN; check the gradients before selecting"


class NonFiniteError(ValueError):
    """A score, or what it is made of, is NaN or infinite."""


def as_float(key: int) -> float:
    return float(np.int32(key).view(np.float32))


def digits(keys: Keys, prefix: int, shift: int, bits: int) -> Keys:
    """Of the keys that begin with ``prefix`` the ``bits`` that follow, ``shift`` bits from the end."""
    mine = keys if prefix == 0 and shift + bits == 31 else keys[keys >> (shift + bits) == prefix]
    return (mine >> shift) & ((1 << bits) - 1)


def pick(bins: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the ``k``-th largest, and how many are in the bins above; bin 0 if there are fewer."""
    from_above = bins[::-1].cumsum()
    place = min(int(np.searchsorted(from_above, k)), len(bins) - 1)
    return len(bins) - 1 - place, int(from_above[place] - bins[len(bins) - 1 - place])


def check_finite(keys: Keys) -> int:
    """How many are infinite; NonFiniteError if one is NaN."""
    largest = int(keys.max())
    if largest > INFINITY:
        raise NonFiniteError(NAN)
    return int(np.count_nonzero(keys == INFINITY)) if largest == INFINITY else 0


def pack(scores: Sequence[Score]) -> core.Scores | None:
    """The scores for the compiled core; None if it is not there, or cannot take them."""
    if not scores or not core.is_available():
        return None
    if not all(core.fits(score.w) if score.g is None else core.fits(score.w, score.g) for score in scores):
        return None
    gradients = [score.g for score in scores if score.g is not None]
    if gradients and len(gradients) < len(scores):
        return None
    if not all(score.inside is None or core.fits_mask(score.w, score.inside) for score in scores):
        return None
    is_masked = any(score.inside is not None for score in scores)
    masks = [score.inside for score in scores] if is_masked else None
    return core.Scores([score.w for score in scores], gradients or None, masks)


def are_on_cpu(scores: Sequence[Score]) -> bool:
    return all(score.device.type == "cpu" for score in scores)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of one tensor in a chunk: ``place`` there, from ``start`` of the flat tensor on."""

    tensor: int
    start: int
    place: slice


@dataclass(frozen=True, slots=True)
class Chunk:
    """Scores of one tensor or several small ones, in scratch memory that the next chunk takes over."""

    values: Tensor  # float32, 1-d
    spans: list[Span]

    def keys(self) -> Keys:
        return self.values.numpy().view(np.int32)


def chunks(scores: Sequence[Score]) -> Iterator[Chunk]:
    """All scores in order, a cacheful at a time; a tensor that is not contiguous is copied."""
    scratch = torch.empty(min(CHUNK, sum(score.numel() for score in scores)))
    spans: list[Span] = []
    filled = 0
    for i, score in enumerate(scores):
        flat = score.flat()
        start = 0
        while start < flat.numel():
            num = min(flat.numel() - start, len(scratch) - filled)
            _compute(flat.piece(start, start + num), scratch[filled:][:num])
            spans.append(Span(i, start, slice(filled, filled + num)))
            start += num
            filled += num
            if filled == len(scratch):
                yield Chunk(scratch, spans)
                spans, filled = [], 0
    if filled:
        yield Chunk(scratch[:filled], spans)


def _compute(score: Score, out: Tensor) -> None:
    w = score.w
    if score.g is None:
        torch.abs(w, out=out) if w.dtype is torch.float32 else out.copy_(w).abs_()
    else:
        torch.mul(w.float(), score.g.float(), out=out).abs_()
    if score.inside is not None:
        rank_inside_(out, score.inside)
