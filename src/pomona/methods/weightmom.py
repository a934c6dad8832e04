"""WeightMom: pruning by the momentum of |w| (after Johnson, Tang, Samudrala, arXiv 2208.05970; a reading of ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pomona.granularity import Granularity, canonical
from pomona.method import Method, warn_of_starved
from pomona.ops import among, count, drop_buffers_, drop_gradients_, drop_weights_, masks_of, sparsity_of, total
from pomona.schedule import Value, check_count, check_never_falls
from pomona.score import magnitude
from pomona.selection.top_k import top_k_each
from pomona.weight import Weight, Weights

Importance: TypeAlias = Literal["sparsity", "position", "none"]

_TINY = torch.finfo(torch.float32).tiny  # in place of the mean of a layer that is zero throughout


@dataclass(frozen=True, slots=True)
class WeightMom(Method):
    r"""Prunes weights whose magnitude, averaged with momentum, stays below a threshold for many updates.

    Every ``every`` optimizer steps is an update, meant to be once an epoch. At the :math:`e`-th one, in each layer
    :math:`l` with the mask :math:`B` of live weights,

    .. math::
        m &\leftarrow \beta m + (1 - \beta) |w|, \qquad \beta = 1 - 1 / \text{window},
            \qquad \hat m = m / (1 - \beta^e) \\
        s &= I_l \, \hat m / \text{mean}_{B_l}(\hat m) \\
        k &\leftarrow k + 1 \text{ where } s < \theta, \text{ else } 0 \\
        B &\leftarrow 0 \text{ where } k \ge \text{patience}, \text{ once } e \ge \text{window}

    and at each step :math:`w \leftarrow B w`: pruned weights stay zero for good, survivors train on.
    :math:`s < \theta` says that :math:`\hat m` is below the layer's threshold
    :math:`\theta \, \text{mean}_{B_l}(\hat m) / I_l`, which is relative: weight decay that shrinks all weights alike
    prunes none. The importance is :math:`I_l = D / d_l`, with the density :math:`d_l` of the layer and :math:`D` of
    the network: a layer that is sparser than the others is spared.

    :math:`\theta` is either given, ``threshold=0.3``, and then pruning goes on until nothing stays below it or
    ``min_density`` stops it; or it follows from a target, ``sparsity=0.9`` or a schedule of it: at each update it
    is the value below which lie as many of all weights (the pruned ones counted in) as are then to be zero. So the
    pruned share follows the target ``patience`` updates later and never runs ahead of it, and ``harden`` cuts what
    is left by :math:`s` (not by :math:`|w|`) to exactly :math:`\lfloor (1 - \text{sparsity}) N \rfloor`. A run
    should go on for more than ``max(window, patience)`` updates, and for ``patience`` after a ramp has ended; where it
    does not, ``harden`` does the rest at once, by the history there is, or by :math:`|w|` before the first update.

    **What we know of the paper, and from which sources.** We had its abstract (arXiv, and a preprint copy, DOI
    10.22541/au.166012145.54796793) but neither full text nor code. The abstract says: weights are pruned gradually,
    by their momentum over previous iterations; each layer has an importance value from its relative sparsity,
    followed by the magnitude of the weight in previous iterations. A secondary summary says: the momentum is that of
    magnitudes over the last 15 epochs; a weight that stays below a threshold for 10 to 15 epochs is removed; the
    importance comes from the layer's position and its number of parameters.

    **Ours:** every formula above, the form of the average (exponential), ``every``, the normalisation by the layer's
    mean, both modes of :math:`\theta`, the final cut and ``min_density``. No claim is made to match the paper.

    Needs of the optimizer: none; any that the Pruner takes. Memory: 6 bytes per weight (float32 average, count, mask).
    Exact zeros: by themselves, from the update on that prunes; ``harden`` adds those that are missing.

    Args:
        sparsity: target, the fraction of zeros in [0, 1) of the weights in scope, or a schedule of it. Exactly one of
            ``sparsity`` and ``threshold`` is given.
        threshold: theta, > 0, relative to the layer's mean magnitude. Paper: unknown.
        every: optimizer steps between two updates, >= 1; an epoch is ``len(loader)``. Paper: an epoch (secondary).
        window: updates that the average remembers, >= 1; none is pruned before that many. Paper: 15 (secondary).
        patience: updates in a row that a weight must be low before it goes, in [1, 255]. Paper: 10 to 15 (secondary).
        importance: of a layer. ``"sparsity"`` (abstract): :math:`D / d_l`. ``"position"`` (secondary, formula
            unknown, this one ours): :math:`(l \, n_l)^{-1/4}` for the :math:`l`-th layer, counted from 1 in the order
            of ``model.named_parameters()``, of :math:`n_l` weights, divided by the geometric mean of all layers, so
            that early and small layers are spared. ``"none"``: 1.
        min_density: least share that stays of each layer, in [0, 1]: the ``ceil(min_density n)`` largest :math:`m` of
            a layer of n weights are never counted as low. Paper: unknown.
        granularity: what goes together, by a target only: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity``
            must then end at ``1 - n/m``), a block such as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input
            channel"``; see :mod:`pomona.granularity`. Paper: single weights.

    Example:
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> pruner = pomona.Pruner(model, optimizer, WeightMom(0.9, every=1))
        >>> for _ in range(40):
        ...     model(torch.randn(8, 10)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> int(model.weight.count_nonzero()), pruner.harden().nonzero
        (10, 10)

    References:
        Johnson, Tang, Samudrala: WeightMom: Learning Sparse Networks using Iterative Momentum-based pruning.
        2022, arXiv 2208.05970.
    """

    sparsity: Value | None = None
    _: KW_ONLY
    threshold: float | None = None
    every: int
    window: int = 15
    patience: int = 10
    importance: Importance = "sparsity"
    min_density: float = 0.01
    granularity: Granularity = "weight"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError(
                f"WeightMom needs either a target, sparsity=0.9, or a fixed threshold=0.3, got "
                f"sparsity={self.sparsity} and threshold={self.threshold}"
            )
        if self.sparsity is None and canonical(self.granularity) != "weight":
            raise ValueError(
                f"granularity={self.granularity!r} needs a budget, which threshold={self.threshold} is not; give "
                f"sparsity in its place"
            )
        Method.__post_init__(self)
        if self.sparsity is not None:
            check_never_falls("sparsity", self.sparsity)
        if self.threshold is not None:
            _check_number("threshold", self.threshold)
            if not 0.0 < self.threshold < math.inf:
                raise ValueError(
                    f"threshold must be > 0 and finite (a share of the layer's mean magnitude), got {self.threshold}"
                )
        check_count("every", self.every)
        check_count("window", self.window)
        check_count("patience", self.patience)
        if self.patience > 255:
            raise ValueError(f"patience must be in [1, 255], got {self.patience}; update less often (every) instead")
        if self.importance not in get_args(Importance):
            raise ValueError(f"importance must be one of {', '.join(get_args(Importance))}, got {self.importance!r}")

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {
            "m": torch.zeros_like(w.value, dtype=torch.float32),
            "count": torch.zeros_like(w.value, dtype=torch.uint8),
            "mask": torch.ones_like(w.value, dtype=torch.bool),
        }

    def init_shared(self, weights: Weights) -> dict[str, Tensor]:
        return {"updates": torch.zeros((), dtype=torch.int64, device="cpu")}

    def before_step(self, weights: Weights, step: int) -> None:
        drop_gradients_(weights, masks_of(weights))

    def after_step(self, weights: Weights, step: int) -> None:
        if step % self.every == 0:
            self._update(weights, step)
        drop_weights_(weights, masks_of(weights))

    def _update(self, weights: Weights, step: int) -> None:
        weights.shared["updates"] += 1
        for w in weights:
            w.state["m"].lerp_(magnitude(w.value).tensor(), 1.0 / self.window)
        for w, stays in zip(weights, self._stays(weights, step), strict=True):
            count, mask = w.state["count"], w.state["mask"]  # k, B
            count.add_(count < 255).mul_(mask & ~stays)  # uint8
        if int(weights.shared["updates"]) >= self.window:
            self._prune(weights)
        drop_buffers_(weights, masks_of(weights))

    def _prune(self, weights: Weights) -> None:
        masks = [mask & (w.state["count"] < self.patience) for w, mask in zip(weights, masks_of(weights), strict=True)]
        warn_of_starved(self, weights, masks, before=masks_of(weights))
        for w, mask in zip(weights, masks, strict=True):
            w.state["mask"].copy_(mask)
            w.state["count"].mul_(mask)

    def _stays(self, weights: Weights, step: int) -> list[Tensor]:
        """Which weights are not low now."""
        scores = self._scores(weights)
        if self.threshold is None:
            return self.budget.keep(scores, step, of=weights).masks()
        budget = self.budget
        spared = top_k_each(scores, [budget.floor(w) for w in weights], of=weights)
        return [(s >= self.threshold) | mask for s, mask in zip(scores, spared, strict=True)]

    def _scores(self, weights: Weights) -> list[Tensor]:
        """s of live weights, above 0, and 0 for pruned ones."""
        masks = masks_of(weights)
        # m for m_hat: 1 / (1 - beta^e) is the same for all weights of a layer and cancels in s.
        has_history = bool(weights.shared["updates"])
        ms = [w.state["m"] if has_history else magnitude(w.value).tensor() for w in weights]
        sums = total([m * mask for m, mask in zip(ms, masks, strict=True)], of=weights)
        live = count(masks, of=weights)
        scores = []
        for m, mask, one, num, importance in zip(ms, masks, sums, live, self._importance(weights, live), strict=True):
            mean = one / max(num, 1)
            scores.append(among((m / max(mean, _TINY)).mul_(importance), mask))
        return scores

    def _importance(self, weights: Sequence[Weight], num_live: Sequence[int]) -> list[float]:
        """I of each layer."""
        sizes = torch.tensor([w.numel for w in weights], dtype=torch.float64)
        if self.importance == "sparsity":
            live = torch.tensor(num_live, dtype=torch.float64)
            importance = live.sum() / sizes.sum() / (live / sizes)  # infinite for an empty layer, which has no scores
        elif self.importance == "position":
            raw = (torch.arange(1, len(weights) + 1) * sizes) ** -0.25
            importance = raw / raw.log().mean().exp()
        else:
            importance = torch.ones_like(sizes)
        return [float(i) for i in importance]

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return masks_of(weights) if self.sparsity is None else self._stays(weights, step)

    def unfinished(self, weights: Weights, step: int) -> str:
        num = int(weights.shared["updates"])
        least = max(self.window, self.patience)
        if num >= least:
            return ""
        rest = "nothing is pruned yet" if self.sparsity is None else "the final cut does it all at once"
        return (
            f"WeightMom first prunes at update max(window, patience) = {least}, one each {self.every:,} steps, and "
            f"has made {num}; {rest}"
        )

    def why(self, w: Weight, kept: int, density: float) -> str:
        return self.budget.why(w, kept, density, by="the running mean of |w|")

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {
            "sparsity": sparsity_of(weights),
            "waiting": float(sum(count([w.state["count"] for w in weights], of=weights))),
            "updates": float(weights.shared["updates"]),
        }


def _check_number(name: str, number: object) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {number!r}")
