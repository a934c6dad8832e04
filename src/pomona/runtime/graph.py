"""What a network computes, as a list of operations on numbered values; numpy only.

Values are numbered: first the inputs, then one value per node. Shapes are those of one sample, without the batch, of
one to four dimensions: ``(features,)``, ``(positions, features)``, ``(channels, height, width)`` or any four. Inputs
are float32, int32 or int64; every operation says which of these it takes (:mod:`pomona.runtime.operations`).

As JSON, which is how a graph travels in a file (``docs/file-format.md``)::

    {"inputs": [[1, 28, 28]],
     "nodes": [["conv", [0], {"weight": "conv1.weight", "bias": "conv1.bias", "padding": [2, 2]}], ["relu", [1]]],
     "outputs": [2]}

Attributes that equal their default are left out. An input of another dtype than float32 is an object,
``{"shape": [128], "dtype": "int64"}``. A fourth list may be there, ``"ranges"``: the largest magnitude of every value,
which fixed-point arithmetic needs (:mod:`pomona.runtime.ranges`). :meth:`Graph.from_json` and :meth:`Graph.shapes`
believe nothing: a graph from a hostile file is an error and never a crash, and the memory it takes is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomona.runtime.node import ATTRIBUTES, MAX_INT, MAX_OPERANDS, Node, Pair, Shape, read_ints, read_number, short
from pomona.runtime.operations import (
    DTYPES,
    MAX_DIMENSIONS,
    DType,
    check,
    known_attributes,
    operation_named,
    shape_after,
)
from pomona.runtime.rules import HasShape

__all__ = ["MAX_BYTES", "Graph", "Node", "Pair", "Shape"]

_MAX_NODES = 1 << 16
_MAX_RANGE = 1e18  # as the core's
MAX_BYTES = 1 << 34
"""Values of one sample may take this much memory together, at four bytes per number."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A network without its tensors.

    Attributes:
        inputs: shapes of one sample.
        nodes: in order of execution; each takes values that are there before it.
        outputs: values.
        ranges: the largest magnitude of every value, of float32, or None.
        dtypes: of the inputs, each "float32", "int32" or "int64"; empty: all are float32.

    Example:
        >>> Graph(inputs=((4,),), nodes=(Node("relu", (0,)),), outputs=(1,)).to_json()
        {'inputs': [[4]], 'nodes': [['relu', [0]]], 'outputs': [1]}
    """

    inputs: tuple[Shape, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    ranges: tuple[float, ...] | None = None
    dtypes: tuple[DType, ...] = ()

    def __post_init__(self) -> None:
        if not self.dtypes:
            object.__setattr__(self, "dtypes", ("float32",) * self.num_inputs)
        self._check_ranges()
        self._check_inputs()
        for i, node in enumerate(self.nodes):
            try:
                self._check_node(i, node)
            except ValueError as error:
                raise ValueError(f"node {i}: {error}") from None
        if not self.inputs or not self.outputs:
            raise ValueError(f"a network has inputs and outputs, got {self.num_inputs} and {len(self.outputs)}")
        for value in self.outputs:
            if not 0 <= value < self.num_values:
                raise ValueError(f"an output must be one of {self.num_values} values, got {value}")
            if self.dtype_of(value) != "float32":
                raise ValueError(f"an output must be of float32, but value {value} is of {self.dtype_of(value)}")

    def _check_ranges(self) -> None:
        if self.ranges is None:
            return
        if len(self.ranges) != self.num_values:
            raise ValueError(f"there must be {self.num_values} ranges, one for each value; got {len(self.ranges)}")
        for value, most in enumerate(self.ranges):
            if not 0.0 <= most <= _MAX_RANGE:
                raise ValueError(f"the range of value {value} must be in [0, {_MAX_RANGE:g}], got {most}")

    def _check_inputs(self) -> None:
        if len(self.dtypes) != self.num_inputs:
            raise ValueError(f"there must be {self.num_inputs} dtypes, one for each input; got {len(self.dtypes)}")
        for i, (shape, dtype) in enumerate(zip(self.inputs, self.dtypes, strict=True)):
            if not 1 <= len(shape) <= MAX_DIMENSIONS or not all(1 <= size <= MAX_INT for size in shape):
                raise ValueError(
                    f"input {i} must have 1 to {MAX_DIMENSIONS} dimensions of at least 1, got {short(list(shape))}"
                )
            if dtype not in DTYPES:
                raise ValueError(f"the dtype of input {i} must be one of {', '.join(DTYPES)}, got {short(dtype)}")

    def _check_node(self, i: int, node: Node) -> None:
        for value in node.operands:
            if not 0 <= value < self.num_inputs + i:
                raise ValueError(f"{node.op} takes value {value}; before it there are {self.num_inputs + i}")
        check(node, [self.dtype_of(value) for value in node.operands])

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_values(self) -> int:
        return len(self.inputs) + len(self.nodes)

    def dtype_of(self, value: int) -> DType:
        """What a value is made of; all that nodes yield is float32."""
        return self.dtypes[value] if value < self.num_inputs else "float32"

    def names(self) -> list[str]:
        """The tensors that it needs, each once, in order of use."""
        return list(dict.fromkeys(n for node in self.nodes for n in (node.weight, node.bias) if n is not None))

    def to_json(self) -> dict[str, Any]:
        """What ``json.dumps`` takes; see the head of this file."""
        graph: dict[str, Any] = {
            "inputs": [
                list(shape) if dtype == "float32" else {"shape": list(shape), "dtype": dtype}
                for shape, dtype in zip(self.inputs, self.dtypes, strict=True)
            ],
            "nodes": [_node_to_json(node) for node in self.nodes],
            "outputs": list(self.outputs),
        }
        return graph if self.ranges is None else graph | {"ranges": list(self.ranges)}

    @classmethod
    def from_json(cls, data: Any) -> Graph:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: it is not a graph; says where and why.
        """
        if not isinstance(data, dict) or set(data) - {"ranges"} != {"inputs", "nodes", "outputs"}:
            raise ValueError(f"a graph is a JSON object of inputs, nodes and outputs, got {short(data)}")
        for what, limit in (("inputs", MAX_OPERANDS), ("nodes", _MAX_NODES)):
            if not isinstance(data[what], list) or len(data[what]) > limit:
                raise ValueError(f"{what} must be a list of at most {limit}, got {short(data[what])}")
        inputs = [_read_input(f"input {i}", given) for i, given in enumerate(data["inputs"])]
        nodes = []
        for i, node in enumerate(data["nodes"]):
            try:
                nodes.append(_read_node(node))
            except ValueError as error:
                raise ValueError(f"node {i}: {error}") from None
        ranges = None
        if "ranges" in data:
            if not isinstance(data["ranges"], list) or len(data["ranges"]) > _MAX_NODES + MAX_OPERANDS:
                raise ValueError(f"ranges must be a list, one for each value; got {short(data['ranges'])}")
            ranges = tuple(read_number(f"the range of value {i}", most) for i, most in enumerate(data["ranges"]))
        outputs = read_ints("outputs", data["outputs"], 0)
        return cls(tuple(s for s, _ in inputs), tuple(nodes), outputs, ranges, tuple(dtype for _, dtype in inputs))

    def shapes(self, tensors: Mapping[str, HasShape], *, max_bytes: int = MAX_BYTES) -> list[Shape]:
        """The shape of every value, after checking that all operations fit them and their tensors.

        Args:
            tensors: by name; only shapes are looked at.
            max_bytes: what all values of one sample may take together, at four bytes per number.

        Raises:
            ValueError: names the node, what it needs and what it got.
        """
        found = list(self.inputs)
        total = sum(map(math.prod, found))
        for i, node in enumerate(self.nodes):
            try:
                operands = [found[v] for v in node.operands]
                shape = shape_after(node, operands, tensors)
                total += math.prod(shape)
                if 4 * max(total, _padded_size(node, operands[0])) > max_bytes:
                    raise ValueError(f"the network takes more than {max_bytes:,} bytes per sample, from here on")
            except ValueError as error:
                raise ValueError(f"node {i} ({node.op}): {error}") from None
            found.append(shape)
        return found


