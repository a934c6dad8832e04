"""The engine of the compiled core against the literal executor, on drawn layers and drawn networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomona.files.sparse import Sparse
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.engine import Engine
from pomona.runtime.graph import Graph, Node
from pomona.runtime.operations import ELEMENTWISE

if not library.is_available():
    pytest.skip(f"no compiled core: {library.why_not()}", allow_module_level=True)

Tensors = dict[str, Any]
EASY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=library.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = library.isa()
    library.use_isa(request.param)
    yield
    library.use_isa(before)


class Draw:
    """Random weights and inputs, from one drawn seed."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        self.tensors: Tensors = {}

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def choice(self, values: Any) -> Any:
        return self.data.draw(st.sampled_from(values))

    def weight(self, *shape: int) -> str:
        w = self.random.standard_normal(shape).astype(np.float32)
        w[self.random.random(shape) < self.choice([0.0, 0.5, 0.9, 1.0])] = 0.0
        return self._add(Sparse.from_dense(w) if self.data.draw(st.booleans()) else w)

    def vector(self, num: int) -> str | None:
        return self._add(self.random.standard_normal(num).astype(np.float32)) if self.data.draw(st.booleans()) else None

    def _add(self, tensor: Any) -> str:
        self.tensors[f"t{len(self.tensors)}"] = tensor
        return f"t{len(self.tensors) - 1}"


def check(graph: Graph, tensors: Tensors, draw: Draw, **options: Any) -> None:
    batch = draw.choice([1, 2, 3, 5, 8, 17])
    inputs = [draw.random.standard_normal((batch, *shape)).astype(np.float32) for shape in graph.inputs]
    expected = reference.run(graph, tensors, *inputs, dtype=np.float64)
    # The sum of magnitudes bounds what rounding can do to a sum; activations here do not enlarge errors.
    engine = Engine(graph, tensors, threads=draw.choice([1, 2]), micro_batch=draw.choice([0, 0, 1, 2, 16]), **options)
    for _ in range(2):  # memory is used again
        for got, right in zip(engine(*inputs), expected, strict=True):
            assert got.shape == right.shape
            scale = max(1.0, float(np.abs(right).max(initial=0.0)))
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=2e-5 * scale)


