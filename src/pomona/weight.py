"""What a method sees of one pruned tensor, and of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pomona.distributed import Shard, local
from pomona.layout import ROWS, Layout


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
        layout: what its dimensions are, see :mod:`pomona.layout`; None if that is unknown.
    """

    name: str
    value: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    state: dict[str, Tensor]
    has_grad: bool = True
    optimizer_state: Mapping[str, Any] = field(default_factory=dict)
    shard: Shard | None = None
    layout: Layout | None = ROWS

    @property
    def buffers(self) -> list[Tensor]:
        """What the optimizer remembers about each single weight; edit in place.

        Such as momentum, Adam's moments, an average of the weights or another copy of them. State that is quantised is
        not among it: a zero there is not the number 0.
        """
        blocks = [local(t) for t in self.optimizer_state.values() if isinstance(t, Tensor) and t.is_floating_point()]
        plain = (Tensor, Parameter)
        return [t for t in blocks if t.ndim and t.shape == self.value.shape and type(t) in plain]

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.value.shape if self.shard is None else self.shard.shape

    @property
    def numel(self) -> int:
        """Number of weights in the whole tensor."""
        return self.shape.numel()

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of one of its matrices, (outputs, inputs, \\*kernel); the whole shape if the layout is unknown."""
        return tuple(self.shape) if self.layout is None else self.layout.matrix_shape(self.shape)

    @property
    def num_rows(self) -> int:
        """Size of dimension 0 on this rank; 1 for a scalar."""
        return len(self.value) if self.value.ndim else 1

    @property
    def num_matrices(self) -> int:
        """Number of matrices that lie in the whole tensor; 1 if the layout is unknown."""
        return 1 if self.layout is None else self.layout.num_matrices(self.shape)

    def matrices(self) -> list[Weight]:
        """The matrices that lie in the tensor, each a weight by itself that shares memory with this one.

        For allocation, floors and groups each is a layer of its own, as it would be in a module of its own.
        """
        num = self.num_matrices
        return [self] if num <= 1 else [self._matrix(i, num) for i in range(num)]

    def _matrix(self, i: int, num: int) -> Weight:
        rows = self.shape[0] // num
        first = 0 if self.shard is None else self.shard.start[0]  # of this rank's rows
        start, stop = (min(max(row - first, 0), self.num_rows) for row in (i * rows, (i + 1) * rows))

        def part(t: Tensor) -> Tensor:
            return t[start:stop] if t.ndim and len(t) == self.num_rows else t

        shard, layout = self.shard, self.layout
        if shard is not None:
            shape = torch.Size((rows, *shard.shape[1:]))
            shard = replace(
                shard, shape=shape, start=(first + start - i * rows if stop > start else 0, *shard.start[1:])
            )
        return replace(
            self,
            name=f"{self.name}[{i}]",
            value=self.value[start:stop],
            grad=part(self.grad),
            state={key: part(t) for key, t in self.state.items()},
            optimizer_state={f"{j}": t[start:stop] for j, t in enumerate(self.buffers)},
            shard=shard,
            layout=None if layout is None else replace(layout, matrices=1),
        )

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
        are_stacked: whether several matrices lie in one of the tensors.
        by_name: the same in the order of their names, which a saved state keeps however the model declares its modules.
    """

    shared: dict[str, Tensor]
    numel: int
    by_name: list[Weight]
    are_stacked: bool

    def __new__(cls, weights: Iterable[Weight], shared: dict[str, Tensor] | None = None) -> Weights:
        self = super().__new__(cls, weights)
        self.shared = {} if shared is None else shared
        self.numel = sum(w.numel for w in self)
        self.are_stacked = any(w.num_matrices > 1 for w in self)
        self.by_name = sorted(self, key=attrgetter("name"))
        return self
