"""Builds a graph operation by operation, for any reader; numpy only.

A reader walks a network of some framework and calls a :class:`GraphBuilder`, which knows none of them: it numbers
values, checks shapes, names the tensors that have to be made, and expresses what is no operation of the runtime by
those that are (a slice of channels by a sparse convolution, say).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.fold import pad_weight, prune_graph
from pomona.runtime.graph import Graph
from pomona.runtime.node import Node, Pair, Shape
from pomona.runtime.operations import ELEMENTWISE, DType, check, shape_after
from pomona.runtime.rules import num_channels

BATCH = 13
"""The size of a free batch while a model is read, which hardly occurs elsewhere."""


class UnsupportedError(ValueError):
    """The model computes something that a graph of the runtime cannot express."""


@dataclass(frozen=True, slots=True)
class _Pick:
    """A value that is made of channels of another, or zeros (-1), at every so many-th row and column."""

    source: int
    channels: tuple[int, ...]
    stride: Pair


class GraphBuilder:
    """A graph that grows.

    Attributes:
        inputs, dtypes: of the inputs so far.
        nodes: so far.
        shapes: of all values so far, without the batch.
        tensors: by name, float32.
        operation: the operation of the model that is being read, for messages.
        path: the part of the model that it is in, for messages and for the names of tensors made for it.
        source: the line of the model's code, for messages; may be empty.
        way_out: what a user can do about a model that is refused.
        batch: its size while the model is read.
    """

    def __init__(self, *, way_out: str) -> None:
        self.inputs: list[Shape] = []
        self.dtypes: list[DType] = []
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = []
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self.operation = self.path = self.source = ""
        self.way_out = way_out
        self.batch = BATCH
        self._picks: dict[int, _Pick] = {}

    def input(self, shape: Shape, dtype: DType = "float32") -> int:
        """The number of a new input. All inputs come before the first node."""
        assert not self.nodes
        self.inputs.append(shape)
        self.dtypes.append(dtype)
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def emit(self, op: str, *operands: int, **attributes: Any) -> int:
        """The number of the value that a new node yields; ValueError where it does not fit its operands."""
        return self._add(Node(op, operands, **attributes))

    def _add(self, node: Node) -> int:
        check(node, [self.dtypes[v] if v < len(self.inputs) else "float32" for v in node.operands])
        self.shapes.append(shape_after(node, [self.shapes[v] for v in node.operands], self.tensors))
        self.nodes.append(node)
        return len(self.shapes) - 1

    def finish(self, outputs: Sequence[int]) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
        """The graph of what these values depend on, and its tensors."""
        graph = Graph(tuple(self.inputs), tuple(self.nodes), tuple(outputs), dtypes=tuple(self.dtypes))
        graph, tensors = prune_graph(graph, self.tensors)
        graph.shapes(tensors)
        return graph, tensors  # type: ignore[return-value]  # all dense

    def refuse(self, what: str) -> UnsupportedError:
        """The error that says what the runtime cannot run, where in the model that is, and the way out."""
        where = f" in {self.path}" if self.path else ""
        source = f": {self.source}" if self.source else ""
        return UnsupportedError(f"pomona's runtime cannot run {what}{where}{source}; {self.way_out}")

    # Tensors.

    def made(self, what: str) -> str:
        """A name for a tensor made here."""
        name = f"{self.path}@{what}"
        while name in self.tensors:
            name += "'"
        return name

    def vector(self, what: str, array: NDArray[Any]) -> str:
        """The name of a tensor made here, now among the tensors."""
        name = self.made(what)
        self.tensors[name] = np.ascontiguousarray(array, np.float32)
        return name

    # What several operations make.

    def scaled(self, number: int, factor: NDArray[Any], shift: NDArray[Any]) -> int:
        """factor x + shift; each is one number, or one per channel or feature."""
        size = num_channels(self.shapes[number])
        factors, shifts = (np.broadcast_to(array.reshape(-1), (size,)) for array in (factor, shift))
        weight = self.vector("factor", factors)
        return self.emit("scale", number, weight=weight, bias=self.vector("shift", shifts) if shifts.any() else None)

    def scaled_along(self, number: int, shape: Shape, factor: Any, shift: Any) -> int:
        """factor x + shift of a value that the model sees in this shape, where both broadcast by channel or feature."""
        along = 1 if len(self.shapes[number]) == 3 else len(shape) - 1
        for array in map(np.asarray, (factor, shift)):
            aligned = (1,) * (len(shape) - array.ndim) + array.shape
            if len(aligned) != len(shape) or any(n != 1 for i, n in enumerate(aligned) if i != along):
                raise self.refuse(
                    f"{self.operation} with a parameter of shape {array.shape}, neither a number nor by channel,"
                )
        return self.scaled(number, np.asarray(factor), np.asarray(shift))

    def normalized(
        self, number: int, mean: NDArray[Any], var: NDArray[Any], eps: float, factor: Any = None, shift: Any = None
    ) -> int:
        """A batch norm by statistics that are known: float64 until it is one factor and one shift."""
        scale = 1 / np.sqrt(var.astype(np.float64) + eps)
        if factor is not None:
            scale = scale * np.asarray(factor, np.float64)
        moved = -mean.astype(np.float64) * scale
        if shift is not None:
            moved = moved + np.asarray(shift, np.float64)
        weight, bias = self.vector("scale", scale), self.vector("shift", moved)
        return self.emit("scale", number, weight=weight, bias=bias)

    def reshaped(self, number: int, new: Shape) -> int | None:
        """The value that a model sees in this shape, with the batch; None if it is not a mere flattening."""
        old = self.shapes[number]
        if new == (self.batch, *old) or (len(old) == 2 and new == (self.batch * old[0], old[1])):
            return number
        if new == (self.batch, math.prod(old)) and len(old) != 2:
            return self.emit("flatten", number)
        return self.unflattened(number) if len(old) == 1 and new == (self.batch, *old, 1, 1) else None

    def sliced(self, number: int, shape: Shape, dim: int, picked: range) -> int:
        """Some channels, rows or columns of a value that the model sees in this shape, with the batch."""
        if picked == range(shape[dim]):
            return number
        if dim == 1 and len(shape) in (2, 4) and shape[0] == self.batch and picked:
            return self.picked(number, tuple(picked), (1, 1))
        if dim < 2 or len(shape) != 4 or not picked or picked.step < 1:
            raise self.refuse(f"{self.operation} along dimension {dim} of {shape}")
        return self.every(number, dim - 2, picked)

    def surrounded(self, number: int, channels: Pair, rows: Pair, columns: Pair) -> int:
        """An image with so many zeros before and after, along each dimension."""
        if any(channels):
            places = (*[-1] * channels[0], *range(self.shapes[number][0]), *[-1] * channels[1])
            number = self.picked(number, places, (1, 1))
        return self.padded(number, *columns, *rows) if any((*rows, *columns)) else number

    def padded(self, number: int, left: int, right: int, top: int, bottom: int) -> int:
        """An image with so many zeros on each side."""
        channels = self.shapes[number][0]
        weight, padding = pad_weight(channels, left, right, top, bottom)
        return self.emit("conv", number, weight=self.vector("pad", weight), padding=padding, groups=channels)

    def picked(self, number: int, channels: tuple[int, ...], stride: Pair) -> int:
        """Channels of a value, -1 for zeros, at every so many-th row and column: a 1 x 1 convolution with ones."""
        before = self._picks.get(number, _Pick(number, tuple(range(self.shapes[number][0])), (1, 1)))
        channels = tuple(-1 if c < 0 else before.channels[c] for c in channels)
        stride = before.stride[0] * stride[0], before.stride[1] * stride[1]
        shape = self.shapes[before.source]
        weight = np.zeros((len(channels), num_channels(shape)), np.float32)
        for row, c in enumerate(channels):
            weight[row, c] = c >= 0
        if len(shape) == 3:
            name = self.vector("pick", weight[:, :, None, None])
            made = self.emit("conv", before.source, weight=name, stride=stride)
        else:
            made = self.emit("linear", before.source, weight=self.vector("pick", weight))
        self._picks[made] = _Pick(before.source, channels, stride)
        return made

    def every(self, number: int, axis: int, picked: range) -> int:
        """Rows (axis 0) or columns (axis 1) of an image: `picked` of them."""
        channels, size = self.shapes[number][0], self.shapes[number][1 + axis]
        start, step, num = picked.start, picked.step, len(picked)
        kernel = max(start + 1, size - num * step + 1)  # the least with which no more windows fit
        stride = (step, 1) if axis == 0 else (1, step)
        if kernel == 1:
            return self.picked(number, tuple(range(channels)), stride)
        weight = np.zeros((channels, 1, kernel if axis == 0 else 1, kernel if axis == 1 else 1), np.float32)
        weight.reshape(channels, kernel)[:, start] = 1
        return self.emit("conv", number, weight=self.vector("pick", weight), stride=stride, groups=channels)

    def unflattened(self, number: int) -> int:
        """The value (F,) as (F, 1, 1): layers since it was an image, made again as 1 x 1 convolutions."""
        node = self.nodes[number - len(self.inputs)] if number >= len(self.inputs) else None
        if node is not None and node.op == "flatten" and self.shapes[node.operands[0]][1:] == (1, 1):
            return node.operands[0]
        if node is None or node.op not in (*ELEMENTWISE, "linear", "scale"):
            raise self.refuse(f"{self.operation} of features to an image of one pixel")
        image = self.unflattened(node.operands[0])
        return self._add(replace(node, op="conv" if node.op == "linear" else node.op, operands=(image,)))
