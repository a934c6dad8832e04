"""The facts about a program, and which slots can go by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

Axis = tuple[str, int]  # a dimension of a parameter or buffer
NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of a tensor of the program.

    Attributes:
        shape: of the tensor.
        slots: the slot that each element goes with, or ``NO_SLOT``; of size 1 along each dimension along which it does
            not vary.
        constant: the value of each element that is the same for all inputs, else NaN; broadcasts to the shape.
        axes: of a parameter as it is, or with its dimensions in another order: which of them each dimension is.
    """

    shape: tuple[int, ...]
    slots: Tensor
    constant: Tensor
    axes: tuple[Axis | None, ...] | None = None

    @property
    def is_tracked(self) -> bool:
        """Whether some of its elements go with a slot."""
        return bool((self.slots != NO_SLOT).any())

    @property
    def is_known(self) -> bool:
        """Whether all of it is constant."""
        return not bool(self.constant.isnan().any())

    @property
    def varies(self) -> set[int]:
        """Dimensions along which the slots differ, counted from the last, -1."""
        return {d - len(self.shape) for d, size in enumerate(self.slots.shape) if size > 1}


def plain(shape: Sequence[int], slots: Tensor | None = None, constant: Tensor | None = None) -> Value:
    """A value; of no slot, and unknown, if not given."""
    ones = (1,) * len(shape)
    slots = torch.full(ones, NO_SLOT) if slots is None else compact(slots)
    return Value(tuple(shape), slots, torch.full(ones, math.nan) if constant is None else compact(constant))


def compact(x: Tensor) -> Tensor:
    """One index of each dimension along which the tensor does not vary."""
    for dim in range(x.ndim):
        if x.shape[dim] > 1:
            first = x.narrow(dim, 0, 1)
            same = x.stride(dim) == 0 or bool(((x == first) | ((x != x) & (first != first))).all())
            x = first if same else x
    return x


def number(x: Tensor) -> Tensor:
    """As floats, which have a NaN; a complex number is not followed."""
    return x if x.is_floating_point() else torch.full_like(x.real, math.nan) if x.is_complex() else x.double()


