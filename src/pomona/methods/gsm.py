"""GSM: Global Sparse Momentum SGD (Ding et al., NeurIPS 2019, arXiv 1909.12778)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pomona.diagnosis import Diagnosis, decay_per_step, diagnose_decay
from pomona.granularity import Granularity
from pomona.method import Method
from pomona.ops import check_finite, drop_gradients_, sum_of
from pomona.schedule import Value
from pomona.score import Scoring, saliency
from pomona.weight import Weight, Weights

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class GSM(Method):
    r"""At each step only the globally most salient weights get their gradient; the others only decay.

    With the weights :math:`w`, their gradients and the momentum buffers :math:`z` of all layers,

    .. math::
        T &= |w \, \partial L / \partial w| \\
        B &= 1 \text{ for the } Q \text{ largest } T \text{ of the whole network, else } 0 \\
        z &\leftarrow \beta z + \eta w + B \, \partial L / \partial w \\
        w &\leftarrow w - \alpha z

    with learning rate :math:`\alpha`, momentum :math:`\beta`, weight decay :math:`\eta` and
    :math:`Q = \lfloor (1 - \text{sparsity}) N \rfloor`. The last two lines are ``torch.optim.SGD`` itself, so the
    method only multiplies the gradients by :math:`B`. The choice is made anew at every step from that step's
    gradient: a weight that was passive may be active at the next one. At the end the ``Q`` weights largest in
    magnitude stay (``harden``), without retraining.

    Passive weights fall by about :math:`\exp(-\sum \alpha \eta / (1 - \beta))`; a run whose exponent stays below 7
    cannot make the final cut lossless, see :class:`pomona.Diagnosis`.

    Needs of the optimizer: ``torch.optim.SGD`` with momentum (0.98 to 0.99 in the paper) and weight decay (1e-4 to
    5e-4), Nesterov or not. Memory: none beyond the optimizer's own. Exact zeros: only after ``harden``.

    Keep the weights in float32, under ``torch.autocast`` if you like: in bfloat16 one step of decay is rounded away.

    Differences from the authors' code: ties are broken by position and a zero score is never active, so at most
    ``Q`` weights are active, where theirs (``T >= threshold``) may activate all; the final cut likewise keeps
    exactly ``Q``; ``min_density`` guards layers from being emptied (set it to 0 for the paper's rule; it does not
    bind in any published setting we ran). Weight decay is masked nowhere, as in the paper.

    Args:
        sparsity: fraction of zeros in [0, 1) of the weights in scope, or a schedule of it. Compression c is
            ``1 - 1/c``. Paper: 0.9 (ResNet-56), 1 - 1/60 (LeNet-300-100), 1 - 1/125 and 1 - 1/300 (LeNet-5).
        min_density: least share that stays of each layer, in [0, 1]; of a layer of n weights at least
            ``ceil(min_density n)`` are active at each step (fewer where scores are zero) and survive the cut. Paper:
            none (0).
        granularity: what is active, and survives, together: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity``
            must then end at ``1 - n/m``), a block such as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input
            channel"``; see :mod:`pomona.granularity`. All but the first take masks of one byte per weight at each step,
            for which a GPU's host waits. Paper: single weights.
        score: what the final cut ranks the weights by: ``"magnitude"``, ``"lamp"``, ``"normalized"``, or a function of
            a Weight; see :class:`pomona.Budget`. It does not change :math:`T`, which is fair by itself: in a layer of
            larger weights gradients are smaller. Paper: magnitude.

    Example:
        >>> model = torch.nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.98, weight_decay=1e-4)
        >>> pruner = pomona.Pruner(model, optimizer, GSM(sparsity=0.9))

    References:
        Ding, Ding, Zhou, Guo, Han, Liu: Global Sparse Momentum SGD for Pruning Very Deep Neural Networks.
        NeurIPS 2019, arXiv 1909.12778.
    """

    sparsity: Value
    min_density: float = 1e-4
    granularity: Granularity = "weight"
    score: Scoring = "magnitude"

    checks_gradients: ClassVar[bool] = True

    def before_step(self, weights: Weights, step: int) -> None:
        t = [saliency(w.value, w.grad) for w in weights]
        b = self.budget.keep(t, step, of=weights)
        check_finite(weights, b)
        drop_gradients_(weights, b)  # z <- beta z + eta w + B dL/dw, w <- w - alpha z: the optimizer's own step
        weights.shared["active"].copy_(sum_of(b.counts))
        weights.shared["exponent"].add_(_decay(weights))

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return self.budget.survivors(weights, step).masks()

    def init_shared(self, weights: Weights) -> dict[str, Tensor]:
        return {
            "active": torch.zeros((), dtype=torch.int64, device=weights[0].value.device),
            "exponent": torch.zeros(len(weights), dtype=torch.float64, device="cpu"),
        }

    def check(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        name = type(optimizer).__name__
        way_out = "use torch.optim.SGD(..., momentum=0.98, weight_decay=1e-4), the rule GSM is made of"
        for group in groups:
            if group.get("decoupled_weight_decay") or name in ("AdamW", "NAdamW"):
                raise ValueError(
                    f"GSM cannot prune with {name}: its weight decay is decoupled from the gradient, so momentum "
                    f"does not multiply it by 1/(1 - momentum) and passive weights hardly shrink (to 0.85 instead of "
                    f"0.0003 of their size in the paper's ResNet-56 run); {way_out}"
                )
            if not {"momentum", "dampening", "weight_decay"} <= group.keys():
                raise ValueError(
                    f"GSM cannot prune with {name}: it needs momentum SGD with weight decay inside the momentum "
                    f"buffer; {way_out}"
                )
            if not group["momentum"] > 0.0:
                raise ValueError(f"GSM needs momentum > 0, got {name}(momentum={group['momentum']}); {way_out}")
            if not group["dampening"] < 1.0:
                raise ValueError(f"GSM needs dampening < 1, got {name}(dampening={group['dampening']}); {way_out}")
            if not group["weight_decay"] > 0.0:
                raise ValueError(
                    f"GSM needs weight_decay > 0 for the pruned weights (nothing else moves passive weights to "
                    f"zero), got {name}(weight_decay={group['weight_decay']}); {way_out}"
                )

    def check_weights(self, weights: Weights) -> None:
        self.budget.check_weights(weights)
        _warn_of_rounding(weights)

    def why(self, w: Weight, kept: int, density: float) -> str:
        return self.budget.why(w, kept, density, by="one cut on |w|" if self.score == "magnitude" else "")

    def forecast(self, groups: Sequence[Mapping[str, Any]]) -> Diagnosis:
        exponent = sum(decay_per_step(group["lr"], group) for group in groups)
        return diagnose_decay(exponent, len(groups), groups[0])

    def diagnose(self, weights: Weights, step: int) -> Diagnosis:
        exponent, i = weights.shared["exponent"].min(0)
        return diagnose_decay(float(exponent), step, weights.by_name[int(i)].group)

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {
            "decay_exponent": float(weights.shared["exponent"].min()),
            "active": float(weights.shared["active"]),
        }


def _decay(weights: Weights) -> Tensor:
    """What this step adds to the decay exponent of each tensor, by name; nothing if it has no gradient."""
    rates: dict[int, float] = {}  # of each parameter group
    for w in weights:
        if id(w.group) not in rates:
            rates[id(w.group)] = decay_per_step(w.lr, w.group)
    return torch.tensor([rates[id(w.group)] if w.has_grad else 0.0 for w in weights.by_name], dtype=torch.float64)


def _warn_of_rounding(weights: Weights) -> None:
    for w in weights:
        share = decay_per_step(w.lr, w.group)
        if 0.0 < share < torch.finfo(w.value.dtype).eps / 4:  # rounding always undoes such a step
            warnings.warn(
                f"{w.name} is {w.value.dtype}, and a passive weight would lose a share of {share:.2g} of itself per "
                f"step, which is rounded away: it will not shrink at all, even if diagnose() says so. Keep the "
                f"weights in float32, and use torch.autocast",
                stacklevel=5,
            )
            return
