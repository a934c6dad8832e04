"""Operations: one record each, with which all other tables agree."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.runtime.node import ATTRIBUTES, Node
from pomona.runtime.operations import DTYPES, OPERATIONS
from pomona.runtime.readers.trace import trace
from tests.networks import Lambda

ROOT = Path(__file__).parents[2]

NUMBERS = {
    **{"conv": 0, "linear": 1, "relu": 2, "clip": 3, "gelu": 4, "gelu_tanh": 5, "silu": 6, "sigmoid": 7, "tanh": 8},
    **{"hardswish": 9, "hardsigmoid": 10, "add": 11, "mul": 12, "scale": 13, "max_pool": 14, "avg_pool": 15},
    **{"mean": 16, "flatten": 17, "concat": 18, "upsample": 19},
}
"""As they were given. Add to it and change nothing: compiled cores are called with these numbers."""

ATTRIBUTE_NUMBERS = {
    **{"weight": 0, "bias": 1, "kernel": 2, "stride": 3, "padding": 4, "dilation": 5, "groups": 6, "low": 7},
    **{"high": 8, "ceil": 9, "count_padding": 10},
}


def test_numbers_stay_as_they_are() -> None:
    assert {op.name: op.number for op in OPERATIONS.values()} == NUMBERS
    assert {a.name: a.number for a in ATTRIBUTES.values()} == ATTRIBUTE_NUMBERS
    assert DTYPES == {"float32": 0, "int32": 1, "int64": 2}
    for numbers in (NUMBERS, ATTRIBUTE_NUMBERS):
        assert len(set(numbers.values())) == len(numbers)
    assert max(ATTRIBUTE_NUMBERS.values()) < 64  # the engine has one bit each


def test_records_are_consistent() -> None:
    for name, op in OPERATIONS.items():
        assert op.name == name and set(op.attributes) <= set(ATTRIBUTES)
        assert ("weight" in op.attributes) == (op.weight != ""), name
        assert 1 <= op.operands[0] <= op.operands[1] and op.takes and set(op.takes) <= set(DTYPES)
        assert op.kind != "elementwise" or op.operands == (1, 1)
    assert {field.name for field in fields(Node)} == {"op", "operands", *ATTRIBUTES}


def test_the_tables_of_c_javascript_and_the_documentation_are_made_of_the_records() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "core/tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path, text in tables.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run `make tables`"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_is_plain_c(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text('#include "pomona_net.h"\nint main(void) { return POMONA_CONV; }\n')
    command = ["cc", "-std=c99", "-pedantic", "-Wall", "-Werror", "-fsyntax-only", "-I", ROOT / "core/include"]
    subprocess.run([*command, tmp_path / "x.c"], check=True)


def test_no_range_of_operations_is_compared() -> None:
    names = "|".join(name.upper() for name in OPERATIONS)
    for path in (ROOT / "core").rglob("*.*"):
        if path.suffix in (".cpp", ".h", ".inc"):
            found = re.findall(rf"[<>]=? *POMONA_(?:{names})\b", path.read_text(encoding="utf-8"))
            assert not found, f"{path.name}: {found}"


IMAGE = (4, 6, 8)
MADE_FROM: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 2, 3), IMAGE),
    "linear": (nn.Linear(5, 3), (5,)),
    "relu": (F.relu, IMAGE),
    "clip": (F.relu6, IMAGE),
    "gelu": (F.gelu, IMAGE),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), IMAGE),
    "silu": (F.silu, IMAGE),
    "sigmoid": (torch.sigmoid, IMAGE),
    "tanh": (torch.tanh, IMAGE),
    "hardswish": (F.hardswish, IMAGE),
    "hardsigmoid": (F.hardsigmoid, IMAGE),
    "add": (lambda x: x + x, IMAGE),
    "mul": (lambda x: x * x, IMAGE),
    "scale": (lambda x: 2 * x, IMAGE),
    "max_pool": (lambda x: F.max_pool2d(x, 2), IMAGE),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), IMAGE),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), IMAGE),
    "flatten": (lambda x: x.flatten(1), IMAGE),
    "concat": (lambda x: torch.cat([x, x], 1), IMAGE),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
}


def test_every_operation_of_torch_is_made_by_its_reader() -> None:
    assert set(MADE_FROM) == {name for name, op in OPERATIONS.items() if "aten" in op.readers}
    for name, (function, shape) in MADE_FROM.items():
        model = function if isinstance(function, nn.Module) else Lambda(function)
        graph, _ = trace(model.eval(), torch.zeros(1, *shape), folded=False)
        assert name in [node.op for node in graph.nodes], name


def test_building_a_graph_needs_no_torch() -> None:
    """An ONNX reader would need just this."""
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from pomona.runtime import Network
from pomona.runtime.readers.builder import GraphBuilder, UnsupportedError
builder = GraphBuilder(way_out="there is none")
x = builder.input((3, 4, 4))
builder.path, builder.source, builder.operation = "block", "file.onnx", "Slice"
y = builder.picked(builder.padded(x, 1, 1, 0, 0), (2, 0), (1, 1))
y = builder.scaled(builder.emit("relu", y), np.array(2.0), np.array([1.0, 0.0]))
graph, tensors = builder.finish([y])
assert list(tensors) == ["block@pad", "block@pick", "block@factor", "block@shift"], list(tensors)
values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
expected = 2 * np.maximum(np.pad(values, ((0, 0), (0, 0), (0, 0), (1, 1)))[:, [2, 0]], 0) + np.array([[[1]], [[0]]])
assert np.allclose(Network(graph, tensors).run(values), expected)
error = builder.refuse("LSTM")
assert isinstance(error, UnsupportedError)
assert str(error) == "pomona's runtime cannot run LSTM in block: file.onnx; there is none", str(error)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
