"""web/: the core compiled to WebAssembly and the reader in JavaScript give what Python gives; the page reads digits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomona.files import pack
from pomona.files.sparse import Sparse
from pomona.files.stored import Codebook, Stored
from pomona.files.unpack import read
from pomona.runtime import reference
from pomona.runtime.graph import Graph
from pomona.runtime.ranges import with_ranges
from pomona.zoo.data import load_mnist
from tests.web import chromium

WEB = Path(__file__).parents[2] / "web"
DIGITS_FILE = WEB / "digits.pomona.safetensors"
sys.path.insert(0, str(WEB))
import build  # noqa: E402  # web/build.py

NODE = shutil.which("node")
_INFLATES = 'new DecompressionStream("deflate-raw")'
needs_node = pytest.mark.skipif(
    NODE is None or subprocess.run([NODE, "-e", _INFLATES], capture_output=True).returncode != 0,
    reason="needs node, version 20.12 or newer",
)
needs_chromium = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs chromium")


def node(command: str, *arguments: Any) -> Any:
    """What a command of tests/web/node.mjs prints."""
    assert NODE is not None
    script = Path(__file__).parent / "node.mjs"
    done = subprocess.run([NODE, script, command, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def masked(random: np.random.Generator, *shape: int, density: float = 0.3) -> np.ndarray:
    kept = random.random(shape) < density
    return np.where(kept, random.standard_normal(shape), 0).astype(np.float32)


def write(path: Path, tensors: dict[str, np.ndarray], graph: Any = None) -> Path:
    stored = {name: Stored("F32", Sparse.from_dense(t) if (t == 0).any() else t) for name, t in tensors.items()}
    pack.write(path, stored, {"story": "caf\u00e9"}, graph)
    return path


# ------------------------------------------------------------------------------------------------------- the module


def test_the_module_is_of_these_sources() -> None:
    assert build.remembered(build.OUT.read_bytes()) == build.digest(), "the core has changed: run `make web`"


@pytest.mark.check
@pytest.mark.skipif(not build.has_compiler("clang++"), reason="needs clang and wasm-ld")
def test_it_builds(tmp_path: Path) -> None:
    build.build("clang++", tmp_path / "pomona.wasm")
    module = (tmp_path / "pomona.wasm").read_bytes()
    assert module.startswith(b"\0asm") and build.remembered(module) == build.digest()
    assert len(module) < 220_000


@needs_node
def test_blocks_of_memory_are_apart_and_used_again() -> None:
    found = node("memory", build.OUT)
    assert found["tooMuch"] == [0, 0, 0]  # what cannot be had is a null pointer
    assert found["grown"] < 1.5  # in 10,000 more steps


# ---------------------------------------------------------------------------------------------------------- reading


def every_kind() -> dict[str, Stored]:
    """A tensor of every dtype and of every way to store it."""
    random = np.random.default_rng(0)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-7, 65504.0, 6e-8, -1.5], np.float32)
    sparse = masked(random, 7, 11)
    halves = sparse.astype(np.float16)
    table = Codebook.table(np.array([-1.5, 0.25, 2.0], np.float32), "F16")
    steps = Codebook.uniform(0.125, 4)
    codes = table.values[random.integers(0, 3, 20)]
    spread = np.zeros((40, 50), np.float32)
    spread.reshape(-1)[[0, 3, 700, 701, 1999]] = steps.values[[0, 1, 2, 3, 0]]
    first = Stored("F32", sparse)
    tensors = {
        "f32": Stored("F32", special),
        "f64": Stored("F64", special.astype(np.float64) / 3),
        "f16": Stored("F16", special.astype(np.float16)),
        "bf16": Stored("BF16", (special.view(np.uint32) >> 16).astype(np.uint16)),
        "f32 as f16": Stored("F32", halves.astype(np.float32), "F16"),
        "f64 as f16": Stored("F64", Sparse.from_dense(halves.astype(np.float64)), "F16"),
        "sparse": Stored("F32", Sparse.from_dense(sparse)),
        "one of many": Stored("F32", Sparse((3, 10**6), np.array([2_999_999]), np.array([5], np.float32))),
        "nothing": Stored("F32", Sparse((1000,), np.zeros(0, np.int64), np.zeros(0, np.float32))),
        "empty": Stored("F32", np.zeros((0, 4), np.float32)),
        "scalar": Stored("F32", np.array(7, np.float32)),
        "table": Stored("F32", codes, table),
        "steps": Stored("F64", Sparse.from_dense(spread.astype(np.float64)), steps),
        "bool": Stored("BOOL", np.array([True, False, True])),
        "caf\u00e9/ \u00fc": first,
        "tied": first,
    }
    for dtype in ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"):
        info = np.iinfo(f"{dtype[0].lower()}{int(dtype[1:]) // 8}")
        tensors[dtype] = Stored(dtype, np.array([info.min, info.max, 1, 0], info.dtype))
    return tensors


@needs_node
@pytest.mark.parametrize("subtle", ["yes", "no"])
def test_reads_what_python_reads(tmp_path: Path, subtle: str) -> None:
    path = tmp_path / "x.pomona.safetensors"
    graph = {"inputs": [[4]], "nodes": [["relu", [0]]], "outputs": [1]}
    pack.write(path, every_kind(), {"story": "caf\u00e9"}, graph)
    expected = read(path)
    found = node("dump", path, subtle)
    assert found["metadata"] == expected.metadata
    assert found["graph"] == graph
    assert [name for name, _ in found["tensors"]] == list(expected.tensors)
    for name, tensor in found["tensors"]:
        stored = expected.tensors[name]
        value = stored.value
        assert (tensor["dtype"], tuple(tensor["shape"])) == (stored.dtype, stored.shape)
        assert (tensor["positions"] is not None) == isinstance(value, Sparse), name
        if isinstance(value, Sparse):
            assert tensor["positions"] == value.positions.tolist(), name
            value = value.values
        flat = value.reshape(-1)
        if stored.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        if stored.dtype in ("F16", "BF16", "F32", "F64"):
            numbers = np.array([float(x) for x in tensor["values"]], flat.dtype)
            np.testing.assert_array_equal(numbers, flat, err_msg=name)
            np.testing.assert_array_equal(np.signbit(numbers), np.signbit(flat), err_msg=name)
        else:
            assert [int(x) for x in tensor["values"]] == [int(x) for x in flat.tolist()], name


@needs_node
def test_its_own_sha_256_is_right() -> None:
    assert node("digests")


# ---------------------------------------------------------------------------------------------------------- running


def images() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A network of every operation on images."""
    random = np.random.default_rng(1)
    tensors = {
        "a": masked(random, 8, 3, 3, 3),
        "a.b": masked(random, 8, density=0.5),
        "b": masked(random, 8, 1, 3, 3, density=1),
        "c": masked(random, 6, 4, 1, 2),
        "s": masked(random, 8, density=1),
        "s.b": masked(random, 8, density=1),
        "e": masked(random, 8, 8),
        "f": masked(random, 5, 1),
        "f.b": masked(random, 5, density=1),
    }
    nodes: list[list[Any]] = [
        ["conv", [0], {"weight": "a", "bias": "a.b", "stride": [2, 1], "padding": [1, 2]}],  # 1: 8, 6, 12
        ["scale", [1], {"weight": "s", "bias": "s.b"}],
        ["clip", [2], {"low": -1.5, "high": 2.5}],
        ["conv", [3], {"weight": "b", "padding": [2, 2], "dilation": [2, 2], "groups": 8}],  # depthwise
        ["add", [3, 4]],
        ["hardswish", [5]],
        ["mean", [6]],
        ["conv", [7], {"weight": "e"}],
        ["sigmoid", [8]],
        ["mul", [6, 9]],  # 10
        ["max_pool", [10], {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil": True}],
        ["avg_pool", [10], {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil": True}],
        [
            "avg_pool",
            [10],
            {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil": True, "count_padding": True},
        ],
        ["concat", [11, 12, 13]],
        ["gelu", [14]],
        ["gelu_tanh", [15]],
        ["silu", [16]],
        ["tanh", [17]],
        ["hardsigmoid", [18]],
        ["relu", [19]],  # 20
        ["flatten", [20]],
        ["conv", [13], {"weight": "c", "groups": 2, "padding": [0, 1]}],
    ]
    shapes = Graph.from_json({"inputs": [[3, 11, 10]], "nodes": nodes, "outputs": [21]}).shapes(tensors)
    tensors["f"] = masked(random, 5, shapes[21][0], density=0.1)
    nodes.append(["linear", [21], {"weight": "f", "bias": "f.b"}])
    return {"inputs": [[3, 11, 10]], "nodes": nodes, "outputs": [23, 22]}, tensors


def words() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A network on positions, of two inputs."""
    random = np.random.default_rng(2)
    tensors = {"up": masked(random, 24, 10), "up.b": masked(random, 24, density=1), "down": masked(random, 10, 24)}
    nodes = [
        ["linear", [0], {"weight": "up", "bias": "up.b"}],
        ["gelu", [2]],
        ["linear", [3], {"weight": "down"}],
        ["add", [4, 1]],
    ]
    return {"inputs": [[9, 10], [9, 10]], "nodes": nodes, "outputs": [5]}, tensors


@needs_node
@pytest.mark.parametrize("options", [{}, {"dense": "never"}, {"dense": "always"}, {"microBatch": 4}], ids=str)
@pytest.mark.parametrize("network", [images, words])
def test_runs_as_the_reference_does(network: Any, options: dict[str, Any], tmp_path: Path) -> None:
    graph, tensors = network()
    path = write(tmp_path / "x.pomona.safetensors", tensors, graph)
    random = np.random.default_rng(3)
    inputs = [random.standard_normal((7, *shape)).astype(np.float32) for shape in graph["inputs"]]  # as 4, 2 and 1
    files = []
    for i, x in enumerate(inputs):
        files.append(tmp_path / f"{i}.bin")
        x.tofile(files[-1])
    expected = reference.run(Graph.from_json(graph), tensors, *inputs, dtype=np.float64)
    found = node("run", path, json.dumps(options), *files)
    assert found["shapes"] == [list(x.shape[1:]) for x in expected]
    for x, y in zip(found["outputs"], expected, strict=True):
        np.testing.assert_allclose(np.array(x, float).reshape(y.shape), y, atol=1e-4 * max(1, np.abs(y).max()))
    assert 0 < found["info"]["macs"] < found["info"]["denseMacs"]


@needs_node
def test_four_dimensions_and_inputs_of_integers(tmp_path: Path) -> None:
    graph = {
        "inputs": [[2, 3, 4, 5], {"shape": [6], "dtype": "int64"}, {"shape": [3], "dtype": "int32"}],
        "nodes": [["tanh", [0]], ["add", [3, 0]], ["flatten", [4]]],
        "outputs": [4, 5],
    }
    path = write(tmp_path / "x.pomona.safetensors", {"unused": np.ones((2, 2), np.float32)}, graph)
    random = np.random.default_rng(3)
    inputs = [random.standard_normal((3, 2, 3, 4, 5)), random.integers(0, 9, (3, 6)), random.integers(0, 9, (3, 3))]
    files = []
    for x, dtype in zip(inputs, ("float32", "int64", "int32"), strict=True):
        files.append(tmp_path / f"{dtype}.bin")
        x.astype(dtype).tofile(files[-1])
    found = node("run", path, "{}", *files)
    assert found["shapes"] == [[2, 3, 4, 5], [120]]
    expected = (np.tanh(inputs[0]) + inputs[0]).reshape(-1)
    for output in found["outputs"]:
        np.testing.assert_allclose(np.array(output, float), expected, atol=1e-5)


@needs_node
@pytest.mark.parametrize("network", [images, words])
def test_fixed_point_is_near_the_reference(network: Any, tmp_path: Path) -> None:
    graph, tensors = network()
    random = np.random.default_rng(3)
    inputs = [random.standard_normal((40, *shape)).astype(np.float32) for shape in graph["inputs"]]
    with_them = with_ranges(Graph.from_json(graph), tensors, *inputs)
    assert with_them.ranges is not None
    path = write(tmp_path / "x.pomona.safetensors", tensors, with_them.to_json())
    files = [tmp_path / f"{i}.bin" for i in range(len(inputs))]
    for x, file in zip(inputs, files, strict=True):
        x.tofile(file)
    expected = reference.run(with_them, tensors, *inputs, dtype=np.float64)
    found = node("run", path, '{"precision": "int16"}', *files)
    for x, y in zip(found["outputs"], expected, strict=True):
        assert np.abs(np.array(x, float).reshape(y.shape) - y).max() < 0.01 * max(with_them.ranges)


@needs_node
def test_the_network_of_the_page_reads_digits(tmp_path: Path, no_data: None) -> None:
    data = load_mnist()
    digits = data.test_inputs[:100].numpy()
    digits.tofile(tmp_path / "x.bin")
    (found,) = node("run", DIGITS_FILE, "{}", tmp_path / "x.bin")["outputs"]
    logits = np.array(found, float).reshape(100, 10)
    file = read(DIGITS_FILE)
    tensors = {name: tensor.dense() for name, tensor in file.tensors.items()}
    (expected,) = reference.run(Graph.from_json(file.graph), tensors, digits)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert (logits.argmax(1) == data.test_labels[:100].numpy()).mean() > 0.97


@needs_node
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"nodes": [["softmax", [0]]]}, {}, "node 0: an operation is one of .*softmax"),
        (
            {"nodes": [["linear", [0], {"weight": "up", "stride": [1, 1]}]]},
            {},
            'node 0: linear has no attribute "stride"',
        ),
        ({"nodes": [["linear", [0], {"weight": "left"}]]}, {}, 'there is no tensor "left"'),
        ({"nodes": [["linear", [7], {"weight": "up"}]]}, {}, r"node 0 \(linear\): an operation, an operand"),
        ({"nodes": [["relu", [0]]] * 70_000}, {}, "nodes must be a list of at most 65536"),
        ({"inputs": [[2**31 - 1, 2**31 - 1]]}, {}, "the network: "),
        ({"inputs": [[-1]]}, {}, "input 0 must be an integer in"),
        ({"inputs": [[1, 1, 1, 1, 1]]}, {}, "input 0 must have 1 to 4 dimensions"),
        ({"inputs": [{"shape": [9]}]}, {}, "input 0 must be a shape, or an object of shape and dtype"),
        (
            {"inputs": [{"shape": [9], "dtype": "int8"}]},
            {},
            "the dtype of input 0 must be one of float32, int32, int64",
        ),
        ({"inputs": [{"shape": [9, 10], "dtype": "int32"}] * 2}, {}, r"node 0 \(linear\): an operation, an operand"),
        ({}, {"maxBytes": 100}, "the tensors would take 2016 bytes, more than maxBytes=100"),
        ({}, {"maxBytes": 3000}, "the network: it needs more memory than maxBytes allows"),
        ({}, {"dense": "sometimes"}, 'dense must be "never", "always" or undefined, got "sometimes"'),
        ({}, {"microBatch": -1}, "microBatch must be an integer in"),
        ({"more": 1}, {}, "a graph is a JSON object of inputs, nodes and outputs"),
        ({}, {"precision": "int16"}, 'precision "int16" needs the ranges of values'),
        ({}, {"precision": "int8"}, 'precision must be "float32" or "int16", got "int8"'),
        ({"ranges": [1.0]}, {}, "there must be 6 ranges, one for each value; got 1"),
        ({"ranges": [1.0] * 5 + [-1.0]}, {}, "the range of value 5 must be in"),
    ],
)
def test_says_what_is_wrong(change: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    graph, tensors = words()
    path = write(tmp_path / "x.pomona.safetensors", tensors, graph | change)
    found = node("error", path, json.dumps(options))
    assert found is not None and found["type"] == "Error"
    assert re.match(message, found["message"]), found["message"]


@pytest.mark.check
@needs_node
def test_hostile_files_are_errors_and_never_crashes(tmp_path: Path) -> None:
    graph, tensors = images()
    path = write(tmp_path / "x.pomona.safetensors", tensors, graph)
    found = node("hostile", path, 390, 1)
    ends = found["ends"]
    assert sum(end["refused"] + end["runs"] for end in ends.values()) == 390
    for kind in ("truncated", "damaged", "longer", "cutStream", "followed", "cutPayload", "bomb"):
        assert ends[kind]["runs"] == 0, kind
    for kind in ("stream", "payload", "header", "headerNumber", "graph", "graphNumber"):
        assert len(ends[kind]["messages"]) > 3, kind  # not all for one reason: the tampering goes deep
    assert found["slowest"] < 10_000  # milliseconds; a hundred times what it takes


# --------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """The page as a phone gets it from a computer beside it: on a narrow screen, and without what needs https."""
    profile = tmp_path_factory.mktemp("chromium")
    with chromium.served(WEB) as port, chromium.opened(profile) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=2, mobile=True)
        page.call("Page.navigate", url=f"http://{chromium.OTHER_HOST}:{port}/index.html")
        page.wait_for("document.body && document.body.dataset.state")
        assert not page.evaluate("isSecureContext")
        yield page


# As somebody draws them: corners of strokes, from the top left of the pad.
DIGITS = {
    0: [[(0.5, 0.15), (0.3, 0.3), (0.28, 0.6), (0.45, 0.85), (0.65, 0.7), (0.7, 0.4), (0.5, 0.15)]],
    1: [[(0.52, 0.15), (0.48, 0.85)]],
    2: [[(0.3, 0.35), (0.45, 0.18), (0.65, 0.28), (0.6, 0.5), (0.3, 0.82), (0.72, 0.82)]],
    4: [[(0.35, 0.2), (0.28, 0.5), (0.7, 0.5)], [(0.6, 0.25), (0.56, 0.88)]],
    7: [[(0.28, 0.2), (0.72, 0.2), (0.45, 0.85)]],
}


def along(stroke: list[tuple[float, float]], steps: int = 6) -> list[tuple[float, float]]:
    ends = pairwise(stroke)
    return [stroke[0]] + [
        (a + (c - a) * i / steps, b + (d - b) * i / steps) for (a, b), (c, d) in ends for i in range(1, steps + 1)
    ]


def draw(page: chromium.Page, digit: int, *, by: str) -> None:
    page.evaluate("document.getElementById('clear').click()")
    left, top, width = page.evaluate(
        "(({left, top, width}) => [left, top, width])(document.getElementById('pad').getBoundingClientRect())"
    )
    for stroke in DIGITS[digit]:
        points = [(left + x * width, top + y * width) for x, y in along(stroke)]
        if by == "mouse":
            kinds = ["mousePressed"] + ["mouseMoved"] * (len(points) - 2) + ["mouseReleased"]
            for kind, (x, y) in zip(kinds, points, strict=True):
                page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
            continue
        for i, (x, y) in enumerate(points):
            kind = "touchMove" if i else "touchStart"
            page.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


@pytest.mark.check
@needs_chromium
@pytest.mark.parametrize(("digit", "by"), [*((digit, "mouse") for digit in DIGITS), (4, "finger")])
def test_a_drawn_digit_is_read(page: chromium.Page, digit: int, by: str) -> None:
    draw(page, digit, by=by)
    page.wait_for(f"document.getElementById('digit').textContent === '{digit}'", timeout=10)
    assert page.evaluate("scrollY") == 0  # a finger draws and does not scroll
    assert page.errors == []


@pytest.mark.check
@needs_chromium
def test_the_page_is_whole(page: chromium.Page) -> None:
    assert page.evaluate("document.body.dataset.state") == "ready", page.errors
    sparse, dense = (
        page.evaluate(f"parseFloat(document.getElementById('{name}').textContent)") for name in ("sparse", "dense")
    )
    assert 0 < sparse < dense
    loaded = page.evaluate("performance.getEntriesByType('resource').map(({name}) => name)")
    here = page.evaluate("location.origin")
    assert loaded and all(name.startswith(here) for name in loaded)  # works without a network
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate("document.getElementById('clear').click()")
    page.wait_for("document.getElementById('digit').textContent.trim() === ''", timeout=10)


@pytest.mark.check
@needs_chromium
def test_it_draws_examples_that_it_can_read(page: chromium.Page) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    seen = []
    for _ in range(10):
        page.evaluate("document.getElementById('example').click()")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen.append(int(page.evaluate("document.getElementById('digit').textContent")))
    assert sorted(seen) == list(range(10))


def with_stream(data: bytes, change: Any) -> bytes:
    """The file with another deflate stream, and all else right."""
    length = 8 + struct.unpack("<Q", data[:8])[0]
    stream = change(data[length + 32 :])
    text = re.sub(
        rb'"shape":\[\d+\],"data_offsets":\[0,\d+\]',
        b'"shape":[%d],"data_offsets":[0,%d]' % ((32 + len(stream),) * 2),
        data[8:length],
    )
    start = struct.pack("<Q", len(text)) + text
    return start + hashlib.sha256(start + stream).digest() + stream


@pytest.mark.check
@needs_chromium
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stream: stream, None),
        (lambda stream: stream[:-1], "the compressed data cannot be inflated"),
        (lambda stream: stream[: len(stream) // 2], "the compressed data cannot be inflated"),
        (lambda stream: b"", "the compressed data cannot be inflated"),
        (lambda stream: b"\xff" + stream, "the compressed data cannot be inflated"),
        (lambda stream: stream + b"\0", "the compressed data (cannot be inflated|are followed by something else)"),
        (lambda stream: zlib.compress(bytes(2**28), wbits=-15), "the payload has more than"),
        (lambda stream: zlib.compress(b"", wbits=-15), "the payload has 0 bytes, less than"),
    ],
)
def test_the_browser_refuses_bad_streams(page: chromium.Page, change: Any, message: str | None) -> None:
    data = base64.b64encode(with_stream(DIGITS_FILE.read_bytes(), change)).decode()
    found = page.evaluate(
        f"import('./pomona.js').then(({{read}}) => read(Uint8Array.from(atob('{data}'), (x) => x.charCodeAt(0))))"
        ".then(() => null, (error) => error.message)"
    )
    assert found is None if message is None else re.match(message, found), found
