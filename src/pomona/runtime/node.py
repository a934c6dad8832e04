"""A node of a graph: one operation with its operands and attributes. Every attribute that there is, is defined here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

Shape = tuple[int, ...]
Pair = tuple[int, int]

MAX_INT = 2**31 - 1  # what the core's int32 holds
MAX_OPERANDS = 1 << 12  # of one node; also of inputs and outputs
_MAX_NAME = 1 << 12


def short(value: object) -> str:
    """Any value for a message, however deep and long it is."""
    if isinstance(value, dict) or (
        isinstance(value, list) and not (len(value) <= 8 and set(map(type, value)) <= {int})
    ):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def read_int(what: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_INT:
        raise ValueError(f"{what} must be an integer in [{least}, {MAX_INT}], got {short(value)}")
    return value


def read_ints(what: str, values: Any, least: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > MAX_OPERANDS:
        raise ValueError(f"{what} must be a list of at most {MAX_OPERANDS} integers, got {short(values)}")
    return tuple(read_int(what, value, least) for value in values)


def read_number(what: str, value: Any) -> float:
    # A JSON integer may have any number of digits; float() of it would overflow.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 3.4e38:
        raise ValueError(f"{what} must be a number that float32 holds, got {short(value)}")
    return float(value)


def _read_pair(what: str, value: Any, least: int) -> Pair:
    pair = read_ints(what, value, least)
    if len(pair) != 2:
        raise ValueError(f"{what} must be two integers, of height and width, got {short(value)}")
    return pair[0], pair[1]


def _read_tensor(what: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise ValueError(f"{what} must be the name of a tensor, got {short(value)}")
    return value


def _read_bool(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {short(value)}")
    return value


Kind = Literal["tensor", "integer", "pair", "number", "bool"]
_READ: dict[Kind, Callable[[str, Any, int], Any]] = {
    "tensor": lambda what, value, least: _read_tensor(what, value),
    "integer": read_int,
    "pair": _read_pair,
    "number": lambda what, value, least: read_number(what, value),
    "bool": lambda what, value, least: _read_bool(what, value),
}


@dataclass(frozen=True, slots=True)
class Attribute:
    """A setting of a node besides its operands.

    Attributes:
        name: in a file, and of the field of :class:`Node`.
        number: in the engine's interface; never used again for another one.
        kind: "tensor" (a name), "integer", "pair" (of height and width), "number" or "bool".
        default: what is left out in a file.
        least: of integers.
    """

    name: str
    number: int
    kind: Kind
    default: Any
    least: int

    def read(self, what: str, value: Any) -> Any:
        """The attribute from JSON; ValueError says what `what` must be."""
        return _READ[self.kind](what, value, self.least)


def _about(number: int, kind: Kind, *, least: int = 0) -> dict[str, Any]:
    return {"number": number, "kind": kind, "least": least}


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. Its :class:`~pomona.runtime.operations.Operation` says which attributes it reads; the others keep
    their defaults.

    Attributes:
        op: the name of the operation.
        operands: the values it takes.
        weight, bias: names of tensors.
        kernel, stride, padding, dilation: of height and width, equal on both sides.
        groups: of a convolution.
        low, high: bounds of ``clip``.
        ceil: pools have a last window too which begins inside of the input or its left padding, and ends beyond.
        count_padding: ``avg_pool`` divides by how much of the window is in the input or its padding, and not only by
            how much of it is in the input.
    """

    op: str
    operands: tuple[int, ...]
    weight: str | None = field(default=None, metadata=_about(0, "tensor"))
    bias: str | None = field(default=None, metadata=_about(1, "tensor"))
    kernel: Pair = field(default=(1, 1), metadata=_about(2, "pair", least=1))
    stride: Pair = field(default=(1, 1), metadata=_about(3, "pair", least=1))
    padding: Pair = field(default=(0, 0), metadata=_about(4, "pair"))
    dilation: Pair = field(default=(1, 1), metadata=_about(5, "pair", least=1))
    groups: int = field(default=1, metadata=_about(6, "integer", least=1))
    low: float = field(default=-math.inf, metadata=_about(7, "number"))
    high: float = field(default=math.inf, metadata=_about(8, "number"))
    ceil: bool = field(default=False, metadata=_about(9, "bool"))
    count_padding: bool = field(default=False, metadata=_about(10, "bool"))


def _of_field(f: Field[Any]) -> Attribute:
    return Attribute(f.name, f.metadata["number"], f.metadata["kind"], f.default, f.metadata["least"])


ATTRIBUTES = {f.name: _of_field(f) for f in fields(Node) if f.metadata}
"""Every attribute by name."""
