"""The paper's GSM, rewritten in numpy: the slow and obvious version that the library is tested against.

Section numbers refer to the project's fact sheet on GSM (arXiv 1909.12778): 1.1 the update rule, 1.2 the decay law,
1.3 the schedules, 1.6 what a naive version gets wrong.
"""

import math
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np

from tests.oracles.masks import Array, Mask, top_k_mask

Variant = Literal[
    "paper",
    "decoupled",
    "mask_update",
    "mask_momentum",
    "per_layer",
    "gradient_only",
    "magnitude_only",
    "at_least_threshold",
]


def _gsm_masks(weights: Sequence[Array], grads: Sequence[Array], q: int, variant: Variant) -> list[Mask]:
    """The mask B of section 1.1 from T = |g * w|, or what a wrong variant puts in its place."""
    scores = [np.abs(g * w) for g, w in zip(grads, weights, strict=True)]
    if variant == "gradient_only":
        scores = [np.abs(g) for g in grads]
    if variant == "magnitude_only":
        scores = [np.abs(w) for w in weights]

    if variant == "per_layer":
        total = sum(score.size for score in scores)
        return [top_k_mask([score], q * score.size // total)[0] for score in scores]
    if variant == "at_least_threshold":
        descending = sorted((value for score in scores for value in np.ravel(score).tolist()), reverse=True)
        threshold = descending[q - 1] if q > 0 else math.inf
        return [score >= threshold for score in scores]
    return top_k_mask(scores, q)


def gsm_step(
    weights: list[Array],
    grads: Sequence[Array],
    buffers: list[Array | None],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    q: int,
    nesterov: bool = False,
    dampening: float = 0.0,
    variant: Variant = "paper",
) -> None:
    """One step of GSM, in place (section 1.1).

        T = |g w|,  B = 1 at the q largest T of all arrays, else 0
        d = B g + eta w
        Z <- beta Z + (1 - dampening) d     (Z = d at the first step, where the buffer is None)
        w <- w - alpha Z                    (nesterov: w - alpha (d + beta Z))

    The paper has dampening 0 and no nesterov; both are PyTorch's conventions, as is that momentum 0 ignores
    dampening. `grads` are not changed; the entries of `buffers` are replaced.

    Every other `variant` is wrong, and is here so that tests can tell it from the paper (1.6):
        decoupled: w <- (1 - alpha eta) w beside the step, and no eta w in d (item 1).
        mask_update: d = g + eta w; B multiplies what is subtracted from w, Z is not masked (item 2).
        mask_momentum: d = g + eta w; Z <- B (beta Z + d) (item 2).
        per_layer: each array gets its own top floor(q * size / total) (item 3).
        gradient_only: T = |g| (item 4).
        magnitude_only: T = |w| (item 4).
        at_least_threshold: B = 1 where T >= the q-th largest T, also where that is a tie or zero (item 7).
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {get_args(Variant)}, got {variant!r}")
    # All masks come from the weights before the step: one global ranking, then the update.
    masks = _gsm_masks(weights, grads, q, variant)

    for i, (w, g, mask) in enumerate(zip(weights, grads, masks, strict=True)):
        if variant == "decoupled":
            w *= 1 - lr * weight_decay
            d = mask * g
        elif variant in ("mask_update", "mask_momentum"):
            d = g + weight_decay * w
        else:
            d = mask * g + weight_decay * w

        old = buffers[i]
        if old is None or momentum == 0:
            z = d.copy()
        else:
            z = momentum * old + (1 - dampening) * d
        if variant == "mask_momentum":
            z = mask * z
        buffers[i] = z

        update = d + momentum * z if nesterov else z
        if variant == "mask_update":
            update = mask * update
        w -= lr * update


def gsm_cut(weights: list[Array], keep: int) -> list[Mask]:
    """The final one-shot global magnitude cut, in place: the `keep` largest |w| stay (1.1, "final step").

    Returns the masks of what stayed. The authors keep |w| >= threshold; here ties are broken by position and
    a weight that is already zero does not count as kept, as in `top_k_mask`.
    """
    masks = top_k_mask([np.abs(w) for w in weights], keep)
    for w, mask in zip(weights, masks, strict=True):
        w[~mask] = 0
    return masks


def decay_exponent(lrs: Sequence[float], momentum: float, weight_decay: float, dampening: float = 0.0) -> float:
    """sum_t alpha_t eta (1 - dampening) / (1 - beta): a passive weight ends near exp(-this) (section 1.2).

    The factor (1 - dampening) is not in the paper, which has none.
    """
    return math.fsum(lr * weight_decay * (1 - dampening) / (1 - momentum) for lr in lrs)


def passive_weight(lrs: Sequence[float], momentum: float, weight_decay: float, nesterov: bool = False) -> float:
    """w(end) / w(0) of one weight whose gradient is masked at every step, from an empty buffer (section 1.2).

    The update rule of section 1.1 with B = 0, step by step; `decay_exponent` is its approximation.
    """
    w, z = 1.0, 0.0
    for lr in lrs:
        d = weight_decay * w
        z = momentum * z + d
        w -= lr * (d + momentum * z if nesterov else z)
    return w


def schedule(
    base_lr: float,
    epochs: int,
    drops: Collection[int],
    factor: float,
    warmup_epochs: int,
    steps_per_epoch: int,
) -> list[float]:
    """The authors' learning rate at each step (section 1.3).

    Linear warm-up from 0 over n = warmup_epochs * steps_per_epoch steps (step i has base_lr * i / n)
    and times `factor` from the start of each epoch in `drops`. Warm-up is part of `epochs`: it does not delay
    the drops. The exponents of section 1.2 come out only this way.
    """
    num_warmup = warmup_epochs * steps_per_epoch
    lrs: list[float] = []
    for step in range(epochs * steps_per_epoch):
        epoch = step // steps_per_epoch
        lr = base_lr * factor ** sum(epoch >= drop for drop in drops)
        if step < num_warmup:
            lr = lr * step / num_warmup
        lrs.append(lr)
    return lrs
