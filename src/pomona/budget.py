"""HOW MUCH stays, and WHERE: scores to boolean masks, True = kept."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from pomona.schedule import check_value

Allocation: TypeAlias = Literal["global", "uniform", "erk"]  # WHERE the budget goes

_SAMPLE_STRIDE = 101  # prime, so that a sample does not fall on one column of a power-of-two layer


def num_kept(sparsity: float, total: int) -> int:
    """``floor((1 - sparsity) total)``, GSM's Q; 0.9 of 1,000 keeps 100 although 1 - 0.9 < 0.1 in floating point."""
    check_value("sparsity", sparsity, low=0.0, high=1.0)
    return math.floor(round((1.0 - sparsity) * total, 6))


def global_top_k(scores: Sequence[Tensor], k: int, *, min_density: float = 0.0) -> list[Tensor]:
    """Keep **exactly** the ``k`` largest scores of all tensors together.

    Ties are broken by position: the earlier tensor, then the smaller flat index, stays. A score of zero is never
    kept, so that fewer than ``k`` are kept where fewer are non-zero (the GSM authors' ``>= threshold`` keeps
    everything then). The result depends on nothing but the scores.

    Args:
        scores: float32 tensors >= 0 of any shapes, on one device.
        k: how many to keep in all, 0 <= k <= number of scores.
        min_density: the largest ``ceil(min_density n)`` scores of every tensor of ``n`` are kept before the rest
            of ``k`` is dealt out globally, in [0, 1]; any value above 0 keeps every layer alive.

    Returns:
        Boolean masks, one for each tensor of ``scores``, of its shape.

    Raises:
        ValueError: ``k`` out of range, a NaN among the scores, or floors that together exceed ``k``.
    """
    sizes = [score.numel() for score in scores]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must be in [0, {sum(sizes)}], the number of scores, got {k}")
    check_min_density(min_density)
    floors = check_floors(sizes, k, min_density)
    flat = [score.detach().reshape(-1).float() for score in scores]
    masks = _top_k(flat, k)
    if min_density > 0.0:
        masks = _raise_to_floors(flat, masks, floors, k)
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]


def top_k(
    scores: Sequence[Tensor], k: int, allocation: Allocation = "global", *, min_density: float = 0.0
) -> list[Tensor]:
    """Keep the ``k`` largest scores in all, dealt to the layers by ``allocation``.

    Args:
        scores: as of ``global_top_k``.
        k: how many to keep in all.
        allocation: ``"global"``: one ranking over all layers, ``global_top_k``. ``"uniform"``: the same share of every
            layer. ``"erk"``: shares by ``erk``. The last two ignore ``min_density``, for they empty no layer while
            ``k`` suffices.
        min_density: as of ``global_top_k``.

    Returns:
        Boolean masks. Exactly ``k`` are kept, or fewer where scores are zero.
    """
    check_allocation(allocation)
    if allocation == "global":
        return global_top_k(scores, k, min_density=min_density)
    counts = deal(allocation, [score.shape for score in scores], k)
    return [global_top_k([score], count)[0] for score, count in zip(scores, counts, strict=True)]


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


def tell_share(total: int, kept: int, density: float, allocation: Allocation) -> str:
    """One clause for ``Method.why``: how a layer came to keep ``kept`` of ``total`` by an allocation."""
    if kept == 0:
        return f"emptied by allocation={allocation!r}"
    return f"{kept / total / density:.2g}x the network's share, by allocation={allocation!r}"


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


def _raise_to_floors(flat: list[Tensor], masks: list[Tensor], floors: list[int], k: int) -> list[Tensor]:
    """Give layers below their floor their own top scores, and the others what is left, until none is below."""
    counts = [int(mask.sum()) for mask in masks]
    raised = {i for i, count in enumerate(counts) if count < floors[i]}
    while raised:
        free = [i for i in range(len(flat)) if i not in raised]
        for i in raised:
            masks[i] = _top_k([flat[i]], floors[i])[0]
        budget = min(k - sum(int(masks[i].sum()) for i in raised), sum(flat[i].numel() for i in free))
        for i, mask in zip(free, _top_k([flat[i] for i in free], budget), strict=True):
            masks[i] = mask
        below = {i for i in free if int(masks[i].sum()) < floors[i]}
        if not below:
            break
        raised |= below
    return masks


def _top_k(flat: list[Tensor], k: int) -> list[Tensor]:
    """Exactly the k largest of 1-d tensors, ties by position, never a zero."""
    if not flat:
        return []
    joined = torch.cat(flat)
    if joined.numel() and bool(joined.max().isnan()):
        raise ValueError("a score is NaN; check the gradients before selecting")
    threshold = kth_largest(joined, k) if k else math.inf
    kept = joined >= threshold if threshold > 0.0 else joined > 0.0
    if k:
        surplus = int(kept.sum()) - k
        if surplus > 0:
            ties = (joined == threshold).nonzero().view(-1)
            kept[ties[-surplus:]] = False
    else:
        kept.zero_()
    return list(torch.split(kept, [t.numel() for t in flat]))


def kth_largest(joined: Tensor, k: int) -> float:
    """The k-th largest value, 1 <= k <= n, exactly.

    On a CPU a sample first gives a bound that about 2k scores exceed; only those are then partitioned. When the
    sample misleads, that is when fewer than k exceed the bound, everything is.
    """
    n = joined.numel()
    if joined.device.type != "cpu":
        return float(torch.kthvalue(joined, n - k + 1).values)
    values = joined.numpy()
    sample = values[::_SAMPLE_STRIDE]
    rank = 2 * k // _SAMPLE_STRIDE + 16
    if rank < sample.size // 2:
        bound = np.partition(sample, sample.size - rank)[sample.size - rank]
        above = values[values >= bound]
        if above.size >= k:
            values = above
    return float(np.partition(values, values.size - k)[values.size - k])
