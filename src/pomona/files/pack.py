"""Write the file `x.pomona.safetensors`: sparse tensors near the entropy limit, inside a valid safetensors file.

docs/file-format.md describes it byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files import safetensors
from pomona.files.safetensors import DTYPES, MAX_NDIM
from pomona.files.sparse import Sparse, bits
from pomona.files.stored import DIGEST_BYTES, FLOATS, FORMAT, MAX_LOW_BITS, RESERVED, Codebook, Stored


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
    graph: Mapping[str, Any] | None = None,
) -> int:
    """Write a file that appears whole or not at all. Each tensor is stored sparse or dense, whichever is smaller.

    Args:
        path: conventionally ends in `.pomona.safetensors`.
        tensors: by name; an object that appears under several names is stored once.
        metadata: your own strings; the keys `format`, `tensors`, `books` and `graph` are reserved.
        graph: the graph as JSON (`pomona.runtime.graph`), so that the file can be run without torch.

    Returns:
        The number of bytes.

    Raises:
        ValueError: a tensor, name or key cannot be stored; the message says which.
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
    for name, stored in parts.items():  # in a small file tensors share Huffman tables: try each the other way
        other = {**chosen, name: _the_other_way(chosen[name], stored)}
        data = _pack(other, ties, metadata, graph_text)
        if len(data) < len(best):
            chosen, best = other, data
    return best


_SMALL = 1 << 14
"""Up to so many elements or bytes, more ways to store them are tried."""


def _pack(parts: dict[str, Stored], ties: dict[str, str], metadata: dict[str, str], graph: bytes) -> bytes:
    """The bytes of the file. `parts` are stored as they are given; `ties` maps each name to the tensor's first name."""
    sparse = [part.value for part in parts.values() if isinstance(part.value, Sparse)]
    codebooks = _codebooks(parts.values())
    low_bits, highs = _split_gaps(sparse)
    widths = iter(low_bits)
    lines = [
        _line(name, parts[name], codebooks, widths) if first == name else f"{_quote(name)}={_quote(first)}"
        for name, first in ties.items()
    ]
    header = {"format": FORMAT, "tensors": ";".join(lines)}
    if codebooks:
        header["books"] = ";".join(f"{codebook.kind} {codebook.dtype} {len(codebook.values)}" for codebook in codebooks)
    sections = [[graph], [_pack_lows(sparse, low_bits)], [codebook.raw() for codebook in codebooks]]
    sections.append([_codes(part).tobytes() for part in parts.values() if isinstance(part.storage, Codebook)])
    for dtype in DTYPES:
        sections += [
            [plane] for plane in _planes([_plain(p) for p in parts.values() if (p.storage or p.dtype) == dtype])
        ]
    sections.append(highs)
    return _assemble(header | metadata, _deflate(sections))


def _the_other_way(stored: Stored, original: Stored) -> Stored:
    """Sparse instead of dense, or the reverse."""
    dense = original.dense()
    is_full_codebook = isinstance(stored.storage, Codebook) and len(stored.storage.values) > 255
    if isinstance(stored.value, Sparse) and not is_full_codebook:
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
    if isinstance(stored.storage, Codebook) and stored.dtype not in FLOATS:
        raise ValueError(f"{name} is {stored.dtype}; a codebook is for tensors of {', '.join(FLOATS)}")
    if isinstance(stored.storage, str) and stored.storage not in ("", stored.dtype):
        if stored.storage != "F16" or stored.dtype not in ("F32", "F64"):
            raise ValueError(f"{name} of {stored.dtype} cannot be stored as {stored.storage!r}; only F32, F64 as F16")
        with np.errstate(all="ignore"):
            same = values.astype(np.float16).astype(values.dtype)
        if not np.array_equal(bits(same), bits(values)):
            raise ValueError(f"{name} has values that F16 does not hold exactly; round them first")


