"""Every format gives back what went in, says what does not fit, and tells the accuracy that was measured."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pomona
import pomona.runtime
from pomona.exporters import FORMATS, FormatError
from pomona.exporters import onnx as onnx_format
from pomona.files.quantize import Quantization
from pomona.files.unpack import read

SUFFIX = {
    "pomona": ".pomona.safetensors",
    "safetensors": ".safetensors",
    "csr": ".csr.safetensors",
    "bitmask": ".bitmask.safetensors",
    "2:4": ".2of4.safetensors",
}
LOSSLESS = ("pomona", "safetensors", "csr", "bitmask")


def pruned(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.ndim > 1:
            parameter.data[torch.rand(parameter.shape, generator=generator) < sparsity] = 0
    return model


def small() -> nn.Module:
    return pruned(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 36, 40),
            nn.ReLU(),
            nn.Linear(40, 3),
        )
    )


IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bytes_of(a[k]) == bytes_of(b[k]) for k in a
    )


def bytes_of(tensor: Tensor) -> bytes:
    return (
        tensor.resolve_neg().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
    )


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_state_dict_comes_back_bit_for_bit(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small().to(dtype)
    model[4].weight.data[0, 0] = -0.0
    path = tmp_path / f"x{SUFFIX[format]}"
    told = pomona.export(model, path)
    assert told.format == format and told.path == path and told.num_bytes == path.stat().st_size
    state = pomona.load(path)
    assert same(state, dict(model.state_dict()))
    other = small().to(dtype)
    other[0].weight.data.fill_(7)
    assert pomona.load(path, other) is other
    assert same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("format", ["pomona", "safetensors"])
def test_tensors_of_all_dtypes_come_back(format: str, tmp_path: Path) -> None:
    from pomona.exporters.source import _TORCH

    weight = torch.tensor([[0.0, float("nan")], [-0.0, 1]])
    state = {
        **{name: torch.tensor([0, 1, 1, 0]).to(dtype) for name, dtype in _TORCH.items()},
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "turned": weight.T,
        "every other": torch.arange(10.0)[::2],
        "negative": torch.imag(torch.tensor([1 + 2j]).conj()),
        "first": weight,
        "second": weight,
    }
    pomona.export(state, tmp_path / "x", format)
    found = pomona.load(tmp_path / "x")
    assert same(found, state)
    if format == "pomona":
        assert found["first"].data_ptr() == found["second"].data_ptr() != found["turned"].data_ptr()


def test_plain_files_are_those_of_the_package_safetensors(tmp_path: Path) -> None:
    model = small()
    pomona.export(model, tmp_path / "x.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "x.safetensors"), dict(model.state_dict()))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "y")
    assert same(pomona.load(tmp_path / "y"), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_is_that_of_torch(tmp_path: Path) -> None:
    model = small()
    pomona.export(model, tmp_path / "x.csr.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "x.csr.safetensors")
    parts = [tensors[f"4.weight.{part}"] for part in ("crow_indices", "col_indices", "values")]
    made = torch.sparse_csr_tensor(*parts, (40, 288), check_invariants=True)
    assert torch.equal(made.to_dense(), model[4].weight)
    assert tensors["4.weight.col_indices"].dtype == torch.int32 and "4.bias" in tensors


def test_bitmask_is_the_layout_of_compressed_tensors(tmp_path: Path) -> None:
    weight = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0, 0, 2], [0] * 10, [3] + [0] * 9])
    pomona.export({"fc.weight": weight, "other": weight, "full.weight": torch.ones(2, 2)}, tmp_path / "x", "bitmask")
    tensors = safetensors.torch.load_file(tmp_path / "x")
    assert {name: t.tolist() for name, t in tensors.items() if name.startswith("fc")} == {
        "fc.compressed": [1, 2, 3],
        "fc.bitmask": [[2, 2], [0, 0], [1, 0]],
        "fc.row_offsets": [0, 2, 2],
        "fc.shape": [3, 10],
    }
    assert tensors["fc.bitmask"].dtype == torch.uint8 and tensors["fc.row_offsets"].dtype == torch.int64
    assert tensors["other"].shape == (3, 10) and tensors["full.weight"].shape == (2, 2)


def test_two_of_four_is_stored_in_half_and_a_bit(tmp_path: Path) -> None:
    linear = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [0, 0, 0, 0, 5, 0, 0, 6]])
    conv = torch.zeros(3, 4, 1, 2)
    conv[0, 1, 0, 0], conv[0, 3, 0, 0], conv[2, 0, 0, 1] = 7, 8, 9
    state = {"linear": linear, "conv": conv, "bias": torch.zeros(2), "full": torch.ones(2, 3)}
    pomona.export(state, tmp_path / "x.2of4.safetensors")
    assert same(pomona.load(tmp_path / "x.2of4.safetensors"), state)
    tensors = safetensors.torch.load_file(tmp_path / "x.2of4.safetensors")
    assert tensors["linear.values"].tolist() == [[1, 2, 0, 3], [0, 0, 5, 6]]
    # Places 0 2, 0 3; 0 1, 0 3: two bits each, the low ones first.
    assert tensors["linear.indices"].tolist() == [0b1100_1000, 0b1100_0100]
    assert tensors["conv.values"].shape == (3, 1, 2, 2)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"w": torch.ones(2, 8)}, "no tensor is 2:4: the weights have no zeros"),
        ({"b": torch.zeros(8)}, "no tensor is 2:4"),
        ({"w": torch.tensor([[1.0, 1, 0, 0, 1, 1, 0, 1]])}, r"w\[0, 4:8\] has 3 weights .* \(1 of 2 groups of w"),
        ({"w": torch.tensor([[0.0, 1, 1]])}, r"w of shape \(1, 3\) has zeros but cannot be 2:4: its rows of 3"),
        ({"w": torch.ones(1, 4, 2, 1) * torch.tensor([[0.0], [1]])}, r"w\[0, 0:4, 1, 0\] has 4 weights"),
    ],
)
def test_what_is_not_two_of_four_is_refused(state: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        pomona.export(state, tmp_path / "x", "2:4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "format", "reason"),
    [
        (
            {"w": torch.zeros(2, 9), "w.values": torch.zeros(1)},
            "csr",
            "would be stored as 'w.values', but a tensor has",
        ),
        ({"w.weight": torch.zeros(2, 9), "w.shape": torch.zeros(1)}, "bitmask", "'w.shape', but a tensor has"),
        ({"w.shape": torch.zeros(1), "w.weight": torch.zeros(2, 9)}, "bitmask", "'w.shape', but a tensor has"),
        ({"w": 3}, "pomona", "'w' is a int, not a tensor"),
        ({"w": torch.zeros(2, device="meta")}, "pomona", "on the meta device"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "pomona", "layout torch.sparse_coo; only dense"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "csr", "complex128, which no safetensors file can hold"),
        ({"w": torch.zeros(2, 2)}, "zip", "format must be one of pomona, safetensors, csr"),
        ({"w": torch.zeros(2, 2)}, None, "'x' does not show the format; end it in .pomona.safetensors"),
        ({"w": torch.zeros(2, 2)}, "onnx", "needs a model"),
    ],
)
def test_what_does_not_fit_is_refused(state: dict[str, Any], format: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        pomona.export(state, tmp_path / "x", format)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "x.pomona.safetensors"
    refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: pomona.export(model, path, "csr", quantize="k-means:4"), ValueError, "for format 'pomona', got 'csr'"),
        (lambda: pomona.export(model, path, evaluate=lambda: 1.0), ValueError, "measures what quantize=... changes"),
        (lambda: pomona.export({}, path, quantize="k-means:4", evaluate=lambda: 1.0), ValueError, "in a module"),
        (lambda: pomona.export(model.state_dict(), path, example=IMAGES), ValueError, "a state dict does not say that"),
        (lambda: pomona.export(model, path, "onnx"), ValueError, "export needs example="),
        (lambda: pomona.export(model, path, dynamic_shapes={}), ValueError, "is for format 'onnx', got 'pomona'"),
        (lambda: pomona.export([1], path), TypeError, "a module or a state dict, got list"),
        (lambda: pomona.load(tmp_path / "missing"), FileNotFoundError, "missing"),
    ]
    for call, kind, reason in refused:
        with pytest.raises(kind, match=reason):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_is_in_it(tmp_path: Path) -> None:
    model = small()
    pruner = pomona.Pruner(
        model, torch.optim.SGD(model.parameters(), 0.1, 0.99, weight_decay=1e-4), pomona.GSM(sparsity=0.9)
    )
    told = pomona.export(model, tmp_path / "x.pomona.safetensors", pruner=pruner)
    metadata = read(tmp_path / "x.pomona.safetensors").metadata
    assert metadata["pomona"] == pomona.__version__
    assert metadata["method"] == repr(pomona.GSM(sparsity=0.9)) and metadata["scope"].startswith("Scope(")
    assert float(metadata["sparsity"]) == pytest.approx(pomona.report(model).sparsity, abs=1e-6)
    assert told.sparsity == pytest.approx(pomona.report(model).sparsity)
    state = model.state_dict()
    assert told.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
    assert told.compression == told.dense_bytes / told.num_bytes
    assert f"{told.num_bytes:,} bytes (pomona)" in str(told) and "accuracy" not in str(told)


def test_accuracy_is_measured_with_the_quantised_weights_which_then_leave_the_model(tmp_path: Path) -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    seen: list[int] = []

    def evaluate() -> float:
        seen.append(len(model[4].weight.unique()))
        return 99.5 - len(seen)

    told = pomona.export(model, tmp_path / "x.pomona.safetensors", quantize="k-means:4:biases=3", evaluate=evaluate)
    assert seen[0] > 100 and seen[1] <= 5
    assert same(before, dict(model.state_dict()))
    assert (told.accuracy_before, told.accuracy_after) == (98.5, 97.5)
    assert "accuracy 98.50 before quantisation, 97.50 after (-1.00)" in str(told)
    metadata = read(told.path).metadata
    assert (metadata["accuracy_before"], metadata["accuracy_after"]) == ("98.5", "97.5")
    assert metadata["quantize"] == "k-means:4:biases=3"
    state = pomona.load(told.path)
    assert len(state["4.weight"].unique()) == seen[1] and state["4.weight"].dtype == torch.float32
    assert ((state["4.weight"] == 0) == (before["4.weight"] == 0)).all()


def test_the_model_is_as_before_if_evaluation_fails(tmp_path: Path) -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calls = iter([1.0])
    with pytest.raises(StopIteration):
        pomona.export(model, tmp_path / "x.pomona.safetensors", quantize="k-means:4", evaluate=lambda: next(calls))
    assert same(before, dict(model.state_dict()))


@pytest.mark.parametrize("quantize", [None, Quantization("k-means", 8, biases=8)])
def test_with_an_example_the_file_runs_without_torch(quantize: Quantization | None, tmp_path: Path) -> None:
    model = small()
    model[1].running_mean.fill_(0.3)
    path = tmp_path / "x.pomona.safetensors"
    pomona.export(model, path, example=IMAGES, quantize=quantize)
    assert model.training
    state = pomona.load(path)
    assert state.keys() == model.state_dict().keys()
    assert quantize or same(state, dict(model.state_dict()))
    model.load_state_dict(state)
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    code = (
        "import sys, numpy, pomona.runtime\n"
        f"outputs = pomona.runtime.load({str(path)!r}).run(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        f"numpy.save({str(tmp_path / 'outputs.npy')!r}, outputs); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(pomona.__file__).parent.parent)}
    )
    wanted = model.eval()(IMAGES).detach().numpy()
    # Batch norm is rounded to half precision when quantising, else it is folded in another order of sums.
    assert (
        np.abs(np.load(tmp_path / "outputs.npy") - wanted).max() <= (1e-2 if quantize else 1e-5) * np.abs(wanted).max()
    )


def test_a_network_that_the_runtime_cannot_run_is_refused_with_two_ways_out(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval(), tmp_path / "x.pomona.safetensors"
    tokens = torch.zeros(1, 5, dtype=torch.long)
    ways = r"pomona.compile\(model, example\) takes any model, .* Leave out example= to write the file without a graph"
    with pytest.raises(ValueError, match=rf"cannot run aten.embedding.default in 0; {ways}"):
        pomona.export(model, path, example=tokens)
    with pytest.raises(ValueError, match=rf"example 0 must be a tensor of .* 2 to 5 dimensions, .*; {ways}"):
        pomona.export(nn.EmbeddingBag(9, 4), path, example=tokens[0])
    assert not path.exists()
    pomona.export(model, path)  # as the message advises
    assert same(pomona.load(path), dict(model.state_dict()))


class Gated(nn.Module):
    """Takes and returns dictionaries, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor | None = None, *, gate: Tensor) -> dict[str, Tensor]:
        return {"logits": self.a(x) * self.b(gate).sigmoid()}


