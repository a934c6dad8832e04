"""Exact selection: the ``k`` largest of all scores together, without ever holding all of them.

Float32 numbers >= 0 order like their bits, read as int32: these are the *keys*. On a CPU a random sample of the scores
brackets the k-th largest key; one pass over all scores counts those above the bracket and gathers those inside; the
answer is an order statistic of the few that were gathered. If the sample misled, histograms find it. Where the compiled
core (``pomona.core``) was built, it does the same faster. On other devices it is the histograms at once, whose number
of passes is fixed, so that the host waits for nothing. The result depends on the scores alone, never on the sample.

Scratch on a CPU: a few MiB, and at most a sixteenth of the scores where these are many; on other devices a few times
the largest tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.distributed import Positions, Shard, is_working_on_shards, sum_counts
from pomona.native import core
from pomona.score import Score

if TYPE_CHECKING:
    from pomona.weight import Weight

T = TypeVar("T")

Keys = NDArray[np.int32]

LEVELS = ((20, 11), (10, 10), (0, 10))  # shift and bits of the histograms
INFINITY = 0x7F800000  # the key of infinity; those of NaN are larger
_LAST = 0x7FFFFFFF

_CHUNK = 1 << 18  # scores at a time: 1 MiB, which stays in a core's cache
_DEVICE_CHUNK = 1 << 22
_BLOCK = 16  # neighbours that are sampled together: a cache line
_NUM_BLOCKS = 1 << 12
_WIDTH = 8.0  # of the bracket to either side, in standard deviations of independent draws; neighbours are alike
_NAN = "a score is NaN; check the gradients before selecting"


class NonFiniteError(ValueError):
    """A score, or what it is made of, is NaN or infinite."""


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


class Selection(Protocol):
    """Which scores are kept."""

    @property
    def counts(self) -> Sequence[int | Tensor]:
        """How many each tensor keeps; on other devices than a CPU an int64 tensor each."""

    @property
    def num_infinite(self) -> int | None:
        """Number of infinite scores; None where nobody has counted them."""

    def masks(self) -> list[Tensor]:
        """Boolean, of the shapes of the scores, True = kept."""

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        """Multiply each tensor by its mask in place, as ``mul_`` does: a dropped NaN or infinity becomes NaN."""


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
        threshold = _as_float(self.key)
        left = self.ties[i]
        score = self.scores[i]
        if score.numel() <= _CHUNK:
            pieces = iter([(0, score.tensor().reshape(-1))])
        else:
            pieces = ((chunk.spans[0].start, chunk.values) for chunk in _chunks([score]))
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


@dataclass(frozen=True, slots=True)
class JoinedSelection:
    """Several selections as one.

    Attributes:
        parts: each with the places of its tensors among all.
    """

    parts: list[tuple[list[int], Selection]]

    @property
    def counts(self) -> list[int | Tensor]:
        return self._in_order([(places, part.counts) for places, part in self.parts])

    @property
    def num_infinite(self) -> int | None:
        known = [number for _, part in self.parts if (number := part.num_infinite) is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def masks(self) -> list[Tensor]:
        return self._in_order([(places, part.masks()) for places, part in self.parts])

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for places, part in self.parts:
            part.multiply_([tensors[place] for place in places])

    @staticmethod
    def _in_order(answers: Sequence[tuple[list[int], Sequence[T]]]) -> list[T]:
        found = {place: one for places, many in answers for place, one in zip(places, many, strict=True)}
        return [found[place] for place in range(len(found))]


@dataclass(frozen=True, slots=True)
class MaskSelection:
    """A selection by its masks, of groups of scores.

    Attributes:
        kept: the masks, or this rank's part of them.
        shards: the shard of each tensor, None where this rank holds all of it.
    """

    kept: list[Tensor]
    shards: Sequence[Shard | None]

    @property
    def counts(self) -> list[int]:
        """How many each tensor keeps, on all ranks together."""
        return sum_counts([mask.count_nonzero() for mask in self.kept], self.shards)

    @property
    def num_infinite(self) -> int | None:
        return None

    def masks(self) -> list[Tensor]:
        return self.kept

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mask in zip(tensors, self.kept, strict=True):
            tensor.mul_(mask)


@dataclass(frozen=True, slots=True)
class Everything:
    """All stay, zero scores too.

    Attributes:
        tensors: any of the shapes and on the devices of the scores.
        counts: how many weights each tensor has, on all ranks together.
    """

    tensors: list[Tensor]
    counts: list[int]

    @property
    def num_infinite(self) -> int | None:
        return None

    def masks(self) -> list[Tensor]:
        return [torch.ones_like(t, dtype=torch.bool) for t in self.tensors]

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        pass


def select_largest(scores: Sequence[Score], k: int) -> CPUSelection | DeviceSelection:
    """The ``k`` largest, ties by position: the earlier tensor, then the smaller flat index, stays. Never a zero.

    Args:
        scores: on one device.
        k: how many to keep in all, 0 <= k <= number of scores.

    Raises:
        NonFiniteError: a score is NaN (on other devices than a CPU they are kept: a look at them would wait).
    """
    if any(score.device.type != "cpu" for score in scores):
        return select_on_device(scores, k)
    return resolve(scores, find_threshold(scores, k), k)


def kth_largest(scores: Sequence[Score], k: int, *, of: Sequence[Weight] | None = None) -> float:
    """The ``k``-th largest score, k >= 1; 0 where fewer are not zero. The host waits for it.

    Args:
        scores: on one device.
        k: which one, counted from 1.
        of: the weights that the scores are of; needed where weights are sharded over ranks.
    """
    shards = find_shards(scores, of)
    if shards is not None:
        over = find_threshold_over_ranks(scores, shards, k)
        return _as_float(over.key) if sum(over.greater) + sum(over.equal) >= k else 0.0
    if k > sum(score.numel() for score in scores):
        return 0.0
    if any(score.device.type != "cpu" for score in scores):
        selection = select_on_device(scores, k)
        found, is_short = selection.key.view(torch.float32), selection.quota == torch.iinfo(torch.int64).max
        return 0.0 if bool(is_short) else float(found)
    threshold = find_threshold(scores, k)
    if sum(threshold.greater) + sum(threshold.equal) < k:
        return 0.0
    return _as_float(threshold.key)


def _as_float(key: int) -> float:
    return float(np.int32(key).view(np.float32))


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
    packed = _pack(scores)
    if packed is not None:
        found = core.select(packed, k)
        if found.num_nan:
            raise NonFiniteError(_NAN)
        return Threshold(found.threshold, found.greater, found.equal, found.num_infinite, packed)
    if k == 0:
        return _count(scores, _LAST)
    low, high = (1, _LAST) if total <= _CHUNK else _bracket(scores, total, k)
    return _in_bracket(scores, k, low, high) or _by_histograms(scores, k)


def _pack(scores: Sequence[Score]) -> core.Scores | None:
    """The scores for the compiled core; None if it is not there, or cannot take them."""
    if not scores or not core.is_available():
        return None
    if not all(core.fits(score.w) if score.g is None else core.fits(score.w, score.g) for score in scores):
        return None
    gradients = [score.g for score in scores if score.g is not None]
    if gradients and len(gradients) < len(scores):
        return None
    return core.Scores([score.w for score in scores], gradients or None)


def _in_bracket(scores: Sequence[Score], k: int, low: int, high: int) -> Threshold | None:
    """The threshold if it lies in [low, high], and not too many scores do."""
    most = max(_CHUNK, sum(score.numel() for score in scores) // 16)
    inside: list[list[Keys]] = [[] for _ in scores]
    above = [0] * len(scores)
    gathered = num_infinite = 0
    for chunk in _chunks(scores):
        keys = chunk.keys()
        num_infinite += _check(keys)
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
        for chunk in _chunks(scores):
            keys = chunk.keys()
            _check(keys)
            bins += np.bincount(digits(keys, prefix, shift, bits), minlength=1 << bits)
        digit, above = pick(bins, left)
        prefix, left = prefix << bits | digit, left - above
    return _count(scores, max(prefix, 1))


def digits(keys: Keys, prefix: int, shift: int, bits: int) -> Keys:
    """Of the keys that begin with ``prefix`` the ``bits`` that follow, ``shift`` bits from the end."""
    mine = keys if prefix == 0 and shift + bits == 31 else keys[keys >> (shift + bits) == prefix]
    return (mine >> shift) & ((1 << bits) - 1)


def pick(bins: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the ``k``-th largest, and how many are in the bins above; bin 0 if there are fewer."""
    from_above = bins[::-1].cumsum()
    place = min(int(np.searchsorted(from_above, k)), len(bins) - 1)
    return len(bins) - 1 - place, int(from_above[place] - bins[len(bins) - 1 - place])


