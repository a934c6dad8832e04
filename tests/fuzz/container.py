"""Damaged and hostile files: whatever is done to a file, reading it gives a file or a FormatError, soon and in bounds.

``python -m tests.fuzz.container --cases 100000`` makes that many. Case n of seed s is always the same file:
``--seed s --only n`` repeats it. Every other case is mutated where it hurts most: its header or its inflated payload is
changed, and lengths, offsets and checksum are made to fit again, so that the code behind the checksum is reached.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pomona.exporters import FORMATS, FormatError, Source, load
from pomona.exporters.source import from_state
from pomona.files.pack import pack
from pomona.files.quantize import Quantization, quantize
from pomona.files.stored import Stored
from pomona.files.unpack import read
from pomona.runtime.graph import Graph
from tests.fuzz import fuzzing

MAX_BYTES = 1 << 22
"""What a file may take in these tests; the largest valid one takes a thousandth."""
SECONDS = 2.0
"""No case may take longer."""

_GRAPH = {"inputs": [[6]], "nodes": [["linear", [0], {"weight": "w", "bias": "b"}], ["relu", [1]]], "outputs": [2]}


def seeds() -> list[bytes]:
    """Valid files of all kinds."""
    generator = torch.Generator().manual_seed(0)

    def sparse(*shape: int, keep: float = 0.2) -> torch.Tensor:
        kept = torch.rand(shape, generator=generator) < keep
        return torch.randn(shape, generator=generator) * kept

    weight = sparse(5, 6)
    state = {
        "w": weight,
        "b": torch.randn(5, generator=generator),
        "far": sparse(3, 400, keep=0.003),
        "bf16": sparse(4, 8).bfloat16(),
        "fp16": torch.randn(3, 2, generator=generator).half(),
        "fp64": sparse(2, 3, 4).double(),
        "n": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "tied name;": weight,
    }
    tensors = from_state(state)
    floats = from_state({name: state[name] for name in ("w", "b", "far", "bf16", "tied name;")})
    found = [
        pack(tensors, {"note": "a"}, _GRAPH),
        pack(quantize(floats, Quantization.parse("k-means:5:biases=3")), {}, _GRAPH),
        pack(quantize(floats, Quantization.parse("uniform:3:shared")), {}),
        pack({}, {}),
    ]
    two_four = {"w": torch.tensor([[0.0, 1, 2, 0, 3, 0, 0, 0]]).bfloat16(), "b": torch.zeros(3)}
    plain = {"layer.weight": sparse(9, 16, keep=0.1), "b": torch.ones(2)}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("safetensors", state), ("csr", plain), ("bitmask", plain), ("2:4", two_four)):
            path = Path(folder) / "x"
            FORMATS[name].write(Source(from_state(content)), path)
            found.append(path.read_bytes())
    return found


def mutated(files: list[bytes], seed: int, case: int) -> bytes:
    """Case number `case`: one of the files, changed."""
    chance = random.Random(f"{seed}/{case}")
    data = chance.choice(files)
    if case % 2:
        return _apply(chance, _PLAIN, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    is_ours = b'"format":"pomona ' in header
    payload = zlib.decompress(rest[32:], -15) if is_ours else rest
    where = chance.random()
    if where < 0.6:
        header = _apply(chance, _TEXT, header)
    if where > 0.5:
        payload = _apply(chance, _PLAIN + _PAYLOAD, payload)
    if not is_ours:
        return struct.pack("<Q", len(header)) + header + payload
    return _sealed(chance, header, payload)


def _apply(chance: random.Random, mutations: tuple[Callable[[random.Random, bytes], bytes], ...], data: bytes) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(mutations)(chance, data)
    return data


def _sealed(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    """A file with this header and payload whose offsets and checksum are right, nearly always."""
    coder = zlib.compressobj(1, zlib.DEFLATED, -15)
    stream = coder.compress(payload) + coder.flush()
    if chance.random() < 0.05:
        stream += bytes([chance.randrange(256)])  # something behind the end
    size = 32 + len(stream)
    if chance.random() < 0.95:
        header = re.sub(rb'"shape":\[\d+\],"data_offsets":\[0,\d+\]', _offsets(size), header)
    start = struct.pack("<Q", len(header)) + header
    return start + hashlib.sha256(start + stream).digest() + stream


def _offsets(size: int) -> bytes:
    return b'"shape":[%d],"data_offsets":[0,%d]' % (size, size)


def _flip(chance: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 30))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _append(chance: random.Random, data: bytes) -> bytes:
    return data + chance.randbytes(chance.choice((1, 8, 200)))


def _remove(chance: random.Random, data: bytes) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.choice((1, 2, 8)) :]


def _repeat(chance: random.Random, data: bytes) -> bytes:
    start, count = chance.randrange(len(data) + 1), chance.choice((1, 4, 40))
    return data[: start + count] + data[start:]


def _overwrite(chance: random.Random, data: bytes) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + bytes([chance.choice((0, 1, 127, 128, 254, 255))]) * 8 + data[start + 8 :]


def _length(chance: random.Random, data: bytes) -> bytes:
    """A length of the header that lies, or is big-endian."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    lies = (0, 1, length - 1, length + 1, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1)
    if chance.random() < 0.2:
        return struct.pack(">Q", length) + data[8:]
    return struct.pack("<Q", chance.choice(lies) % 2**64) + data[8:]


