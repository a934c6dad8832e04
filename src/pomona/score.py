"""HOW a weight is ranked: scores >= 0 in the weight's shape; larger scores survive.

Scores are float32 for weights of any dtype: a product of two half-precision numbers underflows to zero long before
the weight stops mattering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

_NAMES = Literal["magnitude", "lamp"]
Scoring: TypeAlias = _NAMES | Callable[[Any], Tensor]  # by name, or from a Weight to its scores
Within: TypeAlias = Callable[[Tensor], Tensor]  # from the scores of a layer to scores that compare between layers


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


# One ranking of all layers: scores that compare between them


def lamp(scores: Tensor) -> Tensor:
    r"""Each score of a layer over the root of the sum of squares of those that are at least as large.

    With :math:`w_{(1)}, w_{(2)}, \dots` the weights of a layer by falling magnitude, ties by position,

    .. math::
        \text{score}(w_{(u)}) = |w_{(u)}| \Big/ \sqrt{\textstyle\sum_{v \le u} w_{(v)}^2}

    which is the root of LAMP's score, and so has its order: the share of the layer's norm that goes with a weight, once
    all smaller ones are gone. It depends on no scale of the layer, keeps the order within it, and is 1 for its largest
    weight, so that no layer is emptied while the budget has one weight for each.

    The squares are summed as integers, each score rounded to 2^-18 of the largest or finer. So the result is the same
    on every device, however the layer is sharded. Takes a sort, and some 40 bytes per score.

    Args:
        scores: float32, >= 0, of any shape: all scores of one layer.

    Returns:
        New scores in [0, 1], of the same shape and type; what is above 0 stays above 0. Those that are not finite stay
        as they are, and count as 0 for the others.

    Example:
        >>> lamp(torch.tensor([0.5, 2.0, 1.5, 0.0]))
        tensor([0.1961, 1.0000, 0.6000, 0.0000])

    References:
        Lee, Park, Mo, Ahn, Shin: Layer-adaptive Sparsity for the Magnitude-based Pruning. ICLR 2021, arXiv 2010.07611.
    """
    sizes, places = torch.sort(scores.reshape(-1), descending=True, stable=True)
    squares, scale = _squares(sizes)
    norms = squares.cumsum_(0).double().clamp_(min=1.0).sqrt_()
    shares = sizes.double().mul_(scale).div_(norms).float()
    return _settled(torch.empty_like(shares).scatter_(0, places, shares).view(scores.shape), scores)


def rule_of(score: Scoring) -> Within | None:
    """What makes the scores of different layers comparable; None if this score leaves them as they are."""
    return lamp if score == "lamp" else None


def check_scoring(score: object) -> None:
    """TypeError or ValueError unless it is the name of a score, or can be called."""
    if isinstance(score, str) and score not in get_args(_NAMES):
        raise ValueError(
            f"score must be one of {', '.join(map(repr, get_args(_NAMES)))}, or a function of a pomona.Weight, got "
            f"{score!r}"
        )
    if not isinstance(score, str) and not callable(score):
        raise TypeError(
            f"score must be a name such as 'lamp', or a function from a pomona.Weight to scores >= 0 of the shape of "
            f"its value, got {score!r}"
        )


def _squares(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The squares as int64 whose sum does not overflow, and the power of two (float64) that scales the scores."""
    finite = scores.double().masked_fill_(~scores.isfinite(), 0.0)
    bits = min(26, (62 - scores.numel().bit_length()) // 2)
    exponent = torch.frexp(finite.max() if scores.numel() else finite.sum()).exponent.long()
    scale = ((bits + 1023 - exponent) << 52).view(torch.float64)  # built from its bits, to be exact
    return finite.mul_(scale).round_().long().square_(), scale


def _settled(ranked: Tensor, scores: Tensor) -> Tensor:
    """What is not finite stays; what is above zero stays there, however small."""
    least = (scores > 0) * torch.finfo(torch.float32).tiny
    return torch.where(scores.isfinite(), torch.maximum(ranked, least), scores)
