"""What a file `x.pomona.safetensors` holds: tensors, the values that they share, strings about them, and a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona.files.safetensors import DTYPES
from pomona.files.sparse import Sparse

FORMAT = "pomona 1"
RESERVED = ("format", "tensors", "books", "graph")
FLOATS = ("F64", "F32", "F16", "BF16")  # the dtypes that `to_float32` and `from_float32` take
DIGEST_BYTES = 32  # of a SHA-256
MAX_LOW_BITS = 40  # of a gap, stored apart


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """The few values that the weights of one or more tensors share.

    Attributes:
        kind: "table", any values, or "uniform", multiples of a step without 0: -n/2 .. -1, 1 .. n/2.
        dtype: how a table stores its values, F32 or F16; a uniform codebook stores its step, as F32.
        values: 1 to 256 float32 values; a weight is stored as an index into them.
    """

    kind: str
    dtype: str
    values: NDArray[np.float32]

    @classmethod
    def table(cls, values: NDArray[Any], dtype: str = "F32") -> Codebook:
        """These values, rounded to `dtype`."""
        with np.errstate(over="ignore"):
            return cls("table", dtype, np.asarray(values).astype(DTYPES[dtype]).astype(np.float32))

    @classmethod
    def uniform(cls, step: float, count: int) -> Codebook:
        """`count` (an even number) multiples of `step`: those nearest to zero, without zero itself."""
        half = count // 2
        multiples = np.concatenate([np.arange(-half, 0), np.arange(1, half + 1)]).astype(np.float32)
        with np.errstate(all="ignore"):
            return cls("uniform", "F32", multiples * np.float32(step))

    def of(self, dtype: str) -> NDArray[Any]:
        """The values as elements of a tensor of this dtype."""
        return from_float32(self.values, dtype)

    def raw(self) -> bytes:
        """The bytes that a file stores: the values of a table, or the step."""
        if self.kind == "table":
            return self.values.astype(DTYPES[self.dtype]).tobytes()
        return self.values[len(self.values) // 2 :][:1].astype("<f4").tobytes()  # 1 times the step


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: a key of `safetensors.DTYPES`.
        value: its elements, dense or sparse; bfloat16 and float8 as bit patterns.
        storage: how values are written: "" as they are; "F16" for 32-bit and 64-bit floats that half precision
            represents exactly; or a `Codebook` with all values that are not zero.
    """

    dtype: str
    value: NDArray[Any] | Sparse
    storage: str | Codebook = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dense(self) -> NDArray[Any]:
        """All elements, zeros included."""
        return self.value.dense() if isinstance(self.value, Sparse) else self.value


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """What a file holds.

    Attributes:
        tensors: by name, in the order of the state dict; tied ones are one object under several names.
        metadata: strings about the whole file: pomona (the version that wrote it), scope, sparsity, method, ...
        graph: what the network computes, as `pomona.runtime.graph` describes it, or None.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)
    graph: dict[str, Any] | None = None


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 numbers as elements of a float dtype, rounded to nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(all="ignore"):
            return values.astype(DTYPES[dtype])
    pattern = np.ascontiguousarray(values).view(np.uint32)
    rounded = (pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16
    return np.where(np.isnan(values), pattern >> 16 | 0x40, rounded).astype(np.uint16)


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Elements of a float dtype as float32 numbers, exactly except for those of 64 bits."""
    if dtype == "BF16":
        pattern: NDArray[np.uint32] = values.astype(np.uint32) << np.uint32(16)
        return pattern.view(np.float32)
    with np.errstate(all="ignore"):
        return values.astype(np.float32)
