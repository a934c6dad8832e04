"""Networks from files and from models, with and without the compiled core, with and without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pomona
from pomona.files.pack import write
from pomona.files.safetensors import FormatError
from pomona.files.sparse import Sparse
from pomona.files.stored import File, Stored
from pomona.files.unpack import read
from pomona.native import library
from pomona.runtime import Network, load
from pomona.runtime.readers.trace import trace
from tests.networks import NETWORKS, randomised, sparsified
from tests.test_init import WITHOUT_TORCH


@pytest.fixture(params=[True, False], ids=["core", "numpy"], autouse=True)
def core(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds with the compiled core and without it."""
    if request.param and not library.is_available():
        pytest.skip(f"no compiled core: {library.why_not()}")
    with library.switched(request.param):
        yield


SHAPE = (1, 12, 12)


def lenet() -> nn.Module:
    """In the manner of LeNet-5."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU()]
    return sparsified(nn.Sequential(*layers, nn.Linear(20, 10)), 0.9).eval()


def as_file(model: nn.Module, example: torch.Tensor) -> File:
    """As an exporter does it: the weights as they are, and what had to be made."""
    graph, made = trace(model, example, folded=False)
    tensors = {name: Stored("F32", Sparse.from_dense(value)) for name, value in made.items()}
    return File(tensors, {"method": "none"}, graph.to_json())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = as_file(lenet(), torch.zeros(1, *SHAPE))
    write(tmp_path / "lenet.pomona.safetensors", file.tensors, file.metadata, file.graph)
    return tmp_path / "lenet.pomona.safetensors"


def close(found: np.ndarray, expected: torch.Tensor) -> bool:
    """Within the rounding of float32 sums in another order."""
    right = expected.detach().numpy()
    return found.dtype == np.float32 and bool(np.abs(found - right).max() <= 2e-6 * np.abs(right).max() * 10)


def test_a_file_runs_as_the_model_does(path: Path) -> None:
    x = torch.randn(5, *SHAPE)
    network = pomona.runtime.load(path)
    assert network.is_compiled == library.is_available()
    assert network.metadata["method"] == "none"
    expected = lenet()(x)
    assert close(network.run(x.numpy()), expected)
    assert np.array_equal(network(x.numpy()), network.run(x.numpy()))
    assert close(load(read(path), threads=2).run(x.numpy()), expected)


def test_a_file_runs_without_torch(path: Path, tmp_path: Path) -> None:
    x = torch.randn(3, *SHAPE)
    np.save(tmp_path / "x.npy", x.numpy())
    code = f"""
{WITHOUT_TORCH}
import numpy, pomona.runtime
numpy.save({str(tmp_path / "y.npy")!r}, pomona.runtime.load({str(path)!r}).run(numpy.load({str(tmp_path / "x.npy")!r})))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert close(np.load(tmp_path / "y.npy"), lenet()(x))


def test_batch_norms_are_folded_when_a_file_is_loaded() -> None:
    build, shape = NETWORKS["resnet50-like"]
    model = sparsified(randomised(build()), 0.9)
    network = load(as_file(model, torch.zeros(1, *shape)))
    assert "scale" not in [node.op for node in network.graph.nodes]
    weights = [network.tensors[node.weight or ""] for node in network.graph.nodes if node.op == "conv"]
    assert any(isinstance(weight, Sparse) for weight in weights)
    x = torch.randn(2, *shape)
    assert close(network.run(x.numpy()), model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_models_run(name: str) -> None:
    build, shape = NETWORKS[name]
    model = sparsified(randomised(build()), 0.5)
    network = Network.from_model(model, torch.zeros(1, *shape))
    x = torch.randn(3, *shape)
    assert close(network.run(x.numpy()), model(x))


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + y, x * y

    network = Network.from_model(Two(), [torch.zeros(1, 3), torch.zeros(1, 3)])
    outputs = network.run([[1, 2, 3]], np.array([[4.0, 5.0, 6.0]]))
    assert [y.tolist() for y in outputs] == [[[5, 7, 9]], [[4, 10, 18]]]


def test_inputs_are_checked(path: Path) -> None:
    network = load(path)
    with pytest.raises(
        ValueError, match=r"\(batch, 1, 12, 12\), got \(1, 12, 12\); a batch of one sample is x\[None\]"
    ):
        network.run(np.zeros(SHAPE))
    with pytest.raises(ValueError, match="takes 1 inputs, got 0"):
        network.run()
    assert network.run(np.zeros((0, *SHAPE))).shape == (0, 10)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_tensors_of_any_float_dtype(dtype: str, is_sparse: bool) -> None:
    bits = {
        "F16": np.float16([[1.5, 0, -2]]),
        "F64": np.float64([[1.5, 0, -2]]),
        "BF16": np.uint16([[0x3FC0, 0, 0xC000]]),
    }
    value: Any = Sparse.from_dense(bits[dtype]) if is_sparse else bits[dtype]
    graph = {"inputs": [[3]], "nodes": [["linear", [0], {"weight": "w"}]], "outputs": [1]}
    network = load(File({"w": Stored(dtype, value)}, {}, graph))
    assert network.run([[1, 10, 100]]).tolist() == [[-198.5]]


def test_bad_files(tmp_path: Path, path: Path) -> None:
    graph = {"inputs": [[3]], "nodes": [["linear", [0], {"weight": "w"}]], "outputs": [1]}
    tensors = {"w": Stored("F32", np.ones((2, 3), np.float32))}
    with pytest.raises(ValueError, match="holds tensors but not what is computed"):
        load(File(tensors))
    with pytest.raises(ValueError, match=r"the file: node 0 \(linear\): 'w' of \[2, 3\] does not fit \[4\]"):
        load(File(tensors, graph={**graph, "inputs": [[4]]}))
    with pytest.raises(ValueError, match="there is no tensor 'w'"):
        load(File({}, graph=graph))
    with pytest.raises(ValueError, match="tensor 'w' is of I64"):
        load(File({"w": Stored("I64", np.ones((2, 3), np.int64))}, graph=graph))
    with pytest.raises(ValueError, match="inputs, nodes and outputs"):
        load(File(tensors, graph=json.loads("[]")))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=re.escape(path.name)):
        load(path)


def test_memory_is_bounded() -> None:
    graph = {"inputs": [[3, 4096, 4096]], "nodes": [["relu", [0]]], "outputs": [1]}
    with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
        load(File({}, graph=graph), max_bytes=1_000_000)