@given(st.data())
@EASY
def test_a_convolution_is_that_of_the_literal_executor(data: st.DataObject) -> None:
    draw = Draw(data)
    groups = draw.choice([1, 1, 2, 3])
    c, o = groups * draw.integer(1, 9), groups * draw.integer(1, 9)
    kernel = draw.integer(1, 4), draw.integer(1, 4)
    stride, dilation = (draw.integer(1, 3), draw.integer(1, 3)), (draw.integer(1, 2), draw.integer(1, 2))
    padding = draw.integer(0, 3), draw.integer(0, 3)
    size = [
        max((k - 1) * d + 1 - 2 * p, 1) + draw.integer(0, 13) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    node = Node("conv", (0,), weight=draw.weight(o, c // groups, *kernel), bias=draw.vector(o), stride=stride,
                padding=padding, dilation=dilation, groups=groups)  # fmt: skip
    check(Graph(((c, *size),), (node,), (1,)), draw.tensors, draw, dense=draw.choice([None, True, False]))


@given(st.data())
@EASY
def test_a_linear_layer_is_that_of_the_literal_executor(data: st.DataObject) -> None:
    draw = Draw(data)
    features, out = draw.integer(1, 70), draw.integer(1, 70)
    shape = (features,) if draw.choice([True, False]) else (draw.integer(1, 40), features)
    node = Node("linear", (0,), weight=draw.weight(out, features), bias=draw.vector(out))
    check(Graph((shape,), (node,), (1,)), draw.tensors, draw, dense=draw.choice([None, True, False]))


def test_many_channels_go_in_blocks() -> None:
    random = np.random.default_rng(0)
    for size, kernel in ((14, 1), (14, 3), (7, 3), (28, 1)):
        w = random.standard_normal((96, 700, kernel, kernel)).astype(np.float32)
        w[random.random(w.shape) < 0.8] = 0.0
        node = Node("conv", (0,), weight="w", padding=(kernel // 2, kernel // 2))
        graph = Graph(((700, size, size),), (node, Node("relu", (1,))), (2,))
        x = random.standard_normal((2, 700, size, size)).astype(np.float32)
        expected = reference.run(graph, {"w": w}, x, dtype=np.float64)[0]
        for threads in (1, 2):
            got = Engine(graph, {"w": w}, threads=threads)(x)[0]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@given(st.data())
@EASY
def test_any_network_is_that_of_the_literal_executor(data: st.DataObject) -> None:
    draw = Draw(data)
    inputs = [(draw.integer(1, 8), draw.integer(4, 12), draw.integer(4, 12))]
    shapes: list[tuple[int, ...]] = list(inputs)
    nodes: list[Node] = []
    for _ in range(draw.integer(1, 9)):
        node = _draw_node(draw, shapes)
        nodes.append(node)
        graph = Graph(tuple(inputs), tuple(nodes), (len(shapes),))
        shapes.append(tuple(graph.shapes(draw.tensors)[-1]))
    outputs = {len(shapes) - 1, *(draw.integer(0, len(shapes) - 1) for _ in range(draw.integer(0, 2)))}
    check(
        Graph(tuple(inputs), tuple(nodes), tuple(sorted(outputs))), draw.tensors, draw, dense=draw.choice([None, True])
    )


def _draw_node(draw: Draw, shapes: list[tuple[int, ...]]) -> Node:
    at = len(shapes) - 1 if draw.integer(0, 3) else draw.integer(0, len(shapes) - 1)
    shape = shapes[at]
    alike = [i for i, other in enumerate(shapes) if other == shape]
    ops = ["add", "mul", "scale", *ELEMENTWISE]
    if len(shape) == 1:
        ops += ["linear"] * 6
        op = draw.choice(ops)
        if op == "linear":
            out = draw.integer(1, 40)
            return Node("linear", (at,), weight=draw.weight(out, shape[0]), bias=draw.vector(out))
    else:
        c, h, w = shape
        op = draw.choice([*ops, *["conv"] * 12, "max_pool", "avg_pool", "mean", "flatten", "concat", "upsample"])
        if op == "conv":
            groups = draw.choice([1, c]) if c < 9 else 1
            kernel = min(h, draw.choice([1, 3, 3, 5])), min(w, draw.choice([1, 3, 3, 5]))
            out = groups * draw.integer(1, 8 if groups == 1 else 2)
            padding = draw.choice([(k[0] // 2, k[1] // 2) for k in [kernel]] + [(0, 0)])
            stride = draw.choice([(1, 1), (1, 1), (2, 2)])
            return Node("conv", (at,), weight=draw.weight(out, c // groups, *kernel), bias=draw.vector(out),
                        padding=padding, stride=stride, groups=groups)  # fmt: skip
        if op in ("max_pool", "avg_pool"):
            kernel = min(h, draw.integer(1, 3)), min(w, draw.integer(1, 3))
            stride = draw.integer(1, 2), draw.integer(1, 2)
            padding = kernel[0] // 2, kernel[1] // 2
            counts = op == "avg_pool" and draw.choice([True, False])
            ceil = draw.choice([True, False])
            return Node(op, (at,), kernel=kernel, stride=stride, padding=padding, ceil=ceil, count_padding=counts)
        if op in ("mean", "flatten"):
            return Node(op, (at,))
        if op == "upsample":
            return Node(op, (at,), stride=(1, 1) if h * w > 99 else (draw.integer(1, 3), draw.integer(1, 2)))
        if op == "concat":
            others = [i for i, other in enumerate(shapes) if len(other) == 3 and other[1:] == shape[1:]]
            return Node("concat", tuple(draw.choice(others) for _ in range(draw.integer(1, 3))))
        if op == "mul":
            alike += [i for i, other in enumerate(shapes) if other == (c, 1, 1)]
    if op in ("add", "mul"):
        return Node(op, (at, draw.choice(alike)))
    if op == "scale":
        name = f"t{len(draw.tensors)}"
        draw.tensors[name] = draw.random.standard_normal(shape[0]).astype(np.float32)
        return Node("scale", (at,), weight=name, bias=draw.vector(shape[0]))
    return Node(op, (at,), low=-0.5, high=0.75) if op == "clip" else Node(op, (at,))


def test_activations_are_within_their_stated_error() -> None:
    x = np.concatenate([np.linspace(-12, 12, 20_001), [0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0, 1e30, -1e30]]).astype(
        np.float32
    )
    for op in ELEMENTWISE:
        graph = Graph(((len(x),),), (Node(op, (0,), low=-1.0, high=2.0) if op == "clip" else Node(op, (0,)),), (1,))
        got = Engine(graph, {})(x[None])[0][0].astype(np.float64)
        right = reference.run(graph, {}, x[None].astype(np.float64), dtype=np.float64)[0][0]
        assert np.max(np.abs(got - right) / np.maximum(1.0, np.abs(x))) < 3e-7, op


def test_what_does_not_fit_is_refused_by_its_node() -> None:
    graph = Graph(((3, 4, 4),), (Node("relu", (0,)), Node("conv", (1,), weight="w")), (2,))
    with pytest.raises(ValueError, match=r"node 1 \(conv\)"):
        Engine(graph, {"w": np.zeros((2, 5, 1, 1), np.float32)})
    with pytest.raises(ValueError, match="names the tensor 'w'"):
        Engine(graph, {})
    with pytest.raises(ValueError, match="max_bytes"):
        Engine(graph, {"w": np.zeros((2, 3, 1, 1), np.float32)}, max_bytes=64)
    engine = Engine(graph, {"w": np.zeros((2, 3, 1, 1), np.float32)})
    with pytest.raises(ValueError, match=r"\(batch, 3, 4, 4\), got \(1, 3, 4, 5\)"):
        engine(np.zeros((1, 3, 4, 5)))
    assert engine(np.zeros((0, 3, 4, 4)))[0].shape == (0, 2, 4, 4)
    assert engine.about().macs == 0 and engine.about().dense_macs == 2 * 3 * 16
