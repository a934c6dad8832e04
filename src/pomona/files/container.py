"""The file `x.pomona.safetensors`: sparse tensors near the entropy limit, inside a valid safetensors file.

Byte for byte it is described in docs/file-format.md. numpy and the standard library only; torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files import safetensors
from pomona.files.safetensors import DTYPES, MAX_NDIM, FormatError
from pomona.files.sparse import Sparse, bits

__all__ = ["Book", "File", "FormatError", "Stored", "pack", "read", "write"]

FORMAT = "pomona 1"
RESERVED = ("format", "tensors", "books", "graph")
FLOATS = ("F64", "F32", "F16", "BF16")
_DIGEST = 32
_MAX_LOW_BITS = 40


@dataclass(frozen=True, slots=True, eq=False)
class Book:
    """The few values that the weights of one or more tensors share.

    Attributes:
        kind: "table", values of any kind, or "uniform", multiples of a step without 0: -n/2 .. -1, 1 .. n/2.
        dtype: how they are stored, F32 or F16; uniform: how the step is, F32.
        values: float32, 1 to 256 of them; a weight is stored as its index.
    """

    kind: str
    dtype: str
    values: NDArray[np.float32]

    @classmethod
    def table(cls, values: NDArray[Any], dtype: str = "F32") -> Book:
        """These values, rounded to `dtype`."""
        with np.errstate(over="ignore"):
            return cls("table", dtype, np.asarray(values).astype(DTYPES[dtype]).astype(np.float32))

    @classmethod
    def uniform(cls, step: float, count: int) -> Book:
        """`count` (even) multiples of `step`, the nearest to zero without zero itself."""
        half = count // 2
        multiples = np.concatenate([np.arange(-half, 0), np.arange(1, half + 1)]).astype(np.float32)
        with np.errstate(all="ignore"):
            return cls("uniform", "F32", multiples * np.float32(step))

    def of(self, dtype: str) -> NDArray[Any]:
        """The values as elements of a tensor of this dtype."""
        return from_float32(self.values, dtype)

    def raw(self) -> bytes:
        if self.kind == "table":
            return self.values.astype(DTYPES[self.dtype]).tobytes()
        return self.values[len(self.values) // 2 :][:1].astype("<f4").tobytes()  # 1 times the step


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: a key of `safetensors.DTYPES`.
        value: its elements, all of them or the sparse ones; bfloat16 and float8 as bit patterns.
        storage: how values are written: "" as they are; "F16", of floats of 32 or 64 bits that half precision holds
            exactly; or a `Book` of all values that are not zero.
    """

    dtype: str
    value: NDArray[Any] | Sparse
    storage: str | Book = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dense(self) -> NDArray[Any]:
        return self.value.dense() if isinstance(self.value, Sparse) else self.value


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """What a file holds.

    Attributes:
        tensors: by name, in the order of the state dict; tied ones are one object under several names.
        metadata: strings about the whole: pomona (the version that wrote it), scope, sparsity, method, ...
        graph: what the network computes, as `pomona.runtime.graph` describes it, or None.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)
    graph: dict[str, Any] | None = None


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Elements of a float dtype as numbers of 32 bits."""
    if dtype == "BF16":
        pattern: NDArray[np.uint32] = values.astype(np.uint32) << np.uint32(16)
        return pattern.view(np.float32)
    with np.errstate(all="ignore"):
        return values.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 numbers as elements of a float dtype, rounded to nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(all="ignore"):
            return values.astype(DTYPES[dtype])
    pattern = np.ascontiguousarray(values).view(np.uint32)
    rounded = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
    return np.where(np.isnan(values), pattern >> 16 | 0x40, rounded).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------------- writing


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    graph: Mapping[str, Any] | None = None,
) -> int:
    """Write a file; each tensor is stored sparse or dense, whichever is smaller. The file appears whole or not at all.

    Args:
        path: conventionally ends in `.pomona.safetensors`.
        tensors: by name; one object under several names is stored once.
        metadata: strings of your own; not the keys `format`, `tensors`, `books`, `graph`.
        graph: JSON of `pomona.runtime.graph`, if the file is to be run without torch.

    Returns:
        The number of bytes.

    Raises:
        ValueError: a tensor, name or key cannot be stored; says which.
    """
    data = pack(tensors, metadata, graph)
    safetensors.write(path, data)
    return len(data)


