"""The file: what goes in comes out bit for bit, small, and as docs/file-format.md says; other files are refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pomona.files import unpack
from pomona.files.pack import pack, write
from pomona.files.safetensors import DTYPES, FormatError
from pomona.files.sparse import Sparse
from pomona.files.stored import Codebook, File, Stored, from_float32
from tests.fuzz import container as fuzz_container
from tests.oracles import container as oracle

ROOT = Path(__file__).parents[2]
fast = settings(deadline=None)


def read(data: bytes, path: Path, **options: Any) -> File:
    path.write_bytes(data)
    return unpack.read(path, **options)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@st.composite
def stored(draw: st.DrawFn) -> Stored:
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    kind = np.dtype(f"u{DTYPES[dtype].itemsize}") if dtype != "BOOL" else np.dtype(bool)
    some = st.integers(0, 2 ** (8 * kind.itemsize) - 1) if dtype != "BOOL" else st.booleans()
    array = draw(arrays(kind, shape, elements=some, fill=st.just(0)))  # any bits: NaNs, -0.0 and subnormals too
    return Stored(dtype, array.view(DTYPES[dtype]))


@fast
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()), stored(), max_size=6))
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Stored]
) -> None:
    path = tmp_path_factory.getbasetemp() / "x"
    found = read(pack(tensors), path).tensors
    assert list(found) == list(tensors)
    for name, wanted in tensors.items():
        assert found[name].dtype == wanted.dtype and found[name].shape == wanted.shape
        assert found[name].dense().tobytes() == wanted.dense().tobytes()


@fast
@given(st.dictionaries(st.sampled_from("abcdef"), stored(), max_size=4), st.booleans())
def test_the_specification_read_out_gives_the_same(tensors: dict[str, Stored], has_graph: bool) -> None:
    tensors = {**tensors, **{f"{name} again": value for name, value in tensors.items()}}
    found = oracle.read(pack(tensors, graph={"a": 1} if has_graph else None))
    assert list(found) != [] or not tensors
    for name, wanted in tensors.items():
        dtype, shape, elements = found[name]
        assert (dtype, tuple(shape)) == (wanted.dtype, wanted.shape)
        assert b"".join(elements) == wanted.dense().tobytes()


def test_the_specification_read_out_decodes_codebooks_and_halves() -> None:
    codebook, uniform = Codebook.table(f32(-1.5, 0.25, 3)), Codebook.uniform(0.5, 4)
    tensors = {
        "sparse": Stored("F32", np.concatenate([np.zeros(90, np.float32), f32(0.25, -1.5, 0, 3)]), codebook),
        "dense": Stored("F32", f32(0.25, -1.5, 0.25, 3), codebook),
        "uniform": Stored("F32", f32(-1, 0.5, 1, -0.5, 0), uniform),
        "half": Stored("F32", f32(0.1, 2).astype(np.float16).astype(np.float32), "F16"),
    }
    found = oracle.read(pack(tensors))
    for name in ("sparse", "dense", "uniform"):
        assert b"".join(found[name][2]) == tensors[name].dense().tobytes()
    assert found["half"][0] == "F32:F16"
    assert struct.unpack("<2e", b"".join(found["half"][2])) == tuple(tensors["half"].dense().tolist())


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "codebook", [Codebook.table(f32(-1.5, 0.25, 3)), Codebook.table(f32(0.25), "F16"), Codebook.uniform(0.3, 254)]
)
def test_codebooks_come_back(dtype: str, codebook: Codebook, tmp_path: Path) -> None:
    values = codebook.of(dtype)
    chosen = np.random.default_rng(0).choice(values, 300)
    for zeros in (0, 3, 3000):
        array = np.concatenate([chosen, np.zeros(zeros, values.dtype)])
        found = read(pack({"a": Stored(dtype, array, codebook), "b": Stored(dtype, values, codebook)}), tmp_path / "x")
        assert found.tensors["a"].dense().tobytes() == array.tobytes()
        assert found.tensors["b"].dense().tobytes() == values.tobytes()
        again = found.tensors["a"].storage
        assert (
            isinstance(again, Codebook)
            and again.values.tobytes() == codebook.values.tobytes()
            and again.kind == codebook.kind
        )


def test_a_codebook_of_256_values_serves_sparse_tensors_and_full_ones(tmp_path: Path) -> None:
    codebook = Codebook.table(np.arange(1, 257))
    for zeros in (0, 5):
        array = np.concatenate([np.arange(1, 257), np.zeros(zeros)]).astype(np.float32)
        found = read(pack({"a": Stored("F32", array, codebook)}), tmp_path / "x").tensors["a"]
        assert found.dense().tobytes() == array.tobytes()


def test_bfloat16_is_rounded_as_torch_does() -> None:
    import torch

    numbers = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1 + 2**-8, 1 + 3 * 2**-8])])
    wanted = numbers.bfloat16().view(torch.uint16).numpy()
    assert from_float32(numbers.numpy(), "BF16").tolist() == wanted.tolist()
    nan = from_float32(f32(math.nan), "BF16")
    assert torch.from_numpy(nan).view(torch.bfloat16).isnan().all()


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path: Path) -> None:
    one = Stored("F32", np.random.default_rng(0).standard_normal(5000).astype(np.float32))
    alone = pack({"a": one})
    twice = pack({"a": one, "b": one})
    assert len(twice) - len(alone) < 10
    tensors = read(twice, tmp_path / "x").tensors
    assert tensors["a"] is tensors["b"]


def test_the_header_is_readable_and_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    weight = np.zeros((20, 30), np.float32)
    weight[3, 7] = 1
    tensors = {
        "fc.weight": Stored("F32", weight),
        "fc.bias": Stored("F16", np.ones(20, np.float16)),
        "é;": Stored("I64", np.array(1)),
    }
    size = write(tmp_path / "x.pomona.safetensors", tensors, {"pomona": "0"}, {"inputs": []})
    assert size == (tmp_path / "x.pomona.safetensors").stat().st_size
    with safetensors.safe_open(tmp_path / "x.pomona.safetensors", "np") as file:
        assert list(file.keys()) == ["pomona"]
        assert file.metadata() == {
            "format": "pomona 1",
            "tensors": "fc.weight F32 20x30 1/0;fc.bias F16 20;%C3%A9%3B I64 -",
            "pomona": "0",
            "graph": "13",
        }
    found = unpack.read(tmp_path / "x.pomona.safetensors")
    assert found.metadata == {"pomona": "0"} and found.graph == {"inputs": []}
    assert isinstance(found.tensors["fc.weight"].value, Sparse)


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98, 0.99, 0.997])
def test_positions_of_a_random_mask_are_near_the_entropy_limit(sparsity: float) -> None:
    """Within 0.1 bit of H(p)/p for each weight that is left; the values here take none."""
    generator = np.random.default_rng(0)
    shapes, total, kept, limit = [(512, 1024), (256, 64, 3, 3), (1000, 512)], 0, 0, 0.0
    tensors = {}
    for i, shape in enumerate(shapes):
        mask = generator.random(shape) > sparsity
        tensors[str(i)] = Stored("F32", mask.astype(np.float32), Codebook.table(f32(1)))
        p = mask.mean()
        kept += int(mask.sum())
        total += mask.size
        limit += mask.size * (-p * math.log2(p) - (1 - p) * math.log2(1 - p))
    size = 8 * len(pack(tensors)) - kept  # an index takes a bit, of which deflate cannot take less
    assert size / kept < limit / kept + 0.1


def test_layers_of_different_density_share_a_table() -> None:
    """Small layers cost a few bytes each, not a table of codes each."""
    generator = np.random.default_rng(0)
    codebook = Codebook.table(f32(1))
    layers = [(generator.random(n) < p).astype(np.float32) for n, p in ((4000, 0.05), (40_000, 0.003), (1000, 0.2))]
    together = len(pack({str(i): Stored("F32", layer, codebook) for i, layer in enumerate(layers)}))
    apart = sum(len(pack({"0": Stored("F32", layer, codebook)})) for layer in layers)
    assert together < apart - 2 * 200


def test_each_tensor_is_stored_as_is_smaller(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dense = generator.standard_normal(1000).astype(np.float32)
    tensors = {
        "dense": Stored("F32", dense),
        "sparse": Stored("F32", np.where(generator.random(1000) < 0.1, dense, np.float32(0))),
        "given sparse": Stored("F32", Sparse.from_dense(dense)),
    }
    found = read(pack(tensors), tmp_path / "x").tensors
    assert [isinstance(f.value, Sparse) for f in found.values()] == [False, True, False]


def test_a_model_without_weights_is_a_file_too(tmp_path: Path) -> None:
    assert read(pack({}), tmp_path / "x").tensors == {}


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({"": Stored("F32", f32(1))}, {}, "must have a name"),
        ({"a": Stored("F4", f32(1))}, {}, "dtype 'F4'; a file can hold F64"),
        ({"a": Stored("F16", f32(1))}, {}, "said to be F16, but its array has dtype float32"),
        ({"a": Stored("I64", np.array([1]), Codebook.table(f32(1)))}, {}, "a codebook is for tensors of F64"),
        ({"a": Stored("F32", f32(2), Codebook.table(f32(1)))}, {}, "1 elements of a tensor .* are not in its codebook"),
        ({"a": Stored("F32", f32(0.1), "F16")}, {}, "values that F16 does not hold exactly"),
        ({"a": Stored("BF16", np.zeros(1, np.uint16), "F16")}, {}, "cannot be stored as 'F16'"),
        ({"a": Stored("F32", f32(1), "F64")}, {}, "cannot be stored as 'F64'"),
        ({}, {"books": "x"}, "must not have the key 'books'"),
        ({}, {"a": 1}, "must be strings, got 'a': 1"),
    ],
)
def test_what_cannot_be_stored_is_refused(tensors: dict[str, Stored], metadata: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack(tensors, metadata)


def test_a_graph_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack({}, graph={"low": math.nan})


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = "import sys, pomona.files.pack, pomona.files.unpack, pomona.files.quantize; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# Hostile files


def forged(
    tensors: str, payload: bytes = b"", *, stream: bytes | None = None, header: Any = None, **metadata: str
) -> bytes:
    """A file whose lengths and checksum are right, whatever it says."""
    if stream is None:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15)
        stream = coder.compress(payload) + coder.flush()
    size = 32 + len(stream)
    about = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    told = {"__metadata__": {"format": "pomona 1", "tensors": tensors, **metadata}, "pomona": about}
    text = json.dumps(header or told).encode()
    start = struct.pack("<Q", len(text)) + text
    return start + hashlib.sha256(start + stream).digest() + stream


def test_forged_files_are_read_if_they_are_right(tmp_path: Path) -> None:
    """So that the refusals below are for the reasons given."""
    found = read(forged("a F32 5 2/1", b"\2" + shuffled(1, 2) + b"\0\1"), tmp_path / "x")
    assert found.tensors["a"].dense().tolist() == [1, 0, 0, 0, 2]


def shuffled(*values: float) -> bytes:
    raw = struct.pack(f"<{len(values)}f", *values)
    return bytes(raw[4 * i + k] for k in range(4) for i in range(len(values)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (forged("a F32 1x2"), "0 bytes or more, not the 8 to 8"),
        (forged("a F32 x"), "describes a tensor as 'a F32 x'"),
        (forged("a F32 01"), "describes a tensor as"),
        (forged("a F32 -1"), "describes a tensor as"),
        (forged("a F32"), "describes a tensor as"),
        (forged("a F32 1;"), "describes a tensor as ''"),
        (forged("a%zz F32 1"), "describes a tensor as"),
        (forged("%FF F32 1"), "is not UTF-8"),
        (forged("a F31 1"), "dtype 'F31'; known are F64"),
        (forged("a F32 1;a F32 1"), "'a' is there twice"),
        (forged("b=a"), "tied to 'a', which is not a tensor before it"),
        (forged("b=a;a F32 1"), "which is not a tensor before it"),
        (forged("a F32 0;b=a;c=b"), "tied to 'b', which is not a tensor before it"),
        (forged("a F32 " + "x".join(["1"] * 33)), "is too large"),
        (forged("a F32 999999999999999x999999999999999"), "is too large"),
        (forged("a F32 0x999999999999999x999999999999999"), "is too large"),
        (
            forged("a F32 300000x300000 1/0", shuffled(1) + b"\0"),
            "would take 360,000,000,000 bytes, more than max_bytes",
        ),
        (forged("a F32 2 3/0"), r"cannot have 3/0"),
        (forged("a F32 2 1/41"), r"cannot have 1/41"),
        (forged("a F32:q0 2"), "uses codebook 0; there are 0"),
        (forged("a I32:q0 2", books="table F32 1"), "uses codebook 0; there are 1, for floats"),
        (forged("a F16:F16 2"), "cannot be stored as F16"),
        (forged("a F32:F64 2"), "describes a tensor as"),
        (forged("a F32:q0 1", b"\0\0\0\0\2", books="table F32 1"), "refers to value 2 of a codebook of 2"),
        (forged("a F32:q0 1 1/0", b"\0\0\0\0\1\0", books="table F32 1"), "refers to value 1 of a codebook of 1"),
        (forged("", books=""), "describes a codebook as ''"),
        (forged("", books="table F32 0"), "describes a codebook"),
        (forged("", books="table F32 257"), "describes a codebook"),
        (forged("", books="table I8 4"), "describes a codebook"),
        (forged("", books="uniform F32 3"), "describes a codebook"),
        (forged("", books="uniform F16 2"), "describes a codebook"),
        (forged("a F32 5 2/0", shuffled(1, 2) + b"\4\0"), "'a' has a value beyond its 5 elements"),
        (forged("a F32 5 2/0", shuffled(1, 2) + b"\5\0"), "'a' has a value beyond its 5 elements"),
        (forged("a F32 5 1/40", b"\xff" * 5 + shuffled(1) + b"\0"), "beyond its 5 elements"),
        (forged("a F32 5 1/40", b"\0" * 5 + shuffled(1) + b"\1"), "beyond its 5 elements"),
        (forged("a F32 600 2/0", shuffled(1, 2) + b"\1\xff"), "positions of 1 values are stored instead of 2"),
        (forged("a F32 600 1/0", shuffled(1) + b"\1\1"), "positions of 2 values are stored instead of 1"),
        (forged("a F32 600 1/0", shuffled(1)), "4 bytes or more, not the 5 to 7"),
        (forged("a BOOL 2", b"\1\2"), "booleans are stored as bytes other than 0 and 1"),
        (forged("a U8 5", b"\0" * 50_000_000), "6 bytes or more, not the 5 to 5"),
        (forged("a U8 1", stream=b"\3\0"), "0 bytes or more"),
        (forged("a U8 1", stream=b"\1\1\0\xfe\xff\7\0"), "followed by something else"),
        (forged("a U8 1", stream=b"\0\1\0\xfe\xff\7"), "cut off"),
        (forged("a U8 1", stream=b"\7"), "cannot be inflated"),
        (forged("a U8 1", stream=b""), "0 bytes or more"),
        (forged("", graph="-1"), "its graph has '-1' bytes, which is not a size"),
        (forged("", b"1", graph="1"), "its graph is not a JSON object"),
        (forged("", b"[" * 9999, graph="9999"), "its graph is nested too deep"),
        (forged("", b'{"a":NaN}', graph="9"), "its graph: NaN is not a JSON number"),
        (forged("", graph="999999999999999"), "0 bytes or more"),
        (forged("", format="pomona 2"), "its format is 'pomona 2', not 'pomona 1'; a newer version"),
        (forged("", format="pt"), "its format is 'pt', .* not written by pomona.export"),
    ],
)
def test_lies_behind_a_right_checksum_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=reason):
        read(data, tmp_path / "x")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    about = {"dtype": "U8", "shape": [34], "data_offsets": [0, 34]}
    metadata = {"format": "pomona 1", "tensors": ""}
    for header, reason in (
        ({"pomona": about}, "its format is ''"),
        ({"__metadata__": {"format": "pomona 1"}, "pomona": about}, "no list of tensors"),
        ({"__metadata__": metadata, "other": about}, r"tensors are \['other'\]"),
        ({"__metadata__": metadata, "pomona": {**about, "dtype": "I8"}}, "not one of bytes named pomona"),
    ):
        with pytest.raises(FormatError, match=reason):
            read(forged("", header=header), tmp_path / "x")


def test_a_single_changed_bit_is_found(tmp_path: Path) -> None:
    data = pack({"a": Stored("F32", np.arange(9, dtype=np.float32))}, {"note": "abc"})
    for bit in range(0, 8 * len(data), 5):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            read(bytes(changed), tmp_path / "x")


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = pack({"a": Stored("F32", np.arange(9, dtype=np.float32))})
    for end in range(0, len(data), 3):
        with pytest.raises(FormatError):
            read(data[:end], tmp_path / "x")


def test_max_bytes_can_be_raised_and_lowered(tmp_path: Path) -> None:
    huge = Sparse((1 << 29,), np.array([5]), f32(1))
    about = "a F32 536870912 1/29"
    data = forged(about, b"\5\0\0\0" + shuffled(1) + b"\0")
    with pytest.raises(FormatError, match=re.escape("read(path, max_bytes=2147483648) allows it")):
        read(data, tmp_path / "x")
    found = read(data, tmp_path / "x", max_bytes=1 << 31).tensors["a"]
    assert isinstance(found.value, Sparse) and found.value.positions.tolist() == huge.positions.tolist()
    with pytest.raises(FormatError, match="more than max_bytes=10"):
        read(data, tmp_path / "x", max_bytes=10)


def test_some_of_the_fuzzers_files(tmp_path: Path) -> None:
    """CONTRIBUTING tells how to make more."""
    told = fuzz_container.run(range(400), 1, tmp_path)
    assert told["refused"] > 200 and told["read"] > 10
