"""docs/file-format.md read out again: one element at a time, in plain Python."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import urllib.parse
import zlib

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2}
SIZES |= {"I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


def read(data: bytes) -> dict[str, tuple[str, list[int], list[bytes]]]:
    """Name -> dtype, shape, and each element as the bytes it is stored in, or of float32 where a book has it."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    digest, stream = data[8 + length : 40 + length], data[40 + length :]
    assert hashlib.sha256(data[: 8 + length] + stream).digest() == digest
    metadata = header["__metadata__"]
    assert metadata["format"] == "pomona 1"
    payload = zlib.decompress(stream, -15)
    at = int(metadata.get("graph", 0))

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return payload[at - count : at]

    lines = [line.replace("=", " ", 1).split(" ") for line in metadata["tensors"].split(";") if line]
    lines = [line for line in lines if line]
    entries = []
    for name, *fields in lines:
        if len(fields) == 1:
            continue
        dtype, _, storage = fields[0].partition(":")
        shape = [] if fields[1] == "-" else [int(size) for size in fields[1].split("x")]
        kept, low = (int(x) for x in fields[2].split("/")) if len(fields) > 2 else (-1, 0)
        entries.append((name, dtype, storage, shape, kept, low, math.prod(shape) if kept < 0 else kept))

    lows: dict[str, list[int]] = {}
    for name, _, _, _, kept, low, _ in entries:
        if kept >= 0:
            packed = take((kept * low + 7) // 8)
            bits = [packed[b >> 3] >> (b & 7) & 1 for b in range(kept * low)]
            lows[name] = [sum(bits[i * low + j] << j for j in range(low)) for i in range(kept)]
    books = []
    for book in filter(None, metadata.get("books", "").split(";")):
        kind, dtype, count = book.split(" ")
        if kind == "uniform":
            (step,) = struct.unpack("<f", take(4))
            half = int(count) // 2
            books.append([struct.pack("<f", step * i) for i in (*range(-half, 0), *range(1, half + 1))])
        else:
            letter = {"F16": "e", "F32": "f"}[dtype]
            values = struct.unpack(f"<{count}{letter}", take(int(count) * SIZES[dtype]))
            books.append([struct.pack("<f", value) for value in values])

    elements: dict[str, list[bytes]] = {}
    for name, _, storage, _, kept, _, count in entries:
        if storage.startswith("q"):
            book = books[int(storage[1:])]
            codes = take(count)
            zero = struct.pack("<f", 0)
            elements[name] = [book[c] for c in codes] if kept >= 0 else [book[c - 1] if c else zero for c in codes]
    for dtype, size in SIZES.items():
        mine = [entry for entry in entries if (entry[2] or entry[1]) == dtype]
        n = sum(entry[-1] for entry in mine)
        shuffled = take(n * size)
        flat = [bytes(shuffled[k * n + i] for k in range(size)) for i in range(n)]
        for name, *_, count in mine:
            elements[name], flat = flat[:count], flat[count:]

    found = {}
    for name, dtype, storage, shape, kept, low, _ in entries:
        value = elements[name]
        if kept >= 0:
            zero = bytes(len(value[0])) if value else bytes(SIZES[storage] if storage in SIZES else SIZES[dtype])
            whole, position = [zero] * math.prod(shape), -1
            for i in range(kept):
                high = 0
                while payload[at] == 255:
                    high, at = high + 255, at + 1
                high, at = high + payload[at], at + 1
                position += 1 + (high << low | lows[name][i])
                whole[position] = value[i]
            value = whole
        found[urllib.parse.unquote(name)] = (f"{dtype}:{storage}" if storage else dtype, shape, value)
    assert at == len(payload)
    for name, *fields in lines:
        if len(fields) == 1:
            found[urllib.parse.unquote(name)] = found[urllib.parse.unquote(fields[0])]
    return found