def _number(chance: random.Random, text: bytes) -> bytes:
    """One number of the header becomes another."""
    numbers = list(re.finditer(rb"\d+", text))
    if not numbers:
        return text
    match = chance.choice(numbers)
    old = int(match[0][:18])
    new = chance.choice((0, 1, old + 1, old - 1, 2 * old, 255, 256, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**15))
    written = chance.choice((b"%d", b"%d", b"%d", b"0%d", b"-%d", b"%d.0", b"%de9")) % abs(new)
    return text[: match.start()] + written + text[match.end() :]


def _word(chance: random.Random, text: bytes) -> bytes:
    """One word of the header becomes another word of it, or something that should not be there."""
    words = list(re.finditer(rb"[A-Za-z0-9_.%~-]+|[^A-Za-z0-9_.%~-]", text))
    if not words:
        return text
    match = chance.choice(words)
    traps = (
        b"NaN",
        b"Infinity",
        b"null",
        b"[" * 3000,
        b'{"a":' * 300,
        b"%zz",
        b"%FF",
        b"x",
        b";",
        b" ",
        b"q0",
        b"F16",
        b"C64",
    )
    new = chance.choice((chance.choice(words)[0], chance.choice(traps), b"9" * 5000))
    return text[: match.start()] + new + text[match.end() :]


def _line(chance: random.Random, text: bytes) -> bytes:
    """Something between two separators twice, gone, or elsewhere."""
    parts = text.split(chance.choice((b";", b",", b" ")))
    separator = next((s for s in (b";", b",", b" ") if len(text.split(s)) == len(parts)), b";")
    i, j = chance.randrange(len(parts)), chance.randrange(len(parts))
    change = chance.randrange(3)
    if change == 0:
        parts.insert(i, parts[j])
    elif change == 1:
        del parts[i]
    else:
        parts[i], parts[j] = parts[j], parts[i]
    return separator.join(parts)


def _bomb(chance: random.Random, data: bytes) -> bytes:
    """Much that compresses to little."""
    start = chance.randrange(len(data) + 1)
    return data[:start] + bytes([chance.choice((0, 255))]) * chance.choice((10_000, 3_000_000)) + data[start:]


_PLAIN = (_flip, _cut, _append, _remove, _repeat, _overwrite, _length)
_PAYLOAD = (_flip, _overwrite, _bomb)
_TEXT = (_number, _number, _word, _line, _flip, _cut)


def check(path: Path) -> str:
    """Read a file that may be anything; says how it went. Raises whatever should not have come."""
    try:
        state = load(path, max_bytes=MAX_BYTES)
    except FormatError as error:
        assert str(path) in str(error), error
        return "refused"
    assert sum(t.numel() * t.element_size() for t in state.values()) <= 2 * MAX_BYTES
    try:
        file = read(path, max_bytes=MAX_BYTES)
    except FormatError:
        return "read"  # of another format
    for stored in file.tensors.values():
        _check_sound(stored)
    if file.graph is None:
        return "read"
    try:
        Graph.from_json(file.graph).shapes(file.tensors)
    except ValueError:
        return "read, but its graph refused"
    return "read"


def _check_sound(stored: Stored) -> None:
    if isinstance(stored.value, np.ndarray):
        return
    places = stored.value.positions
    assert len(places) == len(stored.value.values)
    assert (np.diff(places) > 0).all()
    assert not len(places) or 0 <= places[0] <= places[-1] < stored.value.size


def run(cases: range, seed: int, folder: Path) -> Counter[str]:
    """Check these cases; a wrong one is named."""
    files, path = seeds(), folder / "case"

    def once(case: int) -> str:
        path.write_bytes(mutated(files, seed, case))
        return check(path)

    return fuzzing.run(cases, seed, once, seconds=SECONDS, clock=time.perf_counter)


def main() -> None:
    parser = fuzzing.parser(__doc__)
    parser.add_argument("--out", type=Path, help="with --only: where to write its bytes")
    options = parser.parse_args()
    if options.only is not None and options.out:
        options.out.write_bytes(mutated(seeds(), options.seed, options.only))
    cases = fuzzing.cases_of(options)
    files = seeds()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + (256 << 20)  # more would be a MemoryError, which is a failure
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        told = run(cases, options.seed, Path(folder))
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {"seed": options.seed, "cases": len(cases), **told, "seconds": round(seconds, 1), "files": len(files)}
        )
    )


if __name__ == "__main__":
    main()
