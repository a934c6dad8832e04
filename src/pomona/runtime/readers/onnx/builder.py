"""What a reader of ONNX keeps while it walks a model, and what it gives to the handler of an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.node import Shape
from pomona.runtime.readers.builder import GraphBuilder, UnsupportedError

Array: TypeAlias = NDArray[Any]

WAY_OUT = "ONNX Runtime runs the file as it is"
"""What to do about a file that the runtime cannot run."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph as ONNX sees it, (batch, ...)."""

    number: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Constant:
    """What depends on no input."""

    name: str
    array: Array


@dataclass(frozen=True, slots=True)
class Erf:
    """``erf(source / sqrt(2)) + shift``, on its way to a GELU."""

    source: int
    shape: Shape
    shift: float


Found: TypeAlias = Value | Constant | Erf | None


class OnnxBuilder(GraphBuilder):
    """A graph that grows as the nodes of an ONNX model are read.

    Attributes:
        opset: of the model's operators.
        num_outputs: of the node that is being read, those that are used.
    """

    def __init__(self, opset: int, limit: int) -> None:
        super().__init__(way_out=WAY_OUT)
        self.opset = opset
        self.num_outputs = 1
        self._left = limit
        self._as_they_are: dict[str, str] = {}  # constants that are tensors, and under which names
        self._doubled: dict[int, int] = {}  # 2 gelu(x) -> gelu(x)

    def take(self, shape: Iterable[Any], itemsize: int = 8) -> None:
        """Make sure that an array of this shape does not take more memory than is left."""
        num = math.prod(int(n) for n in shape)
        if num < 0 or num * itemsize > self._left:
            raise ValueError(f"a constant would take {num * itemsize:,} bytes, and max_bytes leaves {self._left:,}")
        self._left -= num * itemsize

    def emit(self, op: str, *operands: int, **attributes: Any) -> int:
        try:
            return super().emit(op, *operands, **attributes)
        except UnsupportedError:
            raise
        except ValueError as error:  # of sizes that ONNX allows and the runtime does not
            raise self.refuse(f"{self.operation} ({error})") from None

    def value(self, x: Found) -> Value:
        if not isinstance(x, Value):
            raise self.refuse(f"{self.operation} of {'a constant' if isinstance(x, Constant) else 'an erf'}")
        return x

    def constant(self, x: Found, what: str) -> Constant:
        if not isinstance(x, Constant):
            raise self.refuse(f"{self.operation} with {what} computed from the input")
        return x

    def weight(self, x: Found, change: Callable[[Array], Array] | None = None) -> str:
        """The name of what must be a constant of floats, now among the tensors."""
        found = self.constant(x, "a weight that is")
        if found.array.dtype.kind != "f":
            raise self.refuse(f"{self.operation} with a weight of {found.array.dtype}")
        if change is None and found.name in self._as_they_are:
            return self._as_they_are[found.name]
        name = found.name if found.name not in self.tensors else self.made(found.name)
        if change is None:
            self._as_they_are[found.name] = name
        self.tensors[name] = np.array(found.array if change is None else change(found.array), np.float32, order="C")
        return name

    def now(self, number: int) -> Value:
        """A value as it lies in the graph."""
        return Value(number, (self.batch, *self.shapes[number]))

    def seen_as(self, x: Value, new: Shape) -> Value:
        """The value in another shape."""
        number = self.reshaped(x.number, new)
        if number is None:
            raise self.refuse(f"{self.operation} from {x.shape} to {new}")
        return Value(number, new)


@dataclass(frozen=True, slots=True)
class Given:
    """What a handler is given.

    Attributes:
        t: the builder.
        inputs: of the node; None where one is left out.
        attributes: of the node.
        onnx: the package.
    """

    t: OnnxBuilder
    inputs: list[Found]
    attributes: dict[str, Any]
    onnx: Any

    def input(self, i: int) -> Found:
        return self.inputs[i] if i < len(self.inputs) else None

    def value(self, i: int = 0) -> Value:
        return self.t.value(self.input(i))

    def array(self, i: int) -> Array:
        return self.t.constant(self.input(i), "an operand").array

    def setting(self, name: str, place: int) -> Any:
        """An attribute that later opsets have as an input; None if it is not there."""
        if name in self.attributes:
            return self.attributes[name]
        x = self.input(place)
        return None if x is None else self.t.constant(x, name).array.tolist()

    def refuse(self, what: str) -> UnsupportedError:
        return self.t.refuse(f"{self.t.operation} {what}")


def array_of(onnx: Any, t: OnnxBuilder, proto: Any) -> Array:
    t.operation = f"initializer {proto.name}"
    t.take(proto.dims)
    array = np.asarray(onnx.numpy_helper.to_array(proto))
    if array.dtype.kind not in "fiub":  # such as bfloat16
        array = array.astype(np.float32)
    return array


def dense_of(onnx: Any, t: OnnxBuilder, proto: Any) -> Array:
    """A sparse tensor as a dense one; its indices are flat, or one per dimension."""
    shape = tuple(proto.dims)
    values, indices = array_of(onnx, t, proto.values), array_of(onnx, t, proto.indices)
    t.take(shape, values.itemsize)
    flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
    if values.shape != flat.shape or (flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < math.prod(shape)):
        raise ValueError(f"the indices of a sparse tensor of shape {shape} do not fit")
    dense = np.zeros(math.prod(shape), values.dtype)
    dense[flat] = values
    return dense.reshape(shape)
