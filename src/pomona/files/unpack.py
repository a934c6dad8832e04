"""Read the file `x.pomona.safetensors`. Nothing that it says is believed before it is checked."""

from __future__ import annotations

import hashlib
import math
import os
import re
import urllib.parse
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files import safetensors
from pomona.files.safetensors import DTYPES, MAX_NDIM, FormatError
from pomona.files.sparse import Sparse
from pomona.files.stored import DIGEST_BYTES, FLOATS, FORMAT, MAX_LOW_BITS, Codebook, File, Stored


def read(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> File:
    """Read a file; check what it says before believing it.

    Args:
        path: a file that `pomona.files.pack.write` wrote.
        max_bytes: how many bytes all tensors may take together when dense. Default: a thousand times the file's
            size, and at least 1 GiB, so that a small hostile file cannot fill the memory.

    Raises:
        FormatError: names the file and what is wrong with it.
    """
    with Path(path).open("rb") as file:
        try:
            header = safetensors.read_header(file)
            if max_bytes is None:
                max_bytes = max(1 << 30, 1000 * (len(header.raw) + header.num_bytes))
            return _read(file, header, max_bytes)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None


def _read(file: Any, header: safetensors.Header, max_bytes: int) -> File:
    metadata = dict(header.metadata)
    kind = metadata.pop("format", "")
    if kind != FORMAT:
        hint = "a newer version of pomona may read it" if kind.startswith("pomona ") else "not written by pomona.export"
        raise FormatError(f"its format is {kind[:40]!r}, not {FORMAT!r}; {hint}")
    if list(header.entries) != ["pomona"] or header.entries["pomona"].dtype != "U8":
        raise FormatError(f"its tensors are {list(header.entries)[:5]}, not one of bytes named pomona")
    if header.num_bytes < DIGEST_BYTES:
        raise FormatError(f"its data are {header.num_bytes} bytes, less than a checksum")
    if header.num_bytes > max_bytes:
        raise FormatError(f"its data take {header.num_bytes:,} bytes, more than max_bytes={max_bytes:,}")
    data = memoryview(safetensors.read_exactly(file, header.num_bytes))
    digest = hashlib.sha256(header.raw)
    digest.update(data[DIGEST_BYTES:])
    if digest.digest() != bytes(data[:DIGEST_BYTES]):
        raise FormatError("its checksum is wrong: the file was damaged or changed after it was written")

    plan = _plan(metadata.pop("tensors", None), metadata.pop("books", None), metadata.pop("graph", None))
    dense_bytes = sum(math.prod(e.shape) * DTYPES[e.dtype].itemsize for e in plan.entries.values())
    if dense_bytes > max_bytes:
        raise FormatError(
            f"its tensors would take {dense_bytes:,} bytes, more than max_bytes={max_bytes:,}; read(path, "
            f"max_bytes={dense_bytes}) allows it, if you trust the file"
        )
    return _decode(plan, _inflate(data[DIGEST_BYTES:], plan), metadata)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the directory."""

    dtype: str
    codebook: int  # -1: none
    storage: str
    shape: tuple[int, ...]
    kept: int  # -1: dense
    low_bits: int

    @property
    def count(self) -> int:
        """Number of stored elements."""
        return math.prod(self.shape) if self.kept < 0 else self.kept


@dataclass(frozen=True, slots=True)
class _Plan:
    """The directory, checked."""

    entries: dict[str, _Entry]
    ties: dict[str, str]
    names: list[str]
    codebooks: list[tuple[str, str, int]]
    graph_bytes: int  # -1: no graph

    def codebook_bytes(self) -> int:
        return sum(4 if kind == "uniform" else count * DTYPES[dtype].itemsize for kind, dtype, count in self.codebooks)

    def low_bytes(self) -> int:
        return sum((e.kept * e.low_bits + 7) // 8 for e in self.entries.values() if e.kept >= 0)

    def element_bytes(self) -> int:
        return sum(
            e.count * (1 if e.codebook >= 0 else DTYPES[e.storage or e.dtype].itemsize) for e in self.entries.values()
        )

    def kept(self) -> int:
        return sum(max(e.kept, 0) for e in self.entries.values())

    def fixed_bytes(self) -> int:
        """The size of all sections except the last, whose content shows its length."""
        return max(self.graph_bytes, 0) + self.low_bytes() + self.codebook_bytes() + self.element_bytes()

    def max_high_bytes(self) -> int:
        escapes = sum((math.prod(e.shape) >> e.low_bits) // 255 for e in self.entries.values() if e.kept > 0)
        return self.kept() + escapes


_NAME = r"(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+"
_INT = r"(?:0|[1-9][0-9]{0,14})"
_LINE = re.compile(
    rf"(?P<name>{_NAME})(?:=(?P<tied>{_NAME})"
    rf"| (?P<dtype>[A-Z0-9_]+)(?::(?:q(?P<codebook>{_INT})|(?P<storage>F16)))? (?P<shape>-|{_INT}(?:x{_INT})*)"
    rf"(?: (?P<kept>{_INT})/(?P<low>{_INT}))?)"
)
_CODEBOOK = re.compile(rf"(?P<kind>table|uniform) (?P<dtype>F16|F32) (?P<count>{_INT})")


def _plan(tensors: str | None, codebooks: str | None, graph: str | None) -> _Plan:
    if tensors is None:
        raise FormatError("its header has no list of tensors")
    if graph is not None and not re.fullmatch(_INT, graph):
        raise FormatError(f"its header says that its graph has {graph[:20]!r} bytes, which is not a size")
    shared = [_plan_codebook(text) for text in codebooks.split(";")] if codebooks is not None else []
    plan = _Plan({}, {}, [], shared, int(graph) if graph is not None else -1)
    for text in tensors.split(";") if tensors else []:
        match = _LINE.fullmatch(text)
        if match is None:
            raise FormatError(f"its header describes a tensor as {text[:80]!r}, which this version cannot read")
        name = _unquote(match["name"])
        if name in plan.entries or name in plan.ties:
            raise FormatError(f"tensor {name!r} is there twice")
        plan.names.append(name)
        if match["tied"] is None:
            plan.entries[name] = _plan_tensor(name, match, len(shared))
            continue
        first = plan.ties[name] = _unquote(match["tied"])
        if first not in plan.entries:
            raise FormatError(f"tensor {name!r} is tied to {first!r}, which is not a tensor before it")
    return plan


def _plan_codebook(text: str) -> tuple[str, str, int]:
    match = _CODEBOOK.fullmatch(text)
    count = int(match["count"]) if match else 0
    if (
        match is None
        or not 1 <= count <= 256
        or (match["kind"] == "uniform" and (count % 2 or match["dtype"] != "F32"))
    ):
        raise FormatError(f"its header describes a codebook as {text[:80]!r}, which this version cannot read")
    return match["kind"], match["dtype"], count


def _plan_tensor(name: str, match: re.Match[str], num_codebooks: int) -> _Entry:
    dtype = match["dtype"]
    if dtype not in DTYPES:
        raise FormatError(f"tensor {name!r} has dtype {dtype[:20]!r}; known are {', '.join(DTYPES)}")
    shape = tuple(map(int, match["shape"].split("x"))) if match["shape"] != "-" else ()
    if len(shape) > MAX_NDIM or math.prod(d for d in shape if d) > 2**53:
        raise FormatError(f"tensor {name!r} is too large: {match['shape'][:80]}")
    codebook = int(match["codebook"]) if match["codebook"] is not None else -1
    if codebook >= num_codebooks or (codebook >= 0 and dtype not in FLOATS):
        raise FormatError(f"tensor {name!r} of {dtype} uses codebook {codebook}; there are {num_codebooks}, for floats")
    storage = match["storage"] or ""
    if storage and dtype not in ("F64", "F32"):
        raise FormatError(f"tensor {name!r} of {dtype} cannot be stored as {storage}")
    kept = int(match["kept"]) if match["kept"] is not None else -1
    low_bits = int(match["low"]) if match["low"] is not None else 0
    if kept > math.prod(shape) or low_bits > MAX_LOW_BITS:
        raise FormatError(f"tensor {name!r} of shape {match['shape'][:80]} cannot have {match['kept']}/{match['low']}")
    return _Entry(dtype, codebook, storage, shape, kept, low_bits)


def _unquote(text: str) -> str:
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise FormatError(f"the name {text[:80]!r} is not UTF-8") from None


def _inflate(stream: memoryview, plan: _Plan) -> bytes:
    """All sections in one piece, never more bytes than the directory accounts for."""
    least = plan.fixed_bytes() + plan.kept()
    most = plan.fixed_bytes() + plan.max_high_bytes()
    decoder = zlib.decompressobj(-15)
    try:
        payload = decoder.decompress(stream, most + 1)
    except zlib.error as error:
        raise FormatError(f"its data cannot be inflated: {error}") from None
    if not least <= len(payload) <= most:
        raise FormatError(f"its data are {len(payload):,} bytes or more, not the {least:,} to {most:,} of its tensors")
    if not decoder.eof or decoder.unused_data:
        raise FormatError("its compressed data are cut off, or followed by something else")
    return payload


class _Sections:
    """Takes the payload piece by piece."""

    def __init__(self, payload: bytes) -> None:
        self._bytes = np.frombuffer(payload, np.uint8)
        self._at = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        self._at += count
        return self._bytes[self._at - count : self._at]

    def rest(self) -> NDArray[np.uint8]:
        return self._bytes[self._at :]


def _decode(plan: _Plan, payload: bytes, metadata: dict[str, str]) -> File:
    sections = _Sections(payload)
    graph = None
    if plan.graph_bytes >= 0:
        graph = safetensors.parse_json(sections.take(plan.graph_bytes).tobytes(), "its graph")
        if not isinstance(graph, dict):
            raise FormatError("its graph is not a JSON object")
    lows = {n: _read_lows(sections, e) for n, e in plan.entries.items() if e.kept >= 0}
    codebooks = [_read_codebook(sections, *codebook) for codebook in plan.codebooks]
    elements = {
        n: _read_codes(sections, n, e, codebooks[e.codebook]) for n, e in plan.entries.items() if e.codebook >= 0
    }
    for dtype in DTYPES:
        mine = {n: e for n, e in plan.entries.items() if e.codebook < 0 and (e.storage or e.dtype) == dtype}
        elements |= _read_planes(sections, mine, dtype)
    positions = _positions(sections.rest(), lows, plan)

    tensors: dict[str, Stored] = {}
    for name in plan.names:
        if name in plan.ties:
            tensors[name] = tensors[plan.ties[name]]
            continue
        entry = plan.entries[name]
        value = elements[name]
        whole = Sparse(entry.shape, positions[name], value) if entry.kept >= 0 else value.reshape(entry.shape)
        tensors[name] = Stored(entry.dtype, whole, codebooks[entry.codebook] if entry.codebook >= 0 else entry.storage)
    return File(tensors, metadata, graph)


def _read_lows(sections: _Sections, entry: _Entry) -> NDArray[np.int64]:
    width = entry.low_bits
    packed = sections.take((entry.kept * width + 7) // 8)
    each = np.unpackbits(packed, count=entry.kept * width, bitorder="little").reshape(entry.kept, width)
    low = np.zeros(entry.kept, np.int64)
    for bit in range(width):
        low |= each[:, bit].astype(np.int64) << bit
    return low


def _read_codebook(sections: _Sections, kind: str, dtype: str, count: int) -> Codebook:
    if kind == "uniform":
        return Codebook.uniform(float(sections.take(4).view("<f4")[0]), count)
    values = sections.take(count * DTYPES[dtype].itemsize)
    return Codebook.table(np.frombuffer(values.tobytes(), DTYPES[dtype]), dtype)


def _read_codes(sections: _Sections, name: str, entry: _Entry, codebook: Codebook) -> NDArray[Any]:
    codes = sections.take(entry.count)
    table = codebook.of(entry.dtype)
    if entry.kept < 0:
        table = np.concatenate([np.zeros(1, table.dtype), table])
    if codes.max(initial=0) >= len(table) and entry.count:
        raise FormatError(f"tensor {name!r} refers to value {codes.max()} of a codebook of {len(table)}")
    return table[codes]


def _read_planes(sections: _Sections, entries: dict[str, _Entry], dtype: str) -> dict[str, NDArray[Any]]:
    size = DTYPES[dtype].itemsize
    total = sum(entry.count for entry in entries.values())
    raw = np.ascontiguousarray(sections.take(total * size).reshape(size, total).T).reshape(-1)
    if dtype == "BOOL" and raw.max(initial=0) > 1:
        raise FormatError("booleans are stored as bytes other than 0 and 1")
    flat = raw.view(DTYPES[dtype])
    found, at = {}, 0
    for name, entry in entries.items():
        found[name] = flat[at : at + entry.count].astype(DTYPES[entry.dtype])
        at += entry.count
    return found


def _positions(raw: NDArray[np.uint8], lows: dict[str, NDArray[np.int64]], plan: _Plan) -> dict[str, NDArray[np.int64]]:
    """The positions of the values of the sparse tensors."""
    ends = np.flatnonzero(raw != 255)
    if ends.size != plan.kept() or (ends[-1] if ends.size else -1) != raw.size - 1:
        raise FormatError(f"positions of {ends.size:,} values are stored instead of {plan.kept():,}")
    highs = (np.diff(ends, prepend=-1) - 1) * 255 + raw[ends]
    found, at = {}, 0
    for name, low in lows.items():
        entry = plan.entries[name]
        size = math.prod(entry.shape)
        high = highs[at : at + entry.kept]
        at += entry.kept
        if high.max(initial=0) > size >> entry.low_bits:
            raise FormatError(f"tensor {name!r} has a value beyond its {size:,} elements")
        places = np.cumsum((high << entry.low_bits) + low + 1) - 1
        if places.size and (places.min() < 0 or places.max() >= size):
            raise FormatError(f"tensor {name!r} has a value beyond its {size:,} elements")
        found[name] = places
    return found
