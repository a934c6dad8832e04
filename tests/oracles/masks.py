"""Which entries stay: the k largest of many arrays, found by sorting them all. Shared by the papers' files."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Position = tuple[int, int]  # (which array, which entry in C order)


def _ranked(scores: Sequence[Array]) -> list[Position]:
    """Positions of all non-zero scores, largest score first, equal scores by position."""
    entries: list[tuple[float, Position]] = []
    for i, score in enumerate(scores):
        for j, value in enumerate(np.ravel(score).tolist()):
            if not value >= 0:
                raise ValueError(f"scores must be >= 0, got {value} at array {i}, entry {j}")
            if value > 0:
                entries.append((-value, (i, j)))
    return [position for _, position in sorted(entries)]


def _masks_at(positions: Collection[Position], like: Sequence[Array]) -> list[Mask]:
    masks = [np.zeros(np.size(array), dtype=np.bool_) for array in like]
    for i, j in positions:
        masks[i][j] = True
    return [mask.reshape(np.shape(array)) for mask, array in zip(masks, like, strict=True)]


def top_k_mask(scores: Sequence[Array], k: int) -> list[Mask]:
    """True at the k largest scores over all arrays together: the mask B of section 1.1, one global threshold.

    Two departures from "T >= threshold" of the paper, both on purpose. Ties are broken by position (array
    order, then C order), so that the count is exact. A score of zero is never selected (1.6, item 7), so
    fewer than k are kept where fewer than k scores are non-zero.
    """
    return _masks_at(_ranked(scores)[:k], scores)


def top_k_mask_with_floor(scores: Sequence[Array], k: int, min_density: float) -> list[Mask]:
    """As `top_k_mask`, but each array first keeps ceil(min_density * size) of its own largest scores.

    Not in the paper. The rest of the budget goes to the largest of all other scores, so the total is still k.
    An array with fewer non-zero scores than its floor keeps those, and what it leaves goes to the rest.
    """
    ranked = _ranked(scores)
    kept: set[Position] = set()
    for i, score in enumerate(scores):
        floor = math.ceil(min_density * np.size(score))
        own = [position for position in ranked if position[0] == i]
        kept.update(own[:floor])
    if len(kept) > k:
        raise ValueError(f"the floors alone keep {len(kept)}, more than k = {k}")
    for position in ranked:
        if len(kept) == k:
            break
        kept.add(position)
    return _masks_at(kept, scores)
