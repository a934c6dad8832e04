"""Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878), rewritten in numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tests.oracles.masks import Array, Mask, top_k_mask, top_k_mask_with_floor
from tests.oracles.sgd import sgd_step

Variant = Literal["paper", "per_layer", "compounds", "largest_go", "zeros_move", "returns", "one_step_late"]


@dataclass
class State:
    """What is kept, and the momentum of SGD."""

    mask: list[Mask]
    buffers: list[Array | None]
    num_steps: int = 0


def start(weights: Sequence[Array], variant: Variant = "paper") -> State:
    """Everything is kept."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    return State([np.ones(w.shape, dtype=np.bool_) for w in weights], [None] * len(weights))


def ramp(step: int, *, initial: float, final: float, begin: int, steps: int) -> float:
    """Sparsity at `step`: s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 (eq. 1); s_i before the ramp, s_f after it."""
    if step <= begin:
        return initial
    if step >= begin + steps:
        return final
    return final + (initial - final) * (1 - (step - begin) / steps) ** 3


def step(
    weights: list[Array],
    grads: Sequence[Array],
    state: State,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    sparsity: float,
    every: int,
    begin: int = 1,
    min_density: float = 0.0,
    variant: Variant = "paper",
) -> None:
    """One step of SGD with the mask, which is chosen anew after steps begin, begin + every, ..., in place.

    Chosen are the floor((1 - sparsity) N) largest |w| of the N weights of all arrays; the others become zero, and get
    no gradient until the next choice. (The paper ranks each layer by itself; the library's default is one ranking.)

    Every other `variant` is wrong, and is here so that tests can tell it from the paper:
        per_layer: each array is ranked by itself.
        compounds: sparsity is the share of the weights kept so far, not of all.
        largest_go: the smallest |w| are kept.
        zeros_move: the weights outside the mask are not held at zero after a step.
        returns: gradients are not masked, and zeros not rewritten before a new choice, so that pruned weights return.
        one_step_late: the choice is made after steps begin + 1, begin + 1 + every, ...
    """
    masked = [g if variant == "returns" else mask * g for g, mask in zip(grads, state.mask, strict=True)]
    sgd_step(weights, masked, state.buffers, lr=lr, momentum=momentum, weight_decay=weight_decay)
    state.num_steps += 1
    due = state.num_steps - (1 if variant == "one_step_late" else 0)
    is_choice = due >= begin and (due - begin) % every == 0
    if variant != "zeros_move" and not (variant == "returns" and is_choice):
        _zero(weights, state.mask)
    if is_choice:
        state.mask = choose(weights, state.mask, sparsity, min_density, variant)
        _zero(weights, state.mask)


def choose(
    weights: Sequence[Array], masks: Sequence[Mask], sparsity: float, min_density: float, variant: Variant = "paper"
) -> list[Mask]:
    """The new masks, from all |w|."""
    scores = [np.abs(w) for w in weights]
    if variant == "largest_go":
        scores = [np.max([s.max() for s in scores]) + 1 - score for score in scores]
    total = sum(w.size for w in weights)
    if variant == "compounds":
        total = sum(int(mask.sum()) for mask in masks)
    if variant == "per_layer":
        return [top_k_mask([score], num_kept(sparsity, score.size))[0] for score in scores]
    return top_k_mask_with_floor(scores, num_kept(sparsity, total), min_density)


def num_kept(sparsity: float, total: int) -> int:
    """floor((1 - sparsity) total), not upset by the rounding of 1 - 0.9."""
    return math.floor((1 - sparsity) * total + 5e-7)


def _zero(weights: list[Array], masks: Sequence[Mask]) -> None:
    for w, mask in zip(weights, masks, strict=True):
        w[~mask] = 0
