"""Plain safetensors: every tensor dense, for any reader of safetensors. Tied tensors are written under each name."""

from __future__ import annotations

from pathlib import Path

from pomona.exporters.source import Source
from pomona.files import safetensors
from pomona.files.stored import Stored


def write(source: Source, path: Path) -> None:
    tensors = {name: (stored.dtype, stored.dense()) for name, stored in source.tensors.items()}
    safetensors.write(path, safetensors.pack(tensors, {"format": "pt", **source.metadata}))


def read(path: Path, max_bytes: int | None) -> dict[str, Stored]:
    _, tensors = safetensors.read(path, max_bytes=max_bytes)
    return {name: Stored(dtype, array) for name, (dtype, array) in tensors.items()}
