"""HOW a weight is ranked: scores >= 0 in the weight's shape; larger scores survive.

Scores are float32 for weights of any dtype: a product of two half-precision numbers underflows to zero long before
the weight stops mattering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)  # not frozen: one is made for each tensor at each step, and freezing triples the cost
class Score:
    """``|w|`` or ``|w g|`` of one tensor: a description, evaluated on demand, one piece at a time.

    Attributes:
        w: any shape and floating dtype.
        g: the second factor, with the same shape; None if there is none.
        inside: boolean, with the same shape: rank only inside this mask. Scores outside are zero; scores inside are at
            least the smallest normal number, so that a selection may keep them. None: rank everywhere.
    """

    w: Tensor
    g: Tensor | None = None
    inside: Tensor | None = None

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
            score = w.to(torch.float32, copy=True).abs_()
        else:
            score = torch.mul(w.float(), self.g.detach().float()).abs_()
        return score if self.inside is None else rank_inside_(score, self.inside)

    def flat(self) -> Score:
        """The same scores in one dimension."""
        return self._map(lambda t: t.reshape(-1))

    def piece(self, start: int, stop: int) -> Score:
        """View of the scores [start, stop) along dimension 0."""
        return self._map(lambda t: t[start:stop])

    def split(self, rows: Sequence[int]) -> list[Score]:
        """The scores of the parts of dimension 0 that have these numbers of rows; itself if it is one part."""
        if len(rows) == 1:
            return [self]
        ends = list(accumulate(rows))
        return [self.piece(end - size, end) for end, size in zip(ends, rows, strict=True)]

    def take(self, places: Tensor) -> Score:
        """The scores at these flat indices."""
        return self._map(lambda t: torch.take(t, places))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Score:
        g, inside = (None if t is None else change(t.detach()) for t in (self.g, self.inside))
        return Score(change(self.w.detach()), g, inside)


def rank_inside_(score: Tensor, mask: Tensor) -> Tensor:
    """Raise scores inside the mask to at least the smallest normal number and set those outside to zero, in place."""
    return score.clamp_(min=torch.finfo(score.dtype).tiny).masked_fill_(~mask, 0.0)


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
