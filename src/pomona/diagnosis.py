"""Will weights that receive no gradient reach zero in this run? Predicted before training, tracked during it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from pomona.weight import Weights

ENOUGH = 7.0  # exp(-7) = 0.0009; the published runs of GSM lie at 8 and above, failures at 2 and below


@dataclass(frozen=True, slots=True)
class Diagnosis:
    r"""How far weight decay and momentum shrink a weight that stays passive for the whole run.

    Such a weight ends at about :math:`\exp(-E)` of its size, with the exponent
    :math:`E = \sum_t \alpha_t \eta (1 - d) / (1 - \beta)` over the steps (learning rate, weight decay, dampening,
    momentum). It is a bound on what a run can do, not a promise: real weights are passive only most of the time, so
    the largest weight that the cut removes is measured too and appears in the report.

    Attributes:
        exponent: E.
        num_steps: number of optimizer steps in the sum.
        remedy: settings that would be enough, with numbers; empty if these are.
    """

    exponent: float
    num_steps: int
    remedy: str = ""

    @property
    def shrinkage(self) -> float:
        """Final size of a passive weight as a share of its initial size."""
        return math.exp(-self.exponent)

    @property
    def is_enough(self) -> bool:
        """Whether passive weights end below a thousandth of their initial size."""
        return self.exponent >= ENOUGH

    def __str__(self) -> str:
        verdict = (
            "enough for passive weights to vanish"
            if self.is_enough
            else f"NOT enough (want {ENOUGH:g}): the final cut will cost accuracy. {self.remedy}"
        )
        return (
            f"decay exponent {self.exponent:.2f} over {self.num_steps:,} steps: passive weights shrink to "
            f"{float(f'{100 * self.shrinkage:.2g}'):g} % of their size; {verdict}"
        )


@runtime_checkable
class Diagnosed(Protocol):
    """A method that can say whether a run will succeed, and whether it has."""

    def forecast(self, groups: Sequence[Mapping[str, Any]]) -> Diagnosis:
        """Whether a run can succeed in which the optimizer's group has these settings, one entry per step."""

    def diagnose(self, weights: Weights, step: int) -> Diagnosis:
        """Whether the run up to ``step`` lets ``harden()`` cut without loss."""


def decay_per_step(lr: float, group: Mapping[str, Any]) -> float:
    """One step's share of the decay exponent, ``lr weight_decay (1 - dampening) / (1 - momentum)``.

    At most ``-log(momentum) / 2``: where decay is so strong that the weight would swing through zero, it still shrinks
    by no more than sqrt(momentum) per step, the modulus of the recursion's complex roots.
    """
    momentum = group["momentum"]
    law: float = lr * group["weight_decay"] * (1.0 - group.get("dampening", 0.0)) / (1.0 - momentum)
    return min(law, _fastest(momentum))


def _fastest(momentum: float) -> float:
    return -0.5 * math.log(momentum) if momentum > 0.0 else math.inf


def diagnose_decay(exponent: float, num_steps: int, group: Mapping[str, Any]) -> Diagnosis:
    """Judge a decay exponent that the group's settings reach, or will reach, in ``num_steps``."""
    remedy = "" if exponent >= ENOUGH else _remedy(exponent, num_steps, group)
    return Diagnosis(exponent, num_steps, remedy)


def _remedy(exponent: float, num_steps: int, group: Mapping[str, Any]) -> str:
    if num_steps == 0:
        return "No step has been taken yet."
    if exponent <= 0.0:
        return "Learning rate and weight decay must be above 0, and dampening below 1."
    missing = ENOUGH / exponent
    ways = [f"{math.ceil(missing * num_steps):,} steps at the same average learning rate"]
    if num_steps * _fastest(group["momentum"]) > 2.0 * ENOUGH:
        ways += [
            f"weight_decay {_rounded_up(missing * group['weight_decay'])} instead of {group['weight_decay']:g}",
            f"learning rates {_rounded_up(missing)} times as high",
        ]
    momentum = math.ceil(1e5 * (1.0 - (1.0 - group["momentum"]) / missing)) / 1e5
    if momentum < 1.0 and num_steps * _fastest(momentum) > 2.0 * ENOUGH:
        ways.insert(0, f"momentum {momentum:.5f} instead of {group['momentum']:g}")
    return f"Enough would be: {', or '.join(ways)}."


def _rounded_up(number: float) -> str:
    """Two significant digits, never less than ``number``."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{float(f'{math.ceil(number / unit) * unit:.2g}'):g}"


def rehearse(
    optimizer: Optimizer, num_steps: int, scheduler: LRScheduler | None = None, *, steps_per_update: int = 1
) -> list[list[dict[str, Any]]]:
    """The settings of each parameter group at the next ``num_steps`` steps, found by rehearsing on a copy.

    Args:
        optimizer: left unchanged.
        num_steps: number of optimizer steps ahead, >= 1.
        scheduler: the one that the loop will call; None: constant rates. Schedulers that need a metric
            (``ReduceLROnPlateau``) cannot be rehearsed.
        steps_per_update: optimizer steps between two calls of ``scheduler.step()``, e.g. ``len(loader)``.
    """
    if num_steps < 1 or steps_per_update < 1:
        raise ValueError(f"num_steps and steps_per_update must be >= 1, got {num_steps} and {steps_per_update}")
    # Schedulers write into a learning rate that is a tensor, so the rehearsal must not share it.
    groups = [copy.deepcopy({**group, "params": [torch.zeros(1)]}) for group in optimizer.param_groups]
    if scheduler is None:
        return [[_settings(group)] * num_steps for group in groups]
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau follows the loss, so its learning rates cannot be known in advance")
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    stand_in.param_groups = groups
    rehearsed = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    ahead: list[list[dict[str, Any]]] = [[] for _ in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() of the scheduler before the optimizer": the rehearsal has no steps
        for step in range(1, num_steps + 1):
            for settings, group in zip(ahead, groups, strict=True):
                now = _settings(group)
                settings.append(settings[-1] if settings and settings[-1] == now else now)  # one dict for equal steps
            if step % steps_per_update == 0:
                rehearsed.step()
    return ahead


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in group.items() if key != "params"}, "lr": float(group["lr"])}
