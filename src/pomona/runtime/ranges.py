"""The ranges of a network's values, which arithmetic in 16-bit fixed point needs; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files.sparse import Sparse
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.engine import Engine
from pomona.runtime.graph import Graph


def with_ranges(graph: Graph, tensors: Mapping[str, NDArray[Any] | Sparse], *inputs: NDArray[Any]) -> Graph:
    """Add to a graph the largest magnitude that each value has on these samples.

    A few dozen typical samples are enough: values may reach four times their range (``POMONA_HEADROOM`` of
    ``core/include/pomona_net.h``), and what goes beyond is cut off. Samples go through one by one, so this takes the
    memory of all values of one sample.

    Args:
        graph: what is computed.
        tensors: its weights by name, float32.
        inputs: one for each of ``graph.inputs``, with the batch in front.

    Raises:
        ValueError: there is no sample, shapes do not fit, a value is not finite or beyond 1e18, or an input is zero in
            all samples: anything else would then be cut off at almost nothing.
    """
    arrays = reference.arrays_of(graph, inputs)
    batch = reference.check_inputs(graph, arrays)
    if not batch:
        raise ValueError("ranges are measured on samples, got a batch of 0")
    numbers = [v for v in range(graph.num_values) if graph.dtype_of(v) == "float32"]
    every = replace(graph, outputs=tuple(numbers), ranges=None)
    run = Engine(every, tensors) if library.is_available() else lambda *x: reference.run(every, tensors, *x)
    most = np.zeros(graph.num_values)  # of integers there is no range, and none is needed
    for sample in range(batch):
        values = run(*(x[sample : sample + 1] for x in arrays))
        most[numbers] = np.maximum(most[numbers], [np.abs(value).max() for value in values])
        if not np.isfinite(most).all():
            first = int(np.flatnonzero(~np.isfinite(most))[0])
            raise ValueError(f"value {first} of sample {sample} is not finite, so it has no range")
    zero = [v for v in numbers if v < graph.num_inputs and most[v] == 0]
    if zero:
        raise ValueError(f"input {zero[0]} is zero in all samples, so it has no range; give typical ones")
    return replace(graph, ranges=tuple(float(np.float32(m)) for m in most))
