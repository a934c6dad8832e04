"""WHAT goes together: single weights, n of every m, blocks, or whole channels; group scores, and masks of whole groups.

Unstructured zeros make a small file. Kernels for 2:4, block kernels and smaller dense layers want zeros that lie
together, and ``granularity=`` says how:

``"weight"``
    Each weight by itself.
``"n:m"``, such as ``"2:4"``
    Of every ``m`` neighbouring inputs of an output at most ``n`` weights stay, those with the largest scores.
``"RxC"`` or ``(R, C)``, such as ``"1x4"``
    Blocks of R neighbouring outputs by C neighbouring inputs go or stay as a whole.
``"channel"``
    All weights of an output go or stay together (the first dimension).
``"input channel"``
    All weights that read an input go or stay together (the second dimension).

A weight of shape ``(outputs, inputs, *kernel)``, as of ``Linear`` and ``Conv``, is seen as one matrix of outputs and
inputs for each place of the kernel, so that groups run along the input channels and never from one place of a kernel
into the next. That is where the 2:4 format of ``pomona.export`` has them, and GPU kernels on channels_last layers.

**The score of a block or a channel** is the root of the mean of its squared scores. Of all ways to keep so many blocks,
the best by this score changes the weights least; the mean lets channels of different layers be compared.
It is summed in whole numbers, each score rounded to 2^-18 of the largest in its group, and so does not depend on
the order of summation: it is the same on every device, and however the weights are sharded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pomona.distributed import Shard, max_over, sum_counts, sum_vectors
from pomona.schedule import FAR_AWAY, Value, highest, value_at
from pomona.score import Score
from pomona.selection import NonFiniteError, find_shards

if TYPE_CHECKING:
    from pomona.weight import Weight

Granularity: TypeAlias = str | tuple[int, int]

_BITS = 18  # of a score in a sum of squares: 2^27 of these squares fit into an int64
_PIECE = 1 << 20  # scores that are looked at together
_NAN = "a score is NaN; check the gradients before selecting"


@dataclass(frozen=True, slots=True)
class Single:
    """Each weight by itself."""

    def __str__(self) -> str:
        return "weight"

    def size(self, shape: Sequence[int]) -> int:
        """Weights of a group, in a tensor of this shape."""
        return 1


@dataclass(frozen=True, slots=True)
class NOfM:
    """Of every ``m`` neighbouring inputs ``n`` stay."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def size(self, shape: Sequence[int]) -> int:
        return 1  # which stays or goes by itself

    def view(self, tensor: Tensor) -> Tensor:
        """The groups of a tensor, in the last dimension: a view."""
        rows = tensor.movedim(1, -1)
        return rows.view(*rows.shape[:-1], rows.shape[-1] // self.m, self.m)


@dataclass(frozen=True, slots=True)
class Block:
    """``rows`` outputs by ``columns`` inputs together."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def size(self, shape: Sequence[int]) -> int:
        return self.rows * self.columns

    def view(self, tensor: Tensor) -> Tensor:
        """The weights of a block in dimensions 1 and 3, the grid of blocks in the others: a view."""
        down, across, *kernel = self.grid(tensor.shape)
        return tensor.view(down, self.rows, across, self.columns, *kernel)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many blocks, in each dimension."""
        return (shape[0] // self.rows, shape[1] // self.columns, *shape[2:])


@dataclass(frozen=True, slots=True)
class Channel:
    """All weights with the same index in dimension ``dim``."""

    dim: int

    def __str__(self) -> str:
        return "input channel" if self.dim else "channel"

    def size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // shape[self.dim] if math.prod(shape) else 1

    def view(self, tensor: Tensor) -> Tensor:
        """One row a channel."""
        rows = tensor.movedim(self.dim, 0)
        return rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))


Kind: TypeAlias = Single | NOfM | Block | Channel
_NAMED: dict[str, Kind] = {str(kind): kind for kind in (Single(), Channel(0), Channel(1))}


