"""HOW MUCH stays, and WHERE: scores to boolean masks, True = kept."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from torch import Size, Tensor

from pomona.granularity import Block, Channel, Granularity, NOfM, check_shapes, parse
from pomona.schedule import check_value
from pomona.score import Score
from pomona.selection import JoinedSelection, Selection, find_shards, select_largest, select_over_ranks
from pomona.selection.groups import block_scores as fold
from pomona.selection.groups import check_fits, top_channels, top_n_of_m
from pomona.selection.groups import expand_blocks as unfold

if TYPE_CHECKING:
    from pomona.method import Weight

Allocation: TypeAlias = Literal["global", "uniform", "erk"]  # WHERE the budget goes


def num_kept(sparsity: float, total: int) -> int:
    """``floor((1 - sparsity) total)``, GSM's Q; 0.9 of 1,000 keeps 100 although 1 - 0.9 < 0.1 in floating point."""
    check_value("sparsity", sparsity, low=0.0, high=1.0)
    return math.floor(round((1.0 - sparsity) * total, 6))


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
            by layer, into each layer's share. n:m: the ``n`` best of every ``m`` stay whatever ``k`` is, and what is
            left of ``k`` goes to the best of all others. So ``k = n N / m`` is n:m itself, and with a larger ``k``
            groups are on their way there, from ``m`` to ``n``.

    Returns:
        Boolean masks. Exactly ``k`` are kept; fewer where scores are zero, or where the next block or channel would
        be too large.
    """
    check_allocation(allocation)
    kind = parse(granularity)
    shapes = _shapes(scores, of)
    names = [f"score {i}" for i in range(len(scores))] if of is None else [w.name for w in of]
    check_shapes(kind, dict(zip(names, shapes, strict=True)))
    if isinstance(kind, NOfM):
        return _n_of_m(scores, k, allocation, kind, of)
    if isinstance(kind, Block):
        folded = [fold(s, kind, None if of is None else of[i]) for i, s in enumerate(scores)]
        ranked, blocks = [score for score, _ in folded], [w for _, w in folded if w is not None]
        masks = top_k(ranked, k // (kind.rows * kind.columns), allocation, of=blocks or None, min_density=min_density)
        return [unfold(mask, kind) for mask in masks]
    if allocation != "global":
        return top_k_each(scores, deal(allocation, shapes, k), of=of, granularity=granularity)
    if isinstance(kind, Channel):
        return top_channels(scores, k, kind, of, _channel_floors(shapes, kind, min_density))
    return global_top_k(scores, k, of=of, min_density=min_density)


def _shapes(scores: Sequence[Score | Tensor], of: Sequence[Weight] | None) -> list[Size]:
    """Of the whole tensors."""
    return [score.shape for score in scores] if of is None else [w.shape for w in of]


def _n_of_m(
    scores: Sequence[Score | Tensor], k: int, allocation: Allocation, kind: NOfM, of: Sequence[Weight] | None
) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in _shapes(scores, of)]
    left = k - sum(sizes) // kind.m * kind.n
    if left < 0:
        raise ValueError(f"k must be >= {k - left}, which granularity='{kind}' keeps of {sum(sizes)} scores, got {k}")
    asked = [score if isinstance(score, Score) else Score(score) for score in scores]
    masks = [top_n_of_m(score.tensor(), kind) for score in asked]
    if left == 0:
        return masks
    others = [score.tensor().masked_fill_(mask, 0.0) for score, mask in zip(asked, masks, strict=True)]
    if allocation == "global":
        more = global_top_k(others, left, of=of)
    else:
        shares = deal(allocation, [(size // kind.m, kind.m - kind.n) for size in sizes], left)
        more = top_k_each(others, shares, of=of)
    return [mask.logical_or_(one) for mask, one in zip(masks, more, strict=True)]


def top_k_each(
    scores: Sequence[Score | Tensor],
    counts: Sequence[int],
    *,
    of: Sequence[Weight] | None = None,
    granularity: Granularity = "weight",
) -> list[Tensor]:
    """Of each tensor keep as many of the largest scores as its count says, in groups of ``granularity``."""
    alone = [None] * len(scores) if of is None else [[w] for w in of]
    places = zip(scores, counts, alone, strict=True)
    return [top_k([s], count, of=w, granularity=granularity)[0] for s, count, w in places]


def check_allocation(allocation: str) -> None:
    """ValueError unless it is a name that ``top_k`` knows."""
    if allocation not in get_args(Allocation):
        raise ValueError(f"allocation must be one of {', '.join(get_args(Allocation))}, got {allocation!r}")


def deal(allocation: Literal["uniform", "erk"], shapes: Sequence[Sequence[int]], k: int) -> list[int]:
    """How many of ``k`` each layer of these shapes keeps: its share by the allocation, rounded.

    First one for each layer, so that none is empty if ``k`` suffices; the rest rounded to the nearest with a common
    factor, as seats of a parliament are by Webster's method. The counts add up to ``k`` exactly, and with a smaller
    ``k`` no layer keeps more, which largest remainders do not ensure.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must be in [0, {sum(sizes)}], the number of weights, got {k}")
    rates = [_erk_rate(shape) for shape in shapes] if allocation == "erk" else sizes
    # Rounding adds at most 1 to each of n shares: what k - n gives is a lower bound, and few more are to be dealt.
    counts = [math.floor(share) for share in _shares(rates, sizes, max(k - len(sizes), 0))]

    def turn(i: int) -> tuple[float, int]:
        return (2 * counts[i] + 1) / rates[i] if counts[i] else 0.0, i

    turns = [turn(i) for i in range(len(sizes)) if counts[i] < sizes[i]]
    heapq.heapify(turns)
    for _ in range(k - sum(counts)):
        _, i = heapq.heappop(turns)
        counts[i] += 1
        if counts[i] < sizes[i]:
            heapq.heappush(turns, turn(i))
    return counts


