"""ADMM: progressive ADMM weight pruning (Ye et al., arXiv 1810.07378)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from pomona.budget import num_kept
from pomona.granularity import Granularity, parse
from pomona.method import Method
from pomona.ops import count, drop_gradients_, drop_weights_, total
from pomona.schedule import Schedule, Value, check_count, check_value, value_at
from pomona.scope import matches
from pomona.score import Scoring, rule_of
from pomona.selection.allocation import Allocation
from pomona.selection.groups import group_size
from pomona.selection.top_k import top_k_each
from pomona.weight import Weight, Weights


@dataclass(frozen=True, slots=True)
class ADMM(Method):
    r"""Pulls the weights towards their own pruned copy, which is made anew every few thousand steps.

    With the weights :math:`W_i` of layer :math:`i`, the loss :math:`L` and the projection :math:`\Pi` that keeps the
    largest magnitudes and zeroes the rest,

    .. math::
        Z_i &= \Pi(W_i), \quad U_i = 0 && \text{before the first step} \\
        Z_i &\leftarrow \Pi(W_i + U_i), \quad U_i \leftarrow U_i + W_i - Z_i
            && \text{before each further ADMM iteration of ``every`` steps} \\
        g_i &= \partial L / \partial W_i + \rho_i (W_i - Z_i + U_i) && \text{at each step}

    where :math:`g_i` is the gradient that the optimizer gets; the second term is that of the squared penalty
    :math:`\rho_i / 2 \, \|W_i - Z_i + U_i\|^2`. :math:`\rho_i = 0` for a layer that has nothing left to prune. The
    cut at the end (``harden``) is :math:`\Pi(W)`, by the weights and not by :math:`Z`. It costs accuracy; the paper's
    masked retraining wins it back, and is to go on training after ``harden``.

    In the paper :math:`\Pi` keeps :math:`l_i` weights of each layer, and the :math:`l_i` are chosen by hand
    (``densities``). Here they may also follow from one ``sparsity``, allocated by ``allocation``. With ``"global"``
    :math:`\Pi` ranks all layers together, and so does the cut: it is the projection onto the set that ADMM
    approached, and of all cuts to that many weights it changes the network's weights least. (The counts that each
    layer has in :math:`Z` would be a cut onto a smaller set, as old as the last ADMM iteration.)

    Needs of the optimizer: none; the authors use SGD with momentum, and Adam. The pull is a gradient, so Adam
    rescales it with the rest. Weight decay stays on. Memory: two float32 copies, Z and U, and one byte with
    ``hold_zeros``. Exact zeros: only after ``harden``.

    Differences from the authors' code: exactly :math:`l_i = \lfloor d_i n_i \rfloor` weights are kept, ties by
    position, where theirs keeps all from the pivot up; masks are of weights only, where theirs also freezes a bias
    that is exactly zero; learning rates are the user's schedule; ``"global"``, ``"uniform"``, ``"erk"`` and
    ``min_density`` are ours.

    Args:
        sparsity: fraction of zeros in [0, 1) of all weights in scope, counted from the dense network in every round.
            Either this or ``densities``.
        densities: shell pattern over the full parameter name, or over that of its module, as in ``Scope`` -> share
            of that layer to keep, in (0, 1]; each weight in scope matches exactly one. Paper (LeNet-5 at 71.2x):
            0.2, 0.08, 0.009, 0.07.
        rho: strength of the pull >= 0, or a schedule of it, which is read at the first step of each ADMM iteration.
            Paper: 1.5e-3, and 3e-3 for high rates; 1e-4 to 7e-3 on MNIST.
        every: steps of one ADMM iteration, >= 1. Paper: 5,000 to 8,000 on MNIST, 60,000 for AlexNet.
        allocation: where ``sparsity`` goes: ``"global"``, ``"uniform"`` or ``"erk"``, see :class:`pomona.Budget`.
        hold_zeros: masked ADMM, for the second and later rounds: weights that are exactly zero before the first step
            stay so. A tensor that is zero throughout is warned of.
        min_density: with ``"global"``, the least share that stays of each layer, in [0, 1]. Paper: none.
        granularity: what goes together: ``"weight"``, ``"n:m"`` such as ``"2:4"`` (``sparsity`` must then end at
            ``1 - n/m``), a block such as ``"1x4"`` or ``(1, 4)``, ``"channel"`` or ``"input channel"``; see
            :mod:`pomona.granularity`. Paper: single weights.
        score: what :math:`\Pi` ranks the weights by: ``"magnitude"``, with which it is the projection; ``"lamp"``,
            with which it is the projection onto the counts per layer that this finds (``"global"`` only); or a function
            of a Weight, whose ``value`` is what is projected. See :class:`pomona.Budget`. Paper: magnitude.

    Example:
        >>> model = nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        >>> pruner = pomona.Pruner(model, optimizer, ADMM(sparsity=0.9, rho=1.5e-3, every=1000))

    References:
        Ye, Zhang, Zhang, Li, Xu, Yang, Yu, Tang, Fardad, Liu, Chen, Lin, Wang: Progressive Weight Pruning of Deep
        Neural Networks using ADMM. 2018, arXiv 1810.07378.
    """

    sparsity: float | None = None
    _: KW_ONLY
    densities: Mapping[str, float] | None = None
    rho: Value = 1.5e-3
    every: int = 1000
    allocation: Allocation = "global"
    hold_zeros: bool = False
    min_density: float = 1e-4
    granularity: Granularity = "weight"
    score: Scoring = "magnitude"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.densities is None):
            got = "neither" if self.sparsity is None else "both"
            raise ValueError(f"ADMM takes either sparsity or densities, got {got}; e.g. ADMM(sparsity=0.9)")
        if isinstance(self.sparsity, Schedule):
            raise TypeError(
                f"ADMM's sparsity is one number for the whole round, got {self.sparsity}; raise it from round to round "
                f"(pomona.progressive)"
            )
        Method.__post_init__(self)
        if self.densities is not None:
            # A copy, sorted: the same text for the same shares, by which load_state_dict() knows the method.
            object.__setattr__(self, "densities", _check_densities(self.densities))
        check_value("rho", self.rho, low=0.0, high=math.inf)
        check_count("every", self.every)
        if self.densities is not None and self.allocation != "global":
            raise ValueError(
                f"allocation={self.allocation!r} allocates a sparsity to the layers, which densities do by name; leave "
                f"one of the two out"
            )
        if self.densities is not None and rule_of(self.score) is not None:
            raise ValueError(
                f"score={self.score!r} makes layers comparable in one ranking, and densities give each its share "
                f"without one; leave one of the two out"
            )
        if not isinstance(self.hold_zeros, bool):
            raise TypeError(f"hold_zeros must be True or False, got {self.hold_zeros!r}")

    def check_weights(self, weights: Weights) -> None:
        if self.densities is not None:
            _check_patterns(self.densities, [w.name for w in weights])
        self.budget.check_weights(weights)
        for w, most in zip(weights, self._counts(weights) or (), strict=False):
            if most < group_size(parse(self.granularity), w) and w.numel:
                raise ValueError(
                    f"{self} keeps none of the {w.numel} weights of {w.name}; keep more of it, or leave it "
                    f"dense: Scope(exclude=[{w.name!r}])"
                )

    def init(self, w: Weight) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(w.value, dtype=torch.float32) for name in ("z", "u")}
        if self.hold_zeros:
            state |= {
                "alive": torch.zeros_like(w.value, dtype=torch.bool),
                "num_alive": torch.zeros((), dtype=torch.int64, device="cpu"),
            }
        return state

    def before_step(self, weights: Weights, step: int) -> None:
        steps_since = (step - 1) % self.every  # the iteration began
        if step == 1 and self.hold_zeros:
            for w, num in zip(weights, count([w.value for w in weights], of=weights), strict=True):
                w.state["alive"].copy_(w.value != 0)
                w.state["num_alive"].fill_(num)
            _warn_of_zeros(weights)
        if steps_since == 0:
            self._begin_iteration(weights, step)
        rho = value_at(self.rho, step - steps_since)
        for w, must_shrink in zip(weights, self._must_shrink(weights), strict=True):
            z, u = w.state["z"], w.state["u"]
            uphill = -1.0 if w.group.get("maximize") else 1.0  # the optimizer negates all of the gradient
            w.grad.add_((w.value - z).add_(u).mul_(rho * must_shrink), alpha=uphill)
        if self.hold_zeros:
            drop_gradients_(weights, [w.state["alive"] for w in weights])

    def after_step(self, weights: Weights, step: int) -> None:
        if self.hold_zeros:
            drop_weights_(weights, [w.state["alive"] for w in weights])

    def _begin_iteration(self, weights: Weights, step: int) -> None:
        for w in weights:
            w.state["z"].copy_(w.value).add_(w.state["u"])
        masks = self._project([replace(w, value=w.state["z"]) for w in weights])
        for w, mask in zip(weights, masks, strict=True):
            z, u = w.state["z"], w.state["u"]
            z.masked_fill_(~mask, 0.0)
            if step > 1:
                u.add_(w.value).sub_(z)

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return self._project(weights)

    def _project(self, weights: Sequence[Weight]) -> list[Tensor]:
        """Where the projection of these values is not zero."""
        budget = self.budget
        if self.densities is None:
            return budget.survivors(weights, 0).masks()
        counts = self._l(weights, self.densities)
        return top_k_each(budget.scores(weights), counts, of=weights, granularity=self.granularity)

    def _counts(self, weights: Weights) -> list[int] | None:
        """How many weights each layer keeps; None if all layers share one count."""
        return self.budget.counts(weights, 0) if self.densities is None else self._l(weights, self.densities)

    @staticmethod
    def _l(weights: Sequence[Weight], densities: Mapping[str, float]) -> list[int]:
        """The paper's l_i."""
        return [num_kept(1.0 - _find(densities, w.name), w.numel) for w in weights]

    def _must_shrink(self, weights: Weights) -> list[bool]:
        """Whether more weights are left in a layer than it may keep; elsewhere rho is 0."""
        counts = self._counts(weights)
        if counts is None:
            return [True] * len(weights)
        if self.hold_zeros:
            return [int(w.state["num_alive"]) > most for w, most in zip(weights, counts, strict=True)]
        return [w.numel > most for w, most in zip(weights, counts, strict=True)]

    def unfinished(self, weights: Weights, step: int) -> str:
        if step > self.every:
            return ""
        return (
            f"the first ADMM iteration takes every={self.every:,} steps, and Z has not been projected anew; this is "
            f"magnitude pruning of weights that were pulled once"
        )

    def why(self, w: Weight, kept: int, density: float) -> str:
        return "its share by densities" if self.densities is not None else self.budget.why(w, kept, density)

    def metrics(self, weights: Weights) -> dict[str, float]:
        """How near ADMM is to done, over the layers that must shrink; nothing before the first step.

        ``primal_residual`` is ``||W - Z|| / ||W||``; ``overlap`` is the share of Z's support that ``harden()`` would
        keep now.
        """
        masks = self.support(weights, 0)
        chosen = [(w, mask) for w, mask, must in zip(weights, masks, self._must_shrink(weights), strict=True) if must]
        shrinking = [w for w, _ in chosen]
        num_chosen = sum(count([w.state["z"] for w in shrinking], of=shrinking))
        if num_chosen == 0:
            return {}
        distance = _norm([w.value - w.state["z"] for w in shrinking], shrinking)
        num_agreed = sum(count([(w.state["z"] != 0).logical_and_(mask) for w, mask in chosen], of=shrinking))
        return {
            "primal_residual": distance / _norm([w.value for w in shrinking], shrinking),
            "overlap": num_agreed / num_chosen,
        }


