"""The safetensors layout: an 8-byte length, a JSON header, then the bytes of the tensors.

numpy and the standard library only. Everything is checked before it is believed: a damaged or hostile file raises
`FormatError`, and takes no more memory and time than its own size and `max_bytes` allow.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has none: bit patterns
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Name of a dtype in a file -> how numpy holds its elements."""

MAX_HEADER = 1 << 24
MAX_NDIM = 32  # the limit of numpy 1


class FormatError(ValueError):
    """A file is damaged, of another kind, or made to do harm."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header says about one tensor.

    Attributes:
        dtype: a key of `DTYPES`.
        shape: its dimensions.
        start: its first byte, counted from the end of the header.
        stop: the byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: the tensors lie one after the other and fill the rest of the file.

    Attributes:
        raw: the bytes before the data: the length and the JSON text.
        metadata: the strings under `__metadata__`.
        entries: name -> entry, in the order of their bytes.
        num_bytes: size of the data that follows.
    """

    raw: bytes
    metadata: dict[str, str]
    entries: dict[str, Entry]
    num_bytes: int


def read_header(file: BinaryIO) -> Header:
    """Read and check everything before the data; leaves `file` at the first byte of the data.

    Raises:
        FormatError: names what is wrong with the file.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise FormatError(f"the file is cut off: {size} bytes, and a header begins with 8")
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER, size - 8):
        limit = f"the file has {size - 8:,} bytes left" if length > size - 8 else f"{MAX_HEADER:,} are allowed"
        raise FormatError(f"the header would be {length:,} bytes, but {limit}; not a safetensors file, or cut off")
    text = file.read(length)
    if len(text) < length:
        raise FormatError(f"the header is cut off after {len(text):,} of {length:,} bytes")
    content = parse_json(text, "the header")
    if not isinstance(content, dict):
        raise FormatError("the header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ of the header is not an object of strings")
    num_bytes = size - 8 - length
    entries = {name: _entry(name, entry) for name, entry in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise FormatError(f"tensor {name!r} begins at byte {entry.start:,}, not at {end:,} where the last one ends")
        end = entry.stop
    if end != num_bytes:
        raise FormatError(f"the tensors take {end:,} bytes, but {num_bytes:,} follow the header")
    return Header(start + text, metadata, entries, num_bytes)


def parse_json(text: bytes, what: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and infinity, deep nesting and endless numbers."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    except RecursionError:
        raise FormatError(f"{what} is nested too deep") from None
    except ValueError as error:
        raise FormatError(f"{what} is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FormatError("an object has the same key twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise FormatError(f"{name} is not a JSON number")


def _entry(name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"tensor {name!r} has dtype {str(dtype)[:20]!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_NDIM:
        raise FormatError(f"tensor {name!r} has no valid shape: at most {MAX_NDIM} integers from 0 to 2^53")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {name!r} has no valid data_offsets: two integers from 0 to 2^53")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise FormatError(
            f"tensor {name!r} of shape {tuple(shape)} and {dtype} does not take bytes {offsets[0]} to {offsets[1]}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x <= 2**53 for x in value)


def read(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata and the tensors, (dtype, array) by name, of a plain safetensors file.

    Raises:
        FormatError: names the file and what is wrong with it.
    """
    with Path(path).open("rb") as file:
        try:
            header = read_header(file)
            if max_bytes is not None and header.num_bytes > max_bytes:
                raise FormatError(f"its tensors take {header.num_bytes:,} bytes, more than max_bytes={max_bytes:,}")
            data = read_exactly(file, header.num_bytes)
            found = {name: (e.dtype, _array(data, name, e)) for name, e in header.entries.items()}
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
    return header.metadata, found


def read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise FormatError(f"the data is cut off after {len(data):,} of {count:,} bytes")
    return data


def _array(data: bytes, name: str, entry: Entry) -> NDArray[Any]:
    raw = np.frombuffer(data, np.uint8)[entry.start : entry.stop]
    if entry.dtype == "BOOL" and raw.max(initial=0) > 1:
        raise FormatError(f"tensor {name!r} is boolean, but has bytes other than 0 and 1")
    return raw.copy().view(DTYPES[entry.dtype]).reshape(entry.shape)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings under `__metadata__` of a safetensors file, after its header is checked.

    Raises:
        FormatError: names the file and what is wrong with it.
    """
    with Path(path).open("rb") as file:
        try:
            return read_header(file).metadata
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pack(tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a plain safetensors file with these tensors, (dtype, array) by name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = [], 0
    for name, (dtype, array) in tensors.items():
        part = np.ascontiguousarray(array, DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that tensors are aligned when a file is mapped into memory
    return b"".join([struct.pack("<Q", len(text)), text, *parts])
