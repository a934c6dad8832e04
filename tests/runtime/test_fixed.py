"""Networks in 16-bit fixed point: the same integers as the literal oracle, the stated bound, and the ways in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pomona
from pomona import runtime
from pomona.files.sparse import Sparse
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.engine import Engine
from pomona.runtime.fold import fold
from pomona.runtime.graph import Graph, Node
from pomona.runtime.ranges import with_ranges
from tests.oracles import fixed
from tests.runtime.test_engine import Draw, _draw_node

EASY = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
needs_core = pytest.mark.skipif(not library.is_available(), reason="no compiled core")


@pytest.fixture(params=library.isas() or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param is None:
        yield
        return
    before = library.isa()
    library.use_isa(request.param)
    yield
    library.use_isa(before)


def dense_tensors(draw: Draw) -> dict[str, np.ndarray]:
    return {name: t.dense() if isinstance(t, Sparse) else t for name, t in draw.tensors.items()}


def draw_weight(draw: Draw, *shape: int) -> str:
    """Some are large: those are kept in parts."""
    name, scale = draw.weight(*shape), np.float32(draw.choice([0.01, 1.0, 30.0]))
    weight = draw.tensors[name]
    is_sparse = isinstance(weight, Sparse)
    draw.tensors[name] = replace(weight, values=weight.values * scale) if is_sparse else weight * scale
    return name


def draw_layer(draw: Draw, nodes: list[Node], shape: tuple[int, ...]) -> None:
    """A convolution or linear layer of the last value, often with a sum or an activation behind it."""
    value = len(nodes)
    if len(shape) == 2:
        node = Node(
            "linear", (value,), weight=draw_weight(draw, out := draw.integer(1, 9), shape[1]), bias=draw.vector(out)
        )
    else:
        groups = draw.choice([g for g in (1, 2, 3) if shape[0] % g == 0])
        kernel = draw.choice([(1, 1), (3, 3), (1, 3), (2, 1)])
        strides, paddings, dilations = [(1, 1), (1, 1), (2, 2), (1, 3)], [(0, 0), (1, 1), (2, 0)], [(1, 1), (1, 2)]
        node = Node(
            "conv",
            (value,),
            weight=draw_weight(draw, out := groups * draw.integer(1, 9), shape[0] // groups, *kernel),
            bias=draw.vector(out),
            stride=draw.choice(strides),
            padding=draw.choice(paddings),
            dilation=draw.choice(dilations),
            groups=groups,
        )
    nodes.append(node)
    if draw.integer(0, 1):
        other = replace(node, weight=draw_weight(draw, *draw.tensors[node.weight or ""].shape))
        nodes += [other, Node("add", draw.choice([(value + 1, value + 2), (value + 2, value + 1)]))]
    if draw.integer(0, 1):
        nodes.append(draw.choice([Node("relu", (len(nodes),)), Node("clip", (len(nodes),), low=-0.5, high=2.0)]))


@needs_core
@given(st.data())
@settings(EASY, max_examples=20)
def test_layers_give_the_integers_of_the_oracle(isa: None, data: st.DataObject) -> None:
    draw = Draw(data)
    nodes: list[Node] = []
    shape = draw.choice(
        [(draw.integer(2, 30), draw.integer(1, 9)), (draw.choice([1, 2, 3, 6]), 12, draw.integer(8, 40))]
    )
    for _ in range(draw.integer(1, 3)):
        graph = Graph((shape,), tuple(nodes), (len(nodes),))
        last = graph.shapes(draw.tensors)[-1]
        if len(last) == 3 and min(last[1:]) < 5:
            break
        draw_layer(draw, nodes, last)
    if len(shape) == 3:
        nodes.append(Node("max_pool", (len(nodes),), kernel=(2, 1), stride=(2, 1), padding=(1, 0)))
        nodes.append(Node("flatten", (len(nodes),)))
    graph = Graph((shape,), tuple(nodes), (len(nodes),))
    x = draw.random.standard_normal((draw.choice([1, 2, 5, 33]), *shape)).astype(np.float32)
    graph = with_ranges(graph, draw.tensors, x)
    assert graph.ranges is not None
    # Ranges of other samples: values are cut off, and terms of a sum have units far apart.
    graph = replace(graph, ranges=tuple(most * draw.choice([1.0, 1.0, 0.1, 10.0, 1e-7]) for most in graph.ranges))
    expected = fixed.run(graph, dense_tensors(draw), x)
    for dense in (None, False, True):
        engine = Engine(graph, draw.tensors, precision="int16", threads=draw.choice([1, 2]), dense=dense)
        np.testing.assert_array_equal(engine(x)[0], expected[0])


@needs_core
def test_a_residual_of_a_far_smaller_unit_adds_nothing(isa: None) -> None:
    nodes = (Node("conv", (0,), weight="w"), Node("add", (2, 1)))
    graph = Graph(((1, 4, 9), (1, 4, 9)), nodes, (3,), ranges=(1.0, 1e-6, 1.0, 1.0))
    engine = Engine(graph, {"w": np.full((1, 1, 1, 1), 0.5, np.float32)}, precision="int16")
    x = np.ones((2, 1, 4, 9), np.float32)
    np.testing.assert_allclose(engine(x, x)[0], 0.5, atol=1e-3)  # at most 4e-6 of the second


@needs_core
@given(st.data())
@EASY
def test_a_layer_is_within_the_stated_bound(isa: None, data: st.DataObject) -> None:
    draw = Draw(data)
    positions, features, out = draw.integer(2, 40), draw.integer(1, 70), draw.integer(1, 40)
    node = Node("linear", (0,), weight=draw.weight(out, features), bias=draw.vector(out))
    x = draw.random.standard_normal((draw.choice([1, 3, 40]), positions, features)).astype(np.float32)
    tensors = dense_tensors(draw)
    graph = with_ranges(Graph(((positions, features),), (node,), (1,)), tensors, x)
    unit_in, unit = fixed.units(graph)
    exact = reference.run(graph, tensors, x, dtype=np.float64)[0]
    weight = tensors[node.weight or ""].astype(np.float64)
    bias = tensors[node.bias] if node.bias else np.zeros(0, np.float32)
    unit *= np.float32(2 ** fixed.num_doublings(weight.astype(np.float32), bias, unit_in, unit))
    parts = fixed.parts(weight.astype(np.float32), unit_in, unit)
    num = (parts * (weight != 0)).sum(1)  # products of a row
    most = np.abs(x).max() / unit_in
    bound = (num + 1) / 2 * unit + np.abs(weight).sum(1) / 2 * unit_in + num * 2.0**-16 * most * unit
    got = Engine(graph, tensors, precision="int16")(x)[0]
    assert np.all(np.abs(got - exact) <= bound * 1.001 + 1e-6)


@needs_core
@given(st.data())
@EASY
def test_any_network_is_near_the_literal_executor(isa: None, data: st.DataObject) -> None:
    draw = Draw(data)
    shapes: list[tuple[int, ...]] = [(draw.integer(1, 8), draw.integer(4, 12), draw.integer(4, 12))]
    nodes: list[Node] = []
    for _ in range(draw.integer(1, 7)):
        nodes.append(_draw_node(draw, shapes))
        shapes.append(Graph((shapes[0],), tuple(nodes), (len(shapes),)).shapes(draw.tensors)[-1])
    graph = Graph((shapes[0],), tuple(nodes), (len(shapes) - 1,))
    x = draw.random.standard_normal((draw.choice([1, 3, 17, 40]), *shapes[0])).astype(np.float32)
    graph = with_ranges(graph, draw.tensors, x)
    assert graph.ranges is not None
    right = reference.run(graph, draw.tensors, x, dtype=np.float64)[0]
    for threads in (1, 2):
        got = Engine(graph, draw.tensors, precision="int16", threads=threads, dense=draw.choice([None, True]))(x)[0]
        # Products of values double a relative error each time; nothing else does more than add one.
        assert np.abs(got - right).max() <= 0.05 * max(graph.ranges)


@needs_core
def test_what_exceeds_the_headroom_is_cut_off() -> None:
    graph = Graph(((1, 2, 2),), (Node("conv", (0,), weight="w"),), (1,), ranges=(1.0, 1.0))
    engine = Engine(graph, {"w": np.full((1, 1, 1, 1), 0.5, np.float32)}, precision="int16")
    got = engine(np.array([[[[3.9, -3.9], [1e30, np.nan]]]], np.float32))[0].ravel()
    np.testing.assert_allclose(got[:3], [1.95, -1.95, 2.0], rtol=1e-3)
    assert np.isfinite(got[3])


def test_ranges_are_the_largest_magnitudes() -> None:
    graph = Graph(((2,),), (Node("linear", (0,), weight="w"), Node("relu", (1,))), (2,))
    w = np.array([[1.0, 0.0], [0.0, -3.0]], np.float32)
    found = with_ranges(graph, {"w": w}, np.array([[1.0, 2.0], [-4.0, 0.5]], np.float32))
    assert found.ranges == (4.0, 6.0, 1.0)
    assert Graph.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="batch of 0"):
        with_ranges(graph, {"w": w}, np.zeros((0, 2), np.float32))
    with pytest.raises(ValueError, match="input 0 is zero in all samples"):
        with_ranges(graph, {"w": w}, np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="value 0 of sample 1 is not finite"):
        with_ranges(graph, {"w": w}, np.array([[1.0, 2.0], [np.inf, 0.5]], np.float32))


def test_ranges_that_do_not_fit_are_refused() -> None:
    graph = Graph(((2,),), (Node("relu", (0,)),), (1,))
    for ranges, message in [
        ((1.0,), "there must be 2 ranges"),
        ((1.0, -1.0), "range of value 1 must be in"),
        ((float("nan"), 1.0), "range of value 0"),
        ((1.0, 1e30), "range of value 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(graph, ranges=ranges)
    with pytest.raises(ValueError, match="ranges must be a list"):
        Graph.from_json(graph.to_json() | {"ranges": 3})
    with pytest.raises(ValueError, match="the range of value 0 must be a number"):
        Graph.from_json(graph.to_json() | {"ranges": ["1", 2]})


def test_folding_keeps_the_range_of_what_is_left() -> None:
    nodes = (Node("conv", (0,), weight="w"), Node("scale", (1,), weight="s", bias="t"), Node("relu", (2,)))
    random = np.random.default_rng(0)
    tensors = {
        "w": random.standard_normal((3, 2, 3, 3)).astype(np.float32),
        "s": np.array([5.0, 1.0, -2.0], np.float32),
        "t": np.zeros(3, np.float32),
    }
    x = random.standard_normal((4, 2, 8, 8)).astype(np.float32)
    graph = with_ranges(Graph(((2, 8, 8),), nodes, (3,)), tensors, x)
    folded, kept = fold(graph, tensors)
    assert graph.ranges is not None and folded.ranges == (graph.ranges[0], *graph.ranges[2:])
    again = with_ranges(folded, kept, x)
    assert again.ranges is not None
    np.testing.assert_allclose(folded.ranges, again.ranges, rtol=1e-5)


def small_network() -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 5, padding=2),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 36, 10),
    ).eval()
    for layer in (model[0], model[5]):
        layer.weight.data[torch.rand(layer.weight.shape) < 0.8] = 0
    return model


def test_a_file_with_ranges_runs_in_fixed_point(tmp_path: Path) -> None:
    model, x = small_network(), torch.randn(50, 1, 12, 12)
    path = tmp_path / "x.pomona.safetensors"
    pomona.export(model, path, example=x[:1], calibrate=x)
    right = model(x).detach().numpy()
    for network in (
        runtime.load(path, precision="int16"),
        runtime.load(path).calibrated(x.numpy()),
        runtime.Network.from_model(model, x[:1]).calibrated(x.numpy()),
    ):
        assert network.precision == "int16"
        for batch in (1, 7, 50):
            got = network.run(x[:batch].numpy())
            assert np.abs(got - right[:batch]).max() < 2e-3 * np.abs(right).max()
    np.testing.assert_allclose(runtime.load(path).run(x.numpy()), right, atol=1e-5)  # float32 unless asked for


def test_without_ranges_there_is_no_fixed_point(tmp_path: Path) -> None:
    model, x = small_network(), torch.randn(2, 1, 12, 12)
    path = tmp_path / "x.pomona.safetensors"
    pomona.export(model, path, example=x)
    with pytest.raises(ValueError, match="needs the ranges of values"):
        runtime.load(path, precision="int16")
    with pytest.raises(ValueError, match="precision must be one of float32, int16, got 'int8'"):
        runtime.load(path, precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give example= too"):
        pomona.export(model, path, calibrate=x)
    with pytest.raises(ValueError, match=r"must have the shape \(batch, 1, 12, 12\)"):
        pomona.export(model, path, example=x, calibrate=torch.zeros(3, 1, 5, 5))
