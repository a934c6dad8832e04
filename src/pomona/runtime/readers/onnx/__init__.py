"""ONNX models as graphs of the runtime, read by the onnx package: opset 7 to now, and no torch.

What depends on no input is computed first (``folds``), so that zeros are found wherever they are: in sparse
initializers, behind Transpose, Identity, Cast or DequantizeLinear. The first dimension of every input is the batch.
Every other operator becomes operations of the graph (``operators``), or is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.graph import Graph
from pomona.runtime.operations import DType
from pomona.runtime.readers.builder import BATCH, UnsupportedError
from pomona.runtime.readers.onnx.builder import Constant, Found, Given, OnnxBuilder, Value, array_of, dense_of
from pomona.runtime.readers.onnx.folds import FOLDS
from pomona.runtime.readers.onnx.operators import HANDLERS

_LEAST_LIMIT = 1 << 30  # bytes
_DTYPES: dict[int, DType] = {1: "float32", 6: "int32", 7: "int64"}  # TensorProto's numbers


def read(
    source: str | os.PathLike[str] | bytes,
    *,
    shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] = (),
    max_bytes: int | None = None,
) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
    """The graph of an ONNX model, and its tensors.

    Args:
        source: a path, or the bytes of a model.
        shapes: name of an input -> its shape without the batch, for dimensions that the file leaves free; or the shapes
            of all inputs in their order.
        max_bytes: the most that the constants of the model may take; default: a thousand times the file, and at least
            1 GiB.

    Raises:
        ImportError: the package onnx is not installed.
        ValueError: this is no ONNX model, it is damaged, or it leaves a dimension free.
        UnsupportedError: names the operator that the runtime lacks; a ValueError.
    """
    onnx, model, t = _open(source, max_bytes)
    try:
        known = _read_constants(onnx, t, model.graph)
        _read_inputs(t, model.graph, known, shapes)
        for node in model.graph.node:
            _read_node(onnx, t, node, known)
        return t.finish([_output(t, known, output.name) for output in model.graph.output])
    except (UnsupportedError, MemoryError):
        raise
    except _OF_DAMAGE as error:
        raise ValueError(f"the ONNX model is damaged{_at(t)}: {str(error)[:300]}") from None


def read_weights(source: str | os.PathLike[str] | bytes, *, max_bytes: int | None = None) -> dict[str, NDArray[Any]]:
    """The constants of an ONNX model by name, sparse ones too, whatever it computes with them."""
    onnx, model, t = _open(source, max_bytes)
    try:
        known = _read_constants(onnx, t, model.graph)
        for node in model.graph.node:
            if node.op_type == "Constant":
                _read_node(onnx, t, node, known)
    except _OF_DAMAGE as error:
        raise ValueError(f"the ONNX model is damaged{_at(t)}: {str(error)[:300]}") from None
    return {name: found.array for name, found in known.items() if isinstance(found, Constant)}


_OF_DAMAGE = (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, ZeroDivisionError)


def _open(source: str | os.PathLike[str] | bytes, max_bytes: int | None) -> tuple[Any, Any, OnnxBuilder]:
    onnx = _import_onnx()
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    limit = max(_LEAST_LIMIT, 1000 * size) if max_bytes is None else max_bytes
    try:
        model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    except Exception as error:  # protobuf and onnx document no closed list
        raise ValueError(f"this is no ONNX model: {type(error).__name__}: {str(error)[:200]}") from None
    opset = max([o.version for o in model.opset_import if o.domain in ("", "ai.onnx")], default=0)
    if opset < 7:
        raise ValueError(f"an ONNX model of opset 7 or later can be read, got opset {opset}")
    return onnx, model, OnnxBuilder(opset, limit)


def _at(t: OnnxBuilder) -> str:
    return f" at {t.operation} {t.path}".rstrip() if t.operation else ""


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise ImportError("reading ONNX needs the package onnx: pip install 'pomona[onnx]'") from None
    return onnx


def _read_constants(onnx: Any, t: OnnxBuilder, graph: Any) -> dict[str, Found]:
    known: dict[str, Found] = {"": None}
    for proto in graph.initializer:
        known[proto.name] = Constant(proto.name, array_of(onnx, t, proto))
    for proto in graph.sparse_initializer:
        known[proto.values.name] = Constant(proto.values.name, dense_of(onnx, t, proto))
    t.operation = ""
    return known


def _read_inputs(
    t: OnnxBuilder,
    graph: Any,
    known: dict[str, Found],
    shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]],
) -> None:
    inputs = [proto for proto in graph.input if proto.name not in known]
    if not isinstance(shapes, Mapping):
        if shapes and len(shapes) != len(inputs):
            raise UnsupportedError(f"the model has {len(inputs)} inputs, and shapes has {len(shapes)}")
        shapes = dict(zip((proto.name for proto in inputs), shapes, strict=False))
    if unknown := set(shapes) - {proto.name for proto in inputs}:
        have = ", ".join(proto.name for proto in inputs)
        raise UnsupportedError(f"shapes names {sorted(unknown)[0]!r}, and the inputs of the model are {have}")
    for i, proto in enumerate(inputs):
        tensor = proto.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
        if tensor.elem_type not in _DTYPES or len(dims) < 2:
            raise t.refuse(f"an input {proto.name} of type {tensor.elem_type} and shape {dims}")
        batch = dims[0] if isinstance(dims[0], int) and dims[0] > 0 else BATCH
        if i == 0:
            t.batch = batch
        if batch != t.batch:
            raise t.refuse(f"inputs of which the first dimensions, {t.batch} and {batch}, are not one batch")
        asked = shapes.get(proto.name, dims[1:])
        wanted = tuple(n for n in asked if isinstance(n, int) and n > 0)
        if len(wanted) < len(asked):
            example = tuple(n if isinstance(n, int) and n > 0 else 224 for n in asked)
            raise UnsupportedError(
                f"the input {proto.name} of shape {dims} leaves dimensions free; say what they are, without the "
                f"batch: shapes={{{proto.name!r}: {example}}}"
            )
        known[proto.name] = Value(t.input(wanted, _DTYPES[tensor.elem_type]), (t.batch, *wanted))


def _read_node(onnx: Any, t: OnnxBuilder, node: Any, known: dict[str, Found]) -> None:
    t.operation, t.path = node.op_type, node.name or (node.output[0] if node.output else "")
    t.num_outputs = sum(bool(name) for name in node.output)
    if node.domain not in ("", "ai.onnx"):
        raise t.refuse(f"the operator {node.op_type} of {node.domain}")
    for name in node.input:
        if name not in known:
            raise ValueError(f"it takes {name!r}, which is not there yet")
    inputs = [known[name] for name in node.input]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given = Given(t, inputs, attributes, onnx)
    if node.op_type in FOLDS and all(x is None or isinstance(x, Constant) for x in inputs):
        made: Any = FOLDS[node.op_type](given)
    elif node.op_type in HANDLERS:
        made = HANDLERS[node.op_type](given)
    else:
        raise t.refuse(f"the operator {node.op_type}")
    results = made if isinstance(made, list) else [made]
    for name, result in zip(node.output, results, strict=False):
        if isinstance(result, int):
            result = t.now(result)
        elif isinstance(result, (np.ndarray, np.generic)):
            result = Constant(name, np.asarray(result))
        known[name] = result


def _output(t: OnnxBuilder, known: Mapping[str, Found], name: str) -> int:
    t.operation, t.path = "output", name
    return t.value(known[name]).number
