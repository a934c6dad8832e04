"""(Progressive) ADMM weight pruning (arXiv 1810.07378), rewritten in numpy.

Section numbers refer to the project's fact sheet: 3.1 the algorithm, 3.4 how the official code behaves, 3.5 errors in
public re-implementations, 3.6 what a naive version gets wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from tests.oracles.masks import Array, Mask, top_k_mask
from tests.oracles.sgd import sgd_step

Variant = Literal[
    "paper",
    "sqrt_norm",
    "unsquared_norm",
    "z_starts_as_w",
    "z_is_w",
    "start_edits_w",
    "u_attached",
    "u_starts_stepped",
    "penalty_beside_lr",
    "penalty_minus_u",
    "u_descends",
    "z_ignores_u",
    "z_keeps_ties",
    "rates_compound",
    "pulls_finished_layers",
    "no_decay",
    "momentum_restarts",
]
CutVariant = Literal["paper", "keeps_ties", "drops_ties", "support_of_z"]
RetrainVariant = Literal["paper", "stale_momentum", "freezes_ties"]


@dataclass
class State:
    """Z and U, the momentum of SGD, which weights may move, and how far the run is."""

    z: list[Array]
    u: list[Array]
    buffers: list[Array | None]
    alive: list[Mask]
    counts: list[int]  # l_i
    num_steps: int = 0
    num_dual_updates: int = 0
    pulls: list[Array] = field(default_factory=list)  # the penalty's gradients in the last step


def start(
    weights: list[Array], counts: Sequence[int], *, hold_zeros: bool = False, variant: Variant = "paper"
) -> State:
    """Z = P(W), a new array, and U = 0 (3.4); with `hold_zeros` weights that are zero now stay so (3.1, "masked")."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    alive = [w != 0 if hold_zeros else np.ones(w.shape, dtype=np.bool_) for w in weights]
    counts = list(counts)
    if variant == "rates_compound":
        counts = [k * np.count_nonzero(w) // w.size for k, w in zip(counts, weights, strict=True)]
    if variant == "z_starts_as_w":
        z = [w.copy() for w in weights]
    elif variant == "z_is_w":
        z = list(weights)  # the arrays themselves, which the steps edit
    else:
        z = project(weights, counts, variant)
    if variant == "start_edits_w":
        for w, projected in zip(weights, z, strict=True):
            w[...] = projected
    u = [np.zeros_like(w) for w in weights]
    if variant == "u_starts_stepped":
        u = [w - projected for w, projected in zip(weights, z, strict=True)]
    return State(z=z, u=u, buffers=[None] * len(weights), alive=alive, counts=counts)


def project(values: Sequence[Array], counts: Sequence[int], variant: Variant = "paper") -> list[Array]:
    """P: of each array by itself the l largest magnitudes stay, by index, and the rest is zero (3.1; 3.6, item 8)."""
    projected = []
    for value, count in zip(values, counts, strict=True):
        mask = top_k_mask([np.abs(value)], count)[0]
        if variant == "z_keeps_ties":
            mask = _at_least(np.abs(value), count)
        projected.append(np.where(mask, value, 0.0).astype(value.dtype))
    return projected


def _at_least(magnitudes: Array, count: int) -> Mask:
    """True where the magnitude is not below the count-th largest, ties and zeros included."""
    threshold = np.sort(magnitudes, axis=None)[::-1][count - 1]
    mask: Mask = magnitudes >= threshold
    return mask


def step(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    rho: float,
    every: int,
    variant: Variant = "paper",
) -> None:
    """One step of ADMM by SGD, in place (3.1); an ADMM iteration is `every` of them.

        before steps 1 + every, 1 + 2 every, ...:  Z <- P(W + U),  U <- U + W - Z
        g <- g + rho (W - Z + U),  which is the gradient of rho/2 |W - Z + U|^2
        a step of SGD with weight decay

    A layer that has nothing to prune in this round, no more than l weights being free to move, has rho = 0 (3.1).

    Every other `variant` is wrong, and is here so that tests can tell it from the paper:
        sqrt_norm: the gradient of rho/2 sqrt(|W - Z + U|) (3.5).
        unsquared_norm: the gradient of rho/2 |W - Z + U| (3.5).
        z_starts_as_w: Z = W at the start, not P(W) (3.5).
        z_is_w: Z is the array W itself until the first update of Z (3.5).
        start_edits_w: the projection at the start zeroes the weights themselves (3.5).
        u_attached: U is part of the graph of W, so after k updates of U the gradient is 1 + k times as large (3.5).
        u_starts_stepped: U = W - Z at the start, not 0 (3.4).
        penalty_beside_lr: W <- W - rho (W - Z + U) beside the step, without learning rate and momentum (3.5).
        penalty_minus_u: the gradient is rho (W - Z - U) (3.6, item 2).
        u_descends: U <- U - (W - Z) (3.6, item 2).
        z_ignores_u: Z <- P(W) (3.6, item 2).
        z_keeps_ties: Z keeps all that is not below the l-th largest (3.5; 3.6, item 8).
        rates_compound: l is a share of the weights that are not zero at the start (3.6, item 7).
        pulls_finished_layers: rho also for a layer that has nothing to prune (3.1).
        no_decay: no weight decay in ADMM (3.6, item 6).
        momentum_restarts: empty momentum buffers at each ADMM iteration (3.6, item 5).
    """
    if state.num_steps > 0 and state.num_steps % every == 0:
        _update_z_and_u(weights, state, variant)
    state.num_steps += 1

    state.pulls = []
    for w, z, u, alive, count in zip(weights, state.z, state.u, state.alive, state.counts, strict=True):
        is_finished = alive.sum() <= count and variant != "pulls_finished_layers"
        state.pulls.append(np.zeros_like(w) if is_finished else _pull(w, z, u, rho, state, variant))
    total = []
    for w, g, pull, alive in zip(weights, grads, state.pulls, state.alive, strict=True):
        if variant == "penalty_beside_lr":
            w -= alive * pull
            total.append(alive * g)
        else:
            total.append(alive * (g + pull))
    decay = 0.0 if variant == "no_decay" else weight_decay
    sgd_step(weights, total, state.buffers, lr=lr, momentum=momentum, weight_decay=decay)


def _update_z_and_u(weights: Sequence[Array], state: State, variant: Variant) -> None:
    sums = [w if variant == "z_ignores_u" else w + u for w, u in zip(weights, state.u, strict=True)]
    state.z = project(sums, state.counts, variant)
    for i, (w, z) in enumerate(zip(weights, state.z, strict=True)):
        state.u[i] = state.u[i] - (w - z) if variant == "u_descends" else state.u[i] + w - z
    state.num_dual_updates += 1
    if variant == "momentum_restarts":
        state.buffers = [None] * len(weights)


def _pull(w: Array, z: Array, u: Array, rho: float, state: State, variant: Variant) -> Array:
    """The penalty's gradient, rho (W - Z + U)."""
    difference = w - z - u if variant == "penalty_minus_u" else w - z + u
    norm = float(np.linalg.norm(difference))
    if variant == "unsquared_norm":
        return 0.5 * rho * difference / norm
    if variant == "sqrt_norm":
        return 0.25 * rho * difference / norm**1.5
    if variant == "u_attached":
        return rho * difference * (1 + state.num_dual_updates)
    pull: Array = rho * difference
    return pull


def cut(
    weights: list[Array], counts: Sequence[int], *, z: Sequence[Array] = (), variant: CutVariant = "paper"
) -> list[Mask]:
    """After ADMM the l largest |W| of each array stay, the rest is zeroed, in place (3.1). Returns what stayed.

    Wrong variants:
        keeps_ties: |W| >= the l-th largest stays (3.6, item 8).
        drops_ties: |W| > the largest that does not stay (3.5).
        support_of_z: what is not zero in Z stays (3.6, item 3).
    """
    magnitudes = [np.abs(w) for w in weights]
    masks = [top_k_mask([m], k)[0] for m, k in zip(magnitudes, counts, strict=True)]
    if variant == "keeps_ties":
        masks = [_at_least(m, k) for m, k in zip(magnitudes, counts, strict=True)]
    if variant == "drops_ties":
        masks = [m > np.sort(m, axis=None)[::-1][k] for m, k in zip(magnitudes, counts, strict=True)]
    if variant == "support_of_z":
        masks = [array != 0 for array in z]
    for w, mask in zip(weights, masks, strict=True):
        w[~mask] = 0
    return masks


def retrain_step(
    weights: list[Array],
    grads: Sequence[Array],
    buffers: list[Array | None],
    masks: Sequence[Mask],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    variant: RetrainVariant = "paper",
) -> None:
    """One step of masked retraining, in place: the plain loss, and what was cut stays zero (3.1).

    Wrong variants:
        stale_momentum: only the gradients are masked, so momentum from before the cut moves zeros (3.6, item 4).
        freezes_ties: a weight as small as the smallest that stayed is kept, but not trained (3.5).
    """
    trained = list(masks)
    if variant == "freezes_ties":
        smallest = [np.abs(w[mask]).min() for w, mask in zip(weights, masks, strict=True)]
        trained = [np.abs(w) > s for w, s in zip(weights, smallest, strict=True)]
    frozen = [w[mask & ~train].copy() for w, mask, train in zip(weights, masks, trained, strict=True)]
    masked = [mask * g for mask, g in zip(trained, grads, strict=True)]
    sgd_step(weights, masked, buffers, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if variant == "stale_momentum":
        return
    for w, mask, train, values in zip(weights, masks, trained, frozen, strict=True):
        w[~mask] = 0
        w[mask & ~train] = values


def sparsest_minimum(curvature: Array, minimum: Array, k: int) -> tuple[int, ...]:
    """Of all supports of size k that of the least 1/2 (w - m)^T H (w - m), by trying them all: best-k selection."""
    from itertools import combinations

    best, best_loss = (), math.inf
    for support in combinations(range(len(minimum)), k):
        inside = list(support)
        # H restricted to the support is solved for the weights there; those outside are zero.
        w = np.zeros_like(minimum)
        w[inside] = np.linalg.solve(curvature[np.ix_(inside, inside)], (curvature @ minimum)[inside])
        loss = float(0.5 * (w - minimum) @ curvature @ (w - minimum))
        if loss < best_loss:
            best, best_loss = support, loss
    return best
