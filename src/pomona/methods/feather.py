"""Feather: straight-through thresholds (Glentis Georgoulakis et al., BMVC 2023, arXiv 2310.02448)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pomona.budget import (
    Allocation,
    check_allocation,
    check_budget,
    check_min_density,
    num_kept,
    tell_share,
    top_k,
)
from pomona.method import Method, Weight
from pomona.ops import largest_outside, smallest_inside, sparsity_of
from pomona.schedule import Value, check_value, highest, value_at
from pomona.score import magnitude


@dataclass(frozen=True, slots=True)
class Feather(Method):
    r"""The network sees thresholded weights; the optimizer moves the dense ones behind them.

    With the dense weights :math:`v`, their optimizer, the sparsity :math:`s_t` and the power :math:`p`, at each step

    .. math::
        g &= \partial L / \partial w \text{ at the sparse } w, \text{ times } \theta \text{ where } w = 0 \\
        v &\leftarrow \text{the optimizer's step from } v \text{ with the gradient } g \\
        T &= \text{the } (\lfloor (1 - s_t) N \rfloor + 1)\text{-th largest } |v| \text{ of the whole network} \\
        w &\leftarrow \operatorname{sign}(v) \, (|v|^p - T^p)^{1/p} \text{ where } |v| > T, \text{ else } 0

    The gradient goes straight through the threshold, so a weight that is zero learns on behind it and returns when
    :math:`|v| > T`. :math:`p = 1` is the soft threshold, :math:`p = \infty` the hard one (then, and with
    :math:`\theta = 1`, this is Lin et al.'s dynamic pruning with feedback, with new masks at every step); the
    paper's :math:`p = 3` is continuous and shrinks large weights hardly. Nothing is cut at the end.

    Needs of the optimizer: none; weight decay acts on :math:`v`. Memory: a copy of the weights in their dtype. Exact
    zeros: after every step of a sparsity above 0. Keep the weights in float32, under ``torch.autocast`` if you like.

    Differences from the authors' code: :math:`T` is the largest magnitude that goes, so that exactly the budget stays
    (of ties with :math:`T` the first ones, at a small share of their size), where theirs is a quantile between two
    magnitudes; the network that is left is the one that was trained and tested, where theirs puts :math:`v` itself
    where :math:`w \neq 0` when all is done; the gradient norm is not clipped (theirs: to 3), which the user's loop
    may do; shares by layer and ``min_density`` are ours: a layer has then a :math:`T` of its own.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, or a schedule of it. Paper: ``Cubic`` from 0
            over the first half of training, to 0.9 to 0.99.
        power: :math:`p` >= 1; ``math.inf`` for the hard threshold. Paper: 3.
        gradient_scale: :math:`\theta` in [0, 1]; None: 0.5 for a sparsity above 0.95, else 1. Paper: that.
        allocation: ``"global"``, ``"uniform"`` or ``"erk"``, see :func:`pomona.budget.top_k`. Paper: ``"global"``.
        min_density: with ``"global"``, the least share that stays of each layer, in [0, 1]. Paper: none.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> pruner = pomona.Pruner(model, optimizer, Feather(pomona.Cubic(0.0, 0.9, steps=500)))

    References:
        Glentis Georgoulakis, Retsinas, Maragos: Feather: An Elegant Solution to Effective DNN Sparsification. BMVC
        2023, arXiv 2310.02448. Of the hard threshold: Lin, Stich, Barba, Dmitriev, Jaggi: Dynamic Model Pruning with
        Feedback. ICLR 2020, arXiv 2006.07253.
    """

    sparsity: Value
    _: KW_ONLY
    power: float = 3.0
    gradient_scale: float | None = None
    allocation: Allocation = "global"
    min_density: float = 1e-4

    def __post_init__(self) -> None:
        check_value("sparsity", self.sparsity, low=0.0, high=1.0)
        for name in ("power", "gradient_scale"):
            number = getattr(self, name)
            is_left_out = number is None and name == "gradient_scale"
            if not is_left_out and (isinstance(number, bool) or not isinstance(number, (int, float))):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if not self.power >= 1.0:
            raise ValueError(f"power must be >= 1 (1: soft threshold, 3: the paper's, inf: hard), got {self.power}")
        if self.gradient_scale is not None and not 0.0 <= self.gradient_scale <= 1.0:
            raise ValueError(f"gradient_scale must be in [0, 1], got {self.gradient_scale}")
        check_allocation(self.allocation)
        check_min_density(self.min_density)

    @property
    def _theta(self) -> float:
        """What the gradients of zeros are multiplied by."""
        if self.gradient_scale is not None:
            return self.gradient_scale
        return 0.5 if highest(self.sparsity) > 0.95 else 1.0

    def check_weights(self, weights: Sequence[Weight]) -> None:
        k = num_kept(highest(self.sparsity), sum(w.numel for w in weights))
        check_budget(weights, k, self.allocation, min_density=self.min_density)

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(w.value), "threshold": torch.zeros((), dtype=torch.float64, device="cpu")}

    def before_step(self, weights: Sequence[Weight], step: int) -> None:
        for w in weights:
            v = w.state["v"]
            if step == 1:
                v.copy_(w.value)
            if float(w.state["threshold"]) > 0.0 and self._theta != 1.0:
                w.grad.mul_(torch.where(w.value == 0, self._theta, 1.0).to(w.grad.dtype))
            w.value.copy_(v)

    def after_step(self, weights: Sequence[Weight], step: int) -> None:
        for w in weights:
            w.state["v"].copy_(w.value)
        masks = self._largest(weights, step)
        for w, mask, threshold in zip(weights, masks, self._thresholds(weights, masks), strict=True):
            w.state["threshold"].fill_(threshold)
            kept = _shrink(w.state["v"][mask], threshold, self.power)
            w.value.zero_().masked_scatter_(mask, kept)

    def _largest(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        k = self.budget(sum(w.numel for w in weights), step)
        scores = [magnitude(w.value) for w in weights]
        return top_k(scores, k, self.allocation, of=weights, min_density=self.min_density)

    def _thresholds(self, weights: Sequence[Weight], masks: Sequence[Tensor]) -> list[float]:
        """The largest magnitude that goes: of all layers, or of the layer where it was ranked by itself."""
        largest = largest_outside(weights, masks)
        if self.allocation != "global":
            return largest
        common = max(largest, default=0.0)
        # Only what a floor holds is below it.
        smallest = smallest_inside(weights, masks)
        return [common if kept >= common else own for own, kept in zip(largest, smallest, strict=True)]

    def support(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        return [w.value != 0 for w in weights] if step else self._largest(weights, step)

    def budget(self, total: int, step: int) -> int:
        return num_kept(value_at(self.sparsity, step), total)

    def why(self, total: int, kept: int, density: float) -> str:
        floor = math.ceil(round(self.min_density * total, 6))
        if self.allocation == "global" and 0 < kept == floor:
            return f"held at the floor min_density={self.min_density:g}"
        return tell_share(total, kept, density, self.allocation)

    def metrics(self, weights: Sequence[Weight]) -> dict[str, float]:
        return {"threshold": max(float(w.state["threshold"]) for w in weights), "sparsity": sparsity_of(weights)}


def _shrink(v: Tensor, threshold: float, power: float) -> Tensor:
    """``sign(v) (|v|^p - T^p)^(1/p)`` of weights with ``|v| >= T``, a new tensor.

    In float64: the last bit of a power in float32 depends on how a tensor lies in memory, and so on the ranks.
    """
    if threshold == 0.0 or power == math.inf:
        return v
    share = (threshold / v.double().abs()).clamp_(max=1.0 - 2.0**-24)  # 1 only for ties with T, which would be zero
    return (v * (1.0 - share.pow_(power)).pow_(1.0 / power)).to(v.dtype)
