"""HOW MUCH stays, and WHERE: scores to boolean masks, True = kept."""

from __future__ import annotations

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
    if not 0.0 <= min_density <= 1.0:
        raise ValueError(f"min_density must be in [0, 1], got {min_density}")
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
            layer. ``"erk"``: shares by ``erk``. The last two ignore ``min_density``, for no layer is empty by them.
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
    """How many of ``k`` each layer of these shapes may keep; they add up to ``k`` exactly."""
    sizes = [math.prod(shape) for shape in shapes]
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"k must be in [0, {sum(sizes)}], the number of weights, got {k}")
    densities = erk(shapes, k) if allocation == "erk" else [k / sum(sizes)] * len(sizes)
    shares = [density * size for density, size in zip(densities, sizes, strict=True)]
    counts = [math.floor(round(share, 6)) for share in shares]
    left = k - sum(counts)
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], i))
    while left > 0:  # a second round only where the first layers are full
        for i in by_remainder:
            if left and counts[i] < sizes[i]:
                counts[i] += 1
                left -= 1
    return counts


def erk(shapes: Sequence[Sequence[int]], k: int) -> list[float]:
    r"""Densities of layers by the Erdos-Renyi kernel rule (RigL, arXiv 1911.11134, section 3; SET for dense layers).

    A layer of shape :math:`(n_1, n_2, \dots)` gets the density
    :math:`\epsilon \, (n_1 + n_2 + \dots) / (n_1 n_2 \cdots)`, so that small layers stay denser than large ones.
    Layers for which that exceeds 1 are kept whole, and :math:`\epsilon` is solved anew for the others until all
    together keep ``k`` weights.
    """
    sizes = [math.prod(shape) for shape in shapes]
    whole: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in whole]
        if not free:
            return [1.0] * len(shapes)
        epsilon = (k - sum(sizes[i] for i in whole)) / sum(sum(shapes[i]) for i in free)
        densities = {i: epsilon * sum(shapes[i]) / sizes[i] for i in free}
        densest = max(densities.values())
        if densest <= 1.0:
            return [1.0 if i in whole else densities[i] for i in range(len(shapes))]
        whole |= {i for i in free if densities[i] == densest}


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
    threshold = _kth_largest(joined, k) if k else math.inf
    kept = joined >= threshold if threshold > 0.0 else joined > 0.0
    if k:
        surplus = int(kept.sum()) - k
        if surplus > 0:
            ties = (joined == threshold).nonzero().view(-1)
            kept[ties[-surplus:]] = False
    else:
        kept.zero_()
    return list(torch.split(kept, [t.numel() for t in flat]))


def _kth_largest(joined: Tensor, k: int) -> float:
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
