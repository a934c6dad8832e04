"""A graph executed in numpy, literally: what the engine is tested against, and what runs where there is no engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files.sparse import Sparse
from pomona.runtime.graph import Graph, Node

Array = NDArray[Any]


def run(
    graph: Graph,
    tensors: Mapping[str, Array | Sparse],
    *inputs: Array,
    dtype: type[np.float32] | type[np.float64] = np.float32,
) -> list[Array]:
    """The outputs of a network.

    Args:
        graph: what to compute.
        tensors: by name, float32.
        inputs: one for each of ``graph.inputs``, with the batch in front: (N, *shape).
        dtype: of all arithmetic and of the outputs; float64 for an oracle.

    Raises:
        ValueError: the graph, the tensors and the inputs do not fit.
    """
    graph.shapes(tensors)
    check_inputs(graph, inputs)
    last_use = {v: i for i, node in enumerate(graph.nodes) for v in node.operands}
    values: dict[int, Array] = {v: np.asarray(x, dtype=dtype) for v, x in enumerate(inputs)}
    for i, node in enumerate(graph.nodes):
        weight, bias = (_dense(tensors[n], dtype) if n else None for n in (node.weight, node.bias))
        with np.errstate(over="ignore"):  # exp of a large number: its limit is right
            values[graph.num_inputs + i] = _RUN[node.op](node, [values[v] for v in node.operands], weight, bias)
        for v in set(node.operands):
            if last_use[v] == i and v not in graph.outputs:
                del values[v]
    return [values[v] for v in graph.outputs]


def check_inputs(graph: Graph, inputs: Sequence[Array]) -> int:
    """The batch size, after checking that these are arrays of the right shapes."""
    if len(inputs) != graph.num_inputs:
        raise ValueError(f"the network takes {graph.num_inputs} inputs, got {len(inputs)}")
    for i, (x, shape) in enumerate(zip(inputs, graph.inputs, strict=True)):
        if x.shape[1:] != shape:
            hint = "; a batch of one sample is x[None]" if x.shape == shape else ""
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"input {i} must have the shape (batch, {wanted}), got {x.shape}{hint}")
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"all inputs must have one batch size, got {inputs[0].shape[0]} and {x.shape[0]}")
    return len(inputs[0])


def _dense(tensor: Array | Sparse, dtype: type) -> Array:
    dense = tensor.dense() if isinstance(tensor, Sparse) else tensor
    return np.asarray(dense, dtype=dtype)


def _by_channel(vector: Array | None, x: Array) -> Array | float:
    """Shaped so that it broadcasts along channels of (N, C, H, W), or features of (N, F) and (N, P, F)."""
    if vector is None:
        return 0.0
    return vector.reshape(-1, 1, 1) if x.ndim == 4 else vector


def _padded(x: Array, node: Node, fill: float, *, reach: tuple[int, int] = (0, 0)) -> Array:
    """With the padding around it, and so much more below and to the right that windows may reach into it."""
    (ph, pw), (more_h, more_w) = node.padding, reach
    return np.pad(x, ((0, 0), (0, 0), (ph, ph + more_h), (pw, pw + more_w)), constant_values=fill)


def _taps(x: Array, node: Node, kernel: tuple[int, int], out: tuple[int, int]) -> list[Array]:
    """For each place of the kernel what lies under it, (N, C, H', W') each."""
    taps = []
    for i, j in itertools.product(*map(range, kernel)):
        top, left = i * node.dilation[0], j * node.dilation[1]
        bottom, right = top + (out[0] - 1) * node.stride[0] + 1, left + (out[1] - 1) * node.stride[1] + 1
        taps.append(x[:, :, top : bottom : node.stride[0], left : right : node.stride[1]])
    return taps


def _conv(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    assert weight is not None
    weight = weight.reshape((*weight.shape, 1, 1)[:4])
    out, per_group, kh, kw = weight.shape
    padded = _padded(x[0], node, 0.0)
    spread = tuple(d * (k - 1) + 1 for d, k in zip(node.dilation, (kh, kw), strict=True))
    h, w = ((n - k) // s + 1 for n, k, s in zip(padded.shape[2:], spread, node.stride, strict=True))
    n = x[0].shape[0]
    y = np.zeros((n, node.groups, out // node.groups, h * w), weight.dtype)
    for k, tap in enumerate(_taps(padded, node, (kh, kw), (h, w))):
        matrix = weight[:, :, k // kw, k % kw].reshape(node.groups, out // node.groups, per_group)
        y += matrix @ tap.reshape(n, node.groups, per_group, h * w)
    y = y.reshape(n, out, h, w)
    return y + _by_channel(bias, y)


def _linear(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    assert weight is not None
    return np.asarray(x[0] @ weight.T + (0.0 if bias is None else bias))


def _scale(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    return x[0] * _by_channel(weight, x[0]) + _by_channel(bias, x[0])


def _pool_sizes(x: Array, node: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many windows there are, and by how much the last ones reach beyond the padding."""
    out, reach = [], []
    for n, k, s, p in zip(x.shape[2:], node.kernel, node.stride, node.padding, strict=True):
        # torch with ceil: one window more, if the last one does not end at the end and the next begins inside.
        starts = [i for i in range(-p, n + p, s) if i + k <= n + p or (node.ceil and i + k < n + p + s and i < n)]
        out.append(len(starts))
        reach.append(max(0, starts[-1] + k - n - p))
    return (out[0], out[1]), (reach[0], reach[1])


def _max_pool(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    out, reach = _pool_sizes(x[0], node)
    taps = _taps(_padded(x[0], node, -np.inf, reach=reach), node, node.kernel, out)
    return np.asarray(np.maximum.reduce(taps))


def _avg_pool(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    out, reach = _pool_sizes(x[0], node)
    counted = np.ones((1, 1, *x[0].shape[2:]), x[0].dtype)
    ones = _padded(counted, node, float(node.count_padding))
    ones = np.pad(ones, ((0, 0), (0, 0), (0, reach[0]), (0, reach[1])))
    total = sum(_taps(_padded(x[0], node, 0.0, reach=reach), node, node.kernel, out))
    return np.asarray(total / sum(_taps(ones, node, node.kernel, out)))


def _concat(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    return np.concatenate(x, axis=1)


def _elementwise(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda node, x, weight, bias: function(x[0])


def _erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), dtype=x.dtype)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _hardsigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x + 3, 0, 6) / 6)


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


_RUN: dict[str, Callable[[Node, list[Array], Array | None, Array | None], Array]] = {
    "conv": _conv,
    "linear": _linear,
    "relu": _elementwise(lambda x: np.maximum(x, 0)),
    "clip": lambda node, x, weight, bias: np.clip(x[0], node.low, node.high),
    "gelu": _elementwise(lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    "gelu_tanh": _elementwise(_gelu_tanh),
    "silu": _elementwise(lambda x: x * _sigmoid(x)),
    "sigmoid": _elementwise(_sigmoid),
    "tanh": _elementwise(np.tanh),
    "hardswish": _elementwise(lambda x: x * _hardsigmoid(x)),
    "hardsigmoid": _elementwise(_hardsigmoid),
    "add": lambda node, x, weight, bias: x[0] + x[1],
    "mul": lambda node, x, weight, bias: x[0] * x[1],
    "scale": _scale,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "mean": _elementwise(lambda x: x.mean(axis=(2, 3), keepdims=True)),
    "flatten": _elementwise(lambda x: x.reshape(len(x), math.prod(x.shape[1:]))),
    "concat": _concat,
}