def _warn_of_zeros(weights: Weights) -> None:
    names = [w.name for w in weights if w.numel and not w.state["num_alive"]]
    if names:
        warnings.warn(
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} zero throughout and will stay so with "
            f"hold_zeros=True; Scope(exclude=[{names[0]!r}]) lets it train",
            stacklevel=3,
        )


def _check_densities(densities: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(densities, Mapping) or not densities:
        raise TypeError(f"densities must be a mapping such as {{'conv*': 0.2, 'fc*': 0.05}}, got {densities!r}")
    for pattern, density in densities.items():
        if not isinstance(pattern, str):
            raise TypeError(f"densities has strings such as 'conv*' for keys, got {pattern!r}")
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"densities[{pattern!r}] must be a number, got {density!r}")
        if not 0.0 < density <= 1.0:
            raise ValueError(f"densities[{pattern!r}] must be in (0, 1], the share to keep, got {density}")
    return {pattern: float(densities[pattern]) for pattern in sorted(densities)}


def _check_patterns(densities: Mapping[str, float], names: Sequence[str]) -> None:
    for name in names:
        found = [pattern for pattern in densities if matches(name, pattern)]
        if len(found) != 1:
            those = f"{len(found)} patterns of densities ({', '.join(found)})" if found else "no pattern of densities"
            raise ValueError(
                f"{name} matches {those}; each weight in scope must match exactly one. Keep it whole with "
                f"densities={{{name!r}: 1.0, ...}}, or leave it out: Scope(exclude=[{name!r}])"
            )
    for pattern in densities:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"densities[{pattern!r}] matches no weight in scope; these are {', '.join(names)}")


def _find(densities: Mapping[str, float], name: str) -> float:
    return next(density for pattern, density in densities.items() if matches(name, pattern))


def _norm(tensors: Sequence[Tensor], weights: Sequence[Weight]) -> float:
    return math.sqrt(math.fsum(total([t.float().square() for t in tensors], of=weights)))