def test_examples_by_name_for_a_file_that_runs(tmp_path: Path) -> None:
    model, path = pruned(Gated(), 0.5), tmp_path / "x.pomona.safetensors"
    x, gate = torch.randn(3, 4), torch.randn(3, 5)
    wanted = model(x, gate=gate)["logits"].detach().numpy()
    for example in ({"gate": gate, "x": x}, (x, {"gate": gate}), (x, None, {"gate": gate})):
        pomona.export(model, path, example=example, calibrate=example)
        network = pomona.runtime.load(path)
        assert np.abs(network.run(x.numpy(), gate.numpy()) - wanted).max() < 1e-6
        assert network.calibrated(x.numpy(), gate.numpy()).graph.ranges == network.graph.ranges
    with pytest.raises(TypeError, match=r"does not fit Gated.forward: missing a required.* argument: 'gate'"):
        pomona.export(model, path, example=x)


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("format", ["pomona", "safetensors"])
def test_files_hold_the_plain_names_of_a_model_that_torch_compiled(format: str, tmp_path: Path) -> None:
    model, path = small(), tmp_path / f"x{SUFFIX[format]}"
    parts = nn.Sequential(*(wrapped(part) if isinstance(part, nn.Linear) else part for part in model))
    for given in (wrapped(model), parts, wrapped(parts), wrapped(model).state_dict()):
        pomona.export(given, path)
        assert same(pomona.load(path), dict(model.state_dict()))
    assert "4._orig_mod.weight" in parts.state_dict()
    safetensors.torch.save_file(wrapped(parts).state_dict(), tmp_path / "old")  # by torch's names
    for file in (path, tmp_path / "old"):
        for other in (small(), wrapped(small()), nn.Sequential(*(wrapped(part) for part in small()))):
            for tensor in other.state_dict().values():
                tensor.fill_(7)
            assert pomona.load(file, other) is other
            for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
                assert torch.equal(a, b)


