"""Operations on tensors that more than one method is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pomona.method import Weight


def soft_threshold(v: Tensor, threshold: float) -> Tensor:
    """``sign(v) max(|v| - threshold, 0)``, a new tensor: the proximal operator of ``threshold |v|``.

    Exact zeros (+0.0) wherever ``|v| <= threshold``; ``threshold >= 0``.
    """
    if threshold == 0.0:
        return v.clone()
    return torch.where(v.abs() > threshold, v - threshold * v.sign(), 0.0)


def drop_gradients_(weights: Sequence[Weight], masks: Sequence[Tensor]) -> None:
    """Zero the gradients outside the masks (True = kept)."""
    for w, mask in zip(weights, masks, strict=True):
        w.grad.masked_fill_(~mask, 0.0)


def drop_weights_(weights: Sequence[Weight], masks: Sequence[Tensor]) -> None:
    """Write exact zeros outside the masks; undoes what momentum, moments or weight decay did there in a step."""
    for w, mask in zip(weights, masks, strict=True):
        w.value.masked_fill_(~mask, 0.0)


def generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers that follow from seed and step alone, so that a resumed run draws the same ones."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63
    return torch.Generator(device).manual_seed(mixed)
