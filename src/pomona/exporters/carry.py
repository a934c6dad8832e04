"""What stays of the tensors of a model that has lost channels."""

from __future__ import annotations

from torch import Tensor

Indices = list[Tensor | None]
"""Of a tensor that becomes smaller: the indices that stay along each dimension, None for all."""


def cut(tensor: Tensor, indices: Indices) -> Tensor:
    """What stays of a tensor; a dimension of size 1, as of a factored moment, is left as it is."""
    for dim, index in enumerate(indices):
        if index is not None and (tensor.shape[dim] > 1 or len(index) == 0):
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
