"""16-bit fixed point as core/include/pomona_net.h has it, literally: integers, one product after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.graph import Graph, Node

Array = NDArray[Any]
F = np.float32
STEPS, HEADROOM = F(32767), F(4)


def units(graph: Graph, tensors: Mapping[str, Array]) -> list[np.float32]:
    """Of every value."""
    assert graph.ranges is not None
    found: list[np.float32] = []
    for value, most in enumerate(graph.ranges):
        unit = max(F(most) * HEADROOM / STEPS, F(1e-18))
        if value >= graph.num_inputs:
            node = graph.nodes[value - graph.num_inputs]
            operands = [found[v] for v in node.operands]
            if node.op in ("conv", "linear"):
                weight = tensors[node.weight or ""]
                unit = max(unit, np.abs(weight).max(initial=0) * operands[0] / F(16))
                while 16 * (parts(weight, operands[0], unit) - 1).sum() > weight.size:
                    unit *= F(1.25)
                if node.bias:
                    unit = max(unit, np.abs(tensors[node.bias]).max() / STEPS)
            elif node.op in ("relu", "clip", "add", "concat"):
                unit = max(unit, *operands)
            elif node.op in ("max_pool", "flatten"):
                unit = operands[0]
        found.append(F(unit))
    return found


def parts(weight: Array, unit_in: np.float32, unit: np.float32) -> NDArray[np.int64]:
    size = np.abs(weight * (unit_in / unit))
    return np.where(size > STEPS / F(32768), 1 + np.floor(size / (STEPS / F(32768))), 1).astype(np.int64)


def to_units(x: Array, unit: np.float32) -> NDArray[np.int64]:
    return np.clip(np.rint(x * (F(1) / unit)), -32768, 32767).astype(np.int64)


def run(graph: Graph, tensors: Mapping[str, Array], x: Array) -> Array:
    """The output of a chain of conv, relu and max_pool, nothing cut off on the way; x is (N, C, H, W)."""
    unit = units(graph, tensors)
    values = [to_units(x, unit[0])]
    for i, node in enumerate(graph.nodes, start=1):
        q = [values[v] for v in node.operands]
        if node.op == "conv":
            values.append(_conv(node, tensors, q[0], unit[node.operands[0]], unit[i]))
        elif node.op == "relu":
            assert unit[i] == unit[node.operands[0]]
            values.append(np.maximum(q[0], 0))
        elif node.op == "max_pool":
            values.append(_max_pool(node, q[0]))
        else:
            raise NotImplementedError(node.op)
    return values[graph.outputs[0]].astype(F) * unit[graph.outputs[0]]


def _conv(node: Node, tensors: Mapping[str, Array], q: Array, unit_in: np.float32, unit: np.float32) -> Array:
    weight = tensors[node.weight or ""]
    out, _, kh, kw = weight.shape
    (ph, pw), (sh, sw) = node.padding, node.stride
    padded = np.pad(q, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    h, w = (padded.shape[2] - kh) // sh + 1, (padded.shape[3] - kw) // sw + 1
    sums = np.zeros((len(q), out, h, w), np.int64)
    nums = parts(weight, unit_in, unit)
    whole = np.rint(weight / nums.astype(F) * (unit_in / unit) * F(32768)).astype(np.int64)
    for o, c, y, x in np.argwhere(weight):
        num, value = int(nums[o, c, y, x]), int(whole[o, c, y, x])
        under = padded[:, c, y : y + (h - 1) * sh + 1 : sh, x : x + (w - 1) * sw + 1 : sw]
        sums[:, o] += num * ((value * under + (1 << 14)) >> 15)
    if node.bias:
        sums += np.rint(tensors[node.bias] / unit).astype(np.int64)[:, None, None]
    assert np.abs(sums).max() < 32768  # nothing is cut off
    return sums


def _max_pool(node: Node, q: Array) -> Array:
    (kh, kw), (sh, sw) = node.kernel, node.stride
    h, w = (q.shape[2] - kh) // sh + 1, (q.shape[3] - kw) // sw + 1
    ends = (h - 1) * sh + 1, (w - 1) * sw + 1
    return np.maximum.reduce(
        [q[:, :, y : y + ends[0] : sh, x : x + ends[1] : sw] for y in range(kh) for x in range(kw)]
    )
