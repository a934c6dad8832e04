"""GSM: Global Sparse Momentum SGD (Ding et al., NeurIPS 2019, arXiv 1909.12778)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pomona.diagnosis import Diagnosis, decay_per_step, diagnose_decay
from pomona.granularity import Granularity
from pomona.method import Method
from pomona.ops import check_finite, count, drop_gradients_, sum_of
from pomona.pages.text import few
from pomona.schedule import Value
from pomona.score import Score, Scoring, saliency
from pomona.weight import Weight, Weights

if TYPE_CHECKING:
    from torch.optim import Optimizer

_Zeros: TypeAlias = Literal["learn", "paper"]


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

    **Tensors that begin as zeros** (LoRA's B, zero convolutions, the last layer of a residual branch) would never learn
    by the paper's rule: all their :math:`T` are 0. Here (ours) their weights are ranked as if they had begun at the
    size that ``torch.nn.Linear`` draws and had been passive since: by
    :math:`T = \max(|w|, e^{-E} / \sqrt{3 n}) \, |\partial L / \partial w|` with :math:`n` inputs and the decay
    exponent :math:`E` so far. Once a weight is larger than that, this is the paper's :math:`T`. Never are more than
    ``Q`` weights active. Which tensors these are is asked once, before the first step; each takes a copy of :math:`|w|`
    while it is ranked. Networks without one are trained bit for bit by the paper's rule.

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
        score: what the final cut ranks the weights by: ``"magnitude"``, ``"lamp"``, or a function of a Weight; see
            :class:`pomona.Budget`. It does not change :math:`T`, which is fair by itself: in a layer of larger weights
            gradients are smaller. Paper: magnitude.
        zeros: ``"learn"``: tensors that are zero throughout before the first step learn, as above; ``"paper"``: they
            stay zero, of which a warning at construction tells the names.

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
    zeros: _Zeros = "learn"

    checks_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        if self.zeros not in get_args(_Zeros):
            raise ValueError(f"zeros must be one of {', '.join(map(repr, get_args(_Zeros)))}, got {self.zeros!r}")

    def before_step(self, weights: Weights, step: int) -> None:
        if step == 1 and self.zeros == "learn":
            weights.shared["began_zero"].copy_(_are_zero(weights))
        t = self._saliencies(weights)
        b = self.budget.keep(t, step, of=weights)
        check_finite(weights, b)
        drop_gradients_(weights, b)  # z <- beta z + eta w + B dL/dw, w <- w - alpha z: the optimizer's own step
        weights.shared["active"].copy_(sum_of(b.counts))
        weights.shared["exponent"].add_(_decay(weights))

    def _saliencies(self, weights: Weights) -> list[Score]:
        """T of all weights; where a tensor began as zeros, of weights no smaller than a passive one would be by now."""
        t = [saliency(w.value, w.grad) for w in weights]
        if not weights.shared["began_zero"].any():
            return t
        names = [w.name for w in weights.by_name]
        began_zero = dict(zip(names, weights.shared["began_zero"].tolist(), strict=True))
        exponent = dict(zip(names, weights.shared["exponent"].tolist(), strict=True))
        for i, w in enumerate(weights):
            if began_zero[w.name]:
                least = _usual_size(w) * math.exp(-exponent[w.name])
                t[i] = saliency(w.value.abs().clamp_(min=least), w.grad)
        return t

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return self.budget.survivors(weights, step).masks()

    def init_shared(self, weights: Weights) -> dict[str, Tensor]:
        return {
            "active": torch.zeros((), dtype=torch.int64, device=weights[0].value.device),
            "exponent": torch.zeros(len(weights), dtype=torch.float64, device="cpu"),
            "began_zero": torch.zeros(len(weights), dtype=torch.bool, device="cpu"),
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
        if self.zeros == "paper":
            _warn_of_zeros(weights)

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


def _are_zero(weights: Weights) -> Tensor:
    """Of each tensor, by name, whether all its weights are zero."""
    by_name = weights.by_name
    counts = count([w.value for w in by_name], of=by_name)
    return torch.tensor([num == 0 < w.numel for w, num in zip(by_name, counts, strict=True)])


def _usual_size(w: Weight) -> float:
    """How large torch initialises the weights of a layer with as many inputs: the root of their mean square."""
    return 1.0 / math.sqrt(3.0 * max(1, math.prod(w.matrix_shape[1:])))


def _decay(weights: Weights) -> Tensor:
    """What this step adds to the decay exponent of each tensor, by name; nothing if it has no gradient."""
    rates: dict[int, float] = {}  # of each parameter group
    for w in weights:
        if id(w.group) not in rates:
            rates[id(w.group)] = decay_per_step(w.lr, w.group)
    return torch.tensor([rates[id(w.group)] if w.has_grad else 0.0 for w in weights.by_name], dtype=torch.float64)


def _warn_of_zeros(weights: Weights) -> None:
    names = [w.name for w, is_zero in zip(weights.by_name, _are_zero(weights).tolist(), strict=True) if is_zero]
    if names:
        is_zero, their, them = ("is", "its", "it") if len(names) == 1 else ("are", "their", "them")
        warnings.warn(
            f"{few(names, 5)} {is_zero} zero throughout, and with zeros='paper' will stay so, for all {their} scores "
            f"|w g| are zero; take zeros='learn', or leave {them} out: Scope(exclude={names})",
            stacklevel=5,
        )


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
