"""What a network computes, as a list of operations on numbered values; numpy only.

Values are numbered: first the inputs, then what each node yields, one value a node. Shapes are those of one sample,
without the batch: ``(features,)``, ``(positions, features)`` or ``(channels, height, width)``. The operations are those
of ``core/include/pomona_net.h``:

========================================  ============================================================================
``conv``                                  (C, H, W) -> (O, H', W'); weight (O, C / groups, kh, kw), or (O, C) for 1 x 1;
                                          bias (O,) or none; stride, zero padding, dilation, groups
``linear``                                (F,) -> (O,), (P, F) -> (P, O); weight (O, F), bias (O,) or none
``relu`` ``gelu`` ``gelu_tanh`` ``silu``  element by element; ``gelu`` is x Phi(x), by erf
``sigmoid`` ``tanh`` ``hardswish``
``hardsigmoid``
``clip``                                  min(max(x, low), high)
``add``                                   of two values of one shape
``mul``                                   of two values of one shape, or (C, H, W) times (C, 1, 1)
``scale``                                 weight (C,) times x plus bias (C,) or none: by channel, or by feature
``max_pool`` ``avg_pool``                 kernel, stride, padding of at most half the kernel; ``ceil`` as in torch
``mean``                                  (C, H, W) -> (C, 1, 1)
``flatten``                               (C, H, W) -> (C H W,); (F,) as it is
``concat``                                along channels (C, H, W), or of features (F,); one or more values
========================================  ============================================================================

As JSON, which is how a graph travels in a file::

    {"inputs": [[1, 28, 28]],
     "nodes": [["conv", [0], {"weight": "conv1.weight", "bias": "conv1.bias", "padding": [2, 2]}], ["relu", [1]]],
     "outputs": [2]}

What equals its default is left out. A fourth list may be there, ``"ranges"``: the largest magnitude of every value,
which fixed-point arithmetic needs (:mod:`pomona.runtime.ranges`). :meth:`Graph.from_json` and :meth:`Graph.shapes`
believe nothing: a graph of a hostile file is an error and never a crash, and the memory it takes is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Shape = tuple[int, ...]
Pair = tuple[int, int]

ELEMENTWISE = ("relu", "clip", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid")

_POOL = ("kernel", "stride", "padding", "ceil")
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "conv": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "linear": ("weight", "bias"),
    **dict.fromkeys(ELEMENTWISE, ()),
    "clip": ("low", "high"),
    "add": (),
    "mul": (),
    "scale": ("weight", "bias"),
    "max_pool": _POOL,
    "avg_pool": (*_POOL, "count_padding"),
    "mean": (),
    "flatten": (),
    "concat": (),
}
OPS = tuple(_ATTRIBUTES)
_NUM_OPERANDS = {"add": 2, "mul": 2}  # else one, but for concat

_MAX_INT = 2**31 - 1  # what the core's int32 holds
_MAX_NODES = 1 << 16
_MAX_OPERANDS = 1 << 12  # of one node; also of inputs and outputs
_MAX_NAME = 1 << 12
_MAX_RANGE = 1e18  # as the core's
_MAX_WINDOW = 1 << 16  # elements of a kernel, without its channels
MAX_BYTES = 1 << 34
"""Values of one sample may take this much memory together, as float32."""


class HasShape(Protocol):
    """A tensor: a numpy array, or a sparse one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. The table above says which attributes it reads; the others keep their defaults.

    Attributes:
        op: one of ``OPS``.
        operands: the values it takes.
        weight, bias: names of tensors.
        kernel, stride, padding, dilation: of height and width, equal on both sides.
        low, high: bounds of ``clip``.
        ceil: pools have a last window too which begins inside of the input or its left padding, and ends beyond.
        count_padding: ``avg_pool`` divides by how much of the window is in the input or its padding; else in the input.
    """

    op: str
    operands: tuple[int, ...]
    weight: str | None = None
    bias: str | None = None
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    low: float = -math.inf
    high: float = math.inf
    ceil: bool = False
    count_padding: bool = False

    def __post_init__(self) -> None:
        if self.op not in _ATTRIBUTES:
            raise ValueError(f"an operation is one of {', '.join(OPS)}; got {self.op!r}")
        num = len(self.operands)
        if self.op == "concat" and not 1 <= num <= _MAX_OPERANDS:
            raise ValueError(f"concat takes 1 to {_MAX_OPERANDS} values, got {num}")
        wanted = _NUM_OPERANDS.get(self.op, 1)
        if self.op != "concat" and num != wanted:
            raise ValueError(f"{self.op} takes {wanted} value{'s' * (wanted > 1)}, got {num}")
        if self.weight is None and "weight" in _ATTRIBUTES[self.op]:
            raise ValueError(f"{self.op} needs a weight")

    def to_json(self) -> list[Any]:
        """``[op, operands]``, or with a third element: the attributes that differ from their defaults."""
        attributes = {}
        for name in _ATTRIBUTES[self.op]:
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                attributes[name] = list(value) if isinstance(value, tuple) else value
        return [self.op, list(self.operands), attributes] if attributes else [self.op, list(self.operands)]

    @classmethod
    def from_json(cls, data: Any) -> Node:
        """The inverse of :meth:`to_json`; ValueError on anything else."""
        if not isinstance(data, list) or len(data) not in (2, 3) or not isinstance(data[0], str):
            raise ValueError(
                f"a node is [operation, operands] or [operation, operands, attributes], got {_short(data)}"
            )
        op, operands, attributes = data[0], data[1], data[2] if len(data) == 3 else {}
        if op not in _ATTRIBUTES:
            raise ValueError(f"an operation is one of {', '.join(OPS)}; got {_short(op)}")
        if not isinstance(attributes, dict):
            raise ValueError(f"attributes of {op} are a JSON object, got {_short(attributes)}")
        for name in attributes:
            if name not in _ATTRIBUTES[op]:
                known = ", ".join(_ATTRIBUTES[op]) or "none"
                raise ValueError(f"{op} has no attribute {_short(name)}; it has: {known}")
        read = {name: _READ[name](f"{op}'s {name}", value) for name, value in attributes.items()}
        return cls(op, _ints(f"{op}'s operands", operands, 0), **read)


_DEFAULTS: dict[str, Any] = {
    name: field.default for name, field in Node.__dataclass_fields__.items() if name not in ("op", "operands")
}


def _short(value: object) -> str:
    """For messages; of any depth and length."""
    if isinstance(value, dict) or (
        isinstance(value, list) and not (len(value) <= 8 and set(map(type, value)) <= {int})
    ):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def _int(what: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MAX_INT:
        raise ValueError(f"{what} must be an integer in [{least}, {_MAX_INT}], got {_short(value)}")
    return value


def _ints(what: str, values: Any, least: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > _MAX_OPERANDS:
        raise ValueError(f"{what} must be a list of at most {_MAX_OPERANDS} integers, got {_short(values)}")
    return tuple(_int(what, value, least) for value in values)


def _pair(least: int) -> Callable[[str, Any], Pair]:
    def read(what: str, value: Any) -> Pair:
        pair = _ints(what, value, least)
        if len(pair) != 2:
            raise ValueError(f"{what} must be two integers, of height and width, got {_short(value)}")
        return pair[0], pair[1]

    return read


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise ValueError(f"{what} must be the name of a tensor, got {_short(value)}")
    return value


def _number(what: str, value: Any) -> float:
    # A JSON integer may have any number of digits; float() of it would overflow.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 3.4e38:
        raise ValueError(f"{what} must be a number that float32 holds, got {_short(value)}")
    return float(value)


def _bool(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {_short(value)}")
    return value


_READ: dict[str, Callable[[str, Any], Any]] = {
    "weight": _name,
    "bias": _name,
    "kernel": _pair(1),
    "stride": _pair(1),
    "padding": _pair(0),
    "dilation": _pair(1),
    "groups": lambda what, value: _int(what, value, 1),
    "low": _number,
    "high": _number,
    "ceil": _bool,
    "count_padding": _bool,
}


@dataclass(frozen=True, slots=True)
class Graph:
    """A network without its tensors.

    Attributes:
        inputs: shapes of one sample.
        nodes: in order of execution; each takes values that are there before it.
        outputs: values.
        ranges: the largest magnitude of every value, of float32, or None.

    Example:
        >>> Graph(inputs=((4,),), nodes=(Node("relu", (0,)),), outputs=(1,)).to_json()
        {'inputs': [[4]], 'nodes': [['relu', [0]]], 'outputs': [1]}
    """

    inputs: tuple[Shape, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    ranges: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.ranges is not None:
            if len(self.ranges) != self.num_values:
                raise ValueError(f"there must be {self.num_values} ranges, one for each value; got {len(self.ranges)}")
            for value, most in enumerate(self.ranges):
                if not 0.0 <= most <= _MAX_RANGE:
                    raise ValueError(f"the range of value {value} must be in [0, {_MAX_RANGE:g}], got {most}")
        for i, shape in enumerate(self.inputs):
            if not 1 <= len(shape) <= 3 or not all(1 <= size <= _MAX_INT for size in shape):
                raise ValueError(f"input {i} must have 1 to 3 dimensions of at least 1, got {_short(list(shape))}")
        for i, node in enumerate(self.nodes):
            for value in node.operands:
                if not 0 <= value < self.num_inputs + i:
                    raise ValueError(
                        f"node {i} ({node.op}) takes value {value}; before it there are {self.num_inputs + i}"
                    )
        if not self.inputs or not self.outputs:
            raise ValueError(f"a network has inputs and outputs, got {self.num_inputs} and {len(self.outputs)}")
        for value in self.outputs:
            if not 0 <= value < self.num_values:
                raise ValueError(f"an output must be one of {self.num_values} values, got {value}")

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_values(self) -> int:
        return len(self.inputs) + len(self.nodes)

    def names(self) -> list[str]:
        """The tensors that it needs, each once, in order of use."""
        return list(dict.fromkeys(n for node in self.nodes for n in (node.weight, node.bias) if n is not None))

    def to_json(self) -> dict[str, Any]:
        """What ``json.dumps`` takes; see the head of this file."""
        graph: dict[str, Any] = {
            "inputs": [list(shape) for shape in self.inputs],
            "nodes": [node.to_json() for node in self.nodes],
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
            raise ValueError(f"a graph is a JSON object of inputs, nodes and outputs, got {_short(data)}")
        for what, limit in (("inputs", _MAX_OPERANDS), ("nodes", _MAX_NODES)):
            if not isinstance(data[what], list) or len(data[what]) > limit:
                raise ValueError(f"{what} must be a list of at most {limit}, got {_short(data[what])}")
        inputs = tuple(_ints(f"input {i}", shape, 1) for i, shape in enumerate(data["inputs"]))
        nodes = []
        for i, node in enumerate(data["nodes"]):
            try:
                nodes.append(Node.from_json(node))
            except ValueError as error:
                raise ValueError(f"node {i}: {error}") from None
        ranges = None
        if "ranges" in data:
            if not isinstance(data["ranges"], list) or len(data["ranges"]) > _MAX_NODES + _MAX_OPERANDS:
                raise ValueError(f"ranges must be a list, one for each value; got {_short(data['ranges'])}")
            ranges = tuple(_number(f"the range of value {i}", most) for i, most in enumerate(data["ranges"]))
        return cls(inputs, tuple(nodes), _ints("outputs", data["outputs"], 0), ranges)

    def shapes(self, tensors: Mapping[str, HasShape], *, max_bytes: int = MAX_BYTES) -> list[Shape]:
        """The shape of every value, after checking that all operations fit them and their tensors.

        Args:
            tensors: by name; only shapes are looked at.
            max_bytes: what all values of one sample may take together, as float32.

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
                    raise ValueError(f"the network takes more than {max_bytes:,} bytes a sample, from here on")
            except ValueError as error:
                raise ValueError(f"node {i} ({node.op}): {error}") from None
            found.append(shape)
        return found


