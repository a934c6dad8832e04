"""Graphs: what they say, what they refuse, and that the literal executor computes it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.files.sparse import Sparse
from pomona.runtime import reference
from pomona.runtime.fold import fold, pad_weight
from pomona.runtime.graph import Graph, Node
from pomona.runtime.operations import OPERATIONS
from tests.fuzz import graph as fuzz_graph

LENET: dict[str, Any] = {
    "inputs": [[1, 28, 28]],
    "nodes": [
        ["conv", [0], {"weight": "conv1.weight", "bias": "conv1.bias", "padding": [2, 2]}],
        ["clip", [1], {"low": 0.0}],
        ["max_pool", [2], {"kernel": [2, 2], "stride": [2, 2]}],
        ["flatten", [3]],
        ["linear", [4], {"weight": "fc.weight"}],
    ],
    "outputs": [5],
}
WEIGHTS = {
    "conv1.weight": np.ones((4, 1, 5, 5), np.float32),
    "conv1.bias": np.ones(4, np.float32),
    "fc.weight": np.ones((10, 4 * 14 * 14), np.float32),
}


def test_json_there_and_back() -> None:
    graph = Graph.from_json(json.loads(json.dumps(LENET)))
    assert graph.to_json() == LENET
    assert Graph.from_json(graph.to_json()) == graph
    assert graph.nodes[0].stride == (1, 1) and graph.nodes[1].high == math.inf
    assert graph.names() == ["conv1.weight", "conv1.bias", "fc.weight"]


def test_shapes_of_all_values() -> None:
    shapes = Graph.from_json(LENET).shapes(WEIGHTS)
    assert shapes == [(1, 28, 28), (4, 28, 28), (4, 28, 28), (4, 14, 14), (784,), (10,)]


def edited(path: list[Any], value: Any) -> Any:
    """LENET with something else in one place."""
    data = json.loads(json.dumps(LENET))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


deep: Any = []
for _ in range(5_000):
    deep = [deep]

BAD: list[tuple[Any, str]] = [
    (None, "a graph is a JSON object"),
    ([], "a graph is a JSON object"),
    ({**LENET, "extra": 1}, "inputs, nodes and outputs, got a dict of 4"),
    (edited(["inputs"], []), "before it there are 0"),
    (edited(["inputs"], "x"), "inputs must be a list"),
    (edited(["inputs"], [[1, 2, 3, 4, 5]]), "1 to 4 dimensions"),
    (edited(["inputs"], [[]]), "1 to 4 dimensions"),
    (edited(["inputs"], [{"shape": [3]}]), "input 0 must be a shape, or an object of shape and dtype"),
    (edited(["inputs"], [{"shape": [3], "dtype": "int16"}]), "dtype of input 0 must be one of float32, int32, int64"),
    (edited(["inputs"], [{"shape": [3], "dtype": ["int64"]}]), "dtype of input 0 must be one of"),
    (edited(["inputs"], [{"shape": 3, "dtype": "int64"}]), "input 0 must be a list"),
    (edited(["inputs"], [{"shape": [9], "dtype": "int64"}]), "node 0: conv takes float32, but value 0 is of int64"),
    (edited(["inputs"], [[0]]), "must be an integer in"),
    (edited(["inputs"], [[True]]), "must be an integer in"),
    (edited(["inputs"], [[2.0]]), "must be an integer in"),
    (edited(["inputs"], [[10**400]]), "must be an integer in"),
    (edited(["outputs"], [6]), "one of 6 values, got 6"),
    (edited(["outputs"], [-1]), "must be an integer in"),
    (edited(["outputs"], []), "inputs and outputs"),
    (edited(["nodes"], {}), "nodes must be a list"),
    (edited(["nodes"], [["relu", [0]]] * (2**16 + 1)), "nodes must be a list of at most"),
    (edited(["nodes", 1], deep), "node 1: a node is"),
    (edited(["nodes", 1], ["softmax", [1]]), "node 1: an operation is one of conv, .* got 'softmax'"),
    (edited(["nodes", 1], [["relu"], [1]]), "node 1: a node is"),
    (edited(["nodes", 1], ["relu", [2]]), "takes value 2; before it there are 2"),
    (edited(["nodes", 1], ["relu", [-1]]), "must be an integer in"),
    (edited(["nodes", 1], ["relu", 1]), "must be a list of at most"),
    (edited(["nodes", 1], ["relu", [1, 1]]), "relu takes 1 value, got 2"),
    (edited(["nodes", 1], ["add", [1]]), "add takes 2 values, got 1"),
    (edited(["nodes", 1], ["concat", []]), "concat takes 1 to"),
    (edited(["nodes", 1], ["relu", [1], {"low": 0.0}]), "relu has no attribute 'low'; it has: none"),
    (edited(["nodes", 1], ["relu", [1], []]), "attributes of relu are a JSON object"),
    (edited(["nodes", 1, 2], {"low": "0"}), "clip's low must be a number"),
    (edited(["nodes", 1, 2], {"low": math.nan}), "clip's low must be a number"),
    (edited(["nodes", 1, 2], {"low": 10**400}), "clip's low must be a number"),
    (edited(["nodes", 0, 2], {}), "conv needs a weight"),
    (edited(["nodes", 0, 2, "weight"], ""), "the name of a tensor"),
    (edited(["nodes", 0, 2, "weight"], "x" * 5_000), "the name of a tensor"),
    (edited(["nodes", 0, 2, "padding"], [2]), "two integers"),
    (edited(["nodes", 0, 2, "padding"], [2, -1]), "must be an integer in"),
    (edited(["nodes", 0, 2, "stride"], [0, 1]), "must be an integer in"),
    (edited(["nodes", 0, 2, "groups"], 0), "must be an integer in"),
    (edited(["nodes", 2, 2, "ceil"], 1), "true or false"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_what_is_no_graph_is_refused(case: int) -> None:
    data, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        Graph.from_json(data)
    assert len(str(caught.value)) < 500


def layer(op: str, shape: tuple[int, ...], *more: tuple[int, ...], **attributes: Any) -> Graph:
    """One node on inputs of these shapes."""
    return Graph((shape, *more), (Node(op, tuple(range(1 + len(more))), **attributes),), (1 + len(more),))


MISFITS: list[tuple[Graph, dict[str, tuple[int, ...]], str]] = [
    (layer("conv", (3, 8, 8), weight="w"), {}, "there is no tensor 'w'"),
    (layer("conv", (3, 8, 8), weight="w"), {"w": (4, 2, 3, 3)}, "does not fit 3 channels"),
    (layer("conv", (4, 8, 8), weight="w", groups=2), {"w": (3, 2, 3, 3)}, "does not fit 4 channels"),
    (layer("conv", (3, 8, 8), weight="w"), {"w": (4, 3, 3)}, "must be .outputs"),
    (layer("conv", (3, 8, 8), weight="w"), {"w": (0, 3, 1, 1)}, "must be .outputs"),
    (layer("conv", (3, 8, 8), weight="w", bias="b"), {"w": (4, 3, 1, 1), "b": (3,)}, r"shape \[4\], got \[3\]"),
    (layer("conv", (3, 8, 8), weight="w", dilation=(4, 4)), {"w": (4, 3, 3, 3)}, "does not fit the input"),
    (layer("conv", (3, 8, 8), weight="w", padding=(2**31 - 1, 1)), {"w": (4, 3, 3, 3)}, "does not fit the input"),
    (layer("conv", (3, 8, 8), weight="w", padding=(2**20, 2**20)), {"w": (4, 3, 3, 3)}, "takes more than"),
    (layer("conv", (3, 8, 8), weight="w"), {"w": (4, 3, 1 << 16, 2)}, "at most 65536 elements"),
    (layer("conv", (8,), weight="w"), {"w": (4, 8)}, "takes .channels, height, width"),
    (layer("linear", (3, 8, 8), weight="w"), {"w": (4, 8)}, "does not fit"),
    (layer("linear", (8,), weight="w"), {"w": (4, 7)}, "does not fit"),
    (layer("linear", (8,), weight="w", bias="b"), {"w": (4, 8), "b": (4, 1)}, r"must have the shape \[4\]"),
    (layer("add", (8,), (7,)), {}, "values of one shape"),
    (layer("mul", (8, 1, 1), (8, 2, 2)), {}, "or .C, H, W. and .C, 1, 1"),
    (layer("scale", (8, 2, 2), weight="w"), {"w": (2,)}, r"must have the shape \[8\]"),
    (layer("clip", (8,), low=1.0, high=0.0), {}, "low must not be above high"),
    (layer("max_pool", (8, 2, 2), kernel=(3, 2)), {}, "does not fit the input"),
    (layer("avg_pool", (8, 4, 4), kernel=(3, 3), padding=(2, 0)), {}, "more than half"),
    (layer("max_pool", (1, 9, 9), kernel=(2**20, 2**20), padding=(2**19, 2**19)), {}, "at most 65536 elements"),
    (layer("mean", (8,)), {}, "takes .channels"),
    (layer("concat", (8, 2, 2), (8, 2, 3)), {}, "of one height and width"),
    (layer("concat", (8, 2), (8, 2)), {}, "of one height and width"),
    (layer("concat", (8, 2, 2, 2), (8, 2, 2, 2)), {}, "of one height and width"),
    (layer("flatten", (8, 2)), {}, "any number of dimensions but two"),
    (layer("linear", (2, 3, 4, 8), weight="w"), {"w": (4, 8)}, "does not fit"),
    (layer("scale", (2, 3, 4, 8), weight="w"), {"w": (8,)}, "it takes .channels"),
    (layer("relu", (2**31 - 1, 2, 2)), {}, "takes more than"),
]


@pytest.mark.parametrize("case", range(len(MISFITS)))
def test_what_does_not_fit_is_refused(case: int) -> None:
    graph, shapes, message = MISFITS[case]
    tensors = {name: Sparse(shape, np.zeros(0, np.int64), np.zeros(0, np.float32)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"node 0 \({graph.nodes[0].op}\): .*{message}"):
        graph.shapes(tensors)


def test_a_node_has_what_its_operation_reads_and_no_more() -> None:
    with pytest.raises(ValueError, match="node 0: relu has no attribute 'low'; it has: none"):
        layer("relu", (8,), low=0.0)
    with pytest.raises(ValueError, match=r"node 0: an operation is one of conv, .*; got 'softmax'"):
        layer("softmax", (8,))


def test_values_of_four_dimensions() -> None:
    graph = Graph(
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        (Node("add", (0, 1)), Node("clip", (2,), low=-1.0, high=1.0), Node("mul", (3, 0)), Node("flatten", (4,))),
        (4, 5),
    )
    assert graph.shapes({}) == [(2, 3, 4, 5)] * 5 + [(120,)]
    assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph
    x, y = np.random.default_rng(0).normal(size=(2, 7, 2, 3, 4, 5)).astype(np.float32)
    expected = np.clip(x + y, -1, 1) * x
    for found, right in zip(reference.run(graph, {}, x, y), (expected, expected.reshape(7, 120)), strict=True):
        np.testing.assert_array_equal(found, right)


def test_inputs_of_integers() -> None:
    data = {
        "inputs": [[3], {"shape": [4, 2], "dtype": "int64"}, {"shape": [2], "dtype": "int32"}],
        "nodes": [["relu", [0]]],
        "outputs": [3],
    }
    graph = Graph.from_json(data)
    assert graph.to_json() == data and graph.dtypes == ("float32", "int64", "int32")
    assert graph.inputs == ((3,), (4, 2), (2,)) and graph.dtype_of(3) == "float32"
    assert Graph.from_json({**data, "inputs": [{"shape": [3], "dtype": "float32"}, *data["inputs"][1:]]}) == graph
    arrays = reference.arrays_of(graph, [[[1, 2, 3]], np.ones((1, 4, 2), np.int8), np.ones((1, 2), np.int64)])
    assert [x.dtype for x in arrays] == [np.float32, np.int64, np.int32]
    assert reference.run(graph, {}, *arrays)[0].tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match=r"input 1 must hold integers \(int64\), got an array of float64"):
        reference.arrays_of(graph, [np.ones((1, 3)), np.ones((1, 4, 2)), np.ones((1, 2), np.int64)])
    with pytest.raises(ValueError, match=r"input 2 must hold numbers of int32, in .*; got some from 4294967296 to"):
        reference.arrays_of(graph, [np.ones((1, 3)), np.ones((1, 4, 2), int), np.full((1, 2), 2**32)])
    with pytest.raises(ValueError, match="an output must be of float32, but value 1 is of int64"):
        Graph.from_json({**data, "outputs": [1]})
    with pytest.raises(ValueError, match="there must be 1 dtypes, one for each input; got 2"):
        Graph(((3,),), (), (0,), dtypes=("int32", "int32"))
    with pytest.raises(ValueError, match="dtype of input 0 must be one of"):
        Graph(((3,),), (), (0,), dtypes=("int8",))  # type: ignore[arg-type]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([*OPERATIONS, "weight", "w", ""])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    path=st.sampled_from([[], ["nodes", 0], ["nodes", 0, 2], ["nodes", 1, 1], ["outputs"], ["inputs", 0]]), value=JSON
)
def test_a_graph_is_read_or_refused(path: list[Any], value: Any) -> None:
    try:
        Graph.from_json(edited(path, value) if path else value).shapes(WEIGHTS)
    except ValueError:
        pass


def run(graph: Graph, tensors: dict[str, Any], *inputs: Any) -> np.ndarray:
    return reference.run(graph, tensors, *(np.asarray(x, np.float32) for x in inputs))[0]


def test_operations_on_numbers_by_hand() -> None:
    x = [[-4.0, -1.0, 0.0, 1.0, 4.0]]
    for op, expected in {
        "relu": [0, 0, 0, 1, 4],
        "hardsigmoid": [0, 1 / 3, 1 / 2, 2 / 3, 1],
        "hardswish": [0, -1 / 3, 0, 2 / 3, 4],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in x[0]],
        "silu": [v / (1 + math.exp(-v)) for v in x[0]],
        "tanh": [math.tanh(v) for v in x[0]],
        "gelu": [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x[0]],
        "gelu_tanh": [v / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3))) for v in x[0]],
    }.items():
        np.testing.assert_allclose(run(layer(op, (5,)), {}, x)[0], expected, rtol=1e-6, atol=1e-7)
    assert run(layer("clip", (5,), low=-2.0, high=3.0), {}, x).tolist() == [[-2, -1, 0, 1, 3]]
    image = np.arange(8.0).reshape(1, 2, 2, 2)
    vectors = {"w": np.array([1.0, 10.0]), "b": np.array([0.5, 0.0])}
    scaled = run(layer("scale", (2, 2, 2), weight="w", bias="b"), vectors, image)
    assert scaled.tolist() == [[[[0.5, 1.5], [2.5, 3.5]], [[40, 50], [60, 70]]]]
    assert run(layer("mean", (2, 2, 2)), {}, image).tolist() == [[[[1.5]], [[5.5]]]]
    assert run(layer("mul", (2, 2, 2), (2, 1, 1)), {}, image, [[[[2]], [[0]]]])[0, :, 1, 1].tolist() == [6, 0]
    assert run(layer("flatten", (2, 2, 2)), {}, image).tolist() == [list(range(8))]
    assert run(layer("concat", (1,), (2,)), {}, [[1]], [[2, 3]]).tolist() == [[1, 2, 3]]


def test_pools_by_hand() -> None:
    x = np.arange(9.0).reshape(1, 1, 3, 3)
    pool = {"kernel": (2, 2), "stride": (2, 2)}
    assert run(layer("max_pool", (1, 3, 3), **pool), {}, x).tolist() == [[[[4]]]]
    assert run(layer("max_pool", (1, 3, 3), ceil=True, **pool), {}, x).tolist() == [[[[4, 5], [7, 8]]]]
    assert run(layer("avg_pool", (1, 3, 3), ceil=True, **pool), {}, x).tolist() == [[[[2, 3.5], [6.5, 8]]]]
    padded = {**pool, "padding": (1, 1)}
    assert run(layer("avg_pool", (1, 3, 3), **padded), {}, x).tolist() == [[[[0, 1.5], [4.5, 6]]]]
    counted = run(layer("avg_pool", (1, 3, 3), count_padding=True, **padded), {}, x)
    assert counted.tolist() == [[[[0, 0.75], [2.25, 6]]]]
    assert run(layer("max_pool", (1, 3, 3), **padded), {}, -x - 1).max() == -1  # padding is -infinity


def test_a_sparse_tensor_is_as_good_as_a_dense_one() -> None:
    rng = np.random.default_rng(0)
    dense = {**WEIGHTS, "conv1.weight": rng.normal(size=(4, 1, 5, 5)).astype(np.float32)}
    dense["conv1.weight"][rng.random((4, 1, 5, 5)) < 0.8] = 0
    sparse = {name: Sparse.from_dense(w) for name, w in dense.items()}
    x = rng.normal(size=(2, 1, 28, 28)).astype(np.float32)
    graph = Graph.from_json(LENET)
    assert np.array_equal(run(graph, dense, x), run(graph, sparse, x))


def test_inputs_are_checked() -> None:
    graph = layer("add", (3,), (3,))
    with pytest.raises(ValueError, match="takes 2 inputs, got 1"):
        run(graph, {}, np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"input 1 must have the shape \(batch, 3\), got \(3,\); .* is x\[None\]"):
        run(graph, {}, np.zeros((1, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="one batch size, got 2 and 1"):
        run(graph, {}, np.zeros((2, 3)), np.zeros((1, 3)))


def test_an_empty_batch() -> None:
    assert run(Graph.from_json(LENET), WEIGHTS, np.zeros((0, 1, 28, 28))).shape == (0, 10)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_folding_dense_or_sparse(is_sparse: bool) -> None:
    rng = np.random.default_rng(0)
    pad, padding = pad_weight(2, 0, 1, 2, 0)
    graph = Graph(
        inputs=((2, 6, 5),),
        nodes=(
            Node("conv", (0,), weight="pad", padding=padding, groups=2),
            Node("conv", (1,), weight="w", stride=(2, 1), padding=(1, 0)),
            Node("scale", (2,), weight="s", bias="t"),
            Node("scale", (3,), weight="s2", bias="t2"),
            Node("relu", (4,)),
            Node("scale", (4,), weight="s"),
            Node("add", (5, 6)),
        ),
        outputs=(7,),
    )
    tensors: dict[str, Any] = {"pad": pad, "w": rng.normal(size=(3, 2, 3, 2)) * (rng.random((3, 2, 3, 2)) < 0.4)}
    tensors |= {name: rng.normal(size=3) for name in ("s", "t", "s2", "t2")}
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    if is_sparse:
        tensors["w"] = Sparse.from_dense(tensors["w"])
    before = {name: x.dense() if isinstance(x, Sparse) else x.copy() for name, x in tensors.items()}
    smaller, made = fold(graph, tensors)
    assert [node.op for node in smaller.nodes] == ["conv", "relu", "scale", "add"]
    assert set(made) == set(smaller.names())
    assert isinstance(made[smaller.nodes[0].weight or ""], Sparse) == is_sparse
    assert all(
        np.array_equal(tensors[name].dense() if isinstance(tensors[name], Sparse) else tensors[name], x)
        for name, x in before.items()
    )
    x = rng.normal(size=(2, 2, 6, 5)).astype(np.float32)
    for a, b in zip(
        reference.run(graph, tensors, x, dtype=np.float64),
        reference.run(smaller, made, x, dtype=np.float64),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # weights were rounded to float32


def test_what_has_another_reader_is_not_folded() -> None:
    nodes = (Node("linear", (0,), weight="w"), Node("scale", (1,), weight="s"), Node("add", (1, 2)))
    graph = Graph(((2,),), nodes, (3,))
    tensors = {"w": np.eye(2, dtype=np.float32), "s": np.full(2, 3, np.float32)}
    smaller, made = fold(graph, tensors)
    assert smaller == graph
    assert run(smaller, made, [[1, 2]]).tolist() == [[4, 8]]
    output_too = Graph(((2,),), nodes[:2], (1, 2))
    assert fold(output_too, tensors)[0] == output_too


def test_an_infinite_factor_leaves_zeros_alone() -> None:
    graph = Graph(((2,),), (Node("linear", (0,), weight="w"), Node("scale", (1,), weight="s")), (2,))
    _, made = fold(graph, {"w": np.eye(2, dtype=np.float32), "s": np.array([np.inf, -1], np.float32)})
    weight = made["w@s"]
    assert isinstance(weight, np.ndarray)
    assert weight.tolist() == [[np.inf, 0], [0, -1]] and not np.signbit(weight[1, 0])


def test_hostile_graphs_are_refused_or_computed() -> None:
    tally = fuzz_graph.run(range(1000), 1)
    assert min(tally[how] for how in ("not read", "refused", "run")) > 20