def parse(granularity: Granularity) -> Kind:
    """What the word means.

    Raises:
        TypeError: it is neither text nor a pair of integers.
        ValueError: it is no granularity; tells which there are.

    Example:
        >>> parse("2:4"), parse((1, 4)), parse("1x4")
        (NOfM(n=2, m=4), Block(rows=1, columns=4), Block(rows=1, columns=4))
    """
    known = '"weight", "n:m" such as "2:4", a block such as "1x4" or (1, 4), "channel" or "input channel"'
    if isinstance(granularity, (tuple, list)) and len(granularity) == 2:
        if any(isinstance(size, bool) or not isinstance(size, int) for size in granularity):
            raise TypeError(f"granularity must be {known}, got {granularity!r}")
        granularity = f"{granularity[0]}x{granularity[1]}"
    if not isinstance(granularity, str):
        raise TypeError(f"granularity must be {known}, got {granularity!r}")
    if granularity in _NAMED:
        return _NAMED[granularity]
    if found := re.fullmatch(r"(\d+):(\d+)", granularity):
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise ValueError(f'granularity="n:m" keeps n of every m with 0 < n < m, got {granularity!r}')
        return NOfM(n, m)
    if found := re.fullmatch(r"(-?\d+)x(-?\d+)", granularity):
        rows, columns = map(int, found.groups())
        if rows < 1 or columns < 1:
            raise ValueError(f"a block has at least one output and one input, got granularity={granularity!r}")
        return Block(rows, columns) if rows * columns > 1 else Single()
    raise ValueError(f"granularity must be {known}, got {granularity!r}")


def canonical(granularity: Granularity) -> str:
    """The one way to write it, by which saved states are compared: ``"1x4"`` for ``(1, 4)``."""
    return str(parse(granularity))


def check_granularity(granularity: Granularity, sparsity: Value | None, allocation: str = "global") -> None:
    """ValueError where n:m, which gives every layer the same share, does not fit what else a method was told."""
    kind = parse(granularity)
    if not isinstance(kind, NOfM):
        return
    if sparsity is None:
        raise ValueError(f"granularity={granularity!r} needs sparsity={_share(kind)}, and no shares by layer")
    end = value_at(sparsity, FAR_AWAY)
    if abs(end - (1 - kind.n / kind.m)) > 1e-9 or highest(sparsity) > end:
        when = "" if value_at(sparsity, 0) == end else " at its end, and highest there"
        raise ValueError(
            f"granularity={granularity!r} keeps {kind.n} of every {kind.m} weights, so that sparsity must be "
            f"{_share(kind)}{when}, got {sparsity}; change one of the two"
        )
    if allocation == "erk":
        raise ValueError(
            f"granularity={granularity!r} keeps the same share of every layer, which allocation='erk' does not; take "
            f"allocation='uniform'"
        )


def _share(kind: NOfM) -> str:
    share = 1 - kind.n / kind.m
    return f"{share:g}" if float(f"{share:g}") == share else f"1 - {kind.n}/{kind.m}"


def check_fits(weights: Sequence[Weight], granularity: Granularity) -> None:
    """ValueError unless all weights fall into such groups, no group on two ranks; names those that do not.

    All ranks must call it where weights are sharded.
    """
    kind = parse(granularity)
    check_shapes(kind, {w.name: w.shape for w in weights})
    steps = _steps(kind)
    if isinstance(kind, (Single, Channel)):
        return  # channels are summed over ranks
    torn = [float(w.shard is not None and not _is_aligned(steps, w.shard, w.value.shape)) for w in weights]
    for w, is_torn in zip(weights, max_over(torn, [w.shard for w in weights]), strict=True):
        if is_torn:
            raise ValueError(
                f"granularity={granularity!r} has groups of {w.name} {tuple(w.shape)} that lie on two ranks; shard it "
                f"along another dimension (FSDP2 cuts the first: shard_placement_fn; n:m lies along the second), in "
                f"pieces that are multiples of the group, or leave it dense: Scope(exclude=[{w.name!r}])"
            )


