"""Operators of which no operand depends on an input: computed when the model is read, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.readers.onnx.builder import Given, array_of, dense_of

Array: TypeAlias = NDArray[Any]


def axes_of(a: Given, place: int, ndim: int) -> tuple[int, ...] | None:
    axes = a.setting("axes", place)
    return None if axes is None else tuple(int(axis) % ndim for axis in np.atleast_1d(axes))


def _fold_constant(a: Given) -> Array:
    for name, value in a.attributes.items():
        if name == "value":
            return array_of(a.onnx, a.t, value)
        if name == "sparse_value":
            return dense_of(a.onnx, a.t, value)
        if name.startswith("value_"):
            return np.asarray(value, np.float32 if "float" in name else np.int64)
    raise a.refuse("without a value")


def _fold_reshape(a: Given) -> Array:
    x, shape = a.array(0), [int(n) for n in a.array(1)]
    if not a.attributes.get("allowzero"):
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def _fold_slice(a: Given) -> Array:
    return a.array(0)[slices_of(a, a.array(0).shape)]


def slices_of(a: Given, shape: Sequence[int]) -> tuple[slice, ...]:
    starts, ends = a.setting("starts", 1), a.setting("ends", 2)
    axes, steps = a.setting("axes", 3), a.setting("steps", 4)
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    found = [slice(None)] * len(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0 and end < -shape[axis]:
            end = None
        found[axis % len(shape)] = slice(start, end, step)
    return tuple(found)


def _fold_gather(a: Given) -> Array:
    x, indices = a.array(0), a.array(1)
    axis = a.attributes.get("axis", 0) % max(1, x.ndim)
    a.t.take((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.itemsize)
    return np.take(x, indices, axis)


def _fold_expand(a: Given) -> Array:
    shape = np.broadcast_shapes(a.array(0).shape, tuple(int(n) for n in a.array(1)))
    a.t.take(shape, a.array(0).itemsize)
    return np.broadcast_to(a.array(0), shape).copy()


def _fold_constant_of_shape(a: Given) -> Array:
    value = array_of(a.onnx, a.t, a.attributes["value"]) if "value" in a.attributes else np.zeros(1, np.float32)
    a.t.take(a.array(0), value.itemsize)
    return np.full(tuple(int(n) for n in a.array(0)), value.reshape(-1)[0])


def _fold_cast(a: Given) -> Array:
    dtype = a.onnx.helper.tensor_dtype_to_np_dtype(a.attributes["to"])
    return a.array(0).astype(dtype if np.dtype(dtype).kind in "fiub" else np.float32)


def _fold_range(a: Given) -> Array:
    start, limit, delta = (a.array(i).reshape(-1)[0] for i in range(3))
    a.t.take((max(0, math.ceil((float(limit) - float(start)) / float(delta))),))
    return np.arange(start, limit, delta, dtype=a.array(0).dtype)


def _fold_squeeze(a: Given) -> Array:
    return a.array(0).squeeze(axes_of(a, 1, a.array(0).ndim))


def _fold_unsqueeze(a: Given) -> Array:
    axes = a.setting("axes", 1)
    return np.expand_dims(a.array(0), tuple(int(axis) for axis in np.atleast_1d(axes)))


def _fold_dequantize(a: Given) -> Array:
    """(x - zero point) scale, along one axis; blocks are refused."""
    x, scale = a.array(0).astype(np.float32), a.array(1).astype(np.float32)
    if a.attributes.get("block_size"):
        raise a.refuse("in blocks")
    zero = a.array(2).astype(np.float32) if a.input(2) is not None else np.zeros_like(scale)
    if scale.size > 1:
        shape = [1] * x.ndim
        shape[a.attributes.get("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (x - zero) * scale


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Given], Array]:
    def fold(a: Given) -> Array:
        x, y = a.array(0), a.array(1)
        a.t.take(np.broadcast_shapes(x.shape, y.shape), max(x.itemsize, y.itemsize))
        return np.asarray(function(x, y)).astype(np.result_type(x, y), copy=False)

    return fold


def _fold_div(a: Given) -> Array:
    x, y = a.array(0), a.array(1)
    if x.dtype.kind == "f":
        return _binary(np.divide)(a)
    return np.trunc(x / y).astype(x.dtype)  # towards zero


def _fold_transpose(a: Given) -> Array:
    return a.array(0).transpose(a.attributes.get("perm"))


def _fold_concat(a: Given) -> Array:
    arrays = [a.array(i) for i in range(len(a.inputs))]
    a.t.take((sum(x.size for x in arrays),), arrays[0].itemsize)
    return np.concatenate(arrays, a.attributes["axis"])


FOLDS: dict[str, Callable[[Given], Array]] = {
    "Constant": _fold_constant,
    "Identity": lambda a: a.array(0),
    "Reshape": _fold_reshape,
    "Flatten": lambda a: a.array(0).reshape(math.prod(a.array(0).shape[: a.attributes.get("axis", 1)]), -1),
    "Transpose": _fold_transpose,
    "Slice": _fold_slice,
    "Gather": _fold_gather,
    "Concat": _fold_concat,
    "Expand": _fold_expand,
    "ConstantOfShape": _fold_constant_of_shape,
    "Cast": _fold_cast,
    "Range": _fold_range,
    "Squeeze": _fold_squeeze,
    "Unsqueeze": _fold_unsqueeze,
    "DequantizeLinear": _fold_dequantize,
    "Shape": lambda a: np.asarray(a.array(0).shape, np.int64)[a.attributes.get("start", 0) : a.attributes.get("end")],
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _fold_div,
    "Sqrt": lambda a: np.sqrt(a.array(0)),
    "Neg": lambda a: -a.array(0),
    "Floor": lambda a: np.floor(a.array(0)),
    "Equal": lambda a: np.equal(a.array(0), a.array(1)),
    "Where": lambda a: np.where(a.array(0), a.array(1), a.array(2)),
}
