"""Selection on a CPU, by the compiled core where it was built and by numpy otherwise.

A random sample of the scores brackets the k-th largest key; one pass over all scores counts those above the bracket and
gathers those inside; the answer is an order statistic of the few that were gathered. If the sample misled, histograms
find it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pomona.native import core
from pomona.score import Score
from pomona.selection.keys import (
    CHUNK,
    LAST,
    LEVELS,
    NAN,
    Keys,
    NonFiniteError,
    as_float,
    check_finite,
    chunks,
    digits,
    pack,
    pick,
)

_BLOCK = 16  # neighbours that are sampled together: a cache line
_NUM_BLOCKS = 1 << 12
_WIDTH = 8.0  # of the bracket to either side, in standard deviations of independent draws; neighbours are alike


@dataclass(frozen=True, slots=True)
class Threshold:
    """The k-th largest key of all scores.

    Attributes:
        key: at least 1, so that a score of zero is never kept.
        greater: of each tensor the number of scores with a larger key.
        equal: of each tensor the number of scores with this key.
        num_infinite: scores that are infinite.
        packed: the scores for the compiled core, if it can take them.
    """

    key: int
    greater: list[int]
    equal: list[int]
    num_infinite: int = 0
    packed: core.Scores | None = None


@dataclass(frozen=True, slots=True)
class CPUSelection:
    """Kept are the scores above the threshold, and in each tensor the first in index order of those equal to it.

    Attributes:
        scores: what was chosen from.
        key: the threshold.
        greater: of each tensor how many scores are above it.
        equal: how many are equal to it.
        ties: how many of these stay.
        num_infinite: scores that are infinite.
        packed: the scores for the compiled core, if it can take them.
    """

    scores: list[Score]
    key: int
    greater: list[int]
    equal: list[int]
    ties: list[int]
    num_infinite: int
    packed: core.Scores | None = None

    @property
    def counts(self) -> list[int]:
        return [greater + ties for greater, ties in zip(self.greater, self.ties, strict=True)]

    def masks(self) -> list[Tensor]:
        if self.packed is None or not self._has_memory_order():
            return [self._mask(i) for i in range(len(self.scores))]
        return core.mask(self.packed, [self.key] * len(self.scores), self.ties)[0]

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        if self.packed is not None and self._has_memory_order() and self._are_alike(tensors):
            core.multiply_(self.packed, [self.key] * len(self.scores), self.ties, tensors)
            return
        for i, (tensor, count) in enumerate(zip(tensors, self.counts, strict=True)):
            if count == tensor.numel():
                continue
            if not tensor.is_contiguous():
                tensor.mul_(self._mask(i))
                continue
            flat = tensor.view(-1)
            for start, piece in self._pieces(i):
                flat[start : start + len(piece)].mul_(piece)

    def _has_memory_order(self) -> bool:
        """Whether the first ties in memory, which the core keeps, are the first in index order."""
        places = zip(self.scores, self.ties, self.equal, strict=True)
        return all(ties in (0, equal) or score.w.is_contiguous() for score, ties, equal in places)

    def _are_alike(self, tensors: Sequence[Tensor]) -> bool:
        pairs = zip(self.scores, tensors, strict=True)
        return all(tensor is score.g or core.fits(score.w, tensor) for score, tensor in pairs)

    def _mask(self, i: int) -> Tensor:
        mask = torch.empty(self.scores[i].shape, dtype=torch.bool)
        flat = mask.view(-1)
        for start, piece in self._pieces(i):
            flat[start : start + len(piece)] = piece
        return mask

    def _pieces(self, i: int) -> Iterator[tuple[int, Tensor]]:
        """Position and mask, piece by piece; the mask is of bool, or of float32 zeros and ones."""
        threshold = as_float(self.key)
        left = self.ties[i]
        score = self.scores[i]
        if score.numel() <= CHUNK:
            pieces = iter([(0, score.tensor().reshape(-1))])
        else:
            pieces = ((chunk.spans[0].start, chunk.values) for chunk in chunks([score]))
        for start, values in pieces:
            if left == self.equal[i]:
                mask = torch.ge(values, threshold, out=values)
            elif left == 0:
                mask = torch.gt(values, threshold, out=values)
            else:
                mask = values >= threshold
                tied = (values == threshold).nonzero().view(-1)
                mask[tied[left:]] = False
                left -= min(left, len(tied))
            yield start, mask


def resolve(scores: Sequence[Score], found: Threshold, k: int) -> CPUSelection:
    """Hand out what is left of ``k`` to the scores equal to the threshold, tensor by tensor."""
    left = k - sum(found.greater)
    ties = []
    for equal in found.equal:
        ties.append(min(equal, left))
        left -= ties[-1]
    return CPUSelection(list(scores), found.key, found.greater, found.equal, ties, found.num_infinite, found.packed)


def find_threshold(scores: Sequence[Score], k: int) -> Threshold:
    """The ``k``-th largest key of scores on a CPU; of ``k = 0`` one that no score reaches."""
    total = sum(score.numel() for score in scores)
    packed = pack(scores)
    if packed is not None:
        found = core.select(packed, k)
        if found.num_nan:
            raise NonFiniteError(NAN)
        return Threshold(found.threshold, found.greater, found.equal, found.num_infinite, packed)
    if k == 0:
        return _count(scores, LAST)
    low, high = (1, LAST) if total <= CHUNK else _bracket(scores, total, k)
    return _in_bracket(scores, k, low, high) or _by_histograms(scores, k)


def _in_bracket(scores: Sequence[Score], k: int, low: int, high: int) -> Threshold | None:
    """The threshold if it lies in [low, high], and not too many scores do."""
    most = max(CHUNK, sum(score.numel() for score in scores) // 16)
    inside: list[list[Keys]] = [[] for _ in scores]
    above = [0] * len(scores)
    gathered = num_infinite = 0
    for chunk in chunks(scores):
        keys = chunk.keys()
        num_infinite += check_finite(keys)
        is_high = keys >= low
        found = keys[is_high]
        offset = 0
        for span in chunk.spans:
            # One tensor in the chunk, as is usual: no need to count.
            num = len(found) if len(chunk.spans) == 1 else int(np.count_nonzero(is_high[span.place]))
            mine = found[offset : offset + num]
            offset += num
            within = mine[mine <= high]
            above[span.tensor] += len(mine) - len(within)
            inside[span.tensor].append(within)
            gathered += len(within)
        if gathered > most:
            return None
    left = k - sum(above)
    if left <= 0 or (left > gathered and low > 1):
        return None
    key = 1
    if left <= gathered:
        every = np.concatenate(list(itertools.chain(*inside)))
        key = int(np.partition(every, gathered - left)[gathered - left])
    for i, pieces in enumerate(inside):
        above[i] += sum(int(np.count_nonzero(piece > key)) for piece in pieces)
    equal = [sum(int(np.count_nonzero(piece == key)) for piece in pieces) for pieces in inside]
    return Threshold(key, above, equal, num_infinite)


def _by_histograms(scores: Sequence[Score], k: int) -> Threshold:
    """Three passes, each of which settles some bits of the key, from the highest on."""
    prefix, left = 0, k
    for shift, bits in LEVELS:
        bins = np.zeros(1 << bits, np.int64)
        for chunk in chunks(scores):
            keys = chunk.keys()
            check_finite(keys)
            bins += np.bincount(digits(keys, prefix, shift, bits), minlength=1 << bits)
        digit, above = pick(bins, left)
        prefix, left = prefix << bits | digit, left - above
    return _count(scores, max(prefix, 1))


def _count(scores: Sequence[Score], key: int) -> Threshold:
    greater, equal = [0] * len(scores), [0] * len(scores)
    num_infinite = 0
    for chunk in chunks(scores):
        keys = chunk.keys()
        num_infinite += check_finite(keys)
        for span in chunk.spans:
            greater[span.tensor] += int(np.count_nonzero(keys[span.place] > key))
            equal[span.tensor] += int(np.count_nonzero(keys[span.place] == key))
    return Threshold(key, greater, equal, num_infinite)


def _bracket(scores: Sequence[Score], total: int, k: int) -> tuple[int, int]:
    """Keys between which the ``k``-th largest lies, almost always: from a random sample of blocks of neighbours."""
    ends = np.cumsum([score.numel() for score in scores])
    num_blocks = min(_NUM_BLOCKS, max(_NUM_BLOCKS // 8, total // (32 * _BLOCK)))  # a small part of all
    starts = np.random.default_rng(0).integers(0, total, num_blocks)
    drawn = []
    for i, score in enumerate(scores):
        mine = starts[(starts >= ends[i] - score.numel()) & (starts < ends[i])] - (ends[i] - score.numel())
        if len(mine):
            places = (mine[:, None] + np.arange(_BLOCK)).reshape(-1) % score.numel()
            drawn.append(score.take(torch.from_numpy(places)).tensor())
    sample = torch.cat(drawn).numpy().view(np.int32)
    share = k / total
    rank, width = share * len(sample), _WIDTH * (len(sample) * share * (1.0 - share)) ** 0.5 + _WIDTH
    first, last = len(sample) - 1 - int(rank + width), len(sample) - 1 - int(rank - width)
    wanted = sorted({min(max(place, 0), len(sample) - 1) for place in (first, last)})
    ordered = np.partition(sample, wanted)
    low = int(ordered[wanted[0]]) if first >= 0 else 1
    high = int(ordered[wanted[-1]]) if last < len(sample) else LAST
    return max(low, 1), high
