"""The safetensors layout: we and the package safetensors read what the other writes, and lies are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from pomona.files import safetensors as ours
from pomona.files.safetensors import DTYPES, FormatError

GOOD: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def written(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    wanted = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.array([True, False]),
    }
    safetensors.numpy.save_file(wanted, tmp_path / "x", metadata={"k": "v"})
    metadata, tensors = ours.read(tmp_path / "x")
    assert metadata == {"k": "v"} == ours.read_metadata(tmp_path / "x")
    assert {name: dtype for name, (dtype, _) in tensors.items()} == {"a": "F32", "b": "I64", "c": "BOOL"}
    for name, (_, array) in tensors.items():
        assert array.dtype == wanted[name].dtype and np.array_equal(array, wanted[name])
        assert array.shape == wanted[name].shape and array.flags.writeable


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": ("BF16", np.array([0x3F80, 0], np.uint16)), "n": ("I64", np.array(7)), "": ("U8", np.zeros((0, 2)))}
    ours.write(tmp_path / "x", ours.pack(tensors, {"é": "ü"}))
    state = safetensors.torch.load_file(tmp_path / "x")
    assert state["a"].tolist() == [1.0, 0.0] and state["a"].dtype == torch.bfloat16
    assert state["n"].item() == 7 and state[""].shape == (0, 2)
    assert ours.read_metadata(tmp_path / "x") == {"é": "ü"}
    assert len(list(tmp_path.iterdir())) == 1  # no temporary stays


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b'{"a":1,"a":1}', "the same key twice"),
        (b'{"a":NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' + b"1" * 10_000 + b"}", "is not JSON"),
        ({"__metadata__": {"a": 1}}, "not an object of strings"),
        ({"__metadata__": []}, "not an object of strings"),
        ({"a": []}, "has not exactly dtype, shape and data_offsets"),
        ({"a": {**GOOD["a"], "more": 1}}, "has not exactly"),
        ({"a": {**GOOD["a"], "dtype": "F31"}}, "dtype 'F31'; known are F64"),
        ({"a": {**GOOD["a"], "dtype": ["F32"]}}, "dtype"),
        ({"a": {**GOOD["a"], "shape": [-2]}}, "no valid shape"),
        ({"a": {**GOOD["a"], "shape": [2.0]}}, "no valid shape"),
        ({"a": {**GOOD["a"], "shape": [True]}}, "no valid shape"),
        ({"a": {**GOOD["a"], "shape": [1] * 33 + [2]}}, "no valid shape"),
        ({"a": {**GOOD["a"], "shape": [2**60]}}, "no valid shape"),
        ({"a": {**GOOD["a"], "shape": [2**40, 2**40]}}, "does not take bytes 0 to 8"),
        ({"a": {**GOOD["a"], "shape": [3]}}, "does not take bytes 0 to 8"),
        ({"a": {**GOOD["a"], "data_offsets": [0]}}, "no valid data_offsets"),
        ({"a": {**GOOD["a"], "data_offsets": [8, 0]}}, "does not take bytes"),
        ({"a": {**GOOD["a"], "data_offsets": [4, 12]}}, "begins at byte 4"),
        ({**GOOD, "b": GOOD["a"]}, "begins at byte 0, not at 8"),
        ({**GOOD, "b": {"dtype": "U8", "shape": [9], "data_offsets": [8, 17]}}, "take 17 bytes, but 8 follow"),
        ({}, "take 0 bytes, but 8 follow"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: Any, reason: str) -> None:
    path = written(tmp_path / "x", header)
    for read in (ours.read, ours.read_metadata):
        with pytest.raises(FormatError, match=reason) as raised:
            read(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cut off: 0 bytes"),
        (b"\1\0\0", "cut off: 3 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "the file has 2 bytes left"),
        (struct.pack(">Q", 2) + b"{}", "the file has 2 bytes left"),
        (struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 1), "16,777,216 are allowed"),
    ],
)
def test_lying_lengths_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FormatError, match=reason):
        ours.read(tmp_path / "x")


def test_booleans_are_0_or_1(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2")
    with pytest.raises(FormatError, match="bytes other than 0 and 1"):
        ours.read(path)


def test_more_than_allowed_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x", GOOD)
    with pytest.raises(FormatError, match="more than max_bytes=7"):
        ours.read(path, max_bytes=7)
    assert ours.read(path, max_bytes=8)[1]["a"][1].tolist() == [0, 0]


def test_dtypes_have_the_sizes_that_safetensors_gives_them(tmp_path: Path) -> None:
    for dtype, kind in DTYPES.items():
        ours.write(tmp_path / "x", ours.pack({"a": (dtype, np.zeros(3, kind))}, {}))
        with safetensors.safe_open(tmp_path / "x", "pt") as file:
            assert file.get_slice("a").get_dtype() == dtype and file.get_tensor("a").shape == (3,)


def test_a_missing_folder_is_named_not_a_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere'"):
        ours.write(tmp_path / "nowhere" / "x.safetensors", b"")
