"""The operations of a graph: one record each, from which everything else that lists them is made or checked.

The engine's tables (``core/include/pomona_net.h``, ``core/src/operations.inc``), those of ``web/pomona.js`` and of
``docs/file-format.md`` are written by ``make tables`` (``core/tables.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pomona.runtime import rules
from pomona.runtime.node import ATTRIBUTES, MAX_OPERANDS, Node, Shape, short
from pomona.runtime.rules import Formula, HasShape, Rule, Tensors, elementwise, hardsigmoid, sigmoid

DType = Literal["float32", "int32", "int64"]

DTYPES: dict[DType, int] = {"float32": 0, "int32": 1, "int64": 2}
"""What values are made of, with the engine's number of each."""

MAX_DIMENSIONS = 4
"""Dimensions of a value, without the batch."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What there is to know about an operation.

    Attributes:
        name: in a graph.
        number: in the engine's interface; never used again for another one.
        says: what it computes, for the documentation.
        shape: the rule for the shape of its result.
        compute: its result in numpy.
        attributes: names of those that it reads; ``weight`` is needed, all others have defaults.
        operands: how many values it takes, at least and at most.
        takes: dtypes that its operands may have; it yields float32.
        kind: "layer" (a matrix of weights, whose zeros are skipped), "elementwise" (a function of each number of its
            one operand) or "other".
        keeps_zero: it yields 0 for 0; of ``clip`` that depends on its bounds.
        is_in_place: a result may take the place of the first operand, where both have one shape.
        unit: of the result in 16-bit fixed point: its "own", by its range; the "largest" of that and of those of the
            operands; or that of the "operand".
        weight: what its weight is to the engine: a "matrix"; a "kernel", a matrix that also has the attribute `kernel`
            there, by its shape; a "vector", one number per channel; or "", there is none.
        readers: which of ``pomona.runtime.readers`` make it.
    """

    name: str
    number: int
    says: str
    shape: Rule
    compute: Formula
    attributes: tuple[str, ...] = ()
    operands: tuple[int, int] = (1, 1)
    takes: tuple[DType, ...] = ("float32",)
    kind: Literal["layer", "elementwise", "other"] = "other"
    keeps_zero: bool = True
    is_in_place: bool = False
    unit: Literal["own", "largest", "operand"] = "own"
    weight: Literal["", "matrix", "kernel", "vector"] = ""
    readers: tuple[str, ...] = ("aten",)


def _elementwise(
    name: str, number: int, says: str, compute: Formula, *, shape: Rule = rules.same_shape, **settings: Any
) -> Operation:
    return Operation(name, number, says, shape, compute, kind="elementwise", is_in_place=True, **settings)


_POOL = ("kernel", "stride", "padding", "ceil")

