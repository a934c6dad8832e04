"""ONNX in: equal to ONNX Runtime, to torch, or refused by the operator's name; and nothing that a file can break."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import pomona
from pomona.cli import main
from pomona.runtime.network import Network
from pomona.runtime.readers.builder import UnsupportedError
from pomona.runtime.readers.onnx import read, read_weights
from pomona.runtime.readers.onnx.folds import FOLDS
from pomona.runtime.readers.onnx.operators import HANDLERS

Array = NDArray[Any]


def model_of(
    nodes: Sequence[Any], weights: dict[str, Array], shape: Sequence[Any] = ("b", 4), opset: int = 17, **more: Any
) -> bytes:
    """A model from ``x`` to ``y``."""
    x = helper.make_tensor_value_info("x", more.pop("dtype", TensorProto.FLOAT), list(shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "net", [x], [y], initializers, **more)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()


def run(data: bytes, x: Array, **how: Any) -> Array:
    result: Array = Network(*read(data, **how)).run(x)
    return result


def close(got: Array, wanted: Array, bound: float = 1e-5) -> None:
    assert got.shape == wanted.shape
    assert float(np.abs(got - wanted).max()) <= bound * max(1.0, float(np.abs(wanted).max()))


rng = np.random.default_rng(0)
W = rng.standard_normal((6, 4)).astype(np.float32) * (rng.random((6, 4)) < 0.4)
X = rng.standard_normal((3, 4)).astype(np.float32)


# the onnx package's own tests


def cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about infinities that are meant
        return [
            case
            for case in collect_testcases(None)  # type: ignore[no-untyped-call]
            if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in HANDLERS
        ]


_TWO_VALUES = ("Add", "Sub", "Mul")


def test_the_backend_tests_of_onnx_pass_or_are_refused_by_name() -> None:
    passed: dict[str, int] = {}
    for case in cases():
        op = case.model.graph.node[0].op_type
        for given, expected in case.data_sets:
            if not given or not all(isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "fiub" for x in given):
                continue
            num = len(given) if op == "Concat" else 1
            if op in _TWO_VALUES and given[0].shape == given[1].shape:
                num = 2
            model = onnx.ModelProto()
            model.CopyFrom(case.model)
            for proto, x in list(zip(model.graph.input, given, strict=False))[num:]:  # the others are constants
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(x), proto.name))
            try:
                graph, tensors = read(model.SerializeToString())
            except UnsupportedError:
                continue
            except ValueError as error:
                assert "has no shape [3, 4, 0]" in str(error)  # nothing is empty here
                continue
            got = Network(graph, tensors).run(*given[:num])
            for a, b in zip(got if isinstance(got, list) else [got], expected, strict=False):
                close(a.reshape(np.shape(b)), np.asarray(b), 1e-4)
            passed[op] = passed.get(op, 0) + 1
    least = {"Conv": 6, "Gemm": 8, "MaxPool": 7, "AveragePool": 6, "BatchNormalization": 2, "Clip": 3, "Flatten": 3}
    assert all(passed[op] >= num for op, num in least.items()), passed
    assert len(passed) >= 20


# what exporters write


class Small(nn.Module):
    """A bit of everything that convnets have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.wide = nn.Conv2d(8, 12, (1, 3), padding=(0, 1))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.deep(x)
        x = x + y * self.squeeze(y)
        a, b = self.wide(x).chunk(2, 1)
        x = self.pool(torch.cat([a * b.sigmoid(), b, nn.functional.silu(a), a - 2 * b], 1))
        result: torch.Tensor = self.head(x.mean((2, 3)) / 3)
        return result


def small() -> Small:
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(torch.rand_like(p) < 0.5)
    return model


def exported(model: nn.Module, x: torch.Tensor, how: str) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        if how == "dynamo":
            program = torch.onnx.export(
                model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            assert program is not None
            return program.model_proto.SerializeToString()
        torch.onnx.export(
            model, (x,), file, dynamo=False, opset_version=int(how), input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
    return file.getvalue()


@pytest.mark.parametrize("how", ["11", "13", "17", pytest.param("dynamo", marks=pytest.mark.check)])
def test_what_torch_exports_computes_the_same_for_any_batch(how: str) -> None:
    model = small()
    data = exported(model, torch.randn(2, 3, 16, 16), how)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            close(run(data, x.numpy()), model(x).numpy())


def test_a_fixed_batch_is_free_here() -> None:
    file = io.BytesIO()
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(1, 3, 16, 16),), file, dynamo=False, opset_version=13)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        close(run(file.getvalue(), x.numpy()), model(x).numpy())


