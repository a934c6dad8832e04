"""What a method sees of one pruned tensor, and of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pomona.distributed import Shard, local


@dataclass(frozen=True, slots=True)
class Weight:
    """One pruned tensor, as a method sees it during a call; keep none of it for later.

    Where several ranks hold the tensor together, its tensors are plain tensors too: the block of this rank. What
    depends on the whole network comes from functions that take the weights: selections with ``of=weights``, counts
    with :func:`pomona.ops.count`.

    Attributes:
        name: full parameter name.
        value: the weights, a plain tensor of any shape; edit in place.
        grad: their gradient, same shape, unscaled; edit in place.
        group: the optimizer's parameter group that holds it, as it is now; read only.
        state: what ``Method.init`` returned; edit in place; saved by the Pruner.
        has_grad: False in a step without a gradient for it: the optimizer skips it, decay included.
        optimizer_state: what the optimizer remembers about the tensor; empty before its first step. See ``buffers``.
        shard: which block of the whole tensor this is, if other ranks hold the rest.
    """

    name: str
    value: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    state: dict[str, Tensor]
    has_grad: bool = True
    optimizer_state: Mapping[str, Any] = field(default_factory=dict)
    shard: Shard | None = None

    @property
    def buffers(self) -> list[Tensor]:
        """What the optimizer remembers about each single weight, such as momentum or Adam's moments; edit in place."""
        blocks = [local(t) for t in self.optimizer_state.values() if isinstance(t, Tensor) and t.ndim]
        return [t for t in blocks if t.shape == self.value.shape]

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.value.shape if self.shard is None else self.shard.shape

    @property
    def numel(self) -> int:
        """Number of weights in the whole tensor."""
        return self.shape.numel()

    @property
    def lr(self) -> float:
        """Learning rate of the group now."""
        return float(self.group["lr"])

    def renew(self, value: Tensor, grad: Tensor, has_grad: bool) -> None:
        """For the Pruner: what another step brings."""
        _write(self, "value", value)
        _write(self, "grad", grad)
        _write(self, "has_grad", has_grad)

    def release(self) -> None:
        """For the Pruner: after a step, hold no tensor that zero_grad() or model.to() would free."""
        _write(self, "value", _NOTHING)
        _write(self, "grad", _NOTHING)


_write = object.__setattr__
_NOTHING = torch.empty(0)


class Weights(tuple[Weight, ...]):
    """All pruned tensors, in the order of ``model.named_parameters()``, and what belongs to all of them together.

    Attributes:
        shared: what ``Method.init_shared`` returned, the same on all ranks; edit in place; saved by the Pruner.
        numel: number of weights in the whole network.
        by_name: the same in the order of their names, which a saved state keeps however the model declares its modules.
    """

    shared: dict[str, Tensor]
    numel: int
    by_name: list[Weight]

    def __new__(cls, weights: Iterable[Weight], shared: dict[str, Tensor] | None = None) -> Weights:
        self = super().__new__(cls, weights)
        self.shared = {} if shared is None else shared
        self.numel = sum(w.numel for w in self)
        self.by_name = sorted(self, key=attrgetter("name"))
        return self
