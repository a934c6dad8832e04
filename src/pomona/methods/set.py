"""SET: Sparse Evolutionary Training (Mocanu et al., Nature Communications 2018, arXiv 1707.04780)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pomona.methods.drop_and_grow import DropAndGrow
from pomona.ops import random_scores
from pomona.weight import Weights


@dataclass(frozen=True, slots=True)
class SET(DropAndGrow):
    r"""Sparse from the first step; after every epoch the weakest weights are replaced by random ones.

    At step 1 each layer gets a random mask with its share of the budget. At the steps :math:`t = \Delta T, 2 \Delta T,
    \dots`, in each layer with :math:`n` active weights,

    .. math::
        \text{drop} &: \text{the } \lfloor \zeta n \rfloor \text{ active weights with the smallest } |w| \\
        \text{grow} &: \text{as many weights, not among the remaining, at random}

    and grown weights start at zero. Gradients outside the mask are always dropped, so the number of active weights is
    the same in each layer at every step. It is :class:`RigL` with random growth and a constant fraction.

    Needs of the optimizer: none. Memory: one byte per weight. Exact zeros: after every step.

    Differences from the paper: it drops the fraction :math:`\zeta` of the smallest positive and of the largest negative
    weights, which ours takes together by :math:`|w|`; its new weights start at small random values, ours at zero and
    with what the optimizer remembers of them cleared; its first masks are random in number too, ours have exact
    counts; it makes no update after the last epoch, ours none after ``end``. A weight that is dropped and grown at once
    keeps its value. The gradients of step 1 are those of the dense network, because the masks are drawn at that step.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, at every step. The paper gives it as
            :math:`\epsilon`, with :math:`\epsilon (n_1 + n_2)` weights in a layer of shape :math:`(n_1, n_2)`.
        every: steps :math:`\Delta T` from one update to the next, >= 1. Paper: an epoch, ``len(loader)``.
        end: last step at which there may be an update, >= ``every``; None: there is no last one. Paper: all but the
            last epoch.
        drop: fraction :math:`\zeta` of each layer's active weights that an update replaces, in [0, 1); 0 keeps the
            first masks. Paper: 0.3.
        allocation: ``"erk"``: small layers denser, the paper's rule for dense layers, :class:`pomona.Budget`;
            ``"uniform"``: the same sparsity in each layer.
        seed: of masks and growth, >= 0.
        granularity: what is dropped and grown together: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity`` must
            then be ``1 - n/m`` and the allocation ``"uniform"``; each group grows as many as it dropped), a block such
            as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input channel"``; see :mod:`pomona.granularity`. Paper:
            single weights.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> pruner = pomona.Pruner(model, optimizer, SET(sparsity=0.9, every=500))

    References:
        Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta: Scalable training of artificial neural networks with adaptive
        sparse connectivity inspired by network science. Nature Communications 2018, arXiv 1707.04780.
    """

    def fraction(self, step: int) -> float:
        return self.drop

    def growth(self, weights: Weights, step: int) -> Iterable[Tensor]:
        return random_scores(weights, self.seed, step)
