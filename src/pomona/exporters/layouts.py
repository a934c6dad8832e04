"""What the formats share that store several arrays in the place of one tensor, in a safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.exporters.source import Source
from pomona.files import safetensors
from pomona.files.safetensors import DTYPES, FormatError
from pomona.files.stored import Stored

Parts = dict[str, tuple[str, NDArray[Any]]]
"""Suffix -> dtype and array."""


def write(
    source: Source,
    path: Path,
    name: str,
    split: Callable[[str, Stored], Parts | None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write each tensor as the parts that `split` makes of it, or dense where it makes none.

    The metadata say under `shapes` what was split: JSON, name -> shape.
    """
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, stored in source.tensors.items():
        parts = split(key, stored)
        if parts is None:
            parts = {"": (stored.dtype, stored.dense())}
        else:
            shapes[key] = stored.shape
        for suffix, part in parts.items():
            if key + suffix in tensors:
                raise ValueError(f"{key} would be stored as {key + suffix!r}, but a tensor has this name; rename one")
            tensors[key + suffix] = part
    said = {"format": name, **source.metadata, "shapes": json.dumps(shapes, separators=(",", ":"))}
    safetensors.write(path, safetensors.pack(tensors, {**said, **(metadata or {})}))


def read(
    path: Path, max_bytes: int | None, suffixes: tuple[str, ...], join: Callable[..., NDArray[Any]]
) -> dict[str, Stored]:
    """Undo `write`.

    Args:
        suffixes: of the parts; the first is the one whose dtype is the tensor's.
        join: the dense array from its name, its shape and the parts; raises ValueError if they do not fit together.
    """
    metadata, tensors = safetensors.read(path, max_bytes=max_bytes)
    found: dict[str, Stored] = {}
    try:
        shapes = _shapes(metadata)
        dense = sum(math.prod(shape) * tensors[k + suffixes[0]][1].itemsize for k, shape in shapes.items())
        limit = max(1 << 30, 1000 * path.stat().st_size) if max_bytes is None else max_bytes
        if dense > limit:
            raise FormatError(f"its tensors would take {dense:,} bytes, more than max_bytes={limit:,}")
        for name, shape in shapes.items():
            parts = [tensors.pop(name + suffix) for suffix in suffixes]
            found[name] = Stored(parts[0][0], join(name, shape, *(array for _, array in parts)))
    except KeyError as error:
        raise FormatError(f"{path}: it has no tensor {error}") from None
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    return found | {name: Stored(dtype, array) for name, (dtype, array) in tensors.items()}


def _shapes(metadata: dict[str, str]) -> dict[str, tuple[int, ...]]:
    shapes = safetensors.parse_json(metadata.get("shapes", "{}").encode(), "its record of shapes")
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list)
        and len(shape) <= safetensors.MAX_NDIM
        and all(type(size) is int and 0 <= size <= 2**53 for size in shape)
        for shape in shapes.values()
    ):
        raise FormatError("its record of shapes is not an object of lists of sizes")
    return {name: tuple(shape) for name, shape in shapes.items()}


def check(claim: bool, message: str) -> None:
    if not claim:
        raise FormatError(message)


def is_smaller(parts: Parts, stored: Stored) -> bool:
    """Whether the parts take fewer bytes than the dense tensor."""
    return sum(array.nbytes for _, array in parts.values()) < math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """First dimension, and all others together."""
    return shape[0], math.prod(shape[1:])


def integers(array: NDArray[Any]) -> NDArray[np.int64]:
    check(array.dtype.kind in "iu", f"positions have dtype {array.dtype}, not integers")
    return array.astype(np.int64)