def test_a_model_that_torch_compiled_runs_from_its_file_and_is_measured(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "x.pomona.safetensors"
    given = wrapped(model)
    told = pomona.export(
        given, path, example=IMAGES, quantize="k-means:4", evaluate=lambda: len(model[4].weight.unique())
    )
    assert told.accuracy_before > 100 and told.accuracy_after <= 5
    pomona.load(path, model)
    wanted = model.eval()(IMAGES).detach().numpy()
    assert np.abs(pomona.runtime.load(path).run(IMAGES.numpy()) - wanted).max() <= 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("num_bytes", "dense_bytes", "words"),
    [
        (50, 1000, "50 bytes (csr), 20.0 times smaller than the 1,000 of the dense tensors"),
        (990, 1000, "990 bytes (csr), about as large as the 1,000 of the dense tensors"),
        (2000, 1000, "2,000 bytes (csr), 2.0 times as large as the 1,000 of the dense tensors"),
        (20, 0, "20 bytes (csr), beside the 0 of the dense tensors"),
    ],
)
def test_a_file_larger_than_its_tensors_is_said_to_be_larger(num_bytes: int, dense_bytes: int, words: str) -> None:
    told = pomona.Exported(Path("x"), "csr", num_bytes, dense_bytes, 0.5, notes=("and more",))
    assert str(told) == f"x: {words}; 50.00 % of the weights are zero\nand more"


