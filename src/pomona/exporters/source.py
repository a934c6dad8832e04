"""What every format is made from, and torch's tensors as numpy arrays and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pomona.example import Example
from pomona.files.safetensors import DTYPES
from pomona.files.sparse import bits
from pomona.files.stored import FLOATS, Stored

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF = {dtype: name for name, dtype in _TORCH.items()}


@dataclass(frozen=True, eq=False)
class Source:
    """What is to be written.

    Attributes:
        tensors: the state dict.
        metadata: strings about it: pomona (our version), sparsity, scope, method, ...
        graph: JSON of `pomona.runtime.graph`, if known.
        model: the module, where one was given; formats of whole networks need it.
        example: what it is called with, ditto.
        dynamic_shapes: as given to `export`.
    """

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    graph: Mapping[str, Any] | None = None
    model: nn.Module | None = None
    example: Example | None = None
    dynamic_shapes: Any = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        format: a key of `FORMATS`.
        num_bytes: its size.
        dense_bytes: of all tensors as they are in memory, tied ones once.
        sparsity: fraction of zeros of the floating-point tensors of two or more dimensions.
        accuracy_before: what `evaluate` gave before quantisation, if it was asked.
        accuracy_after: the same after it.
        notes: what else is to be known about the file, such as its inputs with the dimensions that are free.
    """

    path: Path
    format: str
    num_bytes: int
    dense_bytes: int
    sparsity: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        """How many times smaller than the dense tensors the file is."""
        return self.dense_bytes / self.num_bytes

    def __str__(self) -> str:
        text = (
            f"{self.path}: {self.num_bytes:,} bytes ({self.format}), {_relation(self.compression)} the "
            f"{self.dense_bytes:,} of the dense tensors; {100 * self.sparsity:.2f} % of the weights are zero"
        )
        if self.accuracy_before is not None and self.accuracy_after is not None:
            change = self.accuracy_after - self.accuracy_before
            text += f"\naccuracy {self.accuracy_before:.2f} before quantisation, {self.accuracy_after:.2f} after"
            text += f" ({change:+.2f})"
        return "\n".join([text, *self.notes])


def _relation(compression: float) -> str:
    if compression >= 1.05:
        return f"{compression:.1f} times smaller than"
    if compression > 0.95:
        return "about as large as"
    return f"{1 / compression:.1f} times as large as" if compression else "beside"


def from_state(state: Mapping[str, Any]) -> dict[str, Stored]:
    """A state dict as numpy arrays that share its memory where they can; tied tensors are one object.

    Raises:
        ValueError: an entry is not a plain tensor; says which, and what to do.
    """
    seen: dict[tuple[Any, ...], Stored] = {}
    tensors = {}
    for name, value in state.items():
        _check(name, value)
        memory = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else (name,)
        if memory not in seen:
            seen[memory] = Stored(_NAME_OF[value.dtype], _to_numpy(value))
        tensors[name] = seen[memory]
    return tensors


def _check(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor; a file holds tensors only")
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} is sharded over ranks; gather the state dict first, e.g. with torch.distributed.checkpoint."
            "state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and export that"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; only dense (strided) tensors can be exported: to_dense()")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values")
    if value.dtype not in _NAME_OF:
        raise ValueError(f"{name} is of {value.dtype}, which no safetensors file can hold; convert it first")


def _to_numpy(value: Tensor) -> NDArray[Any]:
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    dtype = DTYPES[_NAME_OF[value.dtype]]
    if value.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        plain = plain.view(torch.uint16 if value.dtype == torch.bfloat16 else torch.uint8)
    return np.asarray(plain.numpy()).astype(dtype, copy=False)


def to_tensors(tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    """A state dict of dense tensors on the CPU; tied ones share their memory."""
    made: dict[int, Tensor] = {}
    for stored in tensors.values():
        if id(stored) not in made:
            array = np.array(stored.dense(), order="C")  # torch wants memory of its own that may be written to
            made[id(stored)] = torch.from_numpy(array).view(_TORCH[stored.dtype])
    return {name: made[id(stored)] for name, stored in tensors.items()}


def is_weight(stored: Stored) -> bool:
    """Whether a tensor counts for sparsity: a floating-point one of two or more dimensions."""
    return stored.dtype in FLOATS and len(stored.shape) >= 2


def sparsity(tensors: Mapping[str, Stored]) -> float:
    """Fraction of zeros of the weights, tied ones counted once; -0.0 is a zero."""
    weights = {id(s): s for s in tensors.values() if is_weight(s)}.values()
    total = sum(s.dense().size for s in weights)
    nonzero = sum(int(np.count_nonzero(nonzeros(s))) for s in weights)
    return 1 - nonzero / total if total else 0.0


def nonzeros(stored: Stored) -> NDArray[np.bool_]:
    """Which elements are not zero; -0.0 is."""
    array = stored.dense()
    if stored.dtype == "BF16":
        return np.asarray((array & 0x7FFF) != 0)
    return np.asarray(bits(array) << 1 != 0 if array.dtype.kind == "f" else array != 0)