def _smaller(stored: Stored) -> Stored:
    """The same tensor, sparse or dense, whichever will take fewer bytes, estimated by their entropy."""
    dense = stored.dense()
    value = Sparse.from_dense(dense)
    if (isinstance(stored.storage, Codebook) and len(stored.storage.values) > 255) or dense.dtype == bool:
        return Stored(stored.dtype, value if dense.dtype != bool else dense, stored.storage)
    sparse_bits = _gap_bits(value) + 64  # its entry in the header
    as_sparse = Stored(stored.dtype, value, stored.storage)
    as_dense = Stored(stored.dtype, dense, stored.storage)
    if isinstance(stored.storage, Codebook):
        sparse_bits += _entropy(_codes(as_sparse))
        dense_bits = _entropy(_codes(as_dense))
    else:
        sparse_bits += sum(map(_entropy, _byte_planes(_plain(as_sparse))))
        dense_bits = sum(map(_entropy, _byte_planes(_plain(as_dense))))
    return as_sparse if sparse_bits < dense_bits else as_dense


def _entropy(codes: NDArray[np.uint8]) -> float:
    """Bits for these bytes if each is coded by its frequency, with at least one bit per byte, as in deflate."""
    counts = np.bincount(codes).astype(float)
    counts = counts[counts > 0]
    return float(max(codes.size, -(counts * np.log2(counts / codes.size)).sum())) if codes.size else 0.0


def _gap_bits(sparse: Sparse) -> float:
    """Bits for the positions if these are random: H(p)/p per stored value."""
    kept, size = len(sparse.positions), sparse.size
    if not 0 < kept < size:
        return 0.0
    p = kept / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def _codebooks(parts: Iterable[Stored]) -> list[Codebook]:
    found = {id(p.storage): p.storage for p in parts if isinstance(p.storage, Codebook)}
    return list(found.values())


def _line(name: str, stored: Stored, codebooks: list[Codebook], widths: Iterator[int]) -> str:
    dtype = stored.dtype
    if isinstance(stored.storage, Codebook):
        dtype += f":q{[id(codebook) for codebook in codebooks].index(id(stored.storage))}"
    elif stored.storage not in ("", stored.dtype):
        dtype += f":{stored.storage}"
    line = f"{_quote(name)} {dtype} {'x'.join(map(str, stored.shape)) or '-'}"
    if isinstance(stored.value, Sparse):
        line += f" {len(stored.value.positions)}/{next(widths)}"
    return line


