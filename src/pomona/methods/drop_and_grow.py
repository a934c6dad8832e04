"""Sparse from the first step: what RigL, SET and their relatives share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pomona.granularity import Granularity, NOfM, parse
from pomona.method import Method
from pomona.ops import (
    among,
    count,
    drop_buffers_,
    drop_gradients_,
    drop_weights_,
    masks_of,
    random_scores,
    sparsity_of,
    split_matrices,
)
from pomona.schedule import Every, Schedule, check_count, check_value
from pomona.score import magnitude
from pomona.selection.groups import check_fits, group_size, grow_n_of_m
from pomona.selection.top_k import top_k
from pomona.weight import Weight, Weights

Distribution: TypeAlias = Literal["uniform", "erk"]  # an allocation layer by layer


@dataclass(frozen=True, slots=True)
class DropAndGrow(Method):
    r"""At step 1 each layer gets a random mask; every so often its smallest weights are dropped and as many grown.

    At the steps :math:`t = \Delta T, 2 \Delta T, \dots`, in each layer with :math:`n` active weights,

    .. math::
        \text{drop} &: \text{the } \lfloor f_t n \rfloor \text{ active weights with the smallest } |w| \\
        \text{grow} &: \text{as many weights, not among the remaining, with the largest growth score}

    and grown weights start at zero, with what the optimizer remembers of them cleared; a weight that is dropped and
    grown at once keeps its value. Gradients outside the mask are dropped at every step. A subclass says
    :math:`f_t` (``fraction``) and the growth score (``growth``), and documents the arguments.
    """

    sparsity: float
    _: KW_ONLY
    every: int = 100
    end: int | None = None
    drop: float = 0.3
    allocation: Distribution = "erk"
    seed: int = 0
    granularity: Granularity = "weight"

    def __post_init__(self) -> None:
        for name, number in (("sparsity", self.sparsity), ("drop", self.drop)):
            if isinstance(number, Schedule):
                raise TypeError(f"{name} must be a number, the same at every step, got {number!r}")
            check_value(name, number, low=0.0, high=1.0)
        check_count("every", self.every)
        if self.end is not None:
            check_count("end", self.end)
            if self.end < self.every:
                raise ValueError(
                    f"end must be >= every ({self.every}), the first update, got {self.end}; drop=0 makes no updates"
                )
        if self.allocation not in get_args(Distribution):
            raise ValueError(
                f"allocation must be one of {', '.join(get_args(Distribution))}, got {self.allocation!r}: random "
                f"masks need a count for each layer"
            )
        check_count("seed", self.seed, low=0)
        Method.__post_init__(self)

    @abstractmethod
    def fraction(self, step: int) -> float:
        """The share of a layer's active weights that the update at ``step`` replaces."""

    @abstractmethod
    def growth(self, weights: Weights, step: int) -> Iterable[Tensor]:
        """A score >= 0 for each weight; of the inactive weights those with the largest come."""

    def check_weights(self, weights: Weights) -> None:
        k = self.budget.num_kept(weights.numel, 1)
        check_fits(weights, self.granularity)
        kind, layers = parse(self.granularity), [matrix for w in weights for matrix in w.matrices()]
        if k < sum(group_size(kind, layer) for layer in layers):
            each = "" if self.granularity == "weight" else f", one {self.granularity} each"
            raise ValueError(
                f"sparsity={self.sparsity:g} leaves {k} weights for {len(layers)} layers{each}; lower the sparsity"
            )
        self.budget.check_weights(weights)

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"mask": torch.ones_like(w.value, dtype=torch.bool)}

    def before_step(self, weights: Weights, step: int) -> None:
        if step == 1:
            scores = list(random_scores(weights, self.seed, step))
            for w, mask in zip(weights, self.budget.keep(scores, step, of=weights).masks(), strict=True):
                _set_mask_(w, mask)
        elif Every(self.every, start=self.every, end=self.end)(step):
            for w, growth in zip(weights, self.growth(weights, step), strict=True):
                if w.has_grad:
                    _update_(w, self.fraction(step), growth, self.granularity)
        drop_gradients_(weights, masks_of(weights))

    def after_step(self, weights: Weights, step: int) -> None:
        drop_weights_(weights, masks_of(weights))

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        if step == 0:  # no masks have been drawn
            return self.budget.keep([magnitude(w.value) for w in weights], step, of=weights).masks()
        return masks_of(weights)

    def unfinished(self, weights: Weights, step: int) -> str:
        if step >= self.every or self.drop == 0.0:
            return ""
        return f"the masks are still the random ones of step 1; their first update is at step every={self.every:,}"

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {"sparsity": sparsity_of(weights)}


def _update_(w: Weight, fraction: float, growth: Tensor, granularity: Granularity) -> None:
    for layer, scores in zip(*split_matrices([w], [growth]), strict=True):
        drop_and_grow_(layer, fraction, scores, granularity)


def drop_and_grow_(w: Weight, fraction: float, growth: Tensor, granularity: Granularity = "weight") -> None:
    """Replace ``fraction`` of the active weights: the smallest go, and the largest in ``growth`` come at zero."""
    kind = parse(granularity)
    active = w.state["mask"]
    (num_active,) = count([active], of=[w])
    size = group_size(kind, w)
    num = math.floor(round(fraction * (num_active // size), 6)) * size
    scores = [among(magnitude(w.value).tensor(), active)]
    if isinstance(kind, NOfM):
        (remaining,) = top_k(scores, num_active - num, of=[w])
        grown = grow_n_of_m(among(growth.float(), ~remaining), remaining, kind, w)
    else:
        (remaining,) = top_k(scores, num_active - num, of=[w], granularity=granularity)
        (grown,) = top_k([among(growth, ~remaining)], num, of=[w], granularity=granularity)
    _set_mask_(w, remaining | grown)


def _set_mask_(w: Weight, mask: Tensor) -> None:
    """Only what was active and stays active keeps its value and its momentum."""
    staying = w.state["mask"] & mask
    drop_weights_([w], [staying])
    drop_buffers_([w], [staying])
    w.state["mask"].copy_(mask)
