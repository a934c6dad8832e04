"""What goes together, from the definitions, group by group: n of every m, blocks, channels."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.oracles.masks import Array, Mask, top_k_mask

Group = list[tuple[int, ...]]  # indices into one array


def groups_of(shape: Sequence[int], granularity: str) -> list[Group]:
    """The groups of an array (outputs, inputs, *kernel), in the order in which ties are broken."""
    if granularity == "channel":
        return [[i for i in np.ndindex(*shape) if i[0] == c] for c in range(shape[0])]
    if granularity == "input channel":
        return [[i for i in np.ndindex(*shape) if i[1] == c] for c in range(shape[1])]
    rows, columns = (1, int(granularity.split(":")[1])) if ":" in granularity else map(int, granularity.split("x"))
    found: dict[tuple[int, ...], Group] = {}
    for i in np.ndindex(*shape):
        found.setdefault((i[0] // rows, i[1] // columns, *i[2:]), []).append(i)
    return [found[place] for place in sorted(found)]


def n_of_m_masks(scores: Sequence[Array], granularity: str, k: int) -> list[Mask]:
    """The n best of every m, and what is left of k to the best of all others."""
    n, m = map(int, granularity.split(":"))
    masks = []
    for score in scores:
        mask = np.zeros(score.shape, dtype=np.bool_)
        for group in groups_of(score.shape, granularity):
            ranked = sorted(group, key=lambda i: (-score[i], group.index(i)))
            for i in ranked[:n]:
                mask[i] = score[i] > 0
        masks.append(mask)
    left = k - sum(score.size // m * n for score in scores)
    others = [np.where(mask, 0, score) for score, mask in zip(scores, masks, strict=True)]
    return [a | b for a, b in zip(masks, top_k_mask(others, left), strict=True)]


def group_masks(scores: Sequence[Array], granularity: str, k: int, min_density: float = 0.0) -> list[Mask]:
    """The groups of the largest mean square, each array's floor first, up to the first that does not fit into k."""
    masks = [np.zeros(score.shape, dtype=np.bool_) for score in scores]
    groups = [groups_of(score.shape, granularity) for score in scores]
    ranked = sorted(
        (-sum((Fraction(float(score[i])) ** 2 for i in group if score[i]), Fraction()) / len(group), a, g)
        for a, score in enumerate(scores)
        for g, group in enumerate(groups[a])
    )
    alive = [(a, g) for score, a, g in ranked if score < 0]
    first = []
    for a in range(len(scores)):
        first += [one for one in alive if one[0] == a][: math.ceil(min_density * len(groups[a]))]
    chosen = set(first)
    for a, g in [*first, *(one for one in alive if one not in chosen)]:
        if len(groups[a][g]) > k:
            break
        k -= len(groups[a][g])
        for i in groups[a][g]:
            masks[a][i] = True
    return masks
