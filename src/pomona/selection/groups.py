"""Selection of groups: the masks of n:m, blocks and channels, and the proof that masks consist of whole groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pomona.distributed import Shard, max_over, sum_counts, sum_vectors
from pomona.granularity import Block, Channel, Granularity, Kind, NOfM, Single, check_shapes, group_steps, parse
from pomona.layout import ROWS, Layout
from pomona.pages.text import few
from pomona.score import Score, Within
from pomona.selection.keys import NAN, NonFiniteError

if TYPE_CHECKING:
    from pomona.weight import Weight

_BITS = 18  # of a score in a sum of squares: 2^27 of these squares fit into an int64
_PIECE = 1 << 20  # scores that are looked at together


def check_fits(weights: Sequence[Weight], granularity: Granularity) -> None:
    """Raise ValueError, with the names, unless all weights fall into such groups and no group lies on two ranks.

    If weights are sharded, call this on every rank.
    """
    kind = parse(granularity)
    if isinstance(kind, Single):
        return
    unknown = [w.name for w in weights if w.layout is None]
    if unknown:
        raise ValueError(
            f"granularity={granularity!r} asks which dimension is outputs and which inputs, and nobody has said so for "
            f"{few(unknown)}; say it: pomona.layout.register(TheModule, name=Layout(outputs=0, "
            f"inputs=1)), or leave it dense: Scope(exclude={unknown})"
        )
    check_shapes(kind, {w.name: w.matrix_shape for w in weights})
    steps = group_steps(kind)
    torn = [float(w.shard is not None and not _is_aligned(kind, steps, w)) for w in weights]
    for w, is_torn in zip(weights, max_over(torn, [w.shard for w in weights]), strict=True):
        if is_torn:
            raise ValueError(
                f"granularity={granularity!r} has groups of {w.name} {tuple(w.shape)} that lie on two ranks; shard it "
                f"along another dimension (FSDP2 cuts the first: shard_placement_fn; n:m lies along the inputs), in "
                f"pieces that are multiples of the group, or leave it dense: Scope(exclude=[{w.name!r}])"
            )


def _is_aligned(kind: Kind, steps: tuple[int, int], w: Weight) -> bool:
    """Whether this rank's block consists of whole groups; channels may be cut: their sums are taken over the ranks."""
    assert w.shard is not None and w.layout is not None
    if 0 in w.value.shape or w.value.ndim < 2:
        return True
    if w.layout.outputs != 0 and w.layout.inputs == 0 and w.layout.matrices > 1:
        return False  # the parts of dimension 0 are not those of the ranks
    if isinstance(kind, Channel):
        return True
    dims = (w.layout.outputs, w.layout.inputs)
    return all(
        w.shard.start[d] % step == 0 and w.value.shape[d] % step == 0 for d, step in zip(dims, steps, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor of scores as its layout sees it: (batch, outputs, inputs, \\*kernel).

    Attributes:
        scores: the view of what this rank has.
        shape: of the view of the whole tensor.
        start: where in it this rank's part begins.
        weight: that the scores are of, if it is known.
    """

    scores: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]
    weight: Weight | None
    _layout: Layout
    _own_shape: torch.Size

    @classmethod
    def of(cls, score: Score | Tensor, w: Weight | None) -> Seen:
        """The scores of a weight; a tensor without a weight is seen as (outputs, inputs, \\*kernel)."""
        layout = (w.layout if w is not None else None) or ROWS
        tensor = _tensor(score)
        shard = None if w is None else w.shard
        whole, start = (tensor.shape, (0,) * tensor.ndim) if shard is None else (shard.shape, shard.start)
        view, shape, first = layout.view(tensor), layout.view_shape(whole), layout.view_start(start)
        return cls(view, shape, first, w, layout, tensor.shape)

    @property
    def shard(self) -> Shard | None:
        """None where this rank has all of it."""
        return None if self.weight is None else self.weight.shard

    def back(self, mask: Tensor) -> Tensor:
        """The mask of the tensor, given that of its view."""
        return self._layout.back(mask, self._own_shape).contiguous()


def group_size(kind: Kind, w: Weight) -> int:
    """How many weights a group of a layer has."""
    if isinstance(kind, Single):
        return 1
    shape = w.matrix_shape
    return kind.size((1, *shape, *(1,) * (2 - len(shape))))


# n:m


def top_n_of_m(score: Tensor, kind: NOfM, quota: Tensor | None = None) -> Tensor:
    """The mask of the ``n`` largest of every ``m`` scores. Ties are broken by position, and a zero is never kept.

    Args:
        score: float32, >= 0, a view of a layout.
        quota: how many to keep of each group, instead of ``n``; of the shape of the groups, with 1 as last dimension.
    """
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    groups, kept = kind.view(score), kind.view(mask)
    limits = torch.full((1,), kind.n, device=score.device) if quota is None else quota
    limits = limits.expand(*groups.shape[:-1], 1)
    for rows in _slices(groups):
        piece = groups[rows]
        if piece.is_cpu and bool(piece.isnan().any()):
            raise NonFiniteError(NAN)
        kept[rows] = (_rank(piece) < limits[rows]) & (piece != 0)
    return mask


def grow_n_of_m(score: Tensor, kept: Tensor, kind: NOfM, w: Weight) -> Tensor:
    """The mask of the largest scores that fill the groups of ``kept`` up to ``n`` each."""
    seen = Seen.of(score, w)
    return seen.back(top_n_of_m(seen.scores, kind, kind.n - num_in_groups(Seen.of(kept, w).scores, kind)))


def _rank(groups: Tensor) -> Tensor:
    """Rank of each score within its group. (Five times faster than sorting such short rows.)"""
    places = groups.movedim(-1, 0).contiguous()
    rank = torch.zeros_like(places, dtype=torch.int32)
    for i in range(len(places)):
        rank[:i] += places[i] > places[:i]
        rank[i + 1 :] += places[i] >= places[i + 1 :]
    return rank.movedim(0, -1)


def num_in_groups(mask: Tensor, kind: NOfM) -> Tensor:
    """Count the True in every ``m``; the last dimension of the result is 1."""
    return kind.view(mask).sum(-1, keepdim=True)


def _slices(groups: Tensor) -> Iterator[slice]:
    """Slices of the first dimensions that cut the tensor into pieces."""
    step = max(1, _PIECE // max(1, math.prod(groups.shape[1:])))
    return (slice(start, start + step) for start in range(0, groups.shape[0], step))


# Blocks


def block_scores(seen: Seen, kind: Block) -> Tensor:
    """The scores of all blocks."""
    groups = kind.view(seen.scores)
    flat = groups.flatten(0, 1) if groups.is_contiguous() else groups.reshape(-1, *groups.shape[2:])
    pieces = [_mean_square_root(flat[rows], (1, 3)) for rows in _slices(flat)]
    scores = torch.cat(pieces) if pieces else flat.new_zeros((0, *kind.grid(seen.scores.shape)[2:]))
    return scores.view(kind.grid(seen.scores.shape))


def block_weight(scores: Tensor, seen: Seen, kind: Block) -> Weight:
    """A weight that stands for the blocks of another, sharded as they are."""
    assert seen.weight is not None
    shard = seen.shard
    if shard is not None:
        first = (seen.start[0], seen.start[1] // kind.rows, seen.start[2] // kind.columns, *seen.start[3:])
        shard = replace(shard, shape=torch.Size(kind.grid(seen.shape)), start=first)
    return replace(seen.weight, value=scores, grad=scores, shard=shard, layout=Layout(1, 2))


def expand_blocks(mask: Tensor, kind: Block) -> Tensor:
    """The mask of the weights, given the mask of the blocks."""
    return mask.repeat_interleave(kind.rows, 1).repeat_interleave(kind.columns, 2)


def _mean_square_root(groups: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = groups.amax(dims, keepdim=True)
    size = math.prod(groups.shape[dim] for dim in dims)
    sums = _sum_of_squares(groups, largest, dims)
    return _root(sums, largest.squeeze(dims), size)


def _sum_of_squares(groups: Tensor, largest: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The sum of squares in units of ``1 / _scale(largest) ** 2``."""
    return (groups.double() * _scale(largest)).round_().long().square_().sum(dims)


def _root(sums: Tensor, largest: Tensor, size: int) -> Tensor:
    root = (sums.double() / size).sqrt_() / _scale(largest)
    return torch.where(largest.isfinite(), root.float(), largest)


def _scale(largest: Tensor) -> Tensor:
    """The power of two (float64) that scales the numbers to [2^17, 2^18). It is built from its bits, to be exact."""
    exponent = torch.frexp(largest).exponent.long().clamp(-200, 200)
    return ((_BITS + 1023 - exponent) << 52).view(torch.float64)


def _tensor(score: Score | Tensor) -> Tensor:
    if isinstance(score, Tensor) and score.dtype is torch.bool:
        return score
    return (score if isinstance(score, Score) else Score(score)).tensor()


# Channels


def top_channels(
    seen: Sequence[Seen], k: int, kind: Channel, floors: Sequence[int], within: Within | None = None
) -> list[Tensor]:
    """Masks of the channels with the largest scores of all tensors: as many as fit into ``k`` weights.

    First each tensor keeps its ``floors`` best channels. The others follow by falling score, ties by position, up to
    the first that does not fit. A channel whose scores are all zero is never kept. ``within`` changes the scores of the
    channels of each tensor.
    """
    ranked = _channel_scores(seen, kind)
    ranked = ranked if within is None else [within(one) for one in ranked]
    layer = np.repeat(np.arange(len(seen)), [r.numel() for r in ranked])
    flat = torch.cat([r.view(-1) for r in ranked]).numpy()
    sizes = np.array([kind.size(one.shape) for one in seen], dtype=np.int64)[layer]
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] > 0]
    is_first = np.zeros(len(flat), dtype=bool)
    for i, floor in enumerate(floors):
        is_first[order[layer[order] == i][:floor]] = True
    rest = order[~is_first[order]]
    fits = np.cumsum(sizes[rest]) <= k - sizes[is_first].sum()
    kept = is_first
    kept[rest[fits]] = True
    chosen = torch.split(torch.from_numpy(kept), [r.numel() for r in ranked])
    return [_spread(mask.view(r.shape), one, kind) for mask, r, one in zip(chosen, ranked, seen, strict=True)]


