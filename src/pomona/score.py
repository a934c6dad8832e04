"""HOW a weight is ranked: pure functions to float32 scores >= 0 of the weight's shape; a larger one stays.

Scores are float32 whatever the weights are: a product of two half-precision numbers underflows to zero long
before the weight stops mattering.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(w: Tensor) -> Tensor:
    """``|w|``, a new float32 tensor."""
    return w.detach().to(torch.float32, copy=True).abs_()


def saliency(w: Tensor, g: Tensor) -> Tensor:
    """``|w g|``, a new float32 tensor: what the loss changes by, to first order, if the weight goes to zero.

    GSM's metric T (arXiv 1909.12778, eq. 4), the first-order Taylor term.
    """
    if w.dtype is torch.float32 and g.dtype is torch.float32:
        return torch.mul(w.detach(), g.detach()).abs_()
    return torch.mul(w.detach().float(), g.detach().float()).abs_()
