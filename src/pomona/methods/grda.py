"""gRDA, directional pruning: generalised regularised dual averaging (Chao et al., NeurIPS 2020, arXiv 2006.09358)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pomona.method import Method
from pomona.ops import soft_threshold, sparsity_of
from pomona.schedule import check_count, check_value
from pomona.score import magnitude
from pomona.selection import kth_largest
from pomona.weight import Weight, Weights

# What torch.optim.SGD offers and gRDA does not support. (Nesterov needs momentum.)
_REFUSED = {
    "momentum": "its theory and the growth of its threshold are for plain SGD; dual averaging has no velocity",
    "dampening": "it belongs to momentum, which dual averaging does not have",
    "weight_decay": "it would act on w, while v, which decides, does not see it",
    "maximize": "its accumulators descend; negate the loss instead",
}

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class GRDA(Method):
    r"""SGD moves a hidden copy of the weights; the network sees it soft-thresholded, by a threshold that grows.

    With the accumulators :math:`v`, at first a copy of the weights :math:`w`, and a threshold :math:`\tau`, at first 0,
    the n-th step is

    .. math::
        v &\leftarrow v - \gamma \, \partial L / \partial w \\
        \tau &\leftarrow \tau + c \, \gamma^{\mu + 1/2} \, (n^\mu - (n - 1)^\mu) \\
        w &\leftarrow \operatorname{sign}(v) \max(|v| - \tau, 0)

    with the learning rate :math:`\gamma` of that step. While it is constant, :math:`\tau = c \, \gamma^{1/2}
    (n \gamma)^\mu`; when it drops, :math:`\tau` grows more slowly and never falls. Zero weights are not masked: their
    :math:`v` goes on collecting gradients, and they come back once :math:`|v| > \tau`. How sparse the network becomes
    is an outcome of :math:`c`, :math:`\mu`, the learning rates and the length of the run. ``c=0`` is plain SGD, bit
    for bit.

    Needs of the optimizer: ``torch.optim.SGD`` without momentum and weight decay, for the weights in scope. Memory:
    one float32 copy, v, as much as a momentum buffer. Exact zeros: by itself, after every step, so that ``harden``
    removes nothing (but before step T, see below); from then on plain SGD trains what is left.

    The authors prune and count all parameters, biases and norms too: ``Pruner(..., scope=Scope(also="*"))``. The
    default scope leaves these dense. They train from random weights; trained ones are a valid start, but neither theory
    nor results are about them. After the first step v decides: edits of the weights by hand are overwritten.

    A target instead of ``c`` (ours, not the paper's): with ``sparsity`` and ``steps=T`` the threshold has the same
    shape and ends where only ``floor((1 - sparsity) N)`` weights exceed it. Let :math:`q` be the largest :math:`|v|`
    that is to become zero, over all weights in scope. At step n the n-th share of the rest of the way is taken,

    .. math::
        \tau \leftarrow \tau + \max(0, q - \tau) \frac{n^\mu - (n - 1)^\mu}{T^\mu - (n - 1)^\mu}

    so that :math:`\tau` follows :math:`n^\mu` while :math:`q` stays, and is :math:`q` at :math:`n = T`. From then on it
    follows :math:`q` upwards only. One threshold serves all parameter groups, whatever their learning rates. ``harden``
    keeps the largest :math:`|w|` within the budget, which cuts only before step T. All this takes one selection over
    all of v a step, and waits for the device.

    Differences from the authors' code: v is float32 under half-precision weights too (float64 under float64), and the
    threshold is float64. As there, each tensor has its own n and threshold, so that one without a gradient in a step
    keeps both, and its v.

    Args:
        c: strength >= 0. Paper: 0 < c < 0.005, the largest that does not cost accuracy in the first epochs. Either
            this or ``sparsity``.
        mu: exponent in (0, 1); a larger one prunes more, and more of it late. Paper: in (0.5, 1), recommended 0.501,
            0.51 and 0.55.
        sparsity: fraction of zeros in [0, 1) of the weights in scope, reached at step ``steps`` and not left again
            (ties may zero more).
        steps: optimizer steps until then, >= 1; with ``sparsity`` only.

    Example:
        >>> model = nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = pomona.Pruner(model, optimizer, GRDA(c=1e-3, mu=0.501), scope=pomona.Scope(also="*"))

    References:
        Chao, Wang, Xing, Cheng: Directional Pruning of Deep Neural Networks. NeurIPS 2020, arXiv 2006.09358.
    """

    _: KW_ONLY
    c: float | None = None
    mu: float = 0.51
    sparsity: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.c is None) == (self.sparsity is None):
            got = "neither" if self.c is None else "both"
            raise ValueError(
                f"GRDA takes either c or sparsity, got {got}; e.g. GRDA(c=1e-3) or GRDA(sparsity=0.9, steps=10_000)"
            )
        for name in ("c", "mu", "sparsity"):
            number = getattr(self, name)
            is_left_out = number is None and name != "mu"
            if not is_left_out and (isinstance(number, bool) or not isinstance(number, (int, float))):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if not 0.0 < self.mu < 1.0:
            raise ValueError(f"mu must be in (0, 1), got {self.mu}; the paper recommends 0.501, 0.51 and 0.55")
        if self.c is not None:
            check_value("c", self.c, low=0.0, high=math.inf)
        Method.__post_init__(self)
        if self.sparsity is None:
            if self.steps is not None:
                raise ValueError(f"steps is for sparsity only, which c does not aim at, got steps={self.steps}")
            return
        if self.steps is None:
            raise ValueError(f"steps must be given with sparsity={self.sparsity:g}: the step at which it is reached")
        check_count("steps", self.steps)

    def check(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        name = type(optimizer).__name__
        if name != "SGD":
            raise ValueError(
                f"GRDA cannot prune with {name}: it is plain SGD on its accumulators, and would discard {name}'s own "
                f"steps; use torch.optim.SGD(..., lr=...), or a method that works with {name}, such as Magnitude"
            )
        for group in groups:
            _check_group(group)

    def init(self, w: Weight) -> dict[str, Tensor]:
        # Half precision would not do: 1e-5 added to 0.7 is 0.7 there, however often.
        dtype = torch.promote_types(w.value.dtype, torch.float32)
        return {
            "v": torch.zeros_like(w.value, dtype=dtype),
            "threshold": torch.zeros((), dtype=torch.float64, device="cpu"),
            "n": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def init_shared(self, weights: Weights) -> dict[str, Tensor]:
        return {} if self.sparsity is None else {"threshold": torch.zeros((), dtype=torch.float64, device="cpu")}

    def before_step(self, weights: Weights, step: int) -> None:
        for w in weights:
            _check_group(w.group)  # a loaded state of the optimizer may have brought momentum or decay
        moving = [w for w in weights if w.has_grad]
        for w in weights if step == 1 else ():
            w.state["v"].copy_(w.value)
        for w in moving:
            w.state["v"].add_(w.grad, alpha=-w.lr)
            w.state["n"] += 1
        if self.c is not None:
            for w in moving:
                n = int(w.state["n"])
                w.state["threshold"] += self.c * w.lr ** (self.mu + 0.5) * (n**self.mu - (n - 1) ** self.mu)
        elif moving:
            weights.shared["threshold"].fill_(self._approach(weights, step))
            for w in moving:
                w.state["threshold"].copy_(weights.shared["threshold"])

    def after_step(self, weights: Weights, step: int) -> None:
        for w in weights:
            if w.has_grad:
                w.value.copy_(soft_threshold(w.state["v"], float(w.state["threshold"])))

    def _approach(self, weights: Weights, step: int) -> float:
        """The one threshold of a run with a target, at ``step``."""
        assert self.sparsity is not None and self.steps is not None
        scores = [magnitude(w.state["v"]) for w in weights]
        q = kth_largest(scores, self.budget.num_kept(weights.numel, step) + 1, of=weights)
        threshold = float(weights.shared["threshold"])
        left = 0.0  # of the way, after this step
        if step < self.steps:
            whole = self.steps**self.mu
            left = (whole - step**self.mu) / (whole - (step - 1) ** self.mu)
        return max(threshold, q - (q - threshold) * left)  # exactly q where nothing is left

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        if self.sparsity is None:
            return [w.value != 0 for w in weights]
        tau = float(weights.shared["threshold"])
        # A tensor that rested is behind the common threshold; it ranks as if it had taken it.
        behind = [tau - float(w.state["threshold"]) for w in weights]
        scores = [magnitude(soft_threshold(w.value, d)) for w, d in zip(weights, behind, strict=True)]
        return self.budget.keep(scores, step, of=weights).masks()

    def unfinished(self, weights: Weights, step: int) -> str:
        if self.steps is None or step >= self.steps:
            return ""
        return f"GRDA reaches sparsity={self.sparsity:g} at step {self.steps:,}, and what is missing is cut off"

    def why(self, w: Weight, kept: int, density: float) -> str:
        return self.budget.why(w, kept, density, by="the threshold on |v|")

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {"threshold": max(float(w.state["threshold"]) for w in weights), "sparsity": sparsity_of(weights)}


def _check_group(group: Mapping[str, Any]) -> None:
    for key, reason in _REFUSED.items():
        if group.get(key):
            raise ValueError(
                f"GRDA does not support SGD({key}={group[key]}): {reason}; leave {key} out for the weights in scope"
            )