def shape_after(node: Node, operands: list[Shape], tensors: Mapping[str, HasShape]) -> Shape:
    """The shape of what a node yields; ValueError if its operands or tensors do not fit."""
    return _SHAPES[node.op](node, operands, _Tensors(tensors))


def _padded_size(node: Node, x: Shape) -> int:
    return x[0] * (x[1] + 2 * node.padding[0]) * (x[2] + 2 * node.padding[1]) if len(x) == 3 else 0


class _Tensors:
    """Shapes by name."""

    def __init__(self, tensors: Mapping[str, HasShape]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> Shape:
        if name not in self._tensors:
            raise ValueError(f"there is no tensor {_short(name)}")
        return tuple(self._tensors[name].shape)

    def check_vector(self, name: str | None, size: int) -> None:
        if name is not None and self.shape(name) != (size,):
            raise ValueError(f"{_short(name)} must have the shape [{size}], got {list(self.shape(name))}")


def _image(x: Shape) -> Shape:
    if len(x) != 3:
        raise ValueError(f"it takes (channels, height, width), got {list(x)}")
    return x


def _windows(size: Pair, kernel: Pair, node: Node) -> Pair:
    """How many windows fit, by height and width."""
    if math.prod(kernel) > _MAX_WINDOW:
        raise ValueError(f"a kernel has at most {_MAX_WINDOW} elements, got {list(kernel)}")
    num = []
    for n, k, stride, padding, dilation in zip(size, kernel, node.stride, node.padding, node.dilation, strict=True):
        room = n + 2 * padding - dilation * (k - 1) - 1
        if room < 0 or n + 2 * padding > _MAX_INT:
            raise ValueError(
                f"a kernel of {list(kernel)} with dilation {list(node.dilation)} and padding {list(node.padding)} "
                f"does not fit the input of {list(size)}"
            )
        count = (room + node.ceil * (stride - 1)) // stride + 1
        num.append(count - (node.ceil and (count - 1) * stride >= n + padding))
    return num[0], num[1]


def _conv(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    c, h, w = _image(x[0])
    weight = tensors.shape(node.weight or "")
    if len(weight) not in (2, 4) or min(weight) < 1:
        raise ValueError(f"{_short(node.weight)} must be (outputs, channels / groups, kh, kw), got {list(weight)}")
    out, per_group, kh, kw = (*weight, 1, 1)[:4]
    if per_group * node.groups != c or out % node.groups:
        raise ValueError(f"{_short(node.weight)} of {list(weight)} in {node.groups} groups does not fit {c} channels")
    tensors.check_vector(node.bias, out)
    return (out, *_windows((h, w), (kh, kw), node))


def _linear(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    weight = tensors.shape(node.weight or "")
    if len(x[0]) > 2 or len(weight) != 2 or weight[1] != x[0][-1] or weight[0] < 1:
        raise ValueError(f"{_short(node.weight)} of {list(weight)} does not fit {list(x[0])}")
    tensors.check_vector(node.bias, weight[0])
    return (*x[0][:-1], weight[0])


def _same(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    return x[0]


def _clip(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    if not node.low <= node.high:
        raise ValueError(f"low must not be above high, got {node.low} and {node.high}")
    return x[0]


def _add(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    if x[0] != x[1]:
        raise ValueError(f"it takes values of one shape, got {list(x[0])} and {list(x[1])}")
    return x[0]


def _mul(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    if x[0] != x[1] and not (len(x[0]) == 3 and x[1] == (x[0][0], 1, 1)):
        raise ValueError(f"it takes values of one shape, or (C, H, W) and (C, 1, 1); got {list(x[0])} and {list(x[1])}")
    return x[0]


def _scale(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    size = num_channels(x[0])
    tensors.check_vector(node.weight, size)
    tensors.check_vector(node.bias, size)
    return x[0]


def _pool(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    c, h, w = _image(x[0])
    if any(2 * p > k for p, k in zip(node.padding, node.kernel, strict=True)):
        raise ValueError(f"padding {list(node.padding)} is more than half of the kernel {list(node.kernel)}")
    return (c, *_windows((h, w), node.kernel, node))


def _mean(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    return _image(x[0])[0], 1, 1


def _flatten(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    if len(x[0]) == 2:
        raise ValueError(f"it takes (channels, height, width), or (features,); got {list(x[0])}")
    return (math.prod(x[0]),)


def _concat(node: Node, x: list[Shape], tensors: _Tensors) -> Shape:
    if len(x[0]) == 2 or any(len(s) != len(x[0]) or s[1:] != x[0][1:] for s in x):
        some = ", ".join(str(list(s)) for s in x[:4])
        raise ValueError(f"it takes (C, H, W) of one height and width, or (F,); got {some}{', ...' * (len(x) > 4)}")
    return (sum(s[0] for s in x), *x[0][1:])


_SHAPES: dict[str, Callable[[Node, list[Shape], _Tensors], Shape]] = {
    "conv": _conv,
    "linear": _linear,
    **dict.fromkeys(ELEMENTWISE, _same),
    "clip": _clip,
    "add": _add,
    "mul": _mul,
    "scale": _scale,
    "max_pool": _pool,
    "avg_pool": _pool,
    "mean": _mean,
    "flatten": _flatten,
    "concat": _concat,
}


def num_channels(shape: Shape) -> int:
    """By how many numbers ``scale`` multiplies: channels of (C, H, W), features of (F,) and (P, F)."""
    return shape[0] if len(shape) == 3 else shape[-1]
