"""Which dimensions of a network's inputs are free in a file, and sizes at which that is tried out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pomona.example import Example


@dataclass(frozen=True, slots=True)
class Freedom:
    """The dimensions that may be free, for each tensor of an example.

    Attributes:
        dims: for each tensor of :meth:`Example.tensors`.
        says: what is true of the file then, if less is free than was hoped for.
    """

    dims: tuple[tuple[int, ...], ...]
    says: str = ""

    def is_none(self) -> bool:
        """Whether everything is fixed."""
        return not any(self.dims)

    def enlarged(self, example: Example) -> Example:
        """The example with a batch of at least two, for torch takes a dimension of one for a fixed one."""
        if self.is_none() or _batch_of(example) != 1:
            return example
        return example.map(lambda x: resized(x, 0, 2) if _is_batched(x, 1) else x)

    def dynamic_shapes(self, model: nn.Module, example: Example) -> Any:
        """The same for ``torch.export``, by the names of the model's arguments."""
        if self.is_none():
            return None
        left = iter(self.dims)
        return tree_map(
            lambda x: dict.fromkeys(next(left), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None,
            example.named(model),
        )


def freedoms(example: Example) -> list[Freedom]:
    """What is tried, the most first: batch and lengths; the batch alone; nothing.

    A length is every dimension but the batch, of two or more, of a tensor that holds integers or has at most three
    dimensions. Those that the model computes with as constants (features, channels) turn out as fixed in the end.
    """
    batch, tensors = _batch_of(example), example.tensors()
    first = [(0,) if _is_batched(x, batch) else () for x in tensors]
    lengths = [
        tuple(d for d in range(x.ndim) if x.shape[d] > 1 and (x.ndim <= 3 or not x.is_floating_point()))
        for x in tensors
    ]
    found = [
        Freedom(tuple(tuple(sorted({*a, *b})) for a, b in zip(first, lengths, strict=True))),
        Freedom(tuple(first), "only the batch is free"),
        Freedom(((),) * len(tensors), "every dimension is fixed to that of the example"),
    ]
    return [freedom for i, freedom in enumerate(found) if freedom.dims not in [other.dims for other in found[:i]]]


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with another size: its first entries, over and over."""
    return x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])


def _batch_of(example: Example) -> int:
    """The size of the batch: the first dimension of the first tensor that has one."""
    return next((x.shape[0] for x in example.tensors() if x.ndim), 0)


def _is_batched(x: Tensor, batch: int) -> bool:
    return x.ndim > 0 and x.shape[0] == batch > 0


# The same in the file.


def settle(proto: Any, program: Any, example: Example) -> None:
    """Give the dimensions of the file's values numbers where they are fixed, and names that say what they are."""
    fixed = {
        str(symbol): int(limits.lower)
        for symbol, limits in program.range_constraints.items()
        if limits.lower == limits.upper
    }
    dims = [dim for value in _values(proto) for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    for dim in dims:
        text = str(fixed.get(dim.dim_param, dim.dim_param))
        if text.isdecimal():
            dim.dim_value = int(text)
    names = _names(proto, example)
    for dim in dims:
        if dim.dim_param:
            dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), dim.dim_param)


def _values(proto: Any) -> list[Any]:
    return [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]


def _shapes(proto: Any) -> list[list[str | int]]:
    """Of the inputs: a number where a dimension is fixed, a name or a formula where it is free."""
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in proto.graph.input]


def _names(proto: Any, example: Example) -> dict[str, str]:
    """Of torch's symbols: that of the batch, and others in the order of their appearance."""
    batch, names, num_lengths = _batch_of(example), {}, 0
    for x, shape in zip(example.tensors(), _shapes(proto), strict=True):
        for d, symbol in enumerate(shape):
            if isinstance(symbol, int) or not symbol.isidentifier() or symbol in names:
                continue
            if d == 0 and _is_batched(x, batch):
                names[symbol] = "batch"
            else:
                num_lengths += 1
                names[symbol] = "length" if num_lengths == 1 else f"length_{num_lengths}"
    return names


def describe(proto: Any) -> str:
    """The inputs and their dimensions, such as ``input_ids (batch, length)``."""
    return ", ".join(
        f"{value.name} ({', '.join(str(d) for d in shape)})"
        for value, shape in zip(proto.graph.input, _shapes(proto), strict=True)
    )


def has_free_batch(proto: Any) -> bool:
    """Whether some input's first dimension is free."""
    return any(isinstance(shape[0], str) for shape in _shapes(proto) if shape)


def others(proto: Any, example: Example) -> list[Example]:
    """The example at other sizes of what is free in the file: one sample of shorter texts, one more of longer ones."""
    shapes = _shapes(proto)
    if not any(isinstance(d, str) for shape in shapes for d in shape):
        return []
    batch = _batch_of(example)
    return [_at(example, shapes, batch + 1, 1), _at(example, shapes, 1, -1)]


def _at(example: Example, shapes: list[list[str | int]], batch: int, more: int) -> Example:
    left, old = iter(shapes), _batch_of(example)

    def change(x: Tensor) -> Tensor:
        for d, free in enumerate(next(left)):
            if isinstance(free, str) and d == 0 and _is_batched(x, old):
                x = resized(x, 0, batch)
            elif isinstance(free, str):
                factor = re.match(r"(\d+)\*", free)  # such as 4*length, if the model cuts it into fours
                x = resized(x, d, max(1, x.shape[d] + more * int(factor[1] if factor else 1)))
        return x

    return example.map(change)
