"""HOW weights move: what a pruning method is, and what it sees of a weight.

The life of a method, driven by the Pruner::

    check(optimizer, groups)                      once, at construction: refuse what cannot work
    check_weights(weights)                        the same of the weights
    init(weight)                                  once a weight: its state
    loop:
        before_step(weights, step)                gradients are final; step = 1, 2, ...
        <optimizer.step() itself>
        after_step(weights, step)                 weights have moved
    unfinished(weights, step)                     at harden(): whether that is early
    support(weights, step)                        what survives

A method is a frozen dataclass of hyper-parameters and never holds state; what it must remember lives in
``Weight.state``, which the Pruner saves and restores. A method does not import ``torch.distributed``,
``torch.optim`` or hooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pomona.diagnosis import Diagnosis
from pomona.distributed import Shard, local
from pomona.granularity import Granularity
from pomona.selection import Selection


@dataclass(frozen=True, slots=True)
class Weight:
    """What a method sees of one pruned tensor.

    Where several ranks hold the tensor together, its tensors are plain tensors too: the block of this rank. What
    depends on the whole network is asked for by functions that take the weights: selections with ``of=weights``,
    counts with :func:`pomona.ops.count`.

    Attributes:
        name: full parameter name.
        value: the weights, a plain tensor of any shape; edit in place.
        grad: their gradient, same shape, unscaled; edit in place.
        group: the optimizer's parameter group that holds it, as it is now; read only.
        state: what ``init`` returned; edit in place; saved by the Pruner.
        moves: False in a step without a gradient for it: the optimizer passes it over, decay included.
        optimizer_state: what the optimizer remembers of the tensor; empty before its first step. See ``buffers``.
        shard: which block of the whole tensor this is, if other ranks hold the rest.
    """

    name: str
    value: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    state: dict[str, Tensor]
    moves: bool = True
    optimizer_state: Mapping[str, Any] = field(default_factory=dict)
    shard: Shard | None = None

    @property
    def buffers(self) -> list[Tensor]:
        """What the optimizer remembers of each single weight, such as momentum or Adam's moments; edit in place."""
        blocks = [local(t) for t in self.optimizer_state.values() if isinstance(t, Tensor) and t.ndim]
        return [t for t in blocks if t.shape == self.value.shape]

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.value.shape if self.shard is None else self.shard.shape

    @property
    def numel(self) -> int:
        """Number of weights of the whole tensor."""
        return self.shape.numel()

    @property
    def lr(self) -> float:
        """Learning rate of the group now."""
        return float(self.group["lr"])


class Method(ABC):
    """A way to prune. Subclasses are frozen dataclasses, one paper and one file each.

    Attributes:
        granularity: what goes together, see :mod:`pomona.granularity`; a method that can choose has a field of it.
    """

    __slots__ = ()
    granularity: Granularity = "weight"

    def check(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if ``optimizer`` cannot drive this method; ``groups`` are those with weights in scope."""

    def check_weights(self, weights: Sequence[Weight]) -> None:
        """Raise ValueError if the method cannot prune these weights as it is set."""

    def init(self, w: Weight) -> dict[str, Tensor]:
        """State of one weight: tensors of the shape of ``w.value``, which reshard by themselves, or of no dimension.

        What depends on the weights' values is filled in at step 1, because they may be loaded after construction.
        """
        return {}

    def checks_gradients(self, step: int) -> bool:
        """Whether ``before_step`` raises NonFiniteError for a gradient that is not finite, before it changes anything.

        Saves the Pruner a look at each of them.
        """
        return False

    def before_step(self, weights: Sequence[Weight], step: int) -> Selection | None:
        """Gradients are final, weights have not moved. Gradients outside of a returned selection are dropped."""
        return None

    def after_step(self, weights: Sequence[Weight], step: int) -> None:
        """Weights have moved."""

    @abstractmethod
    def support(self, weights: Sequence[Weight], step: int) -> list[Tensor]:
        """Boolean masks of what survives ``harden()``, True = kept. ``grad`` is empty here."""

    def budget(self, total: int, step: int) -> int | None:
        """How many of ``total`` weights may survive ``harden()`` at most; None if the method does not say."""
        return None

    def why(self, total: int, kept: int, density: float) -> str:
        """One clause: how a layer came to keep ``kept`` of ``total`` weights; all layers keep the share ``density``."""
        return ""

    def forecast(self, groups: Sequence[Mapping[str, Any]]) -> Diagnosis | None:
        """Whether a run with these settings, one a step, can succeed; None if the method cannot tell."""
        return None

    def unfinished(self, weights: Sequence[Weight], step: int) -> str:
        """Why ``harden()`` at ``step`` comes before the method is done, as a sentence; empty if it does not."""
        return ""

    def diagnose(self, weights: Sequence[Weight], step: int) -> Diagnosis | None:
        """Whether the run up to here lets ``harden()`` cut without loss; None if the method cannot tell."""
        return None

    def metrics(self, weights: Sequence[Weight]) -> dict[str, float]:
        """Numbers worth watching while training; ``grad`` is empty here; may synchronise with the device."""
        return {}
