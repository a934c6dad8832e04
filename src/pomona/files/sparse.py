"""A sparse tensor without torch: where its values are, and what they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """A tensor of which only some elements are stored; the others are zero.

    Attributes:
        shape: the shape of the whole tensor.
        positions: int64, the row-major positions of the stored elements; strictly ascending.
        values: the stored elements, of any dtype; bfloat16, which numpy lacks, as uint16 bit patterns.

    Example:
        >>> sparse = Sparse.from_dense(np.array([[0.0, 3.0], [0.0, 0.0], [5.0, 0.0]]))
        >>> sparse.positions.tolist(), sparse.values.tolist()
        ([1, 4], [3.0, 5.0])
        >>> starts, columns = sparse.csr(3)
        >>> starts.tolist(), columns.tolist()
        ([0, 1, 1, 2], [1, 0])
    """

    shape: tuple[int, ...]
    positions: NDArray[np.int64]
    values: NDArray[Any]

    @classmethod
    def from_dense(cls, array: NDArray[Any]) -> Sparse:
        """Store all elements except zeros. A zero has only zero bits: -0.0 is stored, so that nothing is lost."""
        flat = np.ascontiguousarray(array).reshape(-1)
        positions = np.flatnonzero(bits(flat)).astype(np.int64, copy=False)
        return cls(array.shape, positions, flat[positions])

    @property
    def size(self) -> int:
        """Number of elements, stored or not."""
        return math.prod(self.shape)

    def dense(self) -> NDArray[Any]:
        """The whole tensor, zeros included."""
        whole = np.zeros(self.size, self.values.dtype)
        whole[self.positions] = self.values
        return whole.reshape(self.shape)

    def csr(self, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Compressed sparse rows of the tensor as a matrix of `rows` rows and `size / rows` columns.

        Returns:
            starts: int64, rows + 1; row r owns values[starts[r] : starts[r + 1]].
            columns: int32, ascending in each row.

        Raises:
            ValueError: `rows` does not divide the size, or a column does not fit into int32.
        """
        if rows < 0 or (self.size % rows if rows else self.size):
            raise ValueError(f"a tensor of shape {self.shape} has no {rows} rows of equal length")
        width = self.size // rows if rows else 0
        if width > 2**31:
            raise ValueError(f"rows of {width:,} elements do not fit into int32 columns")
        starts = np.searchsorted(self.positions, np.arange(rows + 1, dtype=np.int64) * width).astype(np.int64)
        columns = self.positions % width if width else self.positions
        return starts, columns.astype(np.int32)


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory as unsigned integers; for complex numbers, whether any bit is set."""
    if array.dtype.kind == "c":
        halves = array.view(f"u{array.itemsize // 2}").reshape(*array.shape, 2)
        return np.asarray(halves.any(axis=-1))
    return array.view(f"u{array.itemsize}")