def placed(vector: Tensor, dim: int, num_dims: int) -> Tensor:
    """A vector as a tensor that varies along one dimension."""
    return vector.reshape([-1 if d == dim % num_dims else 1 for d in range(num_dims)])


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that mixes channels.

    Attributes:
        inputs, outputs: the slots of its columns and rows.
        uses: (outputs, inputs), whether a weight is not zero.
        constants: what it reads of each input; NaN where that depends on the input of the network.
        folds: whether its bias can stand for that.
        weight: (outputs, inputs, places of the kernel).
        bias: name of the parameter, if it has one of its own.
    """

    inputs: Tensor
    outputs: Tensor
    uses: Tensor
    constants: Tensor
    folds: Tensor
    weight: Tensor
    bias: str | None


@dataclass
class Flow:
    """What the rules said.

    Attributes:
        slots: parameter or buffer -> the numbers of its slots along each dimension.
        num_slots: of all of them.
        num_uses: parameter or buffer -> number of operators that take it.
        bound: dimensions that a rule has tied or pinned.
        pins: slots that stay.
        ties: slots that go together, pair by pair.
        readers: layers that mix channels.
        operands, results: what goes into each operator, and comes out of it.
    """

    slots: dict[str, list[Tensor]] = field(default_factory=dict)
    num_slots: int = 0
    num_uses: dict[str, int] = field(default_factory=dict)
    bound: set[Axis] = field(default_factory=set)
    pins: list[Tensor] = field(default_factory=list)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    operands: dict[Node, Any] = field(default_factory=dict)
    results: dict[Node, list[Value]] = field(default_factory=dict)

    # What rules say

    def along_parameter(self, axis: Axis) -> Tensor:
        """The slots along a dimension of a parameter, for a rule that ties them."""
        self.bound.add(axis)
        return self.slots[axis[0]][axis[1]]

    def pin(self, *held: Value | Tensor) -> None:
        """These stay as they are."""
        for one in held:
            if isinstance(one, Tensor):
                self.pins.append(one[one != NO_SLOT])
            elif one.axes is None:
                self.pin(one.slots)
            else:
                self.pins += [self.slots[axis[0]][axis[1]] for axis in one.axes if axis is not None]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Each of these goes with the other one at its place, and stays if there is none."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        both = (a != NO_SLOT) & (b != NO_SLOT)
        self.ties.append((a[both], b[both]))
        self.pin(a[~both], b[~both])

    def along(self, x: Value, dim: int) -> Tensor:
        """One slot for each index along a dimension: all elements at an index go together from now on."""
        slots = x.slots.movedim(dim, 0).flatten(1) if x.slots.ndim > 1 else x.slots[:, None]
        last = slots.max(1).values
        if slots.shape[1] > 1:
            self.tie(last[:, None], slots)
        return last.expand(x.shape[dim])

    # What can go

    def removable(self) -> Tensor:
        """For each slot, whether it can go without a change of the outputs."""
        channel = self._channels()
        pinned = torch.zeros(self.num_slots, dtype=torch.bool)
        for slots in self.pins:
            pinned[channel[slots]] = True
        while True:
            removed = self._unread(channel, pinned)[channel]
            more = [channel[slots] for slots in self._must_stay(removed)]
            if not more:
                return removed
            pinned[torch.cat(more)] = True

    def _channels(self) -> Tensor:
        """For each slot, the lowest of those that go with it."""
        channel = torch.arange(self.num_slots)
        if not self.ties:
            return channel
        a, b = (torch.cat(side) for side in zip(*self.ties, strict=True))
        while True:
            low = torch.minimum(channel[a], channel[b])
            lower = channel.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
            lower = lower.scatter_reduce(0, channel, lower, "amin")[channel]
            if torch.equal(lower, channel):
                return channel
            channel = lower

    def _unread(self, channel: Tensor, pinned: Tensor) -> Tensor:
        """Channels that nothing reads, save as constants for a bias, and those that only such channels read."""
        removed = torch.zeros_like(pinned)
        while True:
            is_read = pinned.clone()
            for reader in self.readers:
                rows = reader.uses[~removed[channel[reader.outputs]]]
                is_read[channel[reader.inputs[rows.any(0) & ~reader.folds]]] = True
            if torch.equal(~is_read, removed):
                return removed
            removed = ~is_read

    def _must_stay(self, removed: Tensor) -> Iterator[Tensor]:
        """Slots without which a tensor would be empty, or no block."""
        for dims in self.slots.values():
            yield from (slots[-1:] for slots in dims if len(slots) and bool(removed[slots].all()))
        for value in (value for values in self.results.values() for value in values):
            gone = _gone(value, removed)
            if gone.numel() and bool(gone.all()):
                yield value.slots.max().view(1)
            elif kept(value, removed) is None:
                yield value.slots[gone]


def kept(value: Value, removed: Tensor) -> list[Tensor] | None:
    """For each dimension, the indices that stay, where the slots vary along it, else 0; None if they are no block."""
    stays = ~_gone(value, removed)
    masks = [stays.movedim(d, 0).reshape(stays.shape[d], -1).any(1) for d in range(stays.ndim)]
    block = torch.ones((), dtype=torch.bool)
    for d, mask in enumerate(masks):
        block = block & placed(mask, d, stays.ndim)
    return [mask.nonzero().flatten() for mask in masks] if torch.equal(block.expand_as(stays), stays) else None


def restricted(value: Value, removed: Tensor) -> Value:
    """The value once the slots have gone, as far as shape and slots go."""
    slots, shape = value.slots, list(value.shape)
    for d, index in enumerate(kept(value, removed) or ()):
        if slots.shape[d] > 1:
            slots, shape[d] = slots.index_select(d, index), len(index)
    return plain(shape, slots)


def _gone(value: Value, removed: Tensor) -> Tensor:
    return removed[value.slots.clamp(min=0)] & (value.slots != NO_SLOT) if len(removed) else value.slots < NO_SLOT
