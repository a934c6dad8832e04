"""CSR: compressed sparse rows, as `torch.sparse_csr_tensor` and scipy take them, in a safetensors file.

A tensor `w` of two or more dimensions, as the matrix of its first dimension and the rest, becomes `w.crow_indices`
(rows + 1), `w.col_indices` (both int32, or int64 where that is too small) and `w.values`, if that is smaller than the
dense one. The shape stands in the metadata under `shapes`. At least 32 bits go into each position: this is for tools
that want CSR.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.exporters import layouts
from pomona.exporters.layouts import Parts, check, integers
from pomona.exporters.source import Source, is_weight
from pomona.files.sparse import Sparse
from pomona.files.stored import Stored


def write(source: Source, path: Path) -> None:
    layouts.write(source, path, "csr", _split)


def read(path: Path, max_bytes: int | None) -> dict[str, Stored]:
    return layouts.read(path, max_bytes, (".values", ".crow_indices", ".col_indices"), _join)


def _split(name: str, stored: Stored) -> Parts | None:
    if not is_weight(stored) or not math.prod(stored.shape):
        return None
    sparse = Sparse.from_dense(stored.dense())
    starts, columns = sparse.csr(stored.shape[0])
    kind, dtype = ("I32", np.int32) if len(columns) < 2**31 else ("I64", np.int64)
    parts = {
        ".crow_indices": (kind, starts.astype(dtype)),
        ".col_indices": (kind, columns.astype(dtype)),
        ".values": (stored.dtype, sparse.values),
    }
    return parts if layouts.is_smaller(parts, stored) else None


def _join(
    name: str, shape: tuple[int, ...], values: NDArray[Any], starts: NDArray[Any], columns: NDArray[Any]
) -> NDArray[Any]:
    check(len(shape) >= 1, "a scalar has no rows")
    rows, width = layouts.matrix_shape(shape)
    starts, columns = integers(starts), integers(columns)
    check(starts.shape == (rows + 1,) and values.shape == columns.shape == (starts[-1],), "rows and values do not fit")
    check(starts[0] == 0 and bool((np.diff(starts) >= 0).all()), "rows do not follow each other")
    check(columns.size == 0 or bool(columns.min() >= 0 and columns.max() < width), "a column is out of range")
    positions = np.repeat(np.arange(rows), np.diff(starts)) * width + columns
    check(bool((np.diff(positions) > 0).all()), "columns of a row do not ascend")
    return Sparse(shape, positions, values).dense()