def test_a_file_of_pomonas_with_sparse_initializers_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(48, 64) < 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an ONNX Runtime may refuse sparse initializers
        pomona.export(model, tmp_path / "net.onnx", example=torch.zeros(1, 64))
    network = pomona.runtime.load(tmp_path / "net.onnx")
    x = torch.randn(3, 64)
    with torch.no_grad():
        close(network.run(x.numpy()), model(x).numpy())
    found = {t.shape: int(np.count_nonzero(t)) for t in read_weights(tmp_path / "net.onnx").values() if t.ndim == 2}
    assert int(model[0].weight.count_nonzero()) in found.values()


# zeros wherever they are


def sparse(name: str, w: Array, *, is_flat: bool) -> Any:
    places = np.flatnonzero(w) if is_flat else np.argwhere(w)
    values = numpy_helper.from_array(w.reshape(-1)[np.flatnonzero(w)], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64), "at"), w.shape)


@pytest.mark.parametrize("is_flat", [True, False])
def test_sparse_initializers(is_flat: bool) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    data = model_of(nodes, {}, sparse_initializer=[sparse("w", W, is_flat=is_flat)])
    close(run(data, X), X @ W.T)
    assert read_weights(data)["w"].tolist() == W.tolist()


def _quantized() -> tuple[list[Any], dict[str, Array]]:
    q, scale = np.round(W * 20).astype(np.int8), np.linspace(0.02, 0.08, 6).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
    ]
    return nodes, {"q": q, "s": scale, "z": np.zeros(6, np.int8)}


BEHIND: dict[str, Callable[[], tuple[list[Any], dict[str, Array], Array]]] = {
    "Transpose": lambda: ([helper.make_node("Transpose", ["w"], ["t"])], {"w": W}, W.T),
    "Identity": lambda: ([helper.make_node("Identity", ["w"], ["t"])], {"w": W.T.copy()}, W.T),
    "Cast": lambda: ([helper.make_node("Cast", ["w"], ["t"], to=1)], {"w": W.T.astype(np.float16)}, W.T),
    "Reshape": lambda: (
        [helper.make_node("Reshape", ["w", "n"], ["t"])],
        {"w": W.T.reshape(-1).copy(), "n": np.array([4, -1])},
        W.T,
    ),
    "Constant": lambda: ([helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(W.T.copy()))], {}, W.T),
    "DequantizeLinear": lambda: (
        *_quantized(),
        (np.round(W * 20) * np.linspace(0.02, 0.08, 6).astype(np.float32)[:, None]).T,
    ),
}


@pytest.mark.parametrize("what", BEHIND)
def test_weights_behind_operators_keep_their_zeros(what: str) -> None:
    nodes, weights, w = BEHIND[what]()
    data = model_of([*nodes, helper.make_node("MatMul", ["x", "t"], ["y"])], weights)
    graph, tensors = read(data)
    (weight,) = tensors.values()
    assert np.count_nonzero(weight) == np.count_nonzero(w) < w.size
    close(Network(graph, tensors).run(X), (X @ w).astype(np.float32), 1e-3 if what == "Cast" else 1e-5)


def test_a_weight_that_is_used_both_ways_is_kept_both_ways() -> None:
    w = rng.standard_normal((4, 4)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["h", "w"], ["y"], transB=1)]
    close(run(model_of(nodes, {"w": w}), X), X @ w @ w.T)


# GELU as exporters before opset 20 wrote it


def _gelu(order: str) -> list[Any]:
    node = helper.make_node
    first = [node("Div", ["x", "r2"], ["d"]), node("Erf", ["d"], ["e"]), node("Add", ["e", "one"], ["s"])]
    if order == "x (1 + erf) / 2":
        return [*first, node("Mul", ["x", "s"], ["m"]), node("Mul", ["m", "half"], ["y"])]
    return [*first, node("Mul", ["x", "half"], ["h"]), node("Mul", ["h", "s"], ["y"])]


