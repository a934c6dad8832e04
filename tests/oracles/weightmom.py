"""WeightMom (arXiv 2208.05970) as this project reads it, rewritten in numpy.

The paper's formulae are not known to the project; this is the reading of section 4.2 of its fact sheet, labelled so
there. 4.3 lists what a naive version gets wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tests.oracles.masks import Array, Mask
from tests.oracles.sgd import sgd_step

Variant = Literal[
    "reading",
    "gradient_momentum",
    "mean_of_signed",
    "no_bias_correction",
    "half_bias_correction",
    "one_threshold",
    "importance_upside_down",
    "counts_steps",
    "absolute_threshold",
    "zeros_in_mean",
    "no_patience",
    "no_history",
    "counter_never_resets",
    "zeros_move",
]


@dataclass
class State:
    """The running means m of |w|, the counters k, what is live, and the momentum of SGD."""

    m: list[Array]
    count: list[np.ndarray]
    mask: list[Mask]
    buffers: list[Array | None]
    num_steps: int = 0
    updates: int = 0


def start(weights: Sequence[Array], variant: Variant = "reading") -> State:
    """Nothing seen, everything live."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    return State(
        m=[np.zeros_like(w) for w in weights],
        count=[np.zeros(w.shape, dtype=np.int64) for w in weights],
        mask=[np.ones(w.shape, dtype=np.bool_) for w in weights],
        buffers=[None] * len(weights),
    )


def step(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    threshold: float,
    every: int,
    window: int,
    patience: int,
    importance: Literal["sparsity", "none"] = "sparsity",
    variant: Variant = "reading",
) -> None:
    """One step of SGD, and an update after each `every`-th, in place (4.2).

    Pruned weights stay zero. At update e = 1, 2, ..., with beta = 1 - 1/window and theta = `threshold`:

        m <- beta m + (1 - beta) |w|,  m^ = m / (1 - beta^e)
        I_l = D / d_l  with the densities of the network and of the layer     (importance "none": 1)
        tau_l = theta mean_live(m^)_l / I_l
        k <- k + 1 where m^ < tau_l, else 0
        where k >= patience and e >= window: pruned

    Every other `variant` is wrong, and is here so that tests can tell it from the reading:
        gradient_momentum: the optimizer's momentum buffer takes the place of m (4.3, item 1).
        mean_of_signed: m is the mean of w, and |m| is compared (item 2).
        no_bias_correction: m itself for m^. It multiplies both sides of m^ < tau_l by the same number, so that this
            one is no error as long as the threshold is relative (item 3).
        half_bias_correction: m itself is compared with the threshold made of m^ (item 3).
        one_threshold: one mean over all layers, and no importance (item 4).
        importance_upside_down: I_l = d_l / D, so that the sparser layer is pruned first (4.2).
        counts_steps: an update at each step (item 5).
        absolute_threshold: tau_l = theta (item 6).
        zeros_in_mean: the mean is over all weights of the layer, the pruned ones included (item 7).
        no_patience: pruned as soon as m^ < tau_l (4.2).
        no_history: pruned also before `window` updates (4.2).
        counter_never_resets: k counts the updates below the threshold, not those in a row (4.2).
        zeros_move: gradient and weight of what is pruned are not held at zero (4.2).
    """
    masked = [g if variant == "zeros_move" else mask * g for g, mask in zip(grads, state.mask, strict=True)]
    sgd_step(weights, masked, state.buffers, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if variant != "zeros_move":
        _zero(weights, state.mask)
    state.num_steps += 1
    if state.num_steps % every == 0 or variant == "counts_steps":
        _update(weights, state, threshold, window, patience, importance, variant)


def _update(
    weights: list[Array],
    state: State,
    threshold: float,
    window: int,
    patience: int,
    importance: Literal["sparsity", "none"],
    variant: Variant,
) -> None:
    state.updates += 1
    beta = 1 - 1 / window
    correction = 1 - beta**state.updates
    for i, w in enumerate(weights):
        seen = w if variant == "mean_of_signed" else np.abs(w)
        state.m[i] = beta * state.m[i] + (1 - beta) * seen
    corrected = [np.abs(m) / correction for m in state.m]
    if variant == "no_bias_correction":
        corrected = list(state.m)
    if variant == "gradient_momentum":
        corrected = [np.abs(z) for z in state.buffers if z is not None]

    thresholds = _thresholds(corrected, state.mask, threshold, importance, variant)
    for i, m in enumerate(corrected):
        compared = state.m[i] if variant == "half_bias_correction" else m
        is_low = compared < thresholds[i]
        if variant == "counter_never_resets":
            state.count[i] = state.count[i] + is_low
        else:
            state.count[i] = np.where(is_low, state.count[i] + 1, 0)
        is_due = state.count[i] >= (1 if variant == "no_patience" else patience)
        if state.updates >= window or variant == "no_history":
            state.mask[i] = state.mask[i] & ~is_due
    _zero(weights, state.mask)


def _thresholds(
    corrected: Sequence[Array],
    masks: Sequence[Mask],
    threshold: float,
    importance: Literal["sparsity", "none"],
    variant: Variant,
) -> list[float]:
    """tau_l of each layer."""
    if variant == "absolute_threshold":
        return [threshold] * len(masks)
    if variant == "one_threshold":
        live = np.concatenate([m[mask] for m, mask in zip(corrected, masks, strict=True)])
        return [threshold * float(live.mean())] * len(masks)
    network = sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)  # D
    thresholds = []
    for m, mask in zip(corrected, masks, strict=True):
        layer = int(mask.sum()) / mask.size  # d_l
        relative = network / layer if importance == "sparsity" else 1.0  # I_l
        if variant == "importance_upside_down":
            relative = 1 / relative
        if variant == "zeros_in_mean":
            mean = float(np.where(mask, m, 0.0).mean())
        else:
            mean = float(m[mask].mean())
        thresholds.append(threshold * mean / relative)
    return thresholds


def _zero(weights: list[Array], masks: Sequence[Mask]) -> None:
    for w, mask in zip(weights, masks, strict=True):
        w[~mask] = 0
