"""RigL: Rigging the Lottery (Evci et al., ICML 2020, arXiv 1911.11134)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from pomona.methods.drop_and_grow import DropAndGrow
from pomona.weight import Weights


@dataclass(frozen=True, slots=True)
class RigL(DropAndGrow):
    r"""Sparse from the first step; now and then the weakest weights make room for promising ones.

    At step 1 each layer gets a random mask with its share of the budget. At the steps :math:`t = \Delta T, 2 \Delta T,
    \dots \le T_{\mathrm{end}}`, in each layer with :math:`n` active weights,

    .. math::
        f_t &= \tfrac{\alpha}{2} (1 + \cos(\pi t / T_{\mathrm{end}})) \\
        \text{drop} &: \text{the } \lfloor f_t n \rfloor \text{ active weights with the smallest } |w| \\
        \text{grow} &: \text{as many weights, not among the remaining, with the largest } |\partial L / \partial w|

    and grown weights start at zero. Gradients outside the mask are dropped otherwise, so the number of active weights
    is the same in each layer at every step.

    Needs of the optimizer: none. Memory: one byte per weight. Exact zeros: after every step. Gradients are dense, as
    in every training with PyTorch: this saves neither time nor memory while training.

    Differences from the paper: the optimizer makes a step at the update iterations too, with the new mask, where
    Algorithm 1 makes none; the gradients of step 1 are those of the dense network, because the masks are drawn once
    they are known; a weight that is dropped and grown at once keeps its value, as in the authors' code, where
    Algorithm 1 sets all grown weights to zero; what the optimizer remembers of a new weight is cleared, as in the
    authors' code; ``"uniform"`` does not keep the first layer dense (leave it out of the scope for that). The authors'
    code adds a little noise to :math:`|w|`; here ties are broken by position. A layer without a gradient at an update
    is left as it is.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, at every step. Paper: 0.8, 0.9, 0.95, 0.965.
        every: steps :math:`\Delta T` from one update to the next, >= 1. Paper: 100.
        end: last step :math:`T_{\mathrm{end}}` at which there may be an update, >= ``every``; None: there is no last
            one, and the fraction stays ``drop``. Paper: 25,000 of 32,000 steps.
        drop: fraction :math:`\alpha` of each layer's active weights that the first update replaces, in [0, 1); 0 keeps
            the first masks. Paper: 0.3.
        allocation: ``"erk"``: small layers denser, by the Erdos-Renyi kernel rule, :class:`pomona.Budget`;
            ``"uniform"``: the same sparsity in each layer. Paper: both.
        seed: of the random masks, >= 0.
        granularity: what is dropped and grown together: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity`` must
            then be ``1 - n/m`` and the allocation ``"uniform"``; each group grows as many as it dropped), a block such
            as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input channel"``; see :mod:`pomona.granularity`. Paper:
            single weights.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> pruner = pomona.Pruner(model, optimizer, RigL(sparsity=0.9, end=750))

    References:
        Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery: Making All Tickets Winners. ICML 2020,
        arXiv 1911.11134.
    """

    def fraction(self, step: int) -> float:
        if self.end is None:
            return self.drop
        return self.drop / 2 * (1 + math.cos(math.pi * step / self.end))

    def growth(self, weights: Weights, step: int) -> Iterable[Tensor]:
        return (w.grad.abs() for w in weights)