@pytest.mark.parametrize("order", ["x (1 + erf) / 2", "(x / 2) (1 + erf)"])
def test_a_gelu_written_out_is_one_operation(order: str) -> None:
    constants = {"r2": np.sqrt(2), "one": 1.0, "half": 0.5}
    data = model_of(_gelu(order), {name: np.array(value, np.float32) for name, value in constants.items()})
    graph, tensors = read(data)
    assert [node.op for node in graph.nodes] == ["gelu"]
    close(Network(graph, tensors).run(X), nn.functional.gelu(torch.from_numpy(X)).numpy())


# what is refused, by name and with a way out


@pytest.mark.parametrize(
    ("nodes", "shape", "told"),
    [
        (
            [helper.make_node("Softmax", ["x"], ["y"])],
            ("b", 4),
            "cannot run the operator Softmax in y; ONNX Runtime runs",
        ),
        (
            [helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])],
            ("b", 2, 3, 4),
            "cannot run Transpose of (13, 2, 3, 4) to the order (0, 2, 3, 1) in y",
        ),
        (
            [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])],
            ("b", 1, 8, 8),
            "cannot run MaxPool with dilation (2, 2)",
        ),
        ([helper.make_node("Mystery", ["x"], ["y"], domain="a.vendor")], ("b", 4), "the operator Mystery of a.vendor"),
        ([helper.make_node("MatMul", ["x", "x"], ["y"])], ("b", 4), "MatMul with an operand computed from the input"),
        ([helper.make_node("Erf", ["x"], ["y"])], ("b", 4), "cannot run Erf of anything but x / sqrt(2)"),
    ],
)
def test_what_the_runtime_lacks_is_refused_by_name(nodes: list[Any], shape: tuple[Any, ...], told: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(told)):
        read(model_of(nodes, {}, shape))


def test_a_dimension_that_is_free_is_asked_for() -> None:
    data = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, ("b", 3, "height", "width"))
    told = (
        "the input x of shape ['b', 3, 'height', 'width'] leaves dimensions free; say what they are, without the batch"
    )
    with pytest.raises(UnsupportedError, match=re.escape(f"{told}: shapes={{'x': (3, 224, 224)}}")):
        read(data)
    x = rng.standard_normal((2, 3, 5, 6)).astype(np.float32)
    close(run(data, x, shapes={"x": (3, 5, 6)}), np.maximum(x, 0))
    close(run(data, x, shapes=[(3, 5, 6)]), np.maximum(x, 0))
    with pytest.raises(UnsupportedError, match="shapes names 'z', and the inputs of the model are x"):
        read(data, shapes={"z": (3,)})


# damage


