"""16-bit fixed point as core/include/pomona_net.h has it, literally: integers, one product after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.runtime import rules
from pomona.runtime.graph import Graph, Node, Shape
from pomona.runtime.operations import OPERATIONS

Array = NDArray[Any]
Integers = NDArray[np.int64]
F = np.float32
STEPS, HEADROOM, MOST_WEIGHT = F(32767), F(4), F(32767) / F(32768)


def units(graph: Graph) -> list[np.float32]:
    """Of every value."""
    assert graph.ranges is not None
    found: list[np.float32] = []
    for value, most in enumerate(graph.ranges):
        unit = max(F(most) * HEADROOM / STEPS, F(1e-18))
        if value >= graph.num_inputs:
            node = graph.nodes[value - graph.num_inputs]
            operands = [found[v] for v in node.operands]
            if node.op in ("relu", "clip", "add", "concat"):
                unit = max(unit, *operands)
            elif node.op in ("max_pool", "flatten"):
                unit = operands[0]
        found.append(F(min(unit, F(1e18))))
    return found


def num_doublings(weight: Array, bias: Array, unit_in: np.float32, unit: np.float32) -> int:
    for num in range(15):
        nums = parts(weight, unit_in, unit)
        few = 16 * (nums - 1).sum() <= (weight != 0).sum() and nums.max(initial=1) <= 16
        if few and np.abs(bias).max(initial=0) <= STEPS * unit:
            return num
        unit *= F(2)
    return 15


def parts(weight: Array, unit_in: np.float32, unit: np.float32) -> Integers:
    size = np.abs(weight * (unit_in / unit))
    return np.where(size > MOST_WEIGHT, 1 + np.floor(size / MOST_WEIGHT), 1).astype(np.int64)


def run(graph: Graph, tensors: Mapping[str, Array], *inputs: Array) -> list[Array]:
    """The outputs of a network of conv, linear, relu, clip, add, max_pool, flatten and concat, whose layers have many
    positions; each input is (N, *shape). What goes through float32 may differ by a unit from the engine's."""
    unit, shapes = units(graph), graph.shapes(tensors)
    q: dict[int, Integers] = {v: to_units(x, unit[v]) for v, x in enumerate(inputs)}
    done: set[int] = set()  # with the layer before
    for i, node in enumerate(graph.nodes):
        value = graph.num_inputs + i
        if value in done:
            continue
        if node.op in ("conv", "linear"):
            chain, residual, act = _fused(graph, value, q)
            done.update(chain)
            value = chain[-1]
            q[value] = _layer(node, tensors, q[node.operands[0]], unit[node.operands[0]], unit[value], shapes[value])
            if residual is not None:
                q[value] = _cut(q[value] + _rescaled(q[residual], unit[residual], unit[value]))
            if act is not None:
                low, high = (0.0, math.inf) if act.op == "relu" else (act.low, act.high)
                q[value] = np.clip(q[value], *to_units(np.array([low, high], F), unit[value]))
        elif node.op == "max_pool":
            q[value] = _max_pool(node, q[node.operands[0]])
        elif node.op == "flatten":
            q[value] = q[node.operands[0]].reshape(len(inputs[0]), -1)
        else:  # in float32
            x = [q[v].astype(F) * unit[v] for v in node.operands]
            q[value] = to_units(OPERATIONS[node.op].compute(node, x, None, None), unit[value])
    return [q[v].astype(F) * unit[v] for v in graph.outputs]


def to_units(x: Array, unit: np.float32) -> Integers:
    return _cut(np.nan_to_num(np.rint(x * (F(1) / unit)), nan=0.0, posinf=32767, neginf=-32768).astype(np.float64))


def _cut(q: Array) -> Integers:
    return np.clip(q, -32768, 32767).astype(np.int64)


def _magnitude_cut(x: Array) -> Integers:
    return np.clip(np.rint(x), -32767, 32767).astype(np.int64)


def _times(factor: int, q: Integers) -> Integers:
    return (factor * q + (1 << 14)) >> 15


def _rescaled(q: Integers, unit_from: np.float32, unit: np.float32) -> Integers:
    return q if unit_from == unit else _times(min(32767, int(np.rint(F(32768) * (unit_from / unit)))), q)


def _fused(graph: Graph, layer: int, known: Mapping[int, Integers]) -> tuple[list[int], int | None, Node | None]:
    """A layer with the sum and the activation that belong to it, that sum's other operand, and that activation."""

    def only_user(value: int) -> int | None:
        users = [graph.num_inputs + i for i, node in enumerate(graph.nodes) for v in node.operands if v == value]
        return users[0] if len(users) == 1 and value not in graph.outputs else None

    chain, residual, act = [layer], None, None
    user = only_user(layer)
    if user is not None and graph.nodes[user - graph.num_inputs].op == "add":
        a, b = graph.nodes[user - graph.num_inputs].operands
        other = b if a == layer else a
        if other in known:
            chain.append(user)
            residual, user = other, only_user(user)
    if user is not None and graph.nodes[user - graph.num_inputs].op in ("relu", "clip"):
        chain.append(user)
        act = graph.nodes[user - graph.num_inputs]
    return chain, residual, act


def _layer(
    node: Node, tensors: Mapping[str, Array], q: Integers, unit_in: np.float32, unit: np.float32, shape: Shape
) -> Integers:
    """Products one after the other, in ascending order of columns."""
    weight = tensors[node.weight or ""]
    if node.op == "linear":  # as a convolution over positions
        q, shape = q.transpose(0, 2, 1)[..., None], (shape[1], shape[0], 1)
    weight = weight.reshape((*weight.shape, 1, 1)[:4])
    bias = tensors[node.bias] if node.bias else np.zeros(0, F)
    doublings = num_doublings(weight, bias, unit_in, unit)
    unit *= F(2**doublings)
    nums = np.minimum(parts(weight, unit_in, unit), 16)
    whole = _magnitude_cut(weight / nums.astype(F) * (unit_in / unit) * F(32768))
    (ph, pw), (sh, sw), (dh, dw) = node.padding, node.stride, node.dilation
    padded = np.pad(q, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    sums = np.zeros((len(q), *shape), np.int64)
    if node.bias:
        sums += _magnitude_cut(tensors[node.bias] / unit)[:, None, None]
    out_each, channels = weight.shape[0] // node.groups, weight.shape[1]
    for o, c, i, j in np.argwhere(weight):
        bottom, right = i * dh + (shape[1] - 1) * sh + 1, j * dw + (shape[2] - 1) * sw + 1
        under = padded[:, o // out_each * channels + c, i * dh : bottom : sh, j * dw : right : sw]
        for _ in range(nums[o, c, i, j]):
            sums[:, o] = _cut(sums[:, o] + _times(int(whole[o, c, i, j]), under))
    for _ in range(doublings):
        sums = _cut(2 * sums)
    return sums[..., 0].transpose(0, 2, 1) if node.op == "linear" else sums


def _max_pool(node: Node, q: Integers) -> Integers:
    out, reach = rules._pool_sizes(q, node)
    padded = rules._padded(q, node, -32768, reach=reach)
    return np.maximum.reduce(rules.taps(padded, node, node.kernel, out))