def test_names_with_an_at_are_refused_with_a_graph(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("a@b", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the model has 'a@b.weight'"):
        pomona.export(model, tmp_path / "x.pomona.safetensors", example=torch.zeros(1, 2))
    pomona.export(model, tmp_path / "x.pomona.safetensors")
    assert "a@b.weight" in pomona.load(tmp_path / "x.pomona.safetensors")


# ONNX and MNN


converts_batch_norms = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="the exporter of torch 2.6 fails on batch norms with today's onnxscript",
)


@converts_batch_norms
@pytest.mark.filterwarnings("default")  # of torch's exporter
def test_onnx_gives_the_same_outputs_and_stores_sparse_initializers(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small()
    told = pomona.export(model, tmp_path / "x.onnx", example=IMAGES)
    assert model.training and told.num_bytes < told.dense_bytes / 2
    proto = onnx.load(tmp_path / "x.onnx")
    assert [t.values.name for t in proto.graph.sparse_initializer] == ["4.weight", "6.weight"]
    assert {p.key for p in proto.metadata_props} >= {"pomona", "sparsity"}
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    wanted = model.eval()(IMAGES).detach().numpy()
    assert np.abs(outputs - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert told.notes == ("inputs: input (batch, 1, 8, 8)",) and str(told).endswith("\ninputs: input (batch, 1, 8, 8)")
    (one,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:1].numpy()})
    assert np.abs(one - wanted[:1]).max() <= 1e-5 * np.abs(wanted).max()


class _Refuses:
    """A runtime that takes no sparse initializers, or computes something else."""

    def __init__(self, *, always: bool) -> None:
        self.always = always

    def SessionOptions(self) -> Any:
        import onnxruntime

        return onnxruntime.SessionOptions()

    def InferenceSession(self, content: bytes, *args: Any, **options: Any) -> Any:
        import onnx
        import onnxruntime

        if self.always or onnx.load_from_string(content).graph.sparse_initializer:
            raise RuntimeError("no sparse tensors here")
        return onnxruntime.InferenceSession(content, *args, **options)


@pytest.mark.check
@converts_batch_norms
@pytest.mark.filterwarnings("default")
def test_onnx_stays_dense_where_the_runtime_refuses_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    find = onnx_format._import
    for always in (False, True):
        refusing = _Refuses(always=always)
        monkeypatch.setattr(onnx_format, "_import", lambda n, p, r=refusing: r if n == "onnxruntime" else find(n, p))
        if always:
            with pytest.raises(ValueError, match="does not reproduce the model: no sparse tensors here"):
                pomona.export(small(), tmp_path / "y.onnx", example=IMAGES)
            assert not (tmp_path / "y.onnx").exists()
        else:
            with pytest.warns(UserWarning, match="refuses sparse initializers here, so weights stay dense"):
                pomona.export(small(), tmp_path / "x.onnx", example=IMAGES)
            assert not onnx.load(tmp_path / "x.onnx").graph.sparse_initializer


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=r"pip install 'pomona\[onnx\]'"):
                pomona.export(small(), tmp_path / "x.onnx", example=IMAGES)


