"""HOW a weight is ranked: scores >= 0 in the weight's shape; larger scores survive.

Scores are float32 for weights of any dtype: a product of two half-precision numbers underflows to zero long before
the weight stops mattering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """``|w|`` or ``|w g|`` of one tensor: a description, evaluated on demand, one piece at a time.

    Attributes:
        w: any shape and floating dtype.
        g: the second factor, with the same shape; None if there is none.
    """

    w: Tensor
    g: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.w.shape

    @property
    def device(self) -> torch.device:
        return self.w.device

    def numel(self) -> int:
        return self.w.numel()

    def tensor(self) -> Tensor:
        """Compute the scores: a new float32 tensor, detached from autograd."""
        w = self.w.detach()
        if self.g is None:
            return w.to(torch.float32, copy=True).abs_()
        return torch.mul(w.float(), self.g.detach().float()).abs_()


def magnitude(w: Tensor) -> Score:
    """``|w|``."""
    return Score(w)


def saliency(w: Tensor, g: Tensor) -> Score:
    """``|w g|``: the first-order change of the loss if the weight becomes zero.

    GSM's metric T (arXiv 1909.12778, eq. 4), the first-order Taylor term.

    Raises:
        ValueError: the shapes differ.
    """
    if w.shape != g.shape:
        raise ValueError(
            f"a weight and its gradient must have the same shape, got {tuple(w.shape)} and {tuple(g.shape)}"
        )
    return Score(w, g)
