"""`x.pomona.safetensors`: sparse tensors near the entropy limit; docs/file-format.md."""

from __future__ import annotations

from pathlib import Path

from pomona.exporters.source import Source
from pomona.files import pack, unpack
from pomona.files.stored import Stored


def write(source: Source, path: Path) -> None:
    pack.write(path, source.tensors, source.metadata, source.graph)


def read(path: Path, max_bytes: int | None) -> dict[str, Stored]:
    file = unpack.read(path, max_bytes=max_bytes)
    if file.graph is None:
        return file.tensors
    return {name: stored for name, stored in file.tensors.items() if "@" not in name}  # the others the graph added