def _padded_size(node: Node, x: Shape) -> int:
    return x[0] * (x[1] + 2 * node.padding[0]) * (x[2] + 2 * node.padding[1]) if len(x) == 3 else 0


def _read_input(what: str, data: Any) -> tuple[Shape, DType]:
    if not isinstance(data, dict):
        return read_ints(what, data, 1), "float32"
    if set(data) != {"shape", "dtype"}:
        raise ValueError(f"{what} must be a shape, or an object of shape and dtype; got {short(data)}")
    if not isinstance(data["dtype"], str) or data["dtype"] not in DTYPES:
        raise ValueError(f"the dtype of {what} must be one of {', '.join(DTYPES)}, got {short(data['dtype'])}")
    return read_ints(what, data["shape"], 1), data["dtype"]


def _node_to_json(node: Node) -> list[Any]:
    """``[op, operands]``, or with a third element: the attributes that differ from their defaults."""
    attributes = {}
    for name in operation_named(node.op).attributes:
        value = getattr(node, name)
        if value != ATTRIBUTES[name].default:
            attributes[name] = list(value) if isinstance(value, tuple) else value
    return [node.op, list(node.operands), attributes] if attributes else [node.op, list(node.operands)]


def _read_node(data: Any) -> Node:
    if not isinstance(data, list) or len(data) not in (2, 3) or not isinstance(data[0], str):
        raise ValueError(f"a node is [operation, operands] or [operation, operands, attributes], got {short(data)}")
    op, operands, attributes = data[0], data[1], data[2] if len(data) == 3 else {}
    operation = operation_named(op)
    if not isinstance(attributes, dict):
        raise ValueError(f"attributes of {op} are a JSON object, got {short(attributes)}")
    for name in attributes:
        if name not in operation.attributes:
            raise ValueError(f"{op} has no attribute {short(name)}; it has: {known_attributes(operation)}")
    read = {name: ATTRIBUTES[name].read(f"{op}'s {name}", value) for name, value in attributes.items()}
    return Node(op, read_ints(f"{op}'s operands", operands, 0), **read)