def _count(scores: Sequence[Score], key: int) -> Threshold:
    greater, equal = [0] * len(scores), [0] * len(scores)
    num_infinite = 0
    for chunk in _chunks(scores):
        keys = chunk.keys()
        num_infinite += _check(keys)
        for span in chunk.spans:
            greater[span.tensor] += int(np.count_nonzero(keys[span.place] > key))
            equal[span.tensor] += int(np.count_nonzero(keys[span.place] == key))
    return Threshold(key, greater, equal, num_infinite)


def _check(keys: Keys) -> int:
    """How many are infinite; NonFiniteError if one is NaN."""
    largest = int(keys.max())
    if largest > INFINITY:
        raise NonFiniteError(_NAN)
    return int(np.count_nonzero(keys == INFINITY)) if largest == INFINITY else 0


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
            drawn.append(_draw(score, torch.from_numpy(places)))
    sample = torch.cat(drawn).numpy().view(np.int32)
    share = k / total
    rank, width = share * len(sample), _WIDTH * (len(sample) * share * (1.0 - share)) ** 0.5 + _WIDTH
    first, last = len(sample) - 1 - int(rank + width), len(sample) - 1 - int(rank - width)
    wanted = sorted({min(max(place, 0), len(sample) - 1) for place in (first, last)})
    ordered = np.partition(sample, wanted)
    low = int(ordered[wanted[0]]) if first >= 0 else 1
    high = int(ordered[wanted[-1]]) if last < len(sample) else _LAST
    return max(low, 1), high