def pack(
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    graph: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes that `write` writes."""
    metadata = dict(metadata or {})
    _check_metadata(metadata)
    own: dict[int, str] = {}  # id of a tensor -> its first name
    parts: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if own.setdefault(id(stored), name) == name:
            _check_stored(name, stored)
            parts[name] = stored
    ties = {name: own[id(stored)] for name, stored in tensors.items()}
    graph_text = b""
    if graph is not None:
        graph_text = json.dumps(graph, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
        metadata["graph"] = str(len(graph_text))

    chosen = {name: _smaller(stored) for name, stored in parts.items()}
    best = _pack(chosen, ties, metadata, graph_text)
    if sum(_elements(stored).size for stored in chosen.values()) > _SMALL:
        return best
    for name, stored in parts.items():  # in a small file tensors share code tables: try each the other way
        other = {**chosen, name: _the_other_way(chosen[name], stored)}
        data = _pack(other, ties, metadata, graph_text)
        if len(data) < len(best):
            chosen, best = other, data
    return best


_SMALL = 1 << 14
"""Of so few elements or bytes more ways are tried."""


def _pack(parts: dict[str, Stored], ties: dict[str, str], metadata: dict[str, str], graph: bytes) -> bytes:
    """The file, of tensors that are as they will be stored; `ties` has the first name for each."""
    sparse = [part.value for part in parts.values() if isinstance(part.value, Sparse)]
    books = _books(parts.values())
    low_bits, highs = _split_gaps(sparse)
    widths = iter(low_bits)
    lines = [
        _line(name, parts[name], books, widths) if first == name else f"{_quote(name)}={_quote(first)}"
        for name, first in ties.items()
    ]
    header = {"format": FORMAT, "tensors": ";".join(lines)}
    if books:
        header["books"] = ";".join(f"{book.kind} {book.dtype} {len(book.values)}" for book in books)
    sections = [[graph], [_pack_lows(sparse, low_bits)], [book.raw() for book in books]]
    sections.append([_codes(part).tobytes() for part in parts.values() if isinstance(part.storage, Book)])
    for dtype in DTYPES:
        sections += [
            [plane] for plane in _planes([_plain(p) for p in parts.values() if (p.storage or p.dtype) == dtype])
        ]
    sections.append(highs)
    return _assemble(header | metadata, _deflate(sections))


def _the_other_way(stored: Stored, original: Stored) -> Stored:
    """Sparse instead of dense, or the reverse."""
    dense = original.dense()
    is_full_book = isinstance(stored.storage, Book) and len(stored.storage.values) > 255
    if isinstance(stored.value, Sparse) and not is_full_book:
        return Stored(stored.dtype, dense, stored.storage)
    return Stored(stored.dtype, Sparse.from_dense(dense), stored.storage)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for key, value in metadata.items():
        if key in RESERVED:
            raise ValueError(f"metadata must not have the key {key!r}: the format itself uses {', '.join(RESERVED)}")
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata must be strings, got {key!r}: {value!r}")


def _check_stored(name: str, stored: Stored) -> None:
    if not name:
        raise ValueError("a tensor must have a name, got ''")
    if stored.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {stored.dtype!r}; a file can hold {', '.join(DTYPES)}")
    values = stored.value.values if isinstance(stored.value, Sparse) else stored.value
    if values.dtype != DTYPES[stored.dtype]:
        raise ValueError(f"{name} is said to be {stored.dtype}, but its array has dtype {values.dtype}")
    if len(stored.shape) > MAX_NDIM:
        raise ValueError(f"{name} has {len(stored.shape)} dimensions; at most {MAX_NDIM} can be stored")
    if isinstance(stored.storage, Book) and stored.dtype not in FLOATS:
        raise ValueError(f"{name} is {stored.dtype}; a book is for tensors of {', '.join(FLOATS)}")
    if isinstance(stored.storage, str) and stored.storage not in ("", stored.dtype):
        if stored.storage != "F16" or stored.dtype not in ("F32", "F64"):
            raise ValueError(f"{name} of {stored.dtype} cannot be stored as {stored.storage!r}; only F32, F64 as F16")
        with np.errstate(all="ignore"):
            same = values.astype(np.float16).astype(values.dtype)
        if not np.array_equal(bits(same), bits(values)):
            raise ValueError(f"{name} has values that F16 does not hold exactly; round them first")


def _smaller(stored: Stored) -> Stored:
    """The same tensor, sparse or dense: as its bytes will be fewer, by their entropy."""
    dense = stored.dense()
    value = Sparse.from_dense(dense)
    if (isinstance(stored.storage, Book) and len(stored.storage.values) > 255) or dense.dtype == bool:
        return Stored(stored.dtype, value if dense.dtype != bool else dense, stored.storage)
    sparse_bits = _gap_bits(value) + 64  # what the header says of it
    as_sparse = Stored(stored.dtype, value, stored.storage)
    as_dense = Stored(stored.dtype, dense, stored.storage)
    if isinstance(stored.storage, Book):
        sparse_bits += _entropy(_codes(as_sparse))
        dense_bits = _entropy(_codes(as_dense))
    else:
        sparse_bits += sum(map(_entropy, _byte_planes(_plain(as_sparse))))
        dense_bits = sum(map(_entropy, _byte_planes(_plain(as_dense))))
    return as_sparse if sparse_bits < dense_bits else as_dense


def _entropy(codes: NDArray[np.uint8]) -> float:
    """Bits that bytes take if each is coded by how often it occurs, and at least one bit each, as deflate has it."""
    counts = np.bincount(codes).astype(float)
    counts = counts[counts > 0]
    return float(max(codes.size, -(counts * np.log2(counts / codes.size)).sum())) if codes.size else 0.0


def _gap_bits(sparse: Sparse) -> float:
    """H(p)/p a stored value: what positions take if they are random."""
    kept, size = len(sparse.positions), sparse.size
    if not 0 < kept < size:
        return 0.0
    p = kept / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def _books(parts: Iterable[Stored]) -> list[Book]:
    found = {id(p.storage): p.storage for p in parts if isinstance(p.storage, Book)}
    return list(found.values())


def _line(name: str, stored: Stored, books: list[Book], widths: Iterator[int]) -> str:
    dtype = stored.dtype
    if isinstance(stored.storage, Book):
        dtype += f":q{[id(book) for book in books].index(id(stored.storage))}"
    elif stored.storage not in ("", stored.dtype):
        dtype += f":{stored.storage}"
    line = f"{_quote(name)} {dtype} {'x'.join(map(str, stored.shape)) or '-'}"
    if isinstance(stored.value, Sparse):
        line += f" {len(stored.value.positions)}/{next(widths)}"
    return line


def _quote(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _gaps(sparse: Sparse) -> NDArray[np.int64]:
    """Zeros before each stored element, since the last."""
    return np.diff(sparse.positions, prepend=-1) - 1


def _split_gaps(tensors: list[Sparse]) -> tuple[list[int], list[bytes]]:
    """How many low bits of each tensor's gaps are kept apart, and the bytes of the rest.

    A geometric gap of mean m has about log2(m) bits of which the low ones are noise: they are stored as they are, and
    what is left has nearly the same distribution in every tensor, so that one Huffman code serves all.
    """
    gaps = [_gaps(sparse) for sparse in tensors]
    natural = [_natural_low_bits(gap) for gap in gaps]
    best: tuple[int, list[int], list[bytes]] | None = None
    for less in (0, 1, 2, 3, 4, _MAX_LOW_BITS):
        widths = [max(0, width - less) for width in natural]
        highs = [_escape(gap >> width) for gap, width in zip(gaps, widths, strict=True)]
        joined = b"".join(highs)
        quick = min(len(_deflated(joined, 1, how)) for how in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY))
        size = 8 * quick + sum(w * gap.size for gap, w in zip(gaps, widths, strict=True))
        if best is None or size < best[0]:
            best = size, widths, highs
    assert best is not None
    return best[1], best[2]


def _natural_low_bits(gaps: NDArray[np.int64]) -> int:
    """The most low bits that are worth keeping apart: half of all gaps have no high part then."""
    if not gaps.size:
        return 0
    return max(0, round(math.log2(math.log(2) * (float(gaps.mean()) + 1))))


def _escape(highs: NDArray[np.int64]) -> bytes:
    """One byte each; 255 means 255 more to come, and the next byte goes on."""
    times, rest = np.divmod(highs, 255)
    if not times.any():
        return rest.astype(np.uint8).tobytes()
    out = np.full(int(times.sum()) + highs.size, 255, np.uint8)
    out[np.cumsum(times + 1) - 1] = rest
    return out.tobytes()


def _pack_lows(tensors: list[Sparse], widths: list[int]) -> bytes:
    parts = []
    for sparse, width in zip(tensors, widths, strict=True):
        low = _gaps(sparse) & ((1 << width) - 1)
        each = (low[:, None] >> np.arange(width) & 1).astype(np.uint8)
        parts.append(np.packbits(each.reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def _elements(stored: Stored) -> NDArray[Any]:
    return stored.value.values if isinstance(stored.value, Sparse) else stored.value.reshape(-1)


def _plain(stored: Stored) -> NDArray[Any]:
    """The elements that are written, in the dtype that they are written in."""
    assert isinstance(stored.storage, str)
    with np.errstate(all="ignore"):
        return _elements(stored).astype(DTYPES[stored.storage or stored.dtype], copy=False)


def _codes(stored: Stored) -> NDArray[np.uint8]:
    """Index of each element in its book; of a dense tensor plus one, and 0 for a zero."""
    assert isinstance(stored.storage, Book)
    table, elements = bits(stored.storage.of(stored.dtype)), bits(_elements(stored))
    order = np.argsort(table, kind="stable")
    place = np.minimum(np.searchsorted(table, elements, sorter=order), len(table) - 1)
    codes = order[place]
    unknown = table[codes] != elements
    if not isinstance(stored.value, Sparse):
        codes = np.where(elements == 0, 0, codes + 1)
        unknown &= elements != 0
    if unknown.any():
        raise ValueError(f"{int(unknown.sum())} elements of a tensor {stored.shape} are not in its book")
    return codes.astype(np.uint8)


def _byte_planes(elements: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """First the lowest byte of every element, then the next, ..."""
    raw = np.frombuffer(elements.tobytes(), np.uint8).reshape(-1, elements.itemsize)
    return [np.ascontiguousarray(plane) for plane in raw.T]


def _planes(elements: list[NDArray[Any]]) -> list[bytes]:
    if not elements:
        return []
    return [plane.tobytes() for plane in _byte_planes(np.concatenate(elements))]


def _deflate(sections: list[list[bytes]]) -> bytes:
    """One raw deflate stream. Each section has codes of its own; in a small file each run of parts, as is best."""
    parts = [part for section in sections for part in section if part]
    if sum(map(len, parts)) > _SMALL or len(parts) > 40:
        return b"".join([*map(_squeeze_runs, sections), _LAST_BLOCK])
    best: list[bytes] = [b""]  # of the first 0, 1, 2, ... parts
    for end in range(1, len(parts) + 1):
        best.append(min((best[i] + _squeeze(b"".join(parts[i:end])) for i in range(end)), key=len))
    return best[-1] + _LAST_BLOCK


_LAST_BLOCK = b"\x03\x00"  # an empty one
_RUNS = (1 << 10, 1 << 12, 1 << 14)  # bytes that may pay for codes of their own


def _squeeze_runs(section: list[bytes]) -> bytes:
    """A section as one, or in runs of parts, whichever is smaller."""
    size = sum(map(len, section))
    candidates = [_squeeze(b"".join(section))]
    for least in _RUNS if size > _RUNS[0] and len(section) > 1 else ():
        runs: list[list[bytes]] = [[]]
        for part in section:
            if sum(map(len, runs[-1])) >= least:
                runs.append([])
            runs[-1].append(part)
        candidates.append(b"".join(_squeeze(b"".join(run), size) for run in runs))
    return min(candidates, key=len)


def _squeeze(section: bytes, size: int = 0) -> bytes:
    """Deflate blocks of one section, or of a run of one of this size, that end at a whole byte and are not the last."""
    if not section:
        return b""
    ways = [(9, zlib.Z_HUFFMAN_ONLY), (9, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_FILTERED)]
    if max(len(section), size) > _LARGE:
        ways = [(9, zlib.Z_HUFFMAN_ONLY), (1, zlib.Z_DEFAULT_STRATEGY)]
    return min(_stored_blocks(section), *(_deflated(section, *way) for way in ways), key=len)


_LARGE = 1 << 18  # bytes for which the last percent is not worth the time


def _deflated(section: bytes, level: int, strategy: int) -> bytes:
    width = len(section).bit_length()
    window, memory = max(9, min(width, 15)), max(1, min(width - 6, 9))  # no more than it can use: a fast start
    coder = zlib.compressobj(level, zlib.DEFLATED, -window, memory, strategy)
    return coder.compress(section) + coder.flush(zlib.Z_SYNC_FLUSH)


def _stored_blocks(section: bytes) -> bytes:
    blocks = [section[i : i + 65535] for i in range(0, len(section), 65535)]
    return b"".join(struct.pack("<BHH", 0, len(block), 65535 - len(block)) + block for block in blocks)


def _assemble(metadata: Mapping[str, str], stream: bytes) -> bytes:
    size = _DIGEST + len(stream)
    header = {
        "__metadata__": metadata,
        "pomona": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if len(text) > safetensors.MAX_HEADER:
        raise ValueError(f"the header takes {len(text):,} bytes; {safetensors.MAX_HEADER:,} are allowed")
    start = struct.pack("<Q", len(text)) + text
    return start + hashlib.sha256(start + stream).digest() + stream


# ---------------------------------------------------------------------------------------------------------- reading


def read(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> File:
    """Read a file, believing nothing.

    Args:
        path: of a file that `write` wrote.
        max_bytes: the most that all tensors together may take as dense ones. Default: a thousand times the file's
            size, and at least 1 GiB, so that a small hostile file cannot fill the memory.

    Raises:
        FormatError: naming the file and what is wrong with it.
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
    if header.num_bytes < _DIGEST:
        raise FormatError(f"its data are {header.num_bytes} bytes, less than a checksum")
    if header.num_bytes > max_bytes:
        raise FormatError(f"its data take {header.num_bytes:,} bytes, more than max_bytes={max_bytes:,}")
    data = memoryview(safetensors.read_exactly(file, header.num_bytes))
    digest = hashlib.sha256(header.raw)
    digest.update(data[_DIGEST:])
    if digest.digest() != bytes(data[:_DIGEST]):
        raise FormatError("its checksum is wrong: the file was damaged or changed after it was written")

    plan = _plan(metadata.pop("tensors", None), metadata.pop("books", None), metadata.pop("graph", None))
    dense_bytes = sum(math.prod(e.shape) * DTYPES[e.dtype].itemsize for e in plan.entries.values())
    if dense_bytes > max_bytes:
        raise FormatError(
            f"its tensors would take {dense_bytes:,} bytes, more than max_bytes={max_bytes:,}; read(path, "
            f"max_bytes={dense_bytes}) allows it, if you trust the file"
        )
    return _decode(plan, _inflate(data[_DIGEST:], plan), metadata)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the directory."""

    dtype: str
    book: int  # -1: none
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
    books: list[tuple[str, str, int]]
    graph_bytes: int  # -1: no graph

    def book_bytes(self) -> int:
        return sum(4 if kind == "uniform" else count * DTYPES[dtype].itemsize for kind, dtype, count in self.books)

    def low_bytes(self) -> int:
        return sum((e.kept * e.low_bits + 7) // 8 for e in self.entries.values() if e.kept >= 0)

    def element_bytes(self) -> int:
        return sum(
            e.count * (1 if e.book >= 0 else DTYPES[e.storage or e.dtype].itemsize) for e in self.entries.values()
        )

    def kept(self) -> int:
        return sum(max(e.kept, 0) for e in self.entries.values())

    def fixed_bytes(self) -> int:
        """Of all sections but the last, whose length is told by its content."""
        return max(self.graph_bytes, 0) + self.low_bytes() + self.book_bytes() + self.element_bytes()

    def max_high_bytes(self) -> int:
        escapes = sum((math.prod(e.shape) >> e.low_bits) // 255 for e in self.entries.values() if e.kept > 0)
        return self.kept() + escapes


_NAME = r"(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+"
_INT = r"(?:0|[1-9][0-9]{0,14})"
_LINE = re.compile(
    rf"(?P<name>{_NAME})(?:=(?P<tied>{_NAME})"
    rf"| (?P<dtype>[A-Z0-9_]+)(?::(?:q(?P<book>{_INT})|(?P<storage>F16)))? (?P<shape>-|{_INT}(?:x{_INT})*)"
    rf"(?: (?P<kept>{_INT})/(?P<low>{_INT}))?)"
)
_BOOK = re.compile(rf"(?P<kind>table|uniform) (?P<dtype>F16|F32) (?P<count>{_INT})")


def _plan(tensors: str | None, books: str | None, graph: str | None) -> _Plan:
    if tensors is None:
        raise FormatError("its header has no list of tensors")
    if graph is not None and not re.fullmatch(_INT, graph):
        raise FormatError(f"its graph is said to have {graph[:20]!r} bytes")
    shared = [_plan_book(text) for text in books.split(";")] if books is not None else []
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


def _plan_book(text: str) -> tuple[str, str, int]:
    match = _BOOK.fullmatch(text)
    count = int(match["count"]) if match else 0
    if (
        match is None
        or not 1 <= count <= 256
        or (match["kind"] == "uniform" and (count % 2 or match["dtype"] != "F32"))
    ):
        raise FormatError(f"its header describes a book of values as {text[:80]!r}, which this version cannot read")
    return match["kind"], match["dtype"], count


def _plan_tensor(name: str, match: re.Match[str], num_books: int) -> _Entry:
    dtype = match["dtype"]
    if dtype not in DTYPES:
        raise FormatError(f"tensor {name!r} has dtype {dtype[:20]!r}; known are {', '.join(DTYPES)}")
    shape = tuple(map(int, match["shape"].split("x"))) if match["shape"] != "-" else ()
    if len(shape) > MAX_NDIM or math.prod(d for d in shape if d) > 2**53:
        raise FormatError(f"tensor {name!r} is too large: {match['shape'][:80]}")
    book = int(match["book"]) if match["book"] is not None else -1
    if book >= num_books or (book >= 0 and dtype not in FLOATS):
        raise FormatError(f"tensor {name!r} of {dtype} uses book {book}; there are {num_books}, for floats")
    storage = match["storage"] or ""
    if storage and dtype not in ("F64", "F32"):
        raise FormatError(f"tensor {name!r} of {dtype} cannot be stored as {storage}")
    kept = int(match["kept"]) if match["kept"] is not None else -1
    low_bits = int(match["low"]) if match["low"] is not None else 0
    if kept > math.prod(shape) or low_bits > _MAX_LOW_BITS:
        raise FormatError(f"tensor {name!r} of shape {match['shape'][:80]} cannot have {match['kept']}/{match['low']}")
    return _Entry(dtype, book, storage, shape, kept, low_bits)


def _unquote(text: str) -> str:
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise FormatError(f"the name {text[:80]!r} is not UTF-8") from None


def _inflate(stream: memoryview, plan: _Plan) -> bytes:
    """All sections in one; never more bytes than the directory can account for."""
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
    """The payload, taken piece by piece."""

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
    books = [_read_book(sections, *book) for book in plan.books]
    elements = {n: _read_codes(sections, n, e, books[e.book]) for n, e in plan.entries.items() if e.book >= 0}
    for dtype in DTYPES:
        mine = {n: e for n, e in plan.entries.items() if e.book < 0 and (e.storage or e.dtype) == dtype}
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
        tensors[name] = Stored(entry.dtype, whole, books[entry.book] if entry.book >= 0 else entry.storage)
    return File(tensors, metadata, graph)


def _read_lows(sections: _Sections, entry: _Entry) -> NDArray[np.int64]:
    width = entry.low_bits
    packed = sections.take((entry.kept * width + 7) // 8)
    each = np.unpackbits(packed, count=entry.kept * width, bitorder="little").reshape(entry.kept, width)
    low = np.zeros(entry.kept, np.int64)
    for bit in range(width):
        low |= each[:, bit].astype(np.int64) << bit
    return low


def _read_book(sections: _Sections, kind: str, dtype: str, count: int) -> Book:
    if kind == "uniform":
        return Book.uniform(float(sections.take(4).view("<f4")[0]), count)
    values = sections.take(count * DTYPES[dtype].itemsize)
    return Book.table(np.frombuffer(values.tobytes(), DTYPES[dtype]), dtype)


def _read_codes(sections: _Sections, name: str, entry: _Entry, book: Book) -> NDArray[Any]:
    codes = sections.take(entry.count)
    table = book.of(entry.dtype)
    if entry.kept < 0:
        table = np.concatenate([np.zeros(1, table.dtype), table])
    if codes.max(initial=0) >= len(table) and entry.count:
        raise FormatError(f"tensor {name!r} refers to value {codes.max()} of a book of {len(table)}")
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
    """Where the values of the sparse tensors are."""
    ends = np.flatnonzero(raw != 255)
    if ends.size != plan.kept() or (ends[-1] if ends.size else -1) != raw.size - 1:
        raise FormatError(f"positions of {ends.size:,} values are stored, not of {plan.kept():,}")
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
