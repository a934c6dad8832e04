"""`pomona bench`: the command on tiny networks, and what it says of results that are made up."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pomona import runtime
from pomona.benchmark.bench import bench, write_network
from pomona.benchmark.page import write_bench_page
from pomona.benchmark.paths import open_module, peak_memory, relative_error
from pomona.benchmark.result import BenchResult, LayerResult, PathResult, with_unit
from pomona.benchmark.worker import Timing, Worker, WorkerError, take_turns
from pomona.files.pack import write
from pomona.files.sparse import Sparse
from pomona.files.stored import Stored
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.graph import Graph, Node
from pomona.runtime.module import GraphModule
from pomona.runtime.operations import ELEMENTWISE
from pomona.zoo.models import build_model
from tests.runs import command_line

TINY = """
    import torch
    from torch import nn

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
        with torch.no_grad():
            model[0].weight.view(-1)[: 8 * 27 - 20] = 0
        return model

    def number():
        return 3
"""
WEIGHTS, KEPT = 8 * 27 + 288 * 5, 20 + 288 * 5
MACS, KEPT_MACS = 8 * 27 * 36 + 288 * 5, 20 * 36 + 288 * 5


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is in the current folder, and nowhere else."""
    (tmp_path / "tiny_net.py").write_text(textwrap.dedent(TINY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # taken back after the test; open_module finds it there
    return "tiny_net:make"


def failing(*arguments: str) -> str:
    done = command_line(["bench", *arguments])
    assert (done.status, done.out) == (2, "")
    return done.err


def row_of(text: str, name: str) -> str:
    """The line of a table that begins with this name."""
    (row,) = (line for line in text.splitlines() if line.split("  ")[0] == name)
    return row


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


@pytest.mark.check
def test_all_paths_of_a_model_agree_and_are_timed(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    page = tmp_path / "page.html"
    paths = ["pomona", "torch", "onnxruntime", "onnxruntime int8"]
    shape = ["--input", "2x3x8x8", "--seconds", "0.01"]
    done = command_line(["bench", tiny, *shape, "--json", "--html", str(page), "--paths", *paths])
    assert (done.status, done.err) == (0, "")
    result = json.loads(done.out)
    assert (result["weights"], result["kept"]) == (WEIGHTS, KEPT)
    assert (result["macs"], result["kept_macs"]) == (MACS, KEPT_MACS)
    assert [path["name"] for path in result["paths"]] == paths
    for path in result["paths"]:
        assert path["why_not"] is None
        assert 0 <= path["error"] < (0.2 if "int8" in path["name"] else 1e-5)
        assert 0 < path["timing"]["median"] <= path["timing"]["p90"] < 1
        assert 0 < path["timing"]["cpu"] < 1 and path["timing"]["num_calls"] >= 3
        assert path["peak_bytes"] > 2**20
    pomona, torch_, *_ = result["paths"]
    assert pomona["peak_bytes"] < torch_["peak_bytes"] / 2  # its process has no torch
    assert [layer["name"] for layer in result["layers"]] == ["0", "4", "all others"]
    assert [layer["kept"] for layer in result["layers"]] == [20, 1440, 0]
    assert all(layer["seconds"] >= 0 and layer["dense_seconds"] >= 0 for layer in result["layers"])
    assert result["layers"][0]["seconds"] > 0
    tags = Tags(page.read_text()).tags
    assert tags.count("rect") == 4 + 2 * 3 and tags.count("table") == 2 and "script" not in tags


@pytest.mark.check
def test_a_file_is_run_without_its_model(tiny: str, tmp_path: Path) -> None:
    file = str(tmp_path / "net.pomona.safetensors")
    module = open_module(tiny).eval()
    write_network(file, module, [torch.zeros(1, 3, 8, 8)])
    x = torch.randn(7, 3, 8, 8)
    data = tmp_path / "data.npz"
    labels = module(x).argmax(dim=1)
    labels[3] = (labels[3] + 1) % 5
    np.savez(data, x=x.numpy(), y=labels.numpy())
    arguments = [file, "--seconds", "0.01", "--input", "4x3x8x8", "--paths", "torch", "--data", str(data)]
    done = command_line(["bench", *arguments])
    assert (done.status, done.err) == (0, "")
    for path in ("pomona", "torch"):
        assert "85.71 %" in row_of(done.out, path)  # 6 of 7, in a whole batch and a part of one
    assert f"weights kept: {KEPT:,} of {WEIGHTS:,}" in done.out
    assert f"size: {Path(file).stat().st_size:,} bytes" in done.out


def test_a_run_is_benched_on_its_data(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"title": "t", "source": "s", "seed": 0, "model": "lenet-300-100", "data": "mnist"}
    (run / "run.json").write_text(json.dumps({"command": "train", "recipe": recipe, "data": "d"}))
    assert "holds no model.pt: the run has not finished; run the same command again" in failing(
        str(run), "--data", str(digits)
    )
    torch.save(build_model("lenet-300-100", seed=3).state_dict(), run / "model.pt")
    result = bench(str(run), seconds=0.01, paths=["pomona"], data=digits)
    assert result.inputs == ((1, 1, 28, 28),) and result.weights == 266_200
    accuracy = result.path("pomona").accuracy
    assert accuracy is not None and 0 <= accuracy <= 100
    assert math.isclose(accuracy % 2, 0)  # of 50 images


def test_what_cannot_be_used_is_told(tiny: str, tmp_path: Path) -> None:
    shape = ("--input", "1x3x8x8")
    assert "MODULE:FUNCTION" in failing("no_such_thing", *shape)
    assert "cannot take 'make' from module 'no_such_module'" in failing("no_such_module:make", *shape)
    assert "cannot take 'nothing' from module 'tiny_net'" in failing("tiny_net:nothing", *shape)
    assert "must return a torch.nn.Module, got int" in failing("tiny_net:number", *shape)
    assert "--input 1x3x224x224" in failing(tiny)
    assert "as 1x3x224x224, got '1x0'" in failing(tiny, "--input", "1x0")
    assert "paths must be among pomona, pomona int16, torch, " in failing(tiny, *shape, "--paths", "tensorrt")
    assert "--seconds must be above 0, got 0" in failing(tiny, *shape, "--seconds", "0")
    data = tmp_path / "data.npz"
    np.savez(data, x=np.zeros((2, 3, 9, 9)), y=np.zeros(2, int))
    assert "have the shape [3, 9, 9], the model takes [3, 8, 8]" in failing(tiny, *shape, "--data", str(data))
    np.savez(data, x=np.zeros((2, 3, 8, 8)), y=np.zeros(3, int))
    assert "got [2, 3, 8, 8] and [3]" in failing(tiny, *shape, "--data", str(data))
    np.savez(data, x=np.zeros((2, 3, 8, 8)))
    assert "must hold arrays x and y, got x" in failing(tiny, *shape, "--data", str(data))
    assert "which works only if the model is a run's folder" in failing(tiny, *shape, "--data", str(tmp_path))
    file = tmp_path / "weights.pomona.safetensors"
    write(file, {"w": Stored("F32", np.ones((2, 2), np.float32))})
    assert "not what is computed with them" in failing(str(file))


def test_without_the_compiled_core_numpy_runs_it(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POMONA_CORE", "0")  # of the process that runs it
    with library.switched(False):
        result = bench(tiny, inputs=[(1, 3, 8, 8)], seconds=0.01, paths=["pomona"])
    timing, layer = result.path("pomona").timing, result.layers[0]
    assert timing is not None and not result.path("pomona").is_wrong
    assert layer.seconds is None and layer.kept == 20
    assert "no compiled core" in str(result)


def test_a_path_that_fails_does_not_end_the_others(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.__globals__, "export_onnx", fail)
    result = bench(tiny, inputs=[(1, 3, 8, 8)], seconds=0.01, paths=["onnxruntime"])
    assert result.path("pomona").timing is not None
    assert result.path("onnxruntime").why_not == "torch.onnx cannot export it: no such operation"
    assert "no dense float32 path ran" in result.verdict()[0]
    assert "torch.onnx cannot export it" in str(result)


def test_without_onnx_it_says_what_to_install(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    result = bench(tiny, inputs=[(1, 3, 8, 8)], seconds=0.01, paths=["onnxruntime"])
    assert "pip install 'pomona[bench]'" in str(result.path("onnxruntime").why_not)


def fail(*_: object) -> None:
    raise RuntimeError("no such operation\nand much more")


def test_a_process_that_ends_is_an_error() -> None:
    with Worker("pomona", code="import sys; sys.stdin.readline(); sys.exit(3)") as worker:
        with pytest.raises(WorkerError, match="ended with status 3"):
            worker.ask("peak")
        with pytest.raises(WorkerError, match="ended with status 3"):
            worker.ask("peak")
        assert isinstance(take_turns([(worker, "")], seconds=0.01)[0], WorkerError)


def test_a_missing_package_is_told_apart() -> None:
    code = "from pomona.benchmark.paths import serve; serve({'a': lambda case, threads: __import__('no_such_package')})"
    with Worker("a", code=code) as worker, pytest.raises(WorkerError, match="no_such_package") as told:
        worker.ask("version", package="no_such_package")
    assert told.value.is_missing  # PackageNotFoundError is a ModuleNotFoundError


def test_errors_are_relative_to_the_largest_number() -> None:
    right = [np.array([[4.0, -8.0]])]
    assert relative_error([np.array([[4.0, -7.0]])], right) == 1 / 8
    assert relative_error([np.array([4.0, -8.0])], right) == math.inf  # another shape
    assert relative_error([np.array([[4.0, math.nan]])], right) == math.inf


@pytest.mark.check
def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory()
    if before is None:
        pytest.skip("this system does not tell")
    block = np.ones(before // 8 + 2**22)  # as many bytes again, and more
    after = peak_memory()
    assert after is not None and after >= before + 2**24 and block[-1] == 1


def test_durations_have_three_digits() -> None:
    assert [with_unit(s) for s in (1.234, 0.04567, 8.9e-6)] == ["1.23 s", "45.7 ms", "8.9 us"]


RESULT = BenchResult(
    model="m",
    inputs=((1, 4),),
    threads=2,
    machine="a machine",
    weights=100,
    kept=10,
    macs=2_000_000,
    kept_macs=200_000,
    dense_bytes=400,
    file_bytes=80,
    paths=(
        PathResult("pomona", Timing(2e-3, 3e-3, 2e-3, 10), 1e-7, 2**24),
        PathResult("onnxruntime", Timing(5e-3, 6e-3, 5e-3, 10), 1e-7, 2**25),
        PathResult("openvino", Timing(1e-3, 1e-3, 1e-3, 10), 0.5, 2**25),  # wrong
        PathResult("openvino int8", Timing(1e-3, 1e-3, 1e-3, 10), 0.02, 2**25),
        PathResult("torch", why_not="torch is not there"),
    ),
    layers=(
        LayerResult("first", (10, 5), 50, 5, 1_000_000, 100_000, 1e-3, 4e-3),
        LayerResult("second", (10, 5), 50, 5, 1_000_000, 100_000, 1e-3, 0.8e-3),
        LayerResult("all others", (), 0, 0, 0, 0, 1e-4, 1e-4),
    ),
)


def test_it_says_where_dense_wins() -> None:
    assert RESULT.verdict() == [
        "pomona is 2.50x as fast as the fastest dense float32 path, onnxruntime",
        "dense int8 wins: openvino int8 is 2.00x as fast as pomona",
        "1 of 2 layers would be faster with their zeros computed: second",
        "outputs of openvino are wrong and do not count",
    ]
    slow = replace(RESULT, paths=(replace(RESULT.paths[0], timing=Timing(6e-3, 6e-3, 6e-3, 3)), *RESULT.paths[1:]))
    assert slow.verdict()[0] == "dense float32 wins: onnxruntime is 1.20x as fast as pomona"
    none = replace(RESULT, paths=(PathResult("pomona", why_not="no core"),))
    assert none.verdict() == ["pomona did not run: no core"]


def test_the_tables_say_what_was_measured() -> None:
    lines = str(RESULT).splitlines()
    assert "weights kept: 10 of 100 (10 %)" in lines and "multiplications: 0.2 M of 2 M (10 %)" in lines
    assert "size: 80 bytes as a file of pomona, 400 with all zeros (5.0x)" in lines
    row = row_of(str(RESULT), "onnxruntime")
    assert row.endswith("differ by 1.0e-07") and "2.50x" in row and "32 MiB" in row
    assert row_of(str(RESULT), "openvino").endswith("WRONG: differ by 5.0e-01")
    assert row_of(str(RESULT), "torch").endswith("torch is not there")
    assert row_of(str(RESULT), "second").endswith("dense is faster")


def test_the_page_draws_what_counts(tmp_path: Path) -> None:
    page = write_bench_page(replace(RESULT, model="<m>"), tmp_path / "page.html").read_text()
    assert "&lt;m&gt;" in page and "<m>" not in page
    bars = [float(part.split('"')[0]) for part in page.split(' width="')[1:]]
    assert len(bars) == 3 + 2 * 3  # openvino is wrong, torch is missing
    assert bars[0] / bars[1] == pytest.approx(2 / 5, abs=1e-3)
    assert page.count('class="int8"') == 1


ALL_OPS = Graph(
    inputs=((4, 9, 9), (6,)),
    nodes=(
        Node("conv", (0,), "conv", "bias", stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),  # 2: (6, 5, 9)
        Node("scale", (2,), "scale", "bias"),
        Node("mul", (3, 2)),
        Node("max_pool", (4,), kernel=(3, 3), stride=(2, 2), padding=(1, 1), ceil=True),  # 5: (6, 3, 5)
        Node("avg_pool", (5,), kernel=(2, 2), stride=(2, 2), padding=(1, 0), ceil=True, count_padding=False),
        Node("conv", (6,), "pointwise"),  # 7: (6, 2, 3)
        Node("concat", (7, 6)),  # 8: (12, 2, 3)
        Node("mean", (8,)),
        Node("flatten", (9,)),  # 10: (12,)
        Node("linear", (10,), "linear", "bias"),  # 11: (6,)
        Node("add", (11, 1)),
        Node("scale", (12,), "scale"),
        Node("clip", (13,), low=-1.0, high=2.0),
        *(Node(op, (13,)) for op in ELEMENTWISE if op != "clip"),
    ),
    outputs=(14, *range(15, 15 + len(ELEMENTWISE) - 1), 5),
)


def test_a_graph_as_a_module_computes_the_graph() -> None:
    random = np.random.default_rng(0)
    shapes = {"conv": (6, 2, 3, 3), "bias": (6,), "scale": (6,), "pointwise": (6, 6), "linear": (6, 12)}
    tensors: dict[str, Any] = {name: 0.3 * random.standard_normal(shape) for name, shape in shapes.items()}
    tensors = {name: tensor.astype("f") for name, tensor in tensors.items()}
    inputs = [random.standard_normal((3, *shape)).astype("f") for shape in ALL_OPS.inputs]
    tensors["linear"][:, ::2] = 0
    right = reference.run(ALL_OPS, tensors, *inputs)
    tensors["linear"] = Sparse.from_dense(tensors["linear"])
    outputs = GraphModule(ALL_OPS, tensors)(*map(torch.from_numpy, inputs))
    assert len(outputs) == len(right) == len(ALL_OPS.outputs)
    for y, wanted in zip(outputs, right, strict=True):
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_file_keeps_zeros_and_gives_the_same_network(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[1:] = 0
    file = str(tmp_path / "net.pomona.safetensors")
    write_network(file, model, [torch.zeros(1, 2, 6, 6)])
    x = torch.randn(3, 2, 6, 6)
    network = runtime.load(file)
    assert [node.op for node in network.graph.nodes] == ["conv", "relu"]
    assert isinstance(network.tensors[network.graph.nodes[0].weight or ""], Sparse)
    torch.testing.assert_close(open_module(file)(x), model(x))