def erk(shapes: Sequence[Sequence[int]], k: int) -> list[float]:
    r"""Densities of layers by the Erdos-Renyi kernel rule (RigL, arXiv 1911.11134, section 3; SET for dense layers).

    A layer of shape :math:`(n_1, n_2, \dots)` gets the density
    :math:`\epsilon \, (n_1 + n_2 + \dots) / (n_1 n_2 \cdots)`, so that small layers stay denser than large ones.
    Layers for which that exceeds 1 are kept whole, and :math:`\epsilon` is solved anew for the others until all
    together keep ``k`` weights.
    """
    sizes = [math.prod(shape) for shape in shapes]
    shares = _shares([_erk_rate(shape) for shape in shapes], sizes, k)
    return [share / size if size else 1.0 for share, size in zip(shares, sizes, strict=True)]


def _erk_rate(shape: Sequence[int]) -> int:
    return sum(shape) or 1  # of a scalar, whose shape is empty


def _shares(rates: Sequence[int], sizes: Sequence[int], k: int) -> list[float]:
    """``min(size, epsilon rate)`` of each layer, with the ``epsilon`` for which they add up to ``k``."""
    shares = [float(size) for size in sizes]
    free = {i for i, size in enumerate(sizes) if size}
    while free:
        epsilon = k / sum(rates[i] for i in free)
        whole = {i for i in free if epsilon * rates[i] > sizes[i]}
        if not whole:
            for i in free:
                shares[i] = epsilon * rates[i]
            break
        free -= whole
        k -= sum(sizes[i] for i in whole)
    return shares


def tell_share(
    total: int, kept: int, density: float, allocation: Allocation, granularity: Granularity = "weight"
) -> str:
    """One clause for ``Method.why``: how a layer came to keep ``kept`` of ``total`` by an allocation."""
    if granularity_decides(total, kept, granularity):
        return f"{granularity}, as every layer"
    if kept == 0:
        return f"emptied by allocation={allocation!r}"
    return f"{kept / total / density:.2g}x the network's share, by allocation={allocation!r}"


def check_budget(
    weights: Sequence[Weight],
    k: int,
    allocation: Allocation,
    *,
    min_density: float = 0.0,
    granularity: Granularity = "weight",
) -> None:
    """ValueError unless the weights fall into groups of ``granularity`` and ``k`` is enough for the layers' floors.

    All ranks must call it where weights are sharded.
    """
    check_fits(weights, granularity)
    kind = parse(granularity)
    shapes = [w.shape for w in weights]
    if allocation == "global" and not isinstance(kind, Channel):
        sizes = [w.numel // kind.size(w.shape) for w in weights]
        check_floors(sizes, k // kind.size(shapes[0]), min_density)
    if not isinstance(kind, Channel):
        return
    if allocation == "global":
        floors = _channel_floors(shapes, kind, min_density)
        needed = sum(floor * kind.size(shape) for floor, shape in zip(floors, shapes, strict=True))
        if needed > k:
            raise ValueError(
                f"min_density={min_density:g} alone keeps {sum(floors)} {kind}s of {needed} weights, more than the "
                f"budget of {k}; lower min_density or the sparsity"
            )
        return
    for w, share in zip(weights, deal(allocation, shapes, k), strict=True):
        if share < kind.size(w.shape):
            raise ValueError(
                f"allocation={allocation!r} leaves {w.name} {tuple(w.shape)} {share} weights, and a {kind} of it has "
                f"{kind.size(w.shape)}; lower the sparsity, take allocation='global', or leave the layer dense: "
                f"Scope(exclude=[{w.name!r}])"
            )


def _channel_floors(shapes: Sequence[Sequence[int]], kind: Channel, min_density: float) -> list[int]:
    return [math.ceil(round(min_density * shape[kind.dim], 6)) for shape in shapes]


def granularity_decides(total: int, kept: int, granularity: Granularity) -> bool:
    """Whether a layer keeps what n:m leaves every layer."""
    kind = parse(granularity)
    return isinstance(kind, NOfM) and kept * kind.m == total * kind.n


def check_min_density(min_density: float) -> None:
    """Refuse what is no number in [0, 1]."""
    if isinstance(min_density, bool) or not isinstance(min_density, (int, float)):
        raise TypeError(f"min_density must be a number, got {min_density!r}")
    if not 0.0 <= min_density <= 1.0:
        raise ValueError(f"min_density must be in [0, 1], got {min_density}")


def check_floors(sizes: Sequence[int], k: int, min_density: float) -> list[int]:
    """The floor of each tensor; ValueError if together they exceed ``k``."""
    floors = [math.ceil(round(min_density * size, 6)) for size in sizes]
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
