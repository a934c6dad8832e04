"""HOW a weight is ranked: scores >= 0 of the weight's shape; a larger one stays.

Scores are float32 whatever the weights are: a product of two half-precision numbers underflows to zero long
before the weight stops mattering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """``|w|``, or ``|w g|``, of one tensor: a description, computed where it is needed, a piece at a time.

    Attributes:
        w: any shape and floating dtype.
        g: the second factor, of the same shape; None if there is none.
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
        """The scores: a new float32 tensor, outside of autograd."""
        w = self.w.detach()
        if self.g is None:
            return w.to(torch.float32, copy=True).abs_()
        return torch.mul(w.float(), self.g.detach().float()).abs_()


def magnitude(w: Tensor) -> Score:
    """``|w|``."""
    return Score(w)


def saliency(w: Tensor, g: Tensor) -> Score:
    """``|w g|``: what the loss changes by, to first order, if the weight goes to zero.

    GSM's metric T (arXiv 1909.12778, eq. 4), the first-order Taylor term.

    Raises:
        ValueError: the shapes differ.
    """
    if w.shape != g.shape:
        raise ValueError(f"a weight and its gradient have one shape, got {tuple(w.shape)} and {tuple(g.shape)}")
    return Score(w, g)
