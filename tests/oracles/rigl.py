"""RigL (arXiv 1911.11134) and SET (arXiv 1707.04780), rewritten in numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from tests.oracles.masks import Array, Mask
from tests.oracles.sgd import sgd_step

Variant = Literal[
    "paper",
    "constant_drop",
    "drops_share_of_layer",
    "drops_over_layers",
    "drops_largest",
    "drops_smallest_gradient",
    "grows_smallest_gradient",
    "grows_by_masked_gradient",
    "grows_only_old_zeros",
    "regrown_start_at_zero",
    "regrown_lose_momentum",
    "grown_keep_momentum",
    "zeros_move",
    "goes_on_after_end",
    "skips_optimizer",
]


@dataclass
class State:
    """What is active, and the momentum of SGD."""

    mask: list[Mask]
    buffers: list[Array | None]
    num_steps: int = 0
    dropped: list[Mask] = field(default_factory=list)  # at the last update
    grown: list[Mask] = field(default_factory=list)  # likewise; what is in both was dropped and grown at once


def start(mask: Sequence[Mask], variant: Variant = "paper") -> State:
    """The random mask is drawn by the library: no oracle can draw the same."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    return State([m.copy() for m in mask], [None] * len(mask))


def erdos_renyi(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[float]:
    """Densities of layers, their mean over all weights being 1 - sparsity (RigL, section 3, "Sparsity distribution").

    A dense layer of n_in inputs and n_out outputs has the density eps (n_in + n_out) / (n_in n_out), a convolution
    eps (n_in + n_out + width + height) / (n_in n_out width height). A layer that would have more than 1 has 1, and
    eps is found anew for the others.
    """
    whole: set[int] = set()
    while True:
        budget, per_eps = (1 - sparsity) * sum(math.prod(shape) for shape in shapes), 0
        for i, shape in enumerate(shapes):
            if i in whole:
                budget -= math.prod(shape)
            else:
                per_eps += sum(shape)
        densities = [
            1.0 if i in whole else budget / per_eps * sum(shape) / math.prod(shape) for i, shape in enumerate(shapes)
        ]
        if max(densities) <= 1.0:
            return densities
        whole.add(densities.index(max(densities)))


def drop_share(step: int, *, drop: float, end: int | None) -> float:
    """f = drop/2 (1 + cos(pi t / T_end)) (RigL, section 3, "Update schedule"); constant without an end."""
    if end is None:
        return drop
    return drop / 2 * (1 + math.cos(math.pi * step / end))


def smallest(scores: Array, among: Mask, count: int) -> Mask:
    """True at the `count` smallest scores where `among` is True, ties by position; zeros count like any number."""
    entries = sorted((score, j) for j, (score, m) in enumerate(zip(scores.flat, among.flat, strict=True)) if m)
    chosen = np.zeros(scores.size, dtype=np.bool_)
    chosen[[j for _, j in entries[:count]]] = True
    return chosen.reshape(scores.shape)


def step(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    every: int,
    end: int | None,
    drop: float,
    given: Sequence[Mask] | None = None,
    variant: Variant = "paper",
) -> None:
    """One step, in place: at steps every, 2 every, ... up to `end` the masks change first, then SGD moves the active.

        step 1: weights outside the mask become zero
        drop: of each layer's active weights the share f with the smallest |w|, floor(f n) of n
        grow: as many, where the dense gradient |g| is largest among all that did not remain, just dropped ones too
        grown weights that were not active start at zero, without momentum; what is dropped and grown at once goes on
        SGD with the gradient inside the mask; outside everything is zero

    `given` are the masks after this step for SET, which grows at random: what must hold for them whatever was drawn is
    asserted here, and their values follow; and f = drop at every update, SET's constant zeta. (RigL's authors let the
    update of the masks take the place of a step of SGD; the library makes both.)

    Every other `variant` is wrong, and is here so that tests can tell it from the papers:
        constant_drop: f = drop, without the cosine.
        drops_share_of_layer: the share is one of all weights of the layer, not of the active ones.
        drops_over_layers: the smallest |w| of all layers together go.
        drops_largest: the largest |w| go.
        drops_smallest_gradient: active weights with the smallest |g| go.
        grows_smallest_gradient: grown where |g| is smallest.
        grows_by_masked_gradient: |g| is zero outside the old mask.
        grows_only_old_zeros: what was just dropped cannot be grown.
        regrown_start_at_zero, regrown_lose_momentum: one dropped and grown at once starts as a grown one does.
        grown_keep_momentum: the momentum of grown weights is not cleared.
        zeros_move: the weights outside the mask are not held at zero.
        goes_on_after_end: masks change after `end` too, by the share that the cosine has there.
        skips_optimizer: no step of SGD where the masks change (this is what the authors' code does).
    """
    state.num_steps += 1
    if state.num_steps == 1:
        _zero(weights, state.mask)
    is_over = end is not None and state.num_steps > end and variant != "goes_on_after_end"
    is_update = state.num_steps % every == 0 and not is_over
    if is_update:
        is_constant = given is not None or variant == "constant_drop"
        share = drop if is_constant else drop_share(state.num_steps, drop=drop, end=end)
        _update_masks(weights, grads, state, share, given, variant)
        if variant == "skips_optimizer":
            return
    masked = [mask * g for mask, g in zip(state.mask, grads, strict=True)]
    sgd_step(weights, masked, state.buffers, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if variant != "zeros_move":
        _zero(weights, state.mask)


def _update_masks(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    share: float,
    given: Sequence[Mask] | None,
    variant: Variant,
) -> None:
    state.dropped = [_drop(w, g, mask, share, variant) for w, g, mask in zip(weights, grads, state.mask, strict=True)]
    if variant == "drops_over_layers":
        state.dropped = _drop_over_layers(weights, state.mask, share)
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        old, dropped = state.mask[i], state.dropped[i]
        remaining = old & ~dropped
        count = int(dropped.sum())
        if given is None:
            grown = _grow(g, old, dropped, count, variant)
        else:
            assert (given[i] & remaining).sum() == remaining.sum(), "a weight was dropped that is not the smallest"
            grown = given[i] & ~remaining
            assert grown.sum() == count, f"{count} weights were dropped, and {grown.sum()} grown"
        new = remaining | grown
        fresh = new & ~old
        w[~new] = 0
        w[fresh] = 0
        buffer = state.buffers[i]
        if buffer is not None and variant != "grown_keep_momentum":
            buffer[fresh] = 0
        if variant == "regrown_start_at_zero":
            w[grown] = 0
        if buffer is not None and variant == "regrown_lose_momentum":
            buffer[grown] = 0
        state.mask[i] = new
        if len(state.grown) < len(weights):
            state.grown.append(grown)
        else:
            state.grown[i] = grown


def _drop(w: Array, g: Array, active: Mask, share: float, variant: Variant) -> Mask:
    count = math.floor(share * (active.size if variant == "drops_share_of_layer" else int(active.sum())) + 1e-6)
    score = np.abs(w)
    if variant == "drops_largest":
        score = -score
    if variant == "drops_smallest_gradient":
        score = np.abs(g)
    return smallest(score, active, min(count, int(active.sum())))


def _drop_over_layers(weights: Sequence[Array], masks: Sequence[Mask], share: float) -> list[Mask]:
    joined = np.concatenate([np.abs(w).ravel() for w in weights])
    active = np.concatenate([mask.ravel() for mask in masks])
    dropped = smallest(joined, active, math.floor(share * active.sum() + 1e-6))
    parts = np.split(dropped, np.cumsum([w.size for w in weights])[:-1])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


def _grow(g: Array, old: Mask, dropped: Mask, count: int, variant: Variant) -> Mask:
    candidates = ~old if variant == "grows_only_old_zeros" else ~(old & ~dropped)
    gradient = old * g if variant == "grows_by_masked_gradient" else g
    score = np.abs(gradient) if variant == "grows_smallest_gradient" else -np.abs(gradient)
    return smallest(score, candidates, min(count, int(candidates.sum())))


def _zero(weights: list[Array], masks: Sequence[Mask]) -> None:
    for w, mask in zip(weights, masks, strict=True):
        w[~mask] = 0
