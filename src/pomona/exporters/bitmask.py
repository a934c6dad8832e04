"""Bitmask: the layout `sparse-bitmask` of compressed-tensors (of its versions before 0.15, which dropped it).

A tensor `layer.weight` of two or more dimensions becomes four: `layer.shape` (int64), `layer.compressed` (the values,
in row-major order), `layer.bitmask` (uint8; the last dimension packed to bits, the lowest bit first) and
`layer.row_offsets` (int64, for each row along the last dimension the number of values before it). It takes one
bit per weight at any sparsity, so it is for tools that want the layout. Weights without a zero, and tensors not called
weight, stay dense.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.exporters import layouts
from pomona.exporters.layouts import check, integers
from pomona.exporters.source import Source, is_weight
from pomona.files import safetensors
from pomona.files.safetensors import FormatError
from pomona.files.sparse import bits
from pomona.files.stored import Stored

_SUFFIXES = ("compressed", "bitmask", "row_offsets", "shape")


def write(source: Source, path: Path) -> None:
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, stored in source.tensors.items():
        parts = _split(stored) if name.endswith(".weight") and is_weight(stored) else None
        named = {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in (parts or {}).items()}
        for key, part in (named or {name: (stored.dtype, stored.dense())}).items():
            if key in tensors or (named and key in source.tensors):
                raise ValueError(f"{name} would be stored as {key!r}, but a tensor has this name; rename one")
            tensors[key] = part
    safetensors.write(path, safetensors.pack(tensors, {"format": "bitmask", **source.metadata}))


def _split(stored: Stored) -> layouts.Parts | None:
    dense = stored.dense()
    kept = bits(dense) != 0
    if kept.all():
        return None
    counts = kept.sum(-1, dtype=np.int64).reshape(-1)
    return {
        "compressed": (stored.dtype, dense[kept]),
        "bitmask": ("U8", np.packbits(kept, axis=-1, bitorder="little")),
        "row_offsets": ("I64", (np.cumsum(counts) - counts).reshape(kept.shape[:-1])),
        "shape": ("I64", np.array(stored.shape, np.int64)),
    }


def read(path: Path, max_bytes: int | None) -> dict[str, Stored]:
    _, tensors = safetensors.read(path, max_bytes=max_bytes)
    found = {}
    try:
        for key in [key for key in tensors if key.endswith(".bitmask")]:
            prefix = key.removesuffix("bitmask")
            parts = [tensors.pop(prefix + suffix) for suffix in _SUFFIXES]
            found[f"{prefix}weight"] = Stored(parts[0][0], _join(*(array for _, array in parts)))
    except KeyError as error:
        raise FormatError(f"{path}: it has no tensor {error}") from None
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return found | {name: Stored(dtype, array) for name, (dtype, array) in tensors.items()}


def _join(values: NDArray[Any], mask: NDArray[Any], offsets: NDArray[Any], shape_array: NDArray[Any]) -> NDArray[Any]:
    check(shape_array.ndim == 1 and 1 <= shape_array.size <= safetensors.MAX_NDIM, "a shape is not a short list")
    shape = tuple(integers(shape_array).tolist())
    check(min(shape) >= 0 and mask.dtype == np.uint8, "a shape is negative, or a mask not of bytes")
    check(mask.shape == (*shape[:-1], (shape[-1] + 7) // 8), "a mask does not fit its shape")
    kept = np.unpackbits(mask, axis=-1, count=shape[-1], bitorder="little").astype(bool)
    counts = kept.sum(-1, dtype=np.int64).reshape(-1)
    check(values.shape == (int(counts.sum()),), "values do not fit the mask")
    check(np.array_equal(integers(offsets).reshape(-1), np.cumsum(counts) - counts), "row offsets do not fit the mask")
    whole = np.zeros(math.prod(shape), values.dtype)
    whole[kept.reshape(-1)] = values
    return whole.reshape(shape)