def check_shapes(kind: Kind, shapes: Mapping[str, Sequence[int]]) -> None:
    """ValueError unless tensors of these shapes, by name, fall into groups."""
    unfit = {name: tuple(shape) for name, shape in shapes.items() if not _fits(kind, shape)}
    if not unfit:
        return
    steps = _steps(kind)
    wanted = {
        NOfM: f"a second dimension (the inputs) divisible by {steps[1]}",
        Block: f"a first dimension (the outputs) divisible by {steps[0]} and a second (the inputs) by {steps[1]}",
        Channel: "two dimensions" if isinstance(kind, Channel) and kind.dim else "a dimension",
    }[type(kind)]
    shown = ", ".join(f"{name} {shape}" for name, shape in list(unfit.items())[:3])
    more = f" and {len(unfit) - 3} more" if len(unfit) > 3 else ""
    does, it = ("do", "them") if len(unfit) > 1 else ("does", "it")
    raise ValueError(
        f"granularity='{kind}' needs {wanted}, which {shown}{more} {does} not have; leave {it} dense: "
        f"Scope(exclude={list(unfit)})"
    )


def _steps(kind: Kind) -> tuple[int, int]:
    """Size of a group in the first two dimensions."""
    if isinstance(kind, NOfM):
        return 1, kind.m
    return (kind.rows, kind.columns) if isinstance(kind, Block) else (1, 1)


def _fits(kind: Kind, shape: Sequence[int]) -> bool:
    if isinstance(kind, Single):
        return True
    if isinstance(kind, Channel):
        return len(shape) > kind.dim
    return len(shape) >= 2 and all(size % step == 0 for size, step in zip(shape, _steps(kind), strict=False))


def _is_aligned(steps: tuple[int, int], shard: Shard, shape: Sequence[int]) -> bool:
    places = zip(shard.start, shape, steps, strict=False)
    return 0 in shape or all(start % step == 0 and size % step == 0 for start, size, step in places)


# n:m


def top_n_of_m(score: Tensor, kind: NOfM, quota: Tensor | None = None) -> Tensor:
    """The mask of the ``n`` largest scores of every ``m``, ties by position, a zero never; needs scores >= 0.

    Args:
        score: float32, of the weight's shape.
        quota: in place of ``n`` how many of each group; of the shape of the groups, the last dimension 1.
    """
    mask = torch.zeros_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    groups, kept = kind.view(score), kind.view(mask)
    limits = torch.full((1,), kind.n, device=score.device) if quota is None else quota
    limits = limits.expand(*groups.shape[:-1], 1)
    for rows in _slices(groups):
        piece = groups[rows]
        if piece.is_cpu and bool(piece.isnan().any()):
            raise NonFiniteError(_NAN)
        kept[rows] = (_rank(piece) < limits[rows]) & (piece != 0)
    return mask


def _rank(groups: Tensor) -> Tensor:
    """Of each score how many of its group go before it; five times faster than to sort so few."""
    places = groups.movedim(-1, 0).contiguous()
    rank = torch.zeros_like(places, dtype=torch.int32)
    for i in range(len(places)):
        rank[:i] += places[i] > places[:i]
        rank[i + 1 :] += places[i] >= places[i + 1 :]
    return rank.movedim(0, -1)


def num_in_groups(mask: Tensor, kind: NOfM) -> Tensor:
    """How many are True in every ``m``; the last dimension is 1."""
    return kind.view(mask).sum(-1, keepdim=True)


