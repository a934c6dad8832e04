"""The parts of a recipe: stages of training, rounds of pruning, published numbers; each field with its range."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, get_type_hints


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the place, the key, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The numbers from ``low`` to ``high``; ``ends`` says whether these two belong to it, as in ``[0, 1)``."""

    low: float
    high: float = math.inf
    ends: str = "[)"

    def __contains__(self, number: float) -> bool:
        above = number >= self.low if self.ends[0] == "[" else number > self.low
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>=' if self.ends[0] == '[' else '>'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


_PERCENT = Interval(0, 100, "[]")

OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training run: a fresh optimizer, a linear warm-up from 0, then a rate that falls in steps.

    Args:
        epochs: length.
        lr: learning rate after the warm-up.
        lr_drops: epochs after which the rate is multiplied by ``lr_drop``; increasing, in [1, epochs - 1].
        lr_drop: the factor.
        lr_fall: first and last epoch of a linear decrease from ``lr`` to ``lr * lr_drop``, epoch by epoch, instead of
            ``lr_drops``; two numbers in [0, epochs], the first below the second.
        lr_restart: number of epochs after which the rate starts again at ``lr``, repeatedly; ``lr_drops`` count from
            each restart (ADMM's authors restart at each of its iterations). In [0, epochs]; 0: never.
        warmup_epochs: length of the warm-up; in [0, epochs].
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"`` (the last two with torch's default betas).
        momentum: momentum of SGD as PyTorch defines it (no dampening).
        nesterov: use Nesterov momentum; needs momentum > 0.
        weight_decay: coupled L2 (decoupled for AdamW) of weights only: biases and norms never decay.
        bias_lr: learning rate of biases, as a multiple of ``lr``.
    """

    epochs: Annotated[int, Interval(1)]
    lr: Annotated[float, Interval(0, ends="()")]
    lr_drops: tuple[int, ...] = ()
    lr_drop: Annotated[float, Interval(0, 1, "(]")] = 0.1
    lr_fall: tuple[int, ...] | None = None
    lr_restart: int = 0
    warmup_epochs: int = 0
    optimizer: str = "sgd"
    momentum: Annotated[float, Interval(0, 1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Interval(0)] = 0.0
    bias_lr: Annotated[float, Interval(0)] = 1.0

    def __post_init__(self) -> None:
        check_intervals(self)
        check_interval("warmup_epochs", self.warmup_epochs, Interval(0, self.epochs, "[]"))
        check_interval("lr_restart", self.lr_restart, Interval(0, self.epochs, "[]"))
        if self.optimizer not in OPTIMIZERS:
            raise RecipeError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {written(self.optimizer)}")
        end = self.lr_restart or self.epochs
        if any(epoch >= later for epoch, later in pairwise((0, *self.lr_drops, end))):
            allowed, together = f"strictly increasing, in [1, {end - 1}]", "lr_restart" if self.lr_restart else "epochs"
            raise RecipeError(f"lr_drops must be {allowed}, got {list(self.lr_drops)}; set it together with {together}")
        if self.lr_fall is not None:
            if self.lr_drops or self.lr_restart:
                raise RecipeError("lr_fall replaces lr_drops and lr_restart; leave them out")
            if len(self.lr_fall) != 2 or not 0 <= self.lr_fall[0] < self.lr_fall[1] <= self.epochs:
                allowed = f"two epochs in [0, {self.epochs}], the first below the second"
                raise RecipeError(f"lr_fall must be {allowed}, got {list(self.lr_fall)}; set it together with epochs")
        if self.momentum > 0 and self.optimizer != "sgd":
            raise RecipeError(f"momentum must be 0 with {self.optimizer}, which has its own, got {self.momentum:g}")
        if self.nesterov and self.momentum == 0:
            raise RecipeError("nesterov must be false if momentum is 0, got true")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of ``step``, counted from 0.

        Example:
            >>> Stage(epochs=4, lr=0.5, lr_drops=(2,), warmup_epochs=1).learning_rates(2)
            [0.0, 0.25, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        lr = self.lr * step / warmup if step < warmup else self.lr
        if self.lr_fall:
            first, last = self.lr_fall
            fallen = min(1.0, max(0.0, (step // steps_per_epoch - first) / (last - first)))
            return lr * (1 - fallen * (1 - self.lr_drop))
        since = step % (self.lr_restart * steps_per_epoch) if self.lr_restart else step
        num_drops = sum(since >= epoch * steps_per_epoch for epoch in self.lr_drops)
        return lr * self.lr_drop**num_drops

    def learning_rates(self, steps_per_epoch: int) -> list[float]:
        """The learning rates of all steps of the stage."""
        return [self.learning_rate(step, steps_per_epoch) for step in range(self.epochs * steps_per_epoch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The published numbers: test accuracies in percent, after the last step of each training.

    Args:
        tolerance: how far below them a run may end, in percentage points.
        base_accuracy: accuracy of the dense network.
        accuracy: accuracy of the pruned network, after the cut.
        ticket_accuracy: accuracy of the initial weights trained with the method's mask (``pomona ticket``).
        magnitude_ticket_accuracy: the same with the largest weights of the dense network as the mask.
    """

    tolerance: Annotated[float, Interval(0, ends="()")]
    base_accuracy: Annotated[float | None, _PERCENT] = None
    accuracy: Annotated[float | None, _PERCENT] = None
    ticket_accuracy: Annotated[float | None, _PERCENT] = None
    magnitude_ticket_accuracy: Annotated[float | None, _PERCENT] = None

    def __post_init__(self) -> None:
        check_intervals(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressive:
    """Rounds of partial pruning at rising compressions, each with a retraining (arXiv 1810.07378, section 2.4).

    Args:
        compressions: those of the rounds before the last one, which has the method's; strictly increasing, above 1.
        width: how many partial models are kept; each round starts from all of them.
        validation: how many of the last training examples choose between the candidates; needs a width above 1.
    """

    compressions: tuple[float, ...]
    width: Annotated[int, Interval(1)] = 1
    validation: Annotated[int, Interval(0)] = 0

    def __post_init__(self) -> None:
        check_intervals(self)
        if not self.compressions or any(a >= b for a, b in pairwise((1, *self.compressions))):
            raise RecipeError(f"compressions must be strictly increasing, above 1, got {list(self.compressions)}")
        if (self.width > 1) != (self.validation > 0):
            raise RecipeError(
                f"validation must be > 0 with a width above 1, which chooses between models, and 0 with a width of 1, "
                f"got validation {self.validation} and width {self.width}"
            )


def check_interval(name: str, number: float, allowed: Interval) -> None:
    """Refuse a number outside of its interval."""
    if number not in allowed:
        raise RecipeError(f"{name} must be {allowed}, got {number}")


def check_intervals(table: object) -> None:
    """Check each field of a dataclass against the interval in its annotation."""
    for name, hint in get_type_hints(type(table), include_extras=True).items():
        value = getattr(table, name)
        for allowed in getattr(hint, "__metadata__", ()):
            if value is not None:
                check_interval(name, value, allowed)


def written(value: object) -> str:
    """The value as a recipe writes it."""
    return str(value) if isinstance(value, float) else json.dumps(value, default=str)
