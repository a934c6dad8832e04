"""Feather (arXiv 2310.02448), rewritten in numpy: dense weights that learn straight through a thresholding operator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from tests.oracles.magnitude import num_kept
from tests.oracles.masks import Array
from tests.oracles.sgd import sgd_step

Variant = Literal[
    "paper",
    "gradient_at_w_only",
    "gradient_through_operator",
    "shrinks_w",
    "decays_w",
    "hard",
    "soft",
    "per_layer",
    "kth_goes",
    "theta_everywhere",
    "theta_nowhere",
    "theta_on_survivors",
    "theta_on_decay",
    "theta_on_any_zero",
    "threshold_of_last_step",
    "sparsity_of_last_step",
]


@dataclass
class State:
    """The dense weights v, the momentum of SGD on them, and one threshold for each array, equal where it is shared."""

    v: list[Array]
    buffers: list[Array | None]
    thresholds: list[float]
    sparsities: list[float] = field(default_factory=list)  # of all steps so far


def start(weights: Sequence[Array], variant: Variant = "paper") -> State:
    """v = a copy of the initial weights; nothing is thresholded."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    return State([w.copy() for w in weights], [None] * len(weights), [0.0] * len(weights))


def shrink(v: Array, threshold: float, power: float) -> Array:
    """0 where |v| <= T, else sign(v) (|v|^p - T^p)^(1/p); p = 1 is soft thresholding, p = inf is hard."""
    shrunk = np.zeros_like(v)
    stays = np.abs(v) > threshold
    kept = v[stays]
    if power == math.inf:
        shrunk[stays] = kept
    else:
        shrunk[stays] = np.sign(kept) * (np.abs(kept) ** power - np.float64(threshold) ** power) ** (1 / power)
    return shrunk


def largest_that_goes(v: Sequence[Array], k: int) -> float:
    """The (k + 1)-th largest |v| of these arrays together; 0 if all of them stay."""
    descending = sorted((abs(x) for array in v for x in array.ravel().tolist()), reverse=True)
    return descending[k] if k < len(descending) else 0.0


def thresholds(v: Sequence[Array], k: int, min_density: float) -> list[float]:
    """One threshold, with which k of all weights stay, but for arrays that would keep less than their floor.

    Not in the paper: such an array of n weights gets a threshold of its own, with which ceil(min_density n) stay. What
    these take of k the others lose, which may bring another one below its floor, and so on.
    """
    floors = [math.ceil(min_density * array.size) for array in v]
    if sum(floors) > k:
        raise ValueError(f"the floors alone keep {sum(floors)}, more than k = {k}")
    at_floor: set[int] = set()
    while True:
        free = [i for i in range(len(v)) if i not in at_floor]
        shared = largest_that_goes([v[i] for i in free], k - sum(floors[i] for i in at_floor))
        below = {i for i in free if np.count_nonzero(np.abs(v[i]) > shared) < floors[i]}
        if not below:
            break
        at_floor |= below
    return [largest_that_goes([v[i]], floors[i]) if i in at_floor else shared for i in range(len(v))]


def step(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    sparsity: float,
    power: float = 3.0,
    theta: float = 1.0,
    min_density: float = 0.0,
    counts: Sequence[int] | None = None,
    variant: Variant = "paper",
) -> None:
    """One step, in place; `grads` are those at the thresholded `weights`, `sparsity` is that of this step.

        g <- theta g                   where w is zero because of a threshold above 0
        v <- SGD(v; g + eta v)         with momentum
        T <- the largest |v| that goes, of the N weights of all arrays, when the floor((1 - s) N) largest stay
        w <- sign(v) (|v|^p - T^p)^(1/p), or 0 where |v| <= T

    With `counts`, how many each array keeps, each has its own T, and neither `sparsity` nor `min_density` matters.

    Every other `variant` is wrong, and is here so that tests can tell it from the paper:
        gradient_at_w_only: the gradients of zeros are dropped; not straight through.
        gradient_through_operator: the gradient is multiplied by the derivative of the operator, (|v| / |w|)^(p - 1).
        shrinks_w: SGD steps from w, so that shrinkage compounds.
        decays_w: weight decay is that of w, so that zeros do not decay.
        hard, soft: p = inf or p = 1 whatever p is.
        per_layer: each array is ranked by itself, at the same sparsity.
        kth_goes: T is the smallest |v| that should stay.
        theta_everywhere: all gradients are multiplied by theta.
        theta_nowhere: none are.
        theta_on_survivors: those of the others are.
        theta_on_decay: the weight decay of zeros is multiplied by theta as well.
        theta_on_any_zero: also the gradients of weights that are zero by themselves, under a threshold of 0.
        threshold_of_last_step: w is v under the threshold that the step before has found.
        sparsity_of_last_step: the ramp is one step late.
    """
    scaled, decay = [], weight_decay
    for w, v, g, threshold in zip(weights, state.v, grads, state.thresholds, strict=True):
        gone = (w == 0) & ((threshold > 0) | (variant == "theta_on_any_zero"))
        d = np.where(gone, theta, 1.0) * g
        if variant == "gradient_at_w_only":
            d = np.where(gone, 0.0, g)
        if variant == "gradient_through_operator":
            d = np.where(gone, 0.0, g * (np.abs(v) / np.where(w == 0, 1.0, np.abs(w))) ** (power - 1))
        if variant == "theta_everywhere":
            d = theta * g
        if variant == "theta_nowhere":
            d = 1.0 * g
        if variant == "theta_on_survivors":
            d = np.where(gone, 1.0, theta) * g
        if variant == "theta_on_decay":
            d = np.where(gone, theta, 1.0) * (g + weight_decay * v)
            decay = 0.0
        if variant == "decays_w":
            d = d + weight_decay * w
            decay = 0.0
        scaled.append(d)
    if variant == "shrinks_w":
        state.v = [w.copy() for w in weights]
    sgd_step(state.v, scaled, state.buffers, lr=lr, momentum=momentum, weight_decay=decay)

    late = state.sparsities[-1] if state.sparsities else 0.0
    state.sparsities.append(sparsity)
    share = late if variant == "sparsity_of_last_step" else sparsity
    k = num_kept(share, sum(v.size for v in state.v))
    before = state.thresholds
    if variant == "per_layer":
        counts = [num_kept(share, v.size) for v in state.v]
    if counts is not None:
        state.thresholds = [largest_that_goes([v], count) for v, count in zip(state.v, counts, strict=True)]
    else:
        state.thresholds = thresholds(state.v, max(k - 1, 0) if variant == "kth_goes" else k, min_density)

    used = before if variant == "threshold_of_last_step" else state.thresholds
    p = {"hard": math.inf, "soft": 1.0}.get(variant, power)
    for w, v, threshold in zip(weights, state.v, used, strict=True):
        w[...] = shrink(v, threshold, p)
