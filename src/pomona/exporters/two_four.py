"""2:4: at most two of every four weights in a row are not zero, which is what sparse GPU kernels want.

A row is what is multiplied together: the inputs of a linear layer; of a convolution the input channels, at each place
of the kernel. Which dimension that is follows from the layer (`pomona.layout`); where it is not dimension 1, the
metadata say so under `inputs`: JSON, name -> dimension. In a state dict, which has no layers, it is dimension 1. Every
four weights become two values (`w.values`: the shape with the inputs halved, and last) and their two places from 0 to
3, ascending, of two bits each (`w.indices`, bytes): low bits first, the first four of a row before the next. That is
the logical order; a GPU library reorders it to its own. A -0.0 counts as zero and becomes 0.0.

Nothing is pruned here: a tensor that has zeros and is not 2:4 is an error that names the first violation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.exporters import layouts
from pomona.exporters.layouts import Parts, check
from pomona.exporters.source import Source, is_weight, nonzeros
from pomona.files.safetensors import FormatError, parse_json, read_metadata
from pomona.files.stored import Stored
from pomona.scope import layouts_of


def write(source: Source, path: Path) -> None:
    layouts_by_name = {} if source.model is None else layouts_of(source.model)
    inputs = {name: layout.inputs for name, layout in layouts_by_name.items() if name in source.tensors}
    split = {name: _split(name, stored, inputs.get(name, 1)) for name, stored in source.tensors.items()}
    if not any(split.values()):
        raise ValueError("no tensor is 2:4: the weights have no zeros; prune two of every four first")
    said = {name: dim for name, dim in inputs.items() if dim != 1 and split[name]}
    metadata = {"inputs": json.dumps(said, separators=(",", ":"))} if said else {}
    layouts.write(source, path, "2:4", lambda name, _: split[name], metadata)


def read(path: Path, max_bytes: int | None) -> dict[str, Stored]:
    inputs = _inputs(read_metadata(path), path)

    def join(name: str, shape: tuple[int, ...], values: NDArray[Any], indices: NDArray[Any]) -> NDArray[Any]:
        return _join(shape, inputs.get(name, 1), values, indices)

    return layouts.read(path, max_bytes, (".values", ".indices"), join)


def _inputs(metadata: Mapping[str, str], path: Path) -> dict[str, int]:
    inputs = parse_json(metadata.get("inputs", "{}").encode(), "its record of inputs")
    if not isinstance(inputs, dict) or not all(type(dim) is int and dim >= 0 for dim in inputs.values()):
        raise FormatError(f"{path}: its record of inputs is not an object of dimensions")
    return inputs


def _split(name: str, stored: Stored, inputs: int) -> Parts | None:
    if not is_weight(stored) or not math.prod(stored.shape):
        return None
    kept = np.moveaxis(nonzeros(stored), inputs, -1)
    if kept.all():
        return None
    _check(name, stored.shape, kept, inputs)
    groups = kept.reshape(-1, 4)
    # The two places that are kept; where fewer are, the first free ones join them, and everything stays ascending.
    places = np.sort(np.argsort(~groups, axis=1, kind="stable")[:, :2], axis=1)
    values = np.moveaxis(stored.dense(), inputs, -1).reshape(-1, 4)
    chosen = np.take_along_axis(values, places, axis=1)
    nibbles = (places[:, 0] | places[:, 1] << 2).astype(np.uint8)
    nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
    shape = (*kept.shape[:-1], kept.shape[-1] // 2)
    return {
        ".values": (stored.dtype, chosen.reshape(shape)),
        ".indices": ("U8", nibbles[0::2] | nibbles[1::2] << 4),
    }


def _check(name: str, shape: tuple[int, ...], kept: NDArray[np.bool_], inputs: int) -> None:
    if shape[inputs] % 4:
        raise ValueError(
            f"{name} of shape {shape} has zeros but cannot be 2:4: its rows of {shape[inputs]} are no multiple of 4; "
            "leave it dense (exclude it from the scope)"
        )
    counts = kept.reshape(*kept.shape[:-1], -1, 4).sum(-1)
    wrong = np.argwhere(counts > 2)
    if len(wrong):
        first = tuple(wrong[0].tolist())
        place: list[int | slice] = list(first[:-1])
        place.insert(inputs, slice(4 * first[-1], 4 * first[-1] + 4))
        written = ", ".join(f"{p.start}:{p.stop}" if isinstance(p, slice) else str(p) for p in place)
        raise ValueError(
            f"{name}[{written}] has {int(counts[first])} weights that are not zero; 2:4 allows two of every four "
            f"({len(wrong):,} of {counts.size:,} groups of {name} have more)"
        )


def _join(shape: tuple[int, ...], inputs: int, values: NDArray[Any], indices: NDArray[Any]) -> NDArray[Any]:
    check(len(shape) > max(1, inputs) and shape[inputs] % 4 == 0, f"a tensor of shape {shape} cannot be 2:4")
    moved = (*shape[:inputs], *shape[inputs + 1 :], shape[inputs])
    count = math.prod(shape) // 4
    check(values.size == 2 * count and indices.dtype == np.uint8, "values do not fit the shape")
    check(indices.shape == ((count + 1) // 2,), "indices do not fit the shape")
    nibbles = np.stack([indices & 15, indices >> 4], axis=1).reshape(-1)[:count]
    first, second = nibbles & 3, nibbles >> 2
    check(bool((first < second).all()), "the places of four values do not ascend")
    whole = np.zeros((count, 4), values.dtype)
    np.put_along_axis(whole, np.stack([first, second], axis=1).astype(np.int64), values.reshape(-1, 2), axis=1)
    return np.ascontiguousarray(np.moveaxis(whole.reshape(moved), -1, inputs))