_ALL = (
    Operation(
        "conv",
        0,
        "(C, H, W) to (O, H', W'); weight (O, C / groups, kh, kw), or (O, C) for 1 x 1; bias (O,); zero padding",
        rules.conv_shape,
        rules.conv,
        attributes=("weight", "bias", "stride", "padding", "dilation", "groups"),
        kind="layer",
        weight="kernel",
    ),
    Operation(
        "linear",
        1,
        "(F,) to (O,), or (P, F) to (P, O); weight (O, F); bias (O,)",
        rules.linear_shape,
        rules.linear,
        attributes=("weight", "bias"),
        kind="layer",
        weight="matrix",
    ),
    _elementwise("relu", 2, "max(x, 0)", elementwise(lambda x: np.maximum(x, 0)), unit="largest"),
    _elementwise(
        "clip",
        3,
        "min(max(x, low), high)",
        lambda node, x, weight, bias: np.clip(x[0], node.low, node.high),
        shape=rules.clip_shape,
        attributes=("low", "high"),
        unit="largest",
    ),
    _elementwise("gelu", 4, "x Phi(x), by erf", elementwise(lambda x: 0.5 * x * (1 + rules.erf(x / math.sqrt(2))))),
    _elementwise("gelu_tanh", 5, "x Phi(x), nearly, by tanh", elementwise(rules.gelu_tanh)),
    _elementwise("silu", 6, "x sigmoid(x)", elementwise(lambda x: x * sigmoid(x))),
    _elementwise("sigmoid", 7, "1 / (1 + exp(-x))", elementwise(sigmoid), keeps_zero=False),
    _elementwise("tanh", 8, "tanh(x)", elementwise(np.tanh)),
    _elementwise("hardswish", 9, "x hardsigmoid(x)", elementwise(lambda x: x * hardsigmoid(x))),
    _elementwise("hardsigmoid", 10, "min(max(x + 3, 0), 6) / 6", elementwise(hardsigmoid), keeps_zero=False),
    Operation(
        "add",
        11,
        "the sum of two values of one shape",
        rules.add_shape,
        lambda node, x, weight, bias: x[0] + x[1],
        operands=(2, 2),
        is_in_place=True,
        unit="largest",
    ),
    Operation(
        "mul",
        12,
        "the product of two values of one shape, or of (C, H, W) and (C, 1, 1)",
        rules.mul_shape,
        lambda node, x, weight, bias: x[0] * x[1],
        operands=(2, 2),
    ),
    Operation(
        "scale",
        13,
        "weight (C,) times x plus bias (C,): by channel of (C, H, W), or by feature",
        rules.scale_shape,
        rules.scale,
        attributes=("weight", "bias"),
        is_in_place=True,
        weight="vector",
    ),
    Operation(
        "max_pool",
        14,
        "(C, H, W) to (C, H', W'): the largest of a window; padding of at most half the kernel",
        rules.pool_shape,
        rules.max_pool,
        attributes=_POOL,
        unit="operand",
    ),
    Operation(
        "avg_pool",
        15,
        "(C, H, W) to (C, H', W'): the mean of a window; padding of at most half the kernel",
        rules.pool_shape,
        rules.avg_pool,
        attributes=(*_POOL, "count_padding"),
    ),
    Operation(
        "mean",
        16,
        "(C, H, W) to (C, 1, 1)",
        rules.mean_shape,
        elementwise(lambda x: x.mean(axis=(2, 3), keepdims=True)),
    ),
    Operation(
        "flatten",
        17,
        "all numbers of a value of 1, 3 or 4 dimensions, in one",
        rules.flatten_shape,
        elementwise(lambda x: x.reshape(len(x), math.prod(x.shape[1:]))),
        unit="operand",
    ),
    Operation(
        "concat",
        18,
        "values (C, H, W) along channels, or (F,)",
        rules.concat_shape,
        rules.concat,
        operands=(1, MAX_OPERANDS),
        unit="largest",
    ),
    Operation(
        "upsample",
        19,
        "(C, H, W) to (C, H s, W t): each pixel s times down and t times across, where `stride` is (s, t)",
        rules.upsample_shape,
        rules.upsample,
        attributes=("stride",),
        unit="operand",
    ),
)

OPERATIONS = {operation.name: operation for operation in _ALL}
"""Every operation by name."""

ELEMENTWISE = tuple(name for name, operation in OPERATIONS.items() if operation.kind == "elementwise")


def operation_named(name: str) -> Operation:
    """The operation of this name; ValueError if there is none."""
    if name not in OPERATIONS:
        raise ValueError(f"an operation is one of {', '.join(OPERATIONS)}; got {short(name)}")
    return OPERATIONS[name]


def check(node: Node, dtypes: Sequence[DType]) -> None:
    """ValueError if there is no such operation, or the node lacks what it needs or has what it does not read.

    Args:
        node: one with operands that exist.
        dtypes: of its operands.
    """
    operation = operation_named(node.op)
    num, (least, most) = len(node.operands), operation.operands
    if not least <= num <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{node.op} takes {wanted} value{'s' * (most > 1)}, got {num}")
    if node.weight is None and "weight" in operation.attributes:
        raise ValueError(f"{node.op} needs a weight")
    for name, attribute in ATTRIBUTES.items():
        if name not in operation.attributes and getattr(node, name) != attribute.default:
            raise ValueError(f"{node.op} has no attribute {name!r}; it has: {known_attributes(operation)}")
    for value, dtype in zip(node.operands, dtypes, strict=True):
        if dtype not in operation.takes:
            raise ValueError(f"{node.op} takes {' or '.join(operation.takes)}, but value {value} is of {dtype}")


def known_attributes(operation: Operation) -> str:
    """The names of its attributes, for messages."""
    return ", ".join(operation.attributes) or "none"


def shape_after(node: Node, operands: list[Shape], tensors: Mapping[str, HasShape]) -> Shape:
    """The shape of what a node yields; ValueError if its operands or tensors do not fit."""
    return OPERATIONS[node.op].shape(node, operands, Tensors(tensors))
