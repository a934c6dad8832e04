"""gRDA, directional pruning (arXiv 2006.09358), rewritten in numpy.

Section numbers refer to the project's fact sheet: 2.1 the algorithm, 2.5 the official code, 2.6 what a naive version
gets wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from tests.oracles.masks import Array

Variant = Literal[
    "paper",
    "thresholds_weights",
    "thresholds_weights_by_increments",
    "threshold_times_lr",
    "threshold_of_current_lr",
    "counts_epochs",
    "restarts_count",
    "zero_start",
    "noise_start",
    "float16_accumulator",
    "bfloat16_accumulator",
    "gradient_momentum",
    "decay_in_accumulator",
]


@dataclass
class State:
    """The dual accumulators v, the step counter n and the threshold tau, which all arrays share."""

    v: list[Array]
    n: int = 0
    threshold: float = 0.0
    lrs: list[float] = field(default_factory=list)  # of all steps so far
    buffers: list[Array] = field(default_factory=list)  # only of the wrong variant with momentum


def start(weights: Sequence[Array], variant: Variant = "paper") -> State:
    """v = a copy of the initial weights, tau = 0 (2.1)."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    if variant == "zero_start":
        return State([np.zeros_like(w) for w in weights])
    if variant == "noise_start":
        rng = np.random.default_rng(0)
        return State([rng.uniform(-0.1, 0.1, w.shape).astype(w.dtype) for w in weights])
    return State([w.copy() for w in weights])


def soft_threshold(v: Array, threshold: float) -> Array:
    """sign(v) max(|v| - threshold, 0)."""
    shrunk: Array = np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0)
    return shrunk


def increment(lr: float, n: int, *, c: float, mu: float) -> float:
    """What step n adds to the threshold: c lr^(mu + 1/2) (n^mu - (n - 1)^mu) (2.1)."""
    return float(c * lr ** (mu + 0.5) * (n**mu - (n - 1) ** mu))


def closed_form(lr: float, n: int, *, c: float, mu: float) -> float:
    """The threshold after n steps of a constant learning rate: c lr^(1/2) (n lr)^mu (2.1)."""
    return float(c * lr**0.5 * (n * lr) ** mu)


def bfloat16(x: Array) -> Array:
    """Rounded to bfloat16 (8 significant bits, ties to even), in the dtype of x."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    low: Array = rounded.astype(np.uint32).view(np.float32).astype(x.dtype)
    return low


def step(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    *,
    lr: float,
    c: float,
    mu: float,
    variant: Variant = "paper",
    steps_per_epoch: int = 4,
) -> None:
    """One step of gRDA, in place (2.1).

        n <- n + 1
        v <- v - lr g
        tau <- tau + c lr^(mu + 1/2) (n^mu - (n - 1)^mu)
        w <- sign(v) max(|v| - tau, 0)

    Every other `variant` is wrong, and is here so that tests can tell it from the paper:
        thresholds_weights: w <- S(w - lr g, tau): shrinkage compounds (2.6, item 1).
        thresholds_weights_by_increments: w <- S(w - lr g, what tau grew by): proximal SGD. The same as the paper for a
            weight that never was zero, but a zero weight forgets its gradients (2.6, item 1).
        threshold_times_lr: w <- S(v, lr tau) (2.6, item 2).
        threshold_of_current_lr: tau = c lr^(1/2) (n lr)^mu with today's lr for all of the past (2.5, 2.6, item 2).
        counts_epochs: n counts epochs of `steps_per_epoch` steps (2.6, item 2).
        restarts_count: n starts again when the learning rate changes (2.1).
        zero_start, noise_start: v starts at 0, or uniform in (-0.1, 0.1), instead of at the weights (2.5).
        float16_accumulator, bfloat16_accumulator: v is kept in that precision (2.6, item 4).
        gradient_momentum: a momentum buffer of 0.9 before v (2.6, item 3).
        decay_in_accumulator: weight decay of 0.1 before v (2.6, item 3).
    """
    if variant == "restarts_count" and state.lrs and lr != state.lrs[-1]:
        state.n = 0
    state.n += 1
    state.lrs.append(lr)
    grown = increment(lr, state.n, c=c, mu=mu)
    if variant == "counts_epochs":
        epoch_begins = (state.n - 1) % steps_per_epoch == 0
        grown = increment(lr, (state.n - 1) // steps_per_epoch + 1, c=c, mu=mu) if epoch_begins else 0.0
    state.threshold += grown
    if variant == "threshold_of_current_lr":
        state.threshold = closed_form(lr, state.n, c=c, mu=mu)

    if not state.buffers:
        state.buffers = [np.zeros_like(w) for w in weights]
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        d = g
        if variant == "decay_in_accumulator":
            d = g + 0.1 * w
        if variant == "gradient_momentum":
            state.buffers[i] = d = 0.9 * state.buffers[i] + g

        if variant == "thresholds_weights":
            w[...] = soft_threshold(w - lr * d, state.threshold)
            continue
        if variant == "thresholds_weights_by_increments":
            w[...] = soft_threshold(w - lr * d, grown)
            continue

        v = state.v[i] - lr * d
        if variant == "float16_accumulator":
            v = v.astype(np.float16).astype(w.dtype)
        if variant == "bfloat16_accumulator":
            v = bfloat16(v)
        state.v[i] = v
        w[...] = soft_threshold(v, lr * state.threshold if variant == "threshold_times_lr" else state.threshold)