def _slices(groups: Tensor) -> Iterator[slice]:
    """Of the first dimension, a piece of the tensor each."""
    step = max(1, _PIECE // max(1, math.prod(groups.shape[1:])))
    return (slice(start, start + step) for start in range(0, groups.shape[0], step))


# Blocks


def fold(score: Score | Tensor, kind: Block, w: Weight | None) -> tuple[Tensor, Weight | None]:
    """The scores of the blocks as a tensor of their own, and the weight it stands for, sharded as the blocks are."""
    groups = kind.view(_tensor(score))
    pieces = [_mean_square_root(groups[rows], (1, 3)) for rows in _slices(groups)]
    scores = torch.cat(pieces) if pieces else groups.new_zeros(kind.grid(score.shape))
    if w is None:
        return scores, None
    shard = w.shard
    if shard is not None:
        start = (shard.start[0] // kind.rows, shard.start[1] // kind.columns, *shard.start[2:])
        shard = replace(shard, shape=torch.Size(kind.grid(shard.shape)), start=start)
    return scores, replace(w, value=scores, grad=scores, shard=shard)


def unfold(mask: Tensor, kind: Block) -> Tensor:
    """The mask of the weights from that of the blocks."""
    return mask.repeat_interleave(kind.rows, 0).repeat_interleave(kind.columns, 1)


def _mean_square_root(groups: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = groups.amax(dims, keepdim=True)
    size = math.prod(groups.shape[dim] for dim in dims)
    sums = _sum_of_squares(groups, largest, dims)
    return _root(sums, largest.squeeze(dims), size)


def _sum_of_squares(groups: Tensor, largest: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """In units of the square of ``1 / _scale(largest)``."""
    return (groups.double() * _scale(largest)).round_().long().square_().sum(dims)


def _root(sums: Tensor, largest: Tensor, size: int) -> Tensor:
    root = (sums.double() / size).sqrt_() / _scale(largest)
    return torch.where(largest.isfinite(), root.float(), largest)


def _scale(largest: Tensor) -> Tensor:
    """The power of two, as float64, that brings the numbers to between 2^17 and 2^18; made of its bits, to be exact."""
    exponent = torch.frexp(largest).exponent.long().clamp(-200, 200)
    return ((_BITS + 1023 - exponent) << 52).view(torch.float64)


def _tensor(score: Score | Tensor) -> Tensor:
    return (score if isinstance(score, Score) else Score(score)).tensor()


# Channels


def top_channels(
    scores: Sequence[Score | Tensor], k: int, kind: Channel, of: Sequence[Weight] | None, floors: Sequence[int]
) -> list[Tensor]:
    """Masks of the channels with the largest scores of all tensors: as many as fit into ``k`` weights.

    First each tensor keeps its ``floors`` best channels; of the others, largest score first, ties by position, all up
    to the first that does not fit. A channel of which all scores are zero is never kept.
    """
    shapes = [s.shape for s in scores] if of is None else [w.shape for w in of]
    ranked = _channel_scores(scores, kind, of, shapes)
    layer = np.repeat(np.arange(len(shapes)), [len(r) for r in ranked])
    flat = torch.cat(ranked).numpy()
    sizes = np.array([kind.size(shape) for shape in shapes], dtype=np.int64)[layer]
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] > 0]
    is_first = np.zeros(len(flat), dtype=bool)
    for i, floor in enumerate(floors):
        is_first[order[layer[order] == i][:floor]] = True
    rest = order[~is_first[order]]
    fits = np.cumsum(sizes[rest]) <= k - sizes[is_first].sum()
    kept = is_first
    kept[rest[fits]] = True
    chosen = torch.split(torch.from_numpy(kept), [len(r) for r in ranked])
    places = zip(chosen, scores, _shards(scores, of), strict=True)
    return [_spread(mask, score, kind, shard) for mask, score, shard in places]


def _shards(scores: Sequence[Score | Tensor], of: Sequence[Weight] | None) -> list[Shard | None]:
    if find_shards([s if isinstance(s, Score) else Score(s) for s in scores], of) is None or of is None:
        return [None] * len(scores)
    return [w.shard for w in of]


def _spread(mask: Tensor, score: Score | Tensor, kind: Channel, shard: Shard | None) -> Tensor:
    """From all channels of the whole tensor to this rank's weights."""
    mine = _own(mask, kind, score.shape, shard).to(score.device)
    shape = [1] * len(score.shape)
    shape[kind.dim] = -1
    return mine.view(shape).expand(score.shape).contiguous()


def _own(whole: Tensor, kind: Channel, shape: Sequence[int], shard: Shard | None) -> Tensor:
    """Of a vector with one number a channel those of this rank: a view."""
    start = 0 if shard is None else shard.start[kind.dim]
    return whole[start : start + shape[kind.dim]]


def _channel_scores(
    scores: Sequence[Score | Tensor], kind: Channel, of: Sequence[Weight] | None, shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """One float32 number a channel of the whole tensors, on the CPU; two sums over ranks where these share them."""
    shards = _shards(scores, of)
    largest = [torch.zeros(shape[kind.dim]) for shape in shapes]
    for score, shard, most in zip(scores, shards, largest, strict=True):
        if score.numel():
            _own(most, kind, score.shape, shard).copy_(kind.view(_tensor(score)).amax(1))
    num_nan = sum(int(most.isnan().sum()) for most in largest)
    is_on_cpu = all(score.device.type == "cpu" for score in scores)
    if is_on_cpu and max_over([float(num_nan)], shards[:1])[0]:
        raise NonFiniteError(_NAN)
    largest = _largest_of_ranks([most.nan_to_num_(nan=math.inf, posinf=math.inf) for most in largest], shards)
    sums = [torch.zeros(len(most), dtype=torch.int64) for most in largest]
    for score, shard, most, total in zip(scores, shards, largest, sums, strict=True):
        if score.numel():
            mine = _own(most, kind, score.shape, shard).unsqueeze(1).to(score.device)
            groups = kind.view(_tensor(score))
            found = [_sum_of_squares(groups[rows], mine[rows], 1) for rows in _slices(groups)]
            _own(total, kind, score.shape, shard).copy_(torch.cat(found))
    whole = sum_vectors(sums, shards)
    return [_root(t, most, kind.size(shape)) for t, most, shape in zip(whole, largest, shapes, strict=True)]


def _largest_of_ranks(vectors: list[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    shard = shards[0]
    if shard is None:
        return vectors
    return list(torch.split(shard.ranks.max_(torch.cat(vectors)), [len(v) for v in vectors]))


# Proof


def violations(granularity: Granularity, pruned: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> list[str]:
    """What in the masks (True = zero) breaks the granularity, a sentence each; the same on all ranks."""
    kind = parse(granularity)
    if isinstance(kind, Single) or not pruned:
        return []
    blocks = [shards.get(name) for name in pruned]
    if isinstance(kind, Channel):
        counts = [_count_in_channels(~mask, kind, shards.get(name)) for name, mask in pruned.items()]
        sizes = [kind.size(m.shape if s is None else s.shape) for m, s in zip(pruned.values(), blocks, strict=True)]
        broken = [int(((c > 0) & (c < s)).sum()) for c, s in zip(sum_vectors(counts, blocks), sizes, strict=True)]
    else:
        broken = sum_counts([_num_broken(mask, kind) for mask in pruned.values()], blocks)
    told = {
        NOfM: f"groups of {{}} keep more than {str(kind).replace(':', ' of ')} weights",
        Block: f"blocks of {kind} of {{}} are cut in part",
        Channel: f"{kind}s of {{}} are cut in part",
    }[type(kind)]
    return [f"{num:,} {told.format(name)}" for name, num in zip(pruned, broken, strict=True) if num]


def _num_broken(pruned: Tensor, kind: NOfM | Block) -> Tensor:
    if isinstance(kind, NOfM):
        return (num_in_groups(~pruned, kind) > kind.n).sum()
    groups = kind.view(pruned)
    return (groups.any(3).any(1) & ~groups.all(3).all(1)).sum()


def _count_in_channels(kept: Tensor, kind: Channel, shard: Shard | None) -> Tensor:
    whole = torch.zeros((kept.shape if shard is None else shard.shape)[kind.dim], dtype=torch.int64)
    _own(whole, kind, kept.shape, shard).copy_(kind.view(kept).sum(1))
    return whole
