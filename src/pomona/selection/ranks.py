"""Selection over ranks: each counts its own scores, and decisions depend on sums over the ranks, so that all agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pomona.distributed import Positions, Shard, is_working_on_shards, sum_counts
from pomona.native import core
from pomona.score import Score
from pomona.selection.cpu import CPUSelection, Threshold, resolve
from pomona.selection.device import DeviceSelection, device_pieces
from pomona.selection.keys import (
    CHUNK,
    INFINITY,
    LAST,
    LEVELS,
    NAN,
    Keys,
    NonFiniteError,
    are_on_cpu,
    chunks,
    digits,
    pack,
    pick,
)

if TYPE_CHECKING:
    from pomona.weight import Weight

_NAN_BIN = LAST >> LEVELS[0][0]  # of the first histogram, whose bins above that of infinity are free
_INFINITE_BIN = INFINITY >> LEVELS[0][0]
_INDEX_BITS = 11
_GATHERED = 1 << 11  # numbers that are worth one message, 16 KiB, where histograms would take several


@dataclass(frozen=True, slots=True)
class RankSelection:
    """What this rank keeps of a selection among the scores of all ranks.

    Attributes:
        here: this rank's part of it; its counts are those of this rank.
        counts: how many each tensor keeps on all ranks together.
        num_infinite: scores of all ranks that are infinite.
    """

    here: CPUSelection | DeviceSelection
    counts: list[int]
    num_infinite: int

    def masks(self) -> list[Tensor]:
        return self.here.masks()

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        self.here.multiply_(tensors)


@dataclass(frozen=True, slots=True)
class RankThreshold(Threshold):
    """A threshold whose numbers are of all ranks together.

    Attributes:
        greater_here: of each tensor the number of this rank's scores with a larger key.
        equal_here: of each tensor the number of this rank's scores with this key.
    """

    greater_here: list[int] = field(default_factory=list)
    equal_here: list[int] = field(default_factory=list)


def find_shards(scores: Sequence[Score], of: Sequence[Weight] | None) -> list[Shard] | None:
    """The shards that the scores are of; None if the scores are all there are.

    Raises:
        RuntimeError: ``of`` is missing where weights are sharded.
        ValueError: the scores are not of these weights.
    """
    if of is None:
        if is_working_on_shards():
            raise RuntimeError(
                "the weights are sharded over ranks, so a selection must know which weights the scores are of, or it "
                "would choose among this rank's alone: pass of=weights, e.g. global_top_k(scores, k, of=weights)"
            )
        return None
    if [w.value.shape for w in of] != [score.shape for score in scores]:
        raise ValueError(
            f"of must be the weights that the scores are of, one for each, got {len(of)} weights for {len(scores)} "
            f"scores, or shapes that differ"
        )
    shards = [w.shard for w in of if w.shard is not None]
    return shards if shards else None


def select_over_ranks(scores: Sequence[Score], shards: Sequence[Shard], k: int) -> RankSelection:
    """As ``select_largest`` of the whole tensors; each rank gets the masks of its blocks. All ranks must call it.

    Five sums over the ranks, of at most 16 KiB and of 16 bytes a tensor; one less where no tie is cut, and some more
    where a tie of hundreds is. The host waits for them.
    """
    found = find_threshold_over_ranks(scores, shards, k)
    whole = resolve(scores, found, k)
    ties = list(found.equal_here)
    for i, (kept, equal) in enumerate(zip(whole.ties, found.equal, strict=True)):
        if kept == 0:
            ties[i] = 0
        elif kept < equal:  # so in one tensor at most
            ties[i] = _num_among_first(scores[i], shards[i], found.key, kept, equal)
    # A block's elements are in the order of the whole: those that stay of a tie are the first of this rank's, too.
    if not are_on_cpu(scores):
        device = scores[0].device
        key = torch.tensor(found.key, dtype=torch.int32, device=device)
        on_device = DeviceSelection(list(scores), key, torch.tensor(sum(ties), device=device))
        return RankSelection(on_device, whole.counts, found.num_infinite)
    packed = pack(scores)
    here = CPUSelection(list(scores), found.key, found.greater_here, found.equal_here, ties, 0, packed)
    return RankSelection(here, whole.counts, found.num_infinite)


def find_threshold_over_ranks(scores: Sequence[Score], shards: Sequence[Shard], k: int) -> RankThreshold:
    """The ``k``-th largest key of the whole tensors; of ``k = 0`` one that no score reaches."""
    ranks = shards[0].ranks
    own = _OwnKeys(scores, [shard.counts for shard in shards])
    prefix, left, num_infinite = 0, k, 0
    for shift, bits in LEVELS:
        bins = ranks.sum_(own.histogram(prefix, shift, bits)).numpy()
        if shift == LEVELS[0][0]:
            if bins[_NAN_BIN]:
                raise NonFiniteError(NAN)
            num_infinite = int(bins[_INFINITE_BIN])
            if k == 0:
                nothing = [0] * len(scores)
                return RankThreshold(LAST, nothing, nothing, num_infinite, greater_here=nothing, equal_here=nothing)
        digit, above = pick(bins, left)
        prefix, left = prefix << bits | digit, left - above
        if shift == LEVELS[0][0]:
            own.narrow(digit)
    key = max(prefix, 1)
    greater, equal = own.count(key)
    sums = sum_counts([*greater, *equal], [*shards, *shards])
    there = sums[: len(scores)], sums[len(scores) :]
    return RankThreshold(key, *there, num_infinite, greater_here=greater, equal_here=equal)


class _OwnKeys:
    """This rank's keys. They are looked at twice: for the first histogram, and to gather those of the bin it leads to.

    Where these are many, and on other devices than a CPU, they are not gathered but looked at for each histogram. That
    is up to each rank: the numbers are the same.
    """

    def __init__(self, scores: Sequence[Score], counts: Sequence[bool]) -> None:
        self.scores = scores
        self.counts = counts  # whether they go into the histograms
        self.is_on_cpu = are_on_cpu(scores)
        self.packed = pack(scores)
        self.packed_counting = pack(list(itertools.compress(scores, counts)))
        self.gathered: Keys | None = None  # those that count, by the compiled core
        self.inside: list[tuple[int, Keys]] | None = None  # gathered, by tensor
        self.above = [0] * len(scores)  # keys larger than those

    def histogram(self, prefix: int, shift: int, bits: int) -> Tensor:
        """How many keys that begin with ``prefix`` have each of the ``bits`` that follow; on the host."""
        if not self.is_on_cpu:
            return self._histogram_on_device(prefix, shift, bits)
        if self.gathered is not None:
            return torch.from_numpy(np.bincount(digits(self.gathered, prefix, shift, bits), minlength=1 << bits))
        if self.packed_counting is not None and shift == LEVELS[0][0]:
            return self._first_by_core(self.packed_counting)
        bins = np.zeros(1 << bits, np.int64)
        for i, keys in self._each() if self.inside is None else self.inside:
            if self.counts[i]:
                bins += np.bincount(digits(keys, prefix, shift, bits), minlength=1 << bits)
        return torch.from_numpy(bins)

    @staticmethod
    def _first_by_core(packed: core.Scores) -> Tensor:
        found = core.histogram(packed, 0, LAST, shift=LEVELS[0][0])
        bins = found.bins
        bins[_INFINITE_BIN:] = 0
        bins[_INFINITE_BIN], bins[_NAN_BIN] = found.num_infinite, found.num_nan
        return bins

    def _histogram_on_device(self, prefix: int, shift: int, bits: int) -> Tensor:
        bins = torch.zeros(1 << bits, dtype=torch.int64, device=self.scores[0].device)
        for i, keys in self._each_on_device():
            if self.counts[i]:
                is_mine = (keys >> (shift + bits)) == prefix
                bins.scatter_add_(0, ((keys >> shift) & ((1 << bits) - 1)).long(), is_mine.long())
        return bins.cpu()

    def narrow(self, digit: int) -> None:
        """Gather the keys of this bin of the first histogram. Zeros, which are never kept, stay out."""
        if not self.is_on_cpu:
            return
        most = max(CHUNK, sum(score.numel() for score in self.scores) // 16)
        low, high = max(1, digit << LEVELS[0][0]), ((digit + 1) << LEVELS[0][0]) - 1
        if self.packed_counting is not None:
            own, num = core.gather(self.packed_counting, low, high, capacity=most)
            self.gathered = own.numpy() if num <= most else None
            return
        inside: list[tuple[int, Keys]] = []
        above = [0] * len(self.scores)
        gathered = 0
        for i, keys in self._each():
            found = keys[keys >= low]
            within = found[found <= high]
            above[i] += len(found) - len(within)
            inside.append((i, within))
            gathered += len(within)
            if gathered > most:
                return
        self.inside, self.above = inside, above

    def count(self, key: int) -> tuple[list[int], list[int]]:
        """Of each tensor how many keys are larger, and how many are equal."""
        if not self.is_on_cpu:
            return self._count_on_device(key)
        if self.packed is not None:
            return core.count(self.packed, key)
        greater, equal = list(self.above), [0] * len(self.scores)
        for i, keys in self._each() if self.inside is None else self.inside:
            greater[i] += int(np.count_nonzero(keys > key))
            equal[i] += int(np.count_nonzero(keys == key))
        return greater, equal

    def _count_on_device(self, key: int) -> tuple[list[int], list[int]]:
        counts = torch.zeros(2, len(self.scores), dtype=torch.int64, device=self.scores[0].device)
        for i, keys in self._each_on_device():
            counts[0, i] += (keys > key).sum()
            counts[1, i] += (keys == key).sum()
        greater, equal = counts.tolist()
        return greater, equal

    def _each(self) -> Iterator[tuple[int, Keys]]:
        for chunk in chunks(self.scores):
            keys = chunk.keys()
            if int(keys.max()) > INFINITY:
                keys[keys > INFINITY] = LAST  # all NaN in one bin
            for span in chunk.spans:
                yield span.tensor, keys[span.place]

    def _each_on_device(self) -> Iterator[tuple[int, Tensor]]:
        for i, score in enumerate(self.scores):
            for _, keys in device_pieces(score):
                yield i, keys.masked_fill_(keys > INFINITY, LAST)


def _num_among_first(score: Score, shard: Shard, key: int, quota: int, num: int) -> int:
    """Of this rank's scores with this key, how many are among the first ``quota`` of ``num`` in the whole tensor."""
    if num * shard.ranks.size <= _GATHERED:
        last = _gather_nth(score, shard, key, quota, num)
    else:
        last = _narrow_to_nth(score, shard, key, quota)
    return sum(int(np.count_nonzero(places <= last)) for places in _tied(score, shard, key))