def test_a_file_that_is_no_model_or_too_old_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="this is no ONNX model"):
        pomona.runtime.load(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="opset 7 or later can be read, got opset 6"):
        read(model_of([helper.make_node("Relu", ["x"], ["y"])], {}, opset=6))


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        (
            [helper.make_node("ConstantOfShape", ["n"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
            {"n": [1 << 40]},
        ),
        (
            [helper.make_node("Expand", ["o", "n"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])],
            {"n": [1 << 20] * 2},
        ),
        ([helper.make_node("Range", ["z", "m", "o1"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])], {}),
        ([helper.make_node("Gather", ["o", "i"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])], {}),
    ],
    ids=["ConstantOfShape", "Expand", "Range", "Gather"],
)
def test_a_small_file_cannot_ask_for_much_memory(nodes: list[Any], weights: dict[str, list[int]]) -> None:
    more: dict[str, Array] = {
        "o": np.ones((1, 1), np.float32),
        "z": np.array(0.0),
        "m": np.array(1e12),
        "o1": np.array(1.0),
        "i": np.zeros((1000, 1000, 200) if nodes[0].op_type == "Gather" else 1, np.int8).astype(np.int64)[:1],
    }
    data = model_of(nodes, {**more, **{name: np.array(n) for name, n in weights.items()}})
    with pytest.raises(ValueError, match="and max_bytes leaves"):
        read(data, max_bytes=1 << 21)


def test_damaged_models_are_errors_and_never_crashes() -> None:
    whole = np.frombuffer(exported(small(), torch.randn(1, 3, 16, 16), "13"), np.uint8)
    generator = np.random.default_rng(1)
    ran = 0
    for _ in range(150):
        data = whole.copy()
        for place in generator.integers(0, min(len(data), 6000), generator.integers(1, 6)):
            data[place] = generator.integers(0, 256)
        if generator.random() < 0.2:
            data = data[: generator.integers(1, len(data))]
        try:
            Network(*read(data.tobytes(), max_bytes=1 << 26), max_bytes=1 << 28)
            ran += 1
        except ValueError:
            pass
    assert ran < 150


# the command line


def test_the_commands_take_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    path, out = tmp_path / "net.onnx", tmp_path / "net.pomona.safetensors"
    path.write_bytes(exported(model, torch.randn(1, 3, 16, 16), "13"))
    assert main(["report", str(path)]) == 0
    assert "head.2.weight" in capsys.readouterr().out
    assert main(["export", str(path), "-o", str(out)]) == 0
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        close(pomona.runtime.load(out).run(x.numpy()), model(x).numpy())
    assert main(["bench", str(path), "--seconds", "0.05", "--paths", "onnxruntime"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_every_operator_is_said_to_be_covered() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text()
    assert all(f"`{op}`" in docs for op in {*HANDLERS, *FOLDS})


# nearest pixels


@pytest.mark.parametrize(
    "how", ["asymmetric floor", "half_pixel round_prefer_floor", "pytorch_half_pixel round_prefer_ceil"]
)
@pytest.mark.parametrize("is_by_size", [False, True])
def test_a_resize_to_the_nearest_pixel_is_one_operation(how: str, is_by_size: bool) -> None:
    places, rounding = how.split()
    given = {"s": np.array([1, 1, 2, 3], np.float32), "n": np.array([1, 2, 6, 12])}
    inputs = ["x", "", "", "n"] if is_by_size else ["x", "", "s"]
    shape = (1, 2, 3, 4)
    node = helper.make_node(
        "Resize", inputs, ["y"], mode="nearest", coordinate_transformation_mode=places, nearest_mode=rounding
    )
    data = model_of([node], {name: given[name] for name in inputs if name in given}, shape)
    x = rng.standard_normal(shape).astype(np.float32)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    close(run(data, x), session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("mode", "places", "rounding", "scale"),
    [
        ("linear", "half_pixel", "round_prefer_floor", 2.0),
        ("nearest", "align_corners", "round_prefer_floor", 2.0),
        ("nearest", "asymmetric", "round_prefer_floor", 3.0),
        ("nearest", "half_pixel", "floor", 2.0),
        ("nearest", "asymmetric", "floor", 1.5),
    ],
)
def test_a_resize_to_other_pixels_is_refused(mode: str, places: str, rounding: str, scale: float) -> None:
    how = {"mode": mode, "coordinate_transformation_mode": places, "nearest_mode": rounding}
    nodes = [helper.make_node("Resize", ["x", "", "s"], ["y"], **how)]
    with pytest.raises(UnsupportedError, match=re.escape(f"({mode}, {places}, {rounding})")):
        read(model_of(nodes, {"s": np.array([1, 1, scale, scale], np.float32)}, ("b", 2, 4, 6)))


class UNet(nn.Module):
    """A small one, with nearest upsampling and skips."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.down, self.deep, self.up = block(3, 8), block(8, 16), block(24, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(x)
        deep = self.deep(nn.functional.max_pool2d(first, 2))
        up = nn.functional.interpolate(deep, scale_factor=2, mode="nearest")
        result: torch.Tensor = self.head(self.up(torch.cat([up, first], 1)))
        return result


@pytest.mark.parametrize("how", ["model", "11", "17"])
def test_a_u_net_runs_whole(how: str) -> None:
    torch.manual_seed(0)
    model, x = UNet().eval(), torch.randn(2, 3, 16, 24)
    network = Network.from_model(model, x) if how == "model" else Network(*read(exported(model, x, how)))
    with torch.no_grad():
        close(network.run(x.numpy()), model(x).numpy())
