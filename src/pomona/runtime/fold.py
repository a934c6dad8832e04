"""Fold a graph into fewer operations: scales into the weights before them, padding into the convolution after it.

Files hold the network's own tensors. Folding happens when a file is loaded, so that nothing is stored twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files.sparse import Sparse
from pomona.runtime.graph import Graph, Node

Tensor = NDArray[Any] | Sparse


def fold(graph: Graph, tensors: Mapping[str, Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    """Fold every ``scale`` into the layer before it, unless something else reads that layer too.

    A layer is ``conv``, ``linear`` or another ``scale``: (w, b) then (s, t) becomes (s w, s b + t), computed in float64
    and rounded once; a zero stays a zero. A ``conv`` that only pads (``pad_weight``) goes into the convolution that
    follows, whose kernel grows by zeros. Nodes that no output depends on are dropped.

    Args:
        graph: not changed; neither are its tensors.
        tensors: float32, by name; they must fit (:meth:`Graph.shapes`).

    Returns:
        The graph and its tensors; new ones have names with an ``@``.
    """
    made: dict[str, Tensor] = {**tensors}
    ranges = None if graph.ranges is None else list(graph.ranges)
    nodes = list(graph.nodes)
    first = graph.num_inputs
    alias = list(range(graph.num_values))
    num_readers = Counter([*graph.outputs, *(v for node in nodes for v in node.operands)])
    for i, node in enumerate(nodes):
        node = nodes[i] = replace(node, operands=tuple(alias[v] for v in node.operands))
        place = node.operands[0] - first
        if place < 0 or num_readers[graph.nodes[i].operands[0]] > 1:
            continue
        before = nodes[place]
        if node.op == "scale" and before.op in ("conv", "linear", "scale"):
            nodes[place] = _scaled(before, node, made)
            alias[first + i] = node.operands[0]
            if ranges is not None:
                ranges[node.operands[0]] = ranges[first + i]
        elif node.op == "conv" and _is_padding(before, made) and node.dilation == (1, 1):
            nodes[i] = _padded(before, node, made)
    folded = replace(
        graph,
        nodes=tuple(nodes),
        outputs=tuple(alias[v] for v in graph.outputs),
        ranges=None if ranges is None else tuple(ranges),
    )
    return prune_graph(folded, made)


def prune_graph(graph: Graph, tensors: Mapping[str, Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of the nodes that the outputs depend on, renumbered, and the tensors that they need."""
    first, nodes = graph.num_inputs, graph.nodes
    needed = set(graph.outputs)
    for i in reversed(range(len(nodes))):
        if first + i in needed:
            needed.update(nodes[i].operands)
    kept = [i for i in range(len(nodes)) if first + i in needed]
    number = {**{v: v for v in range(first)}, **{first + i: first + n for n, i in enumerate(kept)}}
    pruned = replace(
        graph,
        nodes=tuple(replace(nodes[i], operands=tuple(number[v] for v in nodes[i].operands)) for i in kept),
        outputs=tuple(number[v] for v in graph.outputs),
        ranges=None if graph.ranges is None else (*graph.ranges[:first], *(graph.ranges[first + i] for i in kept)),
    )
    return pruned, {name: tensors[name] for name in pruned.names()}


def pad_weight(
    channels: int, left: int, right: int, top: int, bottom: int
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Weight and padding of a depthwise convolution that only adds so many zeros on each side.

    A convolution pads both sides equally. A kernel of zeros and a single one skips what is too much on one side.
    """
    padding = max(top, bottom), max(left, right)
    weight = np.zeros((channels, 1, 1 + abs(top - bottom), 1 + abs(left - right)), np.float32)
    weight[:, :, padding[0] - top, padding[1] - left] = 1
    return weight, padding


def _scaled(layer: Node, scale: Node, tensors: dict[str, Tensor]) -> Node:
    assert layer.weight is not None and scale.weight is not None
    factor = _float64(tensors[scale.weight])
    weight = _fresh(f"{layer.weight}@{scale.weight}", tensors)
    tensors[weight] = _times_rows(tensors[layer.weight], factor)
    if layer.bias is None:
        return replace(layer, weight=weight, bias=scale.bias)
    bias = _fresh(f"{layer.bias}@{scale.weight}", tensors)
    shift = 0.0 if scale.bias is None else _float64(tensors[scale.bias])
    tensors[bias] = (_float64(tensors[layer.bias]) * factor + shift).astype(np.float32)
    return replace(layer, weight=weight, bias=bias)


def _float64(tensor: Tensor) -> NDArray[np.float64]:
    return (tensor.dense() if isinstance(tensor, Sparse) else tensor).astype(np.float64)


def _times_rows(weight: Tensor, factor: NDArray[np.float64]) -> Tensor:
    if isinstance(weight, Sparse):
        rows = weight.positions // (weight.size // weight.shape[0])
        return replace(weight, values=(weight.values * factor[rows]).astype(np.float32))
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite factor would make zeros NaN
        scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return np.where(weight == 0, 0, scaled).astype(np.float32)


def _is_padding(node: Node, tensors: Mapping[str, Tensor]) -> bool:
    """Whether this is a convolution with a weight from :func:`pad_weight`."""
    if node.op != "conv" or node.bias is not None or node.stride != (1, 1) or node.dilation != (1, 1):
        return False
    weight = tensors[node.weight or ""]
    if len(weight.shape) != 4 or weight.shape[:2] != (node.groups, 1) or weight.shape[2] * weight.shape[3] > 64:
        return False
    one = _float64(weight)[:, 0]
    place = _tap(one)
    inside = all(k - 1 - p <= at <= p for at, p, k in zip(place, node.padding, one.shape[1:], strict=True))
    one[:, place[0], place[1]] -= 1
    return inside and not one.any()


def _tap(kernels: NDArray[np.float64]) -> tuple[int, int]:
    y, x = np.unravel_index(int(kernels[0].argmax()), kernels.shape[1:])
    return int(y), int(x)


def _padded(padding: Node, conv: Node, tensors: dict[str, Tensor]) -> Node:
    assert padding.weight is not None and conv.weight is not None
    one = _float64(tensors[padding.weight])[:, 0]
    old = tensors[conv.weight]
    out, channels, kh, kw = (*old.shape, 1, 1)[:4]
    shape = out, channels, kh + one.shape[1] - 1, kw + one.shape[2] - 1
    top, left = _tap(one)
    name = _fresh(f"{conv.weight}@padded", tensors)
    if isinstance(old, Sparse):
        rest, x = np.divmod(old.positions, kw)
        row, y = np.divmod(rest, kh)
        tensors[name] = Sparse(shape, (row * shape[2] + y + top) * shape[3] + x + left, old.values)
    else:
        grown = np.zeros(shape, np.float32)
        grown[:, :, top : top + kh, left : left + kw] = old.reshape(out, channels, kh, kw)
        tensors[name] = grown
    together = tuple(a + b for a, b in zip(padding.padding, conv.padding, strict=True))
    return replace(conv, operands=padding.operands, weight=name, padding=(together[0], together[1]))


def _fresh(name: str, tensors: Mapping[str, Tensor]) -> str:
    while name in tensors:
        name += "'"
    return name