def _draw(score: Score, places: Tensor) -> Tensor:
    w = torch.take(score.w.detach(), places)
    return Score(w, None if score.g is None else torch.take(score.g.detach(), places)).tensor()


@dataclass(frozen=True, slots=True)
class _Span:
    """A piece of one tensor in a chunk: ``place`` there, from ``start`` of the flat tensor on."""

    tensor: int
    start: int
    place: slice


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Scores of one tensor or several small ones, in scratch memory that the next chunk takes over."""

    values: Tensor  # float32, 1-d
    spans: list[_Span]

    def keys(self) -> Keys:
        return self.values.numpy().view(np.int32)


def _chunks(scores: Sequence[Score]) -> Iterator[_Chunk]:
    """All scores in order, a cacheful at a time; a tensor that is not contiguous is copied."""
    scratch = torch.empty(min(_CHUNK, sum(score.numel() for score in scores)))
    spans: list[_Span] = []
    filled = 0
    for i, score in enumerate(scores):
        w = score.w.detach().reshape(-1)
        g = None if score.g is None else score.g.detach().reshape(-1)
        start = 0
        while start < len(w):
            num = min(len(w) - start, len(scratch) - filled)
            _compute(w[start : start + num], None if g is None else g[start : start + num], scratch[filled:][:num])
            spans.append(_Span(i, start, slice(filled, filled + num)))
            start += num
            filled += num
            if filled == len(scratch):
                yield _Chunk(scratch, spans)
                spans, filled = [], 0
    if filled:
        yield _Chunk(scratch[:filled], spans)


def _compute(w: Tensor, g: Tensor | None, out: Tensor) -> None:
    if g is None:
        torch.abs(w, out=out) if w.dtype is torch.float32 else out.copy_(w).abs_()
    else:
        torch.mul(w.float(), g.float(), out=out).abs_()


# On other devices: nothing here makes the host wait, nor depends on values, so that a CUDA graph can hold it.


@dataclass(frozen=True, slots=True)
class DeviceSelection:
    """As ``CPUSelection``, with the numbers on the device.

    Attributes:
        scores: what was chosen from.
        key: int32, the threshold of all.
        quota: int64, how many of the scores equal to it stay, the first of all.
        num_infinite: not looked at.
    """

    scores: list[Score]
    key: Tensor
    quota: Tensor
    num_infinite: int = 0

    @property
    def counts(self) -> list[Tensor]:
        return [mask.sum() for mask in self._each()]

    def masks(self) -> list[Tensor]:
        return list(self._each())

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mask in zip(tensors, self._each(), strict=True):
            tensor.mul_(mask)

    def _each(self) -> Iterator[Tensor]:
        num_before = torch.zeros((), dtype=torch.int64, device=self.key.device)
        for score in self.scores:
            keys = score.tensor().reshape(-1).view(torch.int32)
            rank = (keys == self.key).cumsum(0) + num_before
            yield ((keys > self.key) | ((keys == self.key) & (rank <= self.quota))).view(score.shape)
            num_before = rank[-1] if len(rank) else num_before


def select_on_device(scores: Sequence[Score], k: int) -> DeviceSelection:
    """As ``select_largest``, without a word from the device to the host; a NaN ranks above all."""
    device = scores[0].device
    key = torch.zeros((), dtype=torch.int32, device=device)
    left = torch.full((), k, dtype=torch.int64, device=device)
    for shift, bits in LEVELS:
        bins = torch.zeros(1 << bits, dtype=torch.int64, device=device)
        for score in scores:
            w, g = score.w.reshape(-1), None if score.g is None else score.g.reshape(-1)
            for start in range(0, len(w), _DEVICE_CHUNK):
                piece = slice(start, start + _DEVICE_CHUNK)
                keys = Score(w[piece], None if g is None else g[piece]).tensor().view(torch.int32)
                is_mine = (keys >> (shift + bits)) == key
                bins.scatter_add_(0, ((keys >> shift) & ((1 << bits) - 1)).long(), is_mine.long())
        from_above = bins.flip(0).cumsum(0)
        place = (from_above < left).sum().clamp(max=len(bins) - 1)
        above = from_above.gather(0, place.view(1)) - bins.flip(0).gather(0, place.view(1))
        left = left - above.view(())
        key = (key << bits) | (len(bins) - 1 - place).int()
    # A threshold of zero: fewer than k are not zero, and all of them stay, those equal to the smallest number too.
    everything = key == 0
    if k == 0:
        return DeviceSelection(list(scores), torch.full_like(key, _LAST), torch.zeros_like(left))
    return DeviceSelection(list(scores), key.clamp(min=1), torch.where(everything, torch.iinfo(torch.int64).max, left))


# Over ranks: each counts its own scores, and all decisions depend on sums over the ranks, so that all decide alike.

_NAN_BIN = _LAST >> LEVELS[0][0]  # of the first histogram, whose bins above that of infinity are free
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
    if not _are_on_cpu(scores):
        device = scores[0].device
        key = torch.tensor(found.key, dtype=torch.int32, device=device)
        on_device = DeviceSelection(list(scores), key, torch.tensor(sum(ties), device=device))
        return RankSelection(on_device, whole.counts, found.num_infinite)
    packed = _pack(scores)
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
                raise NonFiniteError(_NAN)
            num_infinite = int(bins[_INFINITE_BIN])
            if k == 0:
                nothing = [0] * len(scores)
                return RankThreshold(_LAST, nothing, nothing, num_infinite, greater_here=nothing, equal_here=nothing)
        digit, above = pick(bins, left)
        prefix, left = prefix << bits | digit, left - above
        if shift == LEVELS[0][0]:
            own.narrow(digit)
    key = max(prefix, 1)
    greater, equal = own.count(key)
    sums = sum_counts([*greater, *equal], [*shards, *shards])
    there = sums[: len(scores)], sums[len(scores) :]
    return RankThreshold(key, *there, num_infinite, greater_here=greater, equal_here=equal)


def _are_on_cpu(scores: Sequence[Score]) -> bool:
    return all(score.device.type == "cpu" for score in scores)


class _OwnKeys:
    """This rank's keys. They are looked at twice: for the first histogram, and to gather those of the bin it leads to.

    Where these are many, and on other devices than a CPU, they are not gathered but looked at for each histogram. That
    is up to each rank: the numbers are the same.
    """

    def __init__(self, scores: Sequence[Score], counts: Sequence[bool]) -> None:
        self.scores = scores
        self.counts = counts  # whether they go into the histograms
        self.is_on_cpu = _are_on_cpu(scores)
        self.packed = _pack(scores)
        self.packed_counting = _pack(list(itertools.compress(scores, counts)))
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
        found = core.histogram(packed, 0, _LAST, shift=LEVELS[0][0])
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
        most = max(_CHUNK, sum(score.numel() for score in self.scores) // 16)
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
        for chunk in _chunks(self.scores):
            keys = chunk.keys()
            if int(keys.max()) > INFINITY:
                keys[keys > INFINITY] = _LAST  # all NaN in one bin
            for span in chunk.spans:
                yield span.tensor, keys[span.place]

    def _each_on_device(self) -> Iterator[tuple[int, Tensor]]:
        for i, score in enumerate(self.scores):
            for _, keys in _device_pieces(score):
                yield i, keys.masked_fill_(keys > INFINITY, _LAST)


def _device_pieces(score: Score) -> Iterator[tuple[int, Tensor]]:
    """Position and keys, piece by piece."""
    w, g = score.w.reshape(-1), None if score.g is None else score.g.reshape(-1)
    for start in range(0, len(w), _DEVICE_CHUNK):
        piece = slice(start, start + _DEVICE_CHUNK)
        yield start, Score(w[piece], None if g is None else g[piece]).tensor().view(torch.int32)


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
    if _are_on_cpu([score]):
        pieces: Iterator[tuple[int, Keys]] = ((chunk.spans[0].start, chunk.keys()) for chunk in _chunks([score]))
        for start, keys in pieces:
            yield shard.places(start + np.flatnonzero(keys == key), score.shape)
        return
    for start, on_device in _device_pieces(score):
        found = (on_device == key).nonzero().view(-1).cpu().numpy()
        yield shard.places(start + found, score.shape)