def _gather_nth(score: Score, shard: Shard, key: int, quota: int, num: int) -> int:
    """The flat index of the ``quota``-th of the tied, from the indices of all."""
    nowhere = shard.shape.numel()
    own = torch.full((num,), nowhere, dtype=torch.int64)
    if shard.counts:
        for places in _tied(score, shard, key):
            first = int((own < nowhere).sum())
            own[first : first + len(places)] = torch.from_numpy(places)
    every = shard.ranks.gather(own).view(-1)
    return int(every.sort().values[quota - 1])


def _narrow_to_nth(score: Score, shard: Shard, key: int, quota: int) -> int:
    """The same, some bits of the index at a time."""
    last, left = 0, quota
    for shift in reversed(range(0, (shard.shape.numel() - 1).bit_length(), _INDEX_BITS)):
        bins = np.zeros(1 << _INDEX_BITS, np.int64)
        for places in _tied(score, shard, key) if shard.counts else ():
            mine = places[places >> (shift + _INDEX_BITS) == last]
            bins += np.bincount((mine >> shift) & ((1 << _INDEX_BITS) - 1), minlength=1 << _INDEX_BITS)
        from_below = shard.ranks.sum_(torch.from_numpy(bins)).numpy().cumsum()
        digit = int(np.searchsorted(from_below, left))
        left -= int(from_below[digit - 1]) if digit else 0
        last = last << _INDEX_BITS | digit
    return last


def _tied(score: Score, shard: Shard, key: int) -> Iterator[Positions]:
    """Flat indices in the whole tensor of this rank's scores with this key, rising."""
    if are_on_cpu([score]):
        pieces: Iterator[tuple[int, Keys]] = ((chunk.spans[0].start, chunk.keys()) for chunk in chunks([score]))
        for start, keys in pieces:
            yield shard.places(start + np.flatnonzero(keys == key), score.shape)
        return
    for start, on_device in device_pieces(score):
        found = (on_device == key).nonzero().view(-1).cpu().numpy()
        yield shard.places(start + found, score.shape)
