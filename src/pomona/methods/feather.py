"""Feather: straight-through thresholds (Glentis Georgoulakis et al., BMVC 2023, arXiv 2310.02448)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice

import torch
from torch import Tensor

from pomona.method import Method, warn_of_starved
from pomona.ops import PIECE, count, sparsity_of, split_matrices
from pomona.schedule import FAR_AWAY, Value, value_at
from pomona.score import Scoring, magnitude, rule_of
from pomona.selection import kth_largest
from pomona.selection.allocation import Allocation
from pomona.weight import Weight, Weights


@dataclass(frozen=True, slots=True)
class Feather(Method):
    r"""The network sees thresholded weights; the optimizer moves the dense ones behind them.

    With the dense weights :math:`v`, their optimizer, the sparsity :math:`s_t` and the power :math:`p`, at each step

    .. math::
        g &= \partial L / \partial w \text{ at the sparse } w, \text{ times } \theta \text{ where } |v| \le T \\
        v &\leftarrow \text{the optimizer's step from } v \text{ with the gradient } g \\
        T &= \text{the } (\lfloor (1 - s_t) N \rfloor + 1)\text{-th largest } |v| \text{ of the whole network} \\
        w &\leftarrow \operatorname{sign}(v) \, (|v|^p - T^p)^{1/p} \text{ where } |v| > T, \text{ else } 0

    The gradient goes straight through the threshold, so a weight that is zero learns on behind it and returns when
    :math:`|v| > T`. :math:`p = 1` is the soft threshold, :math:`p = \infty` the hard one (then, and with
    :math:`\theta = 1`, this is Lin et al.'s dynamic pruning with feedback, with new masks at every step); the
    paper's :math:`p = 3` is continuous and hardly shrinks large weights. Nothing is cut at the end.

    Edits of the weights between two steps are overwritten by :math:`v`: load weights before the first step, or
    together with the Pruner's state. A layer without a gradient stays in the ranking and is thresholded as well.

    Needs of the optimizer: none; weight decay acts on :math:`v`. Memory: a copy of the weights in their dtype, and
    masks of one byte per weight for a moment. Exact zeros: after every step of a sparsity above 0. Keep the weights in
    float32, under ``torch.autocast`` if you like.

    Differences from the authors' code: :math:`T` is the largest magnitude that goes, so that exactly the budget stays
    (of ties with :math:`T` the first ones, next to zero), where theirs is a quantile between two magnitudes; the
    network that is left is the one that was trained and tested, where theirs puts :math:`v` itself where
    :math:`w \neq 0` when all is done; the gradient norm is not clipped (theirs: to 3), which the user's loop may do;
    shares by layer and ``min_density`` are ours: a layer then has a :math:`T` of its own.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, or a schedule of it. Paper: ``Cubic`` from 0
            over the first half of training, to 0.9 to 0.99.
        power: :math:`p` >= 1; ``math.inf`` for the hard threshold. Paper: 3.
        gradient_scale: :math:`\theta` in [0, 1], of what a :math:`T` above 0 has zeroed; None: 0.5 for a sparsity that
            ends above 0.95, else 1. Paper: that.
        allocation: ``"global"``, ``"uniform"`` or ``"erk"``, see :class:`pomona.Budget`. Paper: ``"global"``.
        min_density: with ``"global"``, the least share that stays of each layer, in [0, 1]. Paper: none.
        score: ``"magnitude"``, or ``"lamp"``, with which one ranking is fair to layers of small weights; see
            :class:`pomona.Budget`. Each layer then has a :math:`T` of its own, and each step sorts each layer. Paper:
            magnitude.

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
    score: Scoring = "magnitude"

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        if not isinstance(self.score, str):
            raise ValueError(
                f"Feather's threshold is one on |v|, which a score of your own ({self.score!r}) has not; take "
                f"score='magnitude' or 'lamp', or Magnitude(score=...)"
            )
        for name in ("power", "gradient_scale"):
            number = getattr(self, name)
            is_left_out = number is None and name == "gradient_scale"
            if not is_left_out and (isinstance(number, bool) or not isinstance(number, (int, float))):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if not self.power >= 1.0:
            raise ValueError(f"power must be >= 1 (1: soft threshold, 3: the paper's, inf: hard), got {self.power}")
        if self.gradient_scale is not None and not 0.0 <= self.gradient_scale <= 1.0:
            raise ValueError(f"gradient_scale must be in [0, 1], got {self.gradient_scale}")

    @property
    def _theta(self) -> float:
        """What the gradients of zeros are multiplied by."""
        if self.gradient_scale is not None:
            return self.gradient_scale
        return 0.5 if value_at(self.sparsity, FAR_AWAY) > 0.95 else 1.0

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(w.value), "threshold": torch.zeros((), dtype=torch.float64, device="cpu")}

    def before_step(self, weights: Weights, step: int) -> None:
        for w in weights:
            v = w.state["v"]
            if step == 1:
                v.copy_(w.value)
            if float(w.state["threshold"]) > 0.0 and self._theta != 1.0:
                w.grad.mul_(torch.where(w.value == 0, self._theta, 1.0).to(w.grad.dtype))
            w.value.copy_(v)

    def after_step(self, weights: Weights, step: int) -> None:
        for w in weights:
            w.state["v"].copy_(w.value)
        support = self.support(weights, step)
        if self._ends_at(step):
            warn_of_starved(self, weights, support)
        layers, masks = split_matrices(weights, support)
        thresholds = self._thresholds(layers, masks)
        for layer, mask, threshold in zip(layers, masks, thresholds, strict=True):
            _threshold_(layer.value, mask, threshold, self.power)
        each = iter(thresholds)
        for w in weights:
            w.state["threshold"].fill_(max(islice(each, w.num_matrices)))

    def _ends_at(self, step: int) -> bool:
        """Whether the way to the final sparsity ends at this step: what is starved then will hardly return."""
        end = value_at(self.sparsity, FAR_AWAY)
        return value_at(self.sparsity, step) == end != value_at(self.sparsity, step - 1)

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return self.budget.survivors(weights, step).masks()

    def _thresholds(self, weights: Sequence[Weight], masks: Sequence[Tensor]) -> list[float]:
        """The largest magnitude that goes: of all layers, or of the layer where it was ranked by itself."""
        scores, kept = [magnitude(w.value) for w in weights], count(masks, of=weights)

        def largest(places: Sequence[int], rank: int) -> float:
            return kth_largest([scores[i] for i in places], rank, of=[weights[i] for i in places])

        if self.allocation != "global" or rule_of(self.score) is not None:
            return [largest([i], kept[i] + 1) for i in range(len(weights))]
        budget = self.budget
        at_floor = [i for i, w in enumerate(weights) if 0 < kept[i] <= budget.floor(w)]
        free = [i for i in range(len(weights)) if i not in at_floor]
        own = {i: largest([i], kept[i] + 1) for i in at_floor}
        common = max([largest(free, sum(kept[i] for i in free) + 1) if free else 0.0, *own.values()])
        held = {i for i in at_floor if largest([i], kept[i]) < common}  # the others would be there without a floor
        return [own[i] if i in held else common for i in range(len(weights))]

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {"threshold": max(float(w.state["threshold"]) for w in weights), "sparsity": sparsity_of(weights)}


def _threshold_(value: Tensor, mask: Tensor, threshold: float, power: float) -> None:
    """``sign(v) (|v|^p - T^p)^(1/p)`` inside of the mask, where ``|v| >= T``, and zero outside.

    In float64: the last bit of a power in float32 depends on how a tensor lies in memory, and so on the ranks.
    """
    value.masked_fill_(~mask, 0.0)
    if threshold == 0.0 or power == math.inf:
        return
    value, mask = (t.view(1) if t.ndim == 0 else t for t in (value, mask))
    rows = max(1, PIECE * len(value) // max(1, value.numel()))
    for some, kept in zip(torch.split(value, rows), torch.split(mask, rows), strict=True):
        v = some[kept]
        size = v.double().abs()
        size.mul_((1.0 - (threshold / size).clamp_(max=1.0).pow_(power)).pow_(1.0 / power))
        least = torch.finfo(v.dtype).tiny  # of ties with T, which would be zero
        some.masked_scatter_(kept, size.clamp_(min=least).to(v.dtype).copysign_(v))