def _spread(mask: Tensor, seen: Seen, kind: Channel) -> Tensor:
    """Expand a mask of all channels of the full tensor to this rank's weights."""
    mine = _own(mask, kind, seen).to(seen.scores.device)
    shape = [mine.shape[0], *[1] * (seen.scores.ndim - 1)]
    shape[kind.dim] = mine.shape[1]
    return mine.reshape(shape).expand(seen.scores.shape)


def _own(whole: Tensor, kind: Channel, seen: Seen) -> Tensor:
    """View of this rank's part of what there is one of for each channel."""
    dims = (0, kind.dim)
    rows, columns = (slice(seen.start[d], seen.start[d] + seen.scores.shape[d]) for d in dims)
    return whole[rows, columns]


def _channel_scores(seen: Sequence[Seen], kind: Channel) -> list[Tensor]:
    """One float32 score per channel of the full tensors, on the CPU. Sharded tensors take two sums over the ranks."""
    shards = [one.shard for one in seen]
    largest = [torch.zeros(kind.grid(one.shape)) for one in seen]
    for one, most in zip(seen, largest, strict=True):
        if one.scores.numel():
            mine = _own(most, kind, one)
            mine.copy_(kind.view(one.scores).amax(1).view(mine.shape))
    num_nan = sum(int(most.isnan().sum()) for most in largest)
    is_on_cpu = all(one.scores.device.type == "cpu" for one in seen)
    if is_on_cpu and max_over([float(num_nan)], shards[:1])[0]:
        raise NonFiniteError(NAN)
    largest = _largest_of_ranks([most.nan_to_num_(nan=math.inf, posinf=math.inf) for most in largest], shards)
    sums = [torch.zeros(most.shape, dtype=torch.int64) for most in largest]
    for one, most, total in zip(seen, largest, sums, strict=True):
        if one.scores.numel():
            mine = _own(most, kind, one).reshape(-1, 1).to(one.scores.device)
            groups = kind.view(one.scores)
            found = [_sum_of_squares(groups[rows], mine[rows], 1) for rows in _slices(groups)]
            own = _own(total, kind, one)
            own.copy_(torch.cat(found).view(own.shape))
    whole = sum_vectors([total.view(-1) for total in sums], shards)
    return [
        _root(total.view(most.shape), most, kind.size(one.shape))
        for total, most, one in zip(whole, largest, seen, strict=True)
    ]