def _quote(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _gaps(sparse: Sparse) -> NDArray[np.int64]:
    """Number of zeros between each stored element and the one before it."""
    return np.diff(sparse.positions, prepend=-1) - 1


def _split_gaps(tensors: list[Sparse]) -> tuple[list[int], list[bytes]]:
    """The number of low bits of each tensor's gaps that are stored separately, and the bytes of the high parts.

    A geometric gap of mean m has about log2(m) bits, of which the low ones are noise and are stored as they are. The
    high parts have nearly the same distribution in every tensor, so that one Huffman code serves all.
    """
    gaps = [_gaps(sparse) for sparse in tensors]
    natural = [_natural_low_bits(gap) for gap in gaps]
    best: tuple[int, list[int], list[bytes]] | None = None
    for less in (0, 1, 2, 3, 4, MAX_LOW_BITS):
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
    """The largest number of low bits worth separating: half of all gaps then have no high part."""
    if not gaps.size:
        return 0
    return max(0, round(math.log2(math.log(2) * (float(gaps.mean()) + 1))))


def _escape(highs: NDArray[np.int64]) -> bytes:
    """One byte per value; a byte of 255 adds 255, and the value continues in the next byte."""
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
    """The elements in the dtype in which they are written."""
    assert isinstance(stored.storage, str)
    with np.errstate(all="ignore"):
        return _elements(stored).astype(DTYPES[stored.storage or stored.dtype], copy=False)


def _codes(stored: Stored) -> NDArray[np.uint8]:
    """Index of each element in its codebook; in a dense tensor the index plus one, and 0 for a zero."""
    assert isinstance(stored.storage, Codebook)
    table, elements = bits(stored.storage.of(stored.dtype)), bits(_elements(stored))
    order = np.argsort(table, kind="stable")
    place = np.minimum(np.searchsorted(table, elements, sorter=order), len(table) - 1)
    codes = order[place]
    unknown = table[codes] != elements
    if not isinstance(stored.value, Sparse):
        codes = np.where(elements == 0, 0, codes + 1)
        unknown &= elements != 0
    if unknown.any():
        raise ValueError(f"{int(unknown.sum())} elements of a tensor {stored.shape} are not in its codebook")
    return codes.astype(np.uint8)


def _byte_planes(elements: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """The lowest byte of every element first, then the next byte of each, and so on."""
    raw = np.frombuffer(elements.tobytes(), np.uint8).reshape(-1, elements.itemsize)
    return [np.ascontiguousarray(plane) for plane in raw.T]


def _planes(elements: list[NDArray[Any]]) -> list[bytes]:
    if not elements:
        return []
    return [plane.tobytes() for plane in _byte_planes(np.concatenate(elements))]


def _deflate(sections: list[list[bytes]]) -> bytes:
    """One raw deflate stream. Each section has its own codes; a small file is split into runs of parts as is best."""
    parts = [part for section in sections for part in section if part]
    if sum(map(len, parts)) > _SMALL or len(parts) > 40:
        return b"".join([*map(_squeeze_runs, sections), _LAST_BLOCK])
    best: list[bytes] = [b""]  # for the first 0, 1, 2, ... parts
    for end in range(1, len(parts) + 1):
        best.append(min((best[i] + _squeeze(b"".join(parts[i:end])) for i in range(end)), key=len))
    return best[-1] + _LAST_BLOCK


_LAST_BLOCK = b"\x03\x00"  # an empty block
_RUNS = (1 << 10, 1 << 12, 1 << 14)  # sizes in bytes from which separate codes may pay


def _squeeze_runs(section: list[bytes]) -> bytes:
    """A section as one piece, or in runs of parts, whichever is smaller."""
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
    """Deflate blocks, none the last, ending at a whole byte, for a section or for a run of a section of this size."""
    if not section:
        return b""
    ways = [(9, zlib.Z_HUFFMAN_ONLY), (9, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_FILTERED)]
    if max(len(section), size) > _LARGE:
        ways = [(9, zlib.Z_HUFFMAN_ONLY), (1, zlib.Z_DEFAULT_STRATEGY)]
    return min(_stored_blocks(section), *(_deflated(section, *way) for way in ways), key=len)


_LARGE = 1 << 18  # above so many bytes the last percent is not worth the time


def _deflated(section: bytes, level: int, strategy: int) -> bytes:
    width = len(section).bit_length()
    window, memory = (
        max(9, min(width, 15)),
        max(1, min(width - 6, 9)),
    )  # no more than it can use: starts faster
    coder = zlib.compressobj(level, zlib.DEFLATED, -window, memory, strategy)
    return coder.compress(section) + coder.flush(zlib.Z_SYNC_FLUSH)


def _stored_blocks(section: bytes) -> bytes:
    blocks = [section[i : i + 65535] for i in range(0, len(section), 65535)]
    return b"".join(struct.pack("<BHH", 0, len(block), 65535 - len(block)) + block for block in blocks)


def _assemble(metadata: Mapping[str, str], stream: bytes) -> bytes:
    size = DIGEST_BYTES + len(stream)
    header = {
        "__metadata__": metadata,
        "pomona": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if len(text) > safetensors.MAX_HEADER:
        raise ValueError(f"the header takes {len(text):,} bytes; {safetensors.MAX_HEADER:,} are allowed")
    start = struct.pack("<Q", len(text)) + text
    return start + hashlib.sha256(start + stream).digest() + stream