@pytest.mark.check
@converts_batch_norms
@pytest.mark.filterwarnings("default")
def test_mnn_calls_the_converter_and_tells_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    if importlib.util.find_spec("MNN") is None:
        with pytest.raises(ImportError, match="pip install MNN"):
            pomona.export(small(), tmp_path / "x.mnn", example=IMAGES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "MNN.py").touch()  # not MNN: what its converter would have been told
    converter = tmp_path / "_tools.py"
    converter.write_text("def mnnconvert(told): open(told[6], 'w').write(' '.join(told))\n")
    pomona.export(small(), tmp_path / "x.mnn", example=IMAGES)
    told = (tmp_path / "x.mnn").read_text().split()
    assert told[:4] == ["mnnconvert", "-f", "ONNX", "--modelFile"] and told[-1] == "--detectSparseSpeedUp"
    converter.write_text("def mnnconvert(told): raise SystemExit('out of order')\n")
    with pytest.raises(ValueError, match="failed with status 1: out of order"):
        pomona.export(small(), tmp_path / "y.mnn", example=IMAGES)


# Dead channels


class Joined(nn.Module):
    """Concatenation, depthwise convolution, flattening, a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.deep = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, groups=12)
        self.mix, self.flat = nn.Conv2d(12, 6, 1), nn.Linear(24, 5)
        self.layer_norm, self.out = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.norm(torch.cat([self.a(x), self.b(x)], 1).relu())).relu()
        x = nn.functional.adaptive_avg_pool2d(self.mix(x).relu(), 2).flatten(1)
        y: Tensor = self.out(self.layer_norm(self.flat(x)))
        return y


def test_channels_that_nothing_reads_are_taken_out() -> None:
    torch.manual_seed(0)
    model = Joined()
    with torch.no_grad():
        model.mix.weight[:, [3, 9]] = 0  # channel 3 of a, channel 1 of b
        model.flat.weight[:, 8:12] = 0  # channel 2 of mix
        model.out.weight[:, 1] = 0  # of flat, but the layer norm reads it
    smaller, taken = pomona.shrink(model, torch.randn(2, 3, 8, 8))
    assert taken == {"a": 1, "b": 1, "mix": 1}
    kept = [i for i in range(12) if i not in (3, 9)]
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(smaller.mix.weight, model.mix.weight[rows][:, kept])
    assert torch.equal(smaller.deep.weight, model.deep.weight[kept])
    assert model.a.weight.shape[0] == 8 and model.training and not smaller.training
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(smaller(images), model.eval()(images), atol=1e-6)


def test_a_channel_that_only_dead_channels_read_goes_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[4].weight[:, 2] = 0
        model[2].weight[:, 1] = 0
        model[2].weight[[0, 1, 3, 4], 4] = 0  # only the dead one reads channel 4
    smaller, taken = pomona.shrink(model, torch.randn(1, 4))
    assert taken == {"2": 1, "0": 2}
    assert smaller[0].weight.shape == (4, 4) and smaller[2].weight.shape == (4, 4)


def test_one_channel_stays_even_if_all_are_dead() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight.data.zero_()
    smaller, taken = pomona.shrink(model, torch.randn(1, 4))
    assert taken == {"0": 5} and smaller[0].weight.shape == (1, 4)


def test_residual_channels_go_together_or_not_at_all() -> None:
    from pomona.zoo.models import build_model

    model = pruned(build_model("resnet-20", seed=0), 0.97).eval()
    images = torch.randn(2, 3, 32, 32)
    smaller, taken = pomona.shrink(model, images)
    assert taken
    with torch.no_grad():
        got, wanted = smaller(images), model(images)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


# Hostile files of the other formats: the container's are in test_container.py


def changed(path: Path, **parts: Any) -> Path:
    """The same file with other tensors or metadata."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.torch.load_file(path)
    metadata |= {key: value for key, value in parts.items() if isinstance(value, str)}
    tensors |= {key: value for key, value in parts.items() if isinstance(value, Tensor)}
    tensors = {key: value for key, value in tensors.items() if key not in parts or parts[key] is not None}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("format", "parts", "reason"),
    [
        ("csr", {"w.col_indices": torch.tensor([0, 99], dtype=torch.int32)}, "a column is out of range"),
        ("csr", {"w.col_indices": torch.tensor([-1, 1], dtype=torch.int32)}, "a column is out of range"),
        ("csr", {"w.col_indices": torch.tensor([0.0, 1])}, "positions have dtype float32, not integers"),
        ("csr", {"w.crow_indices": torch.tensor([0, 2, 1, 2])}, "rows do not follow each other"),
        ("csr", {"w.crow_indices": torch.tensor([0, 9, 9, 9])}, "rows and values do not fit"),
        ("csr", {"w.crow_indices": torch.tensor([], dtype=torch.int64)}, "rows and values do not fit"),
        ("csr", {"w.values": None}, "it has no tensor 'w.values'"),
        ("csr", {"shapes": "[]"}, "its record of shapes is not an object"),
        ("csr", {"shapes": '{"w":[3.5]}'}, "its record of shapes is not an object"),
        ("csr", {"shapes": '{"w":[]}'}, "a scalar has no rows"),
        ("csr", {"shapes": '{"w":[3,9000000000000]}'}, "more than max_bytes="),
        ("2:4", {"w.indices": torch.zeros(3, dtype=torch.uint8)}, "the places of four values do not ascend"),
        ("2:4", {"w.indices": torch.zeros(2, dtype=torch.uint8)}, "indices do not fit the shape"),
        ("2:4", {"shapes": '{"w":[3,9]}'}, "cannot be 2:4"),
        ("2:4", {"shapes": '{"w":[3,16]}'}, "values do not fit the shape"),
        ("bitmask", {"w.shape": torch.tensor([3, 99])}, "a mask does not fit its shape"),
        ("bitmask", {"w.shape": torch.tensor([-3, 8])}, "a shape is negative"),
        ("bitmask", {"w.shape": torch.zeros(0, dtype=torch.int64)}, "a shape is not a short list"),
        ("bitmask", {"w.compressed": torch.zeros(9)}, "values do not fit the mask"),
        ("bitmask", {"w.row_offsets": torch.zeros(3, dtype=torch.int64)}, "row offsets do not fit the mask"),
        ("bitmask", {"w.row_offsets": None}, "it has no tensor 'w.row_offsets'"),
    ],
)
def test_damaged_files_of_other_formats_are_refused(
    format: str, parts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    name = "w.weight" if format == "bitmask" else "w"
    weight = torch.tensor([[0.0, 1] + [0] * 6, [0] * 8, [2.0] + [0] * 7])
    pomona.export({name: weight}, tmp_path / "x", format)
    assert same(pomona.load(tmp_path / "x"), {name: weight})
    with pytest.raises(FormatError, match=reason):
        pomona.load(changed(tmp_path / "x", **parts))


def test_every_format_has_a_suffix_or_reads_itself() -> None:
    assert {name for name, module in FORMATS.items() if hasattr(module, "read")} == set(SUFFIX)
