"""A graph executed in numpy, literally: what the engine is tested against, and what runs where there is no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files.sparse import Sparse
from pomona.runtime.graph import Graph
from pomona.runtime.operations import OPERATIONS

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
    values: dict[int, Array] = {
        v: np.asarray(x, dtype=dtype if graph.dtype_of(v) == "float32" else None) for v, x in enumerate(inputs)
    }
    for i, node in enumerate(graph.nodes):
        weight, bias = (_dense(tensors[n], dtype) if n else None for n in (node.weight, node.bias))
        with np.errstate(over="ignore"):  # exp of a large number: its limit is right
            result = OPERATIONS[node.op].compute(node, [values[v] for v in node.operands], weight, bias)
        values[graph.num_inputs + i] = result
        for v in set(node.operands):
            if last_use[v] == i and v not in graph.outputs:
                del values[v]
    return [values[v] for v in graph.outputs]


def arrays_of(graph: Graph, inputs: Sequence[Any]) -> list[Array]:
    """The inputs as contiguous arrays of the dtypes that the graph wants.

    Raises:
        ValueError: an input that must hold integers holds something else, or some that its dtype does not hold.
    """
    arrays = []
    for i, x in enumerate(inputs):
        dtype = graph.dtype_of(i) if i < graph.num_inputs else "float32"
        array = np.asarray(x)
        if dtype != "float32":
            _check_integers(i, array, np.iinfo(dtype))
        arrays.append(np.ascontiguousarray(array, dtype))
    return arrays


def _check_integers(i: int, array: Array, limits: np.iinfo[Any]) -> None:
    if array.dtype.kind not in "iu":
        raise ValueError(f"input {i} must hold integers ({limits.dtype}), got an array of {array.dtype}")
    if array.size and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise ValueError(
            f"input {i} must hold numbers of {limits.dtype}, in [{limits.min}, {limits.max}]; got some from "
            f"{array.min()} to {array.max()}"
        )


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
