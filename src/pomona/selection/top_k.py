"""The k largest of all scores, by layer and in groups where wanted: scores to boolean masks, True = kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pomona.granularity import Block, Channel, Granularity, NOfM, check_shapes, parse
from pomona.score import Score, Within
from pomona.selection import JoinedSelection, Selection, find_shards, select_largest, select_over_ranks
from pomona.selection.allocation import Allocation, allocate, check_allocation
from pomona.selection.groups import Seen, block_scores, block_weight, expand_blocks, top_channels, top_n_of_m
from pomona.selection.within import change_within

if TYPE_CHECKING:
    from pomona.weight import Weight


def select(
    scores: Sequence[Score | Tensor],
    k: int,
    *,
    of: Sequence[Weight] | None = None,
    min_density: float = 0.0,
) -> Selection:
    """Keep **exactly** the ``k`` largest scores of all tensors together, without a temporary of their size.

    Ties are broken by position: the earlier tensor, then the smaller flat index, stays. A score of zero is never
    kept, so that fewer than ``k`` are kept where fewer are non-zero (the GSM authors' ``>= threshold`` keeps
    everything then). The result depends on nothing but the scores.

    Args:
        scores: of any shapes, on one device; a tensor ``t`` stands for the scores ``|t|``.
        k: how many to keep in all, 0 <= k <= number of scores.
        of: the weights that the scores are of, in the same order. Where these are sharded over ranks it is needed:
            ``k`` is then of the whole tensors, all ranks choose together what one process would choose, and each gets
            its part. All ranks must call it.
        min_density: the largest ``ceil(min_density n)`` scores of every tensor of ``n`` are kept before the rest
            of ``k`` is dealt out globally, in [0, 1]; any value above 0 keeps every layer alive. On a GPU the host
            waits for the counts if it is above 0, and for nothing else.

    Raises:
        ValueError: ``k`` out of range, a NaN among the scores, or floors that together exceed ``k``. (On a GPU a NaN
            ranks above all others instead: to look for it would make the host wait.)
        RuntimeError: ``of`` is missing where weights are sharded.
    """
    asked = [score if isinstance(score, Score) else Score(score) for score in scores]
    shards = find_shards(asked, of)
    sizes = [score.numel() for score in asked] if shards is None else [shard.shape.numel() for shard in shards]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must be in [0, {sum(sizes)}], the number of scores, got {k}")
    check_min_density(min_density)
    if min_density == 0.0 and shards is None:
        return select_largest(asked, k)
    floors = check_floors(sizes, k, min_density)

    def choose(places: Sequence[int], k: int) -> Selection:
        """The ``k`` largest of some of the tensors."""
        mine = [asked[i] for i in places]
        if shards is None:
            return select_largest(mine, k)
        return select_over_ranks(mine, [shards[i] for i in places], k)

    selection = choose(range(len(asked)), k)
    return _raise_to_floors(choose, selection, sizes, floors, k) if min_density > 0.0 else selection


def global_top_k(
    scores: Sequence[Score | Tensor], k: int, *, of: Sequence[Weight] | None = None, min_density: float = 0.0
) -> list[Tensor]:
    """The masks of ``select``: boolean, one for each tensor of ``scores``, of its shape, True = kept.

    Example:
        >>> import torch
        >>> global_top_k([torch.tensor([1.0, 4.0]), torch.tensor([[3.0], [2.0]])], 2)
        [tensor([False,  True]), tensor([[ True],
                [False]])]
    """
    return select(scores, k, of=of, min_density=min_density).masks()


def top_k(
    scores: Sequence[Score | Tensor],
    k: int,
    allocation: Allocation = "global",
    *,
    of: Sequence[Weight] | None = None,
    min_density: float = 0.0,
    granularity: Granularity = "weight",
    within: Within | None = None,
) -> list[Tensor]:
    """Keep the ``k`` largest scores in all, dealt to the layers by ``allocation``, in groups of ``granularity``.

    Args:
        scores: as of ``select``.
        k: how many to keep in all.
        allocation: ``"global"``: one ranking over all layers, ``select``. ``"uniform"``: the same share of every
            layer. ``"erk"``: shares by ``erk``. The last two ignore ``min_density``, for they empty no layer while
            ``k`` suffices.
        of: as of ``select``.
        min_density: as of ``select``.
        granularity: what goes together, see :mod:`pomona.granularity`. Blocks: the best ``k // (R C)`` blocks,
            ranked, dealt and floored as weights are. Channels: as many as fit into ``k`` weights; with an allocation
            by layer, into each layer's share. n:m: the ``n`` best of every ``m`` always stay, and what is
            left of ``k`` goes to the best of all others. So ``k = n N / m`` is n:m itself, and with a larger ``k``
            groups are on their way there, from ``m`` to ``n``.
        within: with ``"global"``, what makes the scores of different layers comparable, such as
            :func:`pomona.score.lamp`; applied to the scores of each layer, or to those of its blocks or channels.

    Returns:
        Boolean masks. Exactly ``k`` are kept; fewer where scores are zero, or where the next block or channel would
        be too large.
    """
    check_allocation(allocation)
    kind = parse(granularity)
    shapes = _matrix_shapes(scores, of)
    names = [f"score {i}" for i in range(len(scores))] if of is None else [w.name for w in of]
    check_shapes(kind, dict(zip(names, shapes, strict=True)))
    if isinstance(kind, NOfM):
        return _n_of_m(scores, k, allocation, kind, of, within)
    if isinstance(kind, Block):
        return _blocks(scores, k, allocation, kind, of, min_density, within)
    if allocation != "global":
        return top_k_each(scores, allocate(allocation, shapes, k), of=of, granularity=granularity)
    if isinstance(kind, Channel):
        seen = _seen(scores, of)
        floors = [floor_of(math.prod(kind.grid(one.shape)), min_density) for one in seen]
        masks = top_channels(seen, k, kind, floors, within)
        return [one.back(mask) for one, mask in zip(seen, masks, strict=True)]
    return global_top_k(change_within(scores, within, of), k, of=of, min_density=min_density)


def _matrix_shapes(scores: Sequence[Score | Tensor], of: Sequence[Weight] | None) -> list[tuple[int, ...]]:
    """Shapes of the whole matrices."""
    return [tuple(score.shape) for score in scores] if of is None else [w.matrix_shape for w in of]


def _seen(scores: Sequence[Score | Tensor], of: Sequence[Weight] | None) -> list[Seen]:
    asked = [score if isinstance(score, Score) else Score(score) for score in scores]
    find_shards(asked, of)  # refuses scores that are not of these weights
    if of is None:
        return [Seen.of(score, None) for score in asked]
    return [Seen.of(score, w) for score, w in zip(asked, of, strict=True)]


def _blocks(
    scores: Sequence[Score | Tensor],
    k: int,
    allocation: Allocation,
    kind: Block,
    of: Sequence[Weight] | None,
    min_density: float,
    within: Within | None,
) -> list[Tensor]:
    seen = _seen(scores, of)
    ranked = [block_scores(one, kind) for one in seen]
    if of is None:
        blocks, ranked = None, [one.squeeze(0) for one in ranked]  # no layout, no batch
    else:
        blocks = [block_weight(score, one, kind) for score, one in zip(ranked, seen, strict=True)]
    how: Any = {"of": blocks, "min_density": min_density, "within": within}
    masks = top_k(ranked, k // (kind.rows * kind.columns), allocation, **how)
    grids = [mask.view(kind.grid(one.scores.shape)) for mask, one in zip(masks, seen, strict=True)]
    return [one.back(expand_blocks(grid, kind)) for one, grid in zip(seen, grids, strict=True)]


def _n_of_m(
    scores: Sequence[Score | Tensor],
    k: int,
    allocation: Allocation,
    kind: NOfM,
    of: Sequence[Weight] | None,
    within: Within | None,
) -> list[Tensor]:
    sizes = [math.prod(score.shape) for score in scores] if of is None else [w.numel for w in of]
    left = k - sum(sizes) // kind.m * kind.n
    if left < 0:
        raise ValueError(f"k must be >= {k - left}, which granularity='{kind}' keeps of {sum(sizes)} scores, got {k}")
    asked = [score if isinstance(score, Score) else Score(score) for score in scores]
    masks = [seen.back(top_n_of_m(seen.scores, kind)) for seen in _seen(asked, of)]
    if left == 0:
        return masks
    ranked = [s if isinstance(s, Tensor) else s.tensor() for s in change_within(asked, within, of)]
    others = [score.masked_fill_(mask, 0.0) for score, mask in zip(ranked, masks, strict=True)]
    if allocation == "global":
        more = global_top_k(others, left, of=of)
    else:
        shares = allocate(allocation, [(size // kind.m, kind.m - kind.n) for size in sizes], left)
        more = top_k_each(others, shares, of=of)
    return [mask.logical_or_(one) for mask, one in zip(masks, more, strict=True)]


def top_k_each(
    scores: Sequence[Score | Tensor],
    counts: Sequence[int],
    *,
    of: Sequence[Weight] | None = None,
    granularity: Granularity = "weight",
) -> list[Tensor]:
    """Keep as many of the largest scores of each tensor as its count says, in groups of ``granularity``."""
    alone = [None] * len(scores) if of is None else [[w] for w in of]
    places = zip(scores, counts, alone, strict=True)
    return [top_k([s], count, of=w, granularity=granularity)[0] for s, count, w in places]


def floor_of(num_groups: int, min_density: float) -> int:
    """``ceil(min_density n)``: how many of ``n`` weights or groups stay at least; 0.07 of 100 is 7, not 8."""
    return math.ceil(round(min_density * num_groups, 6))


def check_min_density(min_density: float) -> None:
    """Refuse what is no number in [0, 1]."""
    if isinstance(min_density, bool) or not isinstance(min_density, (int, float)):
        raise TypeError(f"min_density must be a number, got {min_density!r}")
    if not 0.0 <= min_density <= 1.0:
        raise ValueError(f"min_density must be in [0, 1], got {min_density}")


def check_floors(sizes: Sequence[int], k: int, min_density: float) -> list[int]:
    """The floor of each tensor; ValueError if together they exceed ``k``."""
    floors = [floor_of(size, min_density) for size in sizes]
    if sum(floors) > k:
        raise ValueError(
            f"min_density={min_density:g} alone keeps {sum(floors)} of {sum(sizes)} scores, more than the budget of "
            f"{k}; lower min_density or the sparsity"
        )
    return floors


def _raise_to_floors(
    choose: Callable[[Sequence[int], int], Selection],
    selection: Selection,
    sizes: Sequence[int],
    floors: Sequence[int],
    k: int,
) -> Selection:
    """Give layers below their floor their own top scores, and the others what is left, until none is below."""
    raised: dict[int, Selection] = {}
    free, counts = list(range(len(sizes))), [int(count) for count in selection.counts]
    while below := [i for i, count in zip(free, counts, strict=True) if count < floors[i]]:
        raised |= {i: choose([i], floors[i]) for i in below}
        if raised.keys() >= set(range(len(sizes))):
            free, counts = [], []
            break
        free = [i for i in free if i not in raised]
        left = k - sum(int(one.counts[0]) for one in raised.values())
        selection = choose(free, min(left, sum(sizes[i] for i in free)))
        counts = [int(count) for count in selection.counts]
    if not raised:
        return selection
    return JoinedSelection([*(([i], one) for i, one in raised.items()), *([(free, selection)] if free else [])])
