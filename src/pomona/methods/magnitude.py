"""Magnitude pruning, at once or gradually (Zhu & Gupta 2017, arXiv 1710.01878)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pomona.granularity import Granularity
from pomona.method import Method, warn_of_starved
from pomona.ops import (
    drop_buffers_,
    drop_gradients_,
    drop_weights_,
    masks_of,
    sparsity_of,
)
from pomona.schedule import Every, Value, check_count, check_never_falls
from pomona.score import Scoring
from pomona.selection.allocation import Allocation
from pomona.weight import Weight, Weights


@dataclass(frozen=True, slots=True)
class Magnitude(Method):
    r"""Every so often cuts the smallest remaining weights for good; the others train on.

    With the weights :math:`w`, their masks :math:`m`, all 1 at first, and the sparsity :math:`s_t`, after the steps
    :math:`t = t_0, t_0 + \Delta t, t_0 + 2 \Delta t, \dots`

    .. math::
        m \leftarrow 1 \text{ for the } \lfloor (1 - s_t) N \rfloor \text{ largest } m |w|, \text{ else } 0

    and at every step :math:`\partial L / \partial w \leftarrow m \, \partial L / \partial w` before it and
    :math:`w \leftarrow m w` after it. With a plain number for the sparsity there is one cut, after step ``begin``, and
    what follows is fine-tuning. With ``Cubic(0.0, s_f, steps=n, begin=t_0)`` it is the paper's gradual pruning,
    :math:`s_t = s_f + (s_i - s_f) (1 - (t - t_0) / n)^3`.

    Needs of the optimizer: none. Memory: one byte per weight. Exact zeros: after every step from the first cut on.

    Differences from the authors' code: theirs cuts each layer to the same sparsity (``allocation="uniform"``), ours
    ranks all layers together by default; ours cuts to an exact count, ties broken by position; a cut weight never
    returns, where theirs keeps its value behind the mask and may be chosen again later; what the optimizer remembers
    of a cut weight is cleared.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, or a schedule of it that never falls. Paper:
            cubic, from 0 to between 0.5 and 0.975.
        every: steps from one cut to the next, >= 1. Paper: 100 to 1,000.
        begin: the step after which the first cut is made, >= 1.
        allocation: ``"global"``: one ranking of all layers together; ``"uniform"``: the same sparsity in each layer;
            ``"erk"``: by the Erdos-Renyi kernel rule, :class:`pomona.Budget`. Paper: ``"uniform"``.
        min_density: least share that stays of each layer when all are ranked together, in [0, 1]. Paper: none.
        granularity: what goes together: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity`` must then end at
            ``1 - n/m``), a block such as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input channel"``; see
            :mod:`pomona.granularity`. Paper: single weights.
        score: what the weights are ranked by: ``"magnitude"``; ``"lamp"``, with which one ranking is fair to layers of
            small weights (``"global"`` only); or a function of a Weight. See :class:`pomona.Budget`. Paper: magnitude.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = pomona.Pruner(model, optimizer, Magnitude(pomona.Cubic(0.0, 0.9, steps=1000)))

    References:
        Zhu, Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression. 2017,
        arXiv 1710.01878. Of the single cut with fine-tuning: Han, Pool, Tran, Dally: Learning both Weights and
        Connections for Efficient Neural Networks. NeurIPS 2015, arXiv 1506.02626.
    """

    sparsity: Value
    _: KW_ONLY
    every: int = 100
    begin: int = 1
    allocation: Allocation = "global"
    min_density: float = 1e-4
    granularity: Granularity = "weight"
    score: Scoring = "magnitude"

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        check_never_falls("sparsity", self.sparsity)
        check_count("every", self.every)
        check_count("begin", self.begin)

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"mask": torch.ones_like(w.value, dtype=torch.bool)}

    def before_step(self, weights: Weights, step: int) -> None:
        drop_gradients_(weights, masks_of(weights))
        if self._cuts_after(step - 1):
            drop_buffers_(weights, masks_of(weights))

    def after_step(self, weights: Weights, step: int) -> None:
        if self._cuts_after(step):
            masks = self.support(weights, step)
            warn_of_starved(self, weights, masks, before=masks_of(weights))
            for w, mask in zip(weights, masks, strict=True):
                w.state["mask"].copy_(mask)
        drop_weights_(weights, masks_of(weights))

    def _cuts_after(self, step: int) -> bool:
        return Every(self.every, start=self.begin)(step)

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return self.budget.survivors(weights, step, inside=masks_of(weights)).masks()

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {"sparsity": sparsity_of(weights)}
