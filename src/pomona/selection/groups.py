"""Selection of groups: the masks of n:m, blocks and channels, and the proof that masks consist of whole groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pomona.distributed import Shard, max_over, sum_counts, sum_vectors
from pomona.granularity import Block, Channel, Granularity, NOfM, Single, check_shapes, group_steps, parse
from pomona.score import Score
from pomona.selection.keys import NAN, NonFiniteError
from pomona.selection.ranks import find_shards

if TYPE_CHECKING:
    from pomona.weight import Weight

_BITS = 18  # of a score in a sum of squares: 2^27 of these squares fit into an int64
_PIECE = 1 << 20  # scores that are looked at together


def check_fits(weights: Sequence[Weight], granularity: Granularity) -> None:
    """ValueError unless all weights fall into such groups, no group on two ranks; names those that do not.

    All ranks must call it where weights are sharded.
    """
    kind = parse(granularity)
    check_shapes(kind, {w.name: w.shape for w in weights})
    steps = group_steps(kind)
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
            raise NonFiniteError(NAN)
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


def block_scores(score: Score | Tensor, kind: Block, w: Weight | None) -> tuple[Tensor, Weight | None]:
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


def expand_blocks(mask: Tensor, kind: Block) -> Tensor:
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
        raise NonFiniteError(NAN)
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
