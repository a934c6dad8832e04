"""Where a budget goes: how many weights each layer keeps."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

Allocation: TypeAlias = Literal["global", "uniform", "erk"]  # WHERE the budget goes


def check_allocation(allocation: str) -> None:
    """ValueError unless it is a name that ``top_k`` knows."""
    if allocation not in get_args(Allocation):
        raise ValueError(f"allocation must be one of {', '.join(get_args(Allocation))}, got {allocation!r}")


def allocate(allocation: Literal["uniform", "erk"], shapes: Sequence[Sequence[int]], k: int) -> list[int]:
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