def _largest_of_ranks(tables: list[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    shard = shards[0]
    if shard is None:
        return tables
    flat = shard.ranks.max_(torch.cat([table.reshape(-1) for table in tables]))
    parts = torch.split(flat, [table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


# Proof


def violations(granularity: Granularity, pruned: Sequence[Tensor], of: Sequence[Weight]) -> list[str]:
    """Say in one sentence per weight where masks (True = zero) break the granularity; the same on all ranks."""
    kind = parse(granularity)
    if isinstance(kind, Single) or not pruned:
        return []
    blocks = [w.shard for w in of]
    seen = [Seen.of(mask, w) for mask, w in zip(pruned, of, strict=True)]
    if isinstance(kind, Channel):
        counts = [_count_in_channels(one, kind) for one in seen]
        sizes = [kind.size(one.shape) for one in seen]
        broken = [int(((c > 0) & (c < s)).sum()) for c, s in zip(sum_vectors(counts, blocks), sizes, strict=True)]
    else:
        broken = sum_counts([_num_broken(one.scores, kind) for one in seen], blocks)
    said = {
        NOfM: f"groups of {{}} keep more than {str(kind).replace(':', ' of ')} weights",
        Block: f"blocks of {kind} of {{}} are cut in part",
        Channel: f"{kind}s of {{}} are cut in part",
    }[type(kind)]
    return [f"{num:,} {said.format(w.name)}" for w, num in zip(of, broken, strict=True) if num]


def _num_broken(pruned: Tensor, kind: NOfM | Block) -> Tensor:
    if isinstance(kind, NOfM):
        return (num_in_groups(~pruned, kind) > kind.n).sum()
    groups = kind.view(pruned)
    return (groups.any(4).any(2) & ~groups.all(4).all(2)).sum()


def _count_in_channels(pruned: Seen, kind: Channel) -> Tensor:
    whole = torch.zeros(kind.grid(pruned.shape), dtype=torch.int64)
    own = _own(whole, kind, pruned)
    own.copy_(kind.view(~pruned.scores).sum(1).view(own.shape))
    return whole.view(-1)
