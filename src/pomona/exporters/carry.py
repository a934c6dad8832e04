"""An optimizer with what it remembers, carried over to a model that has lost channels."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

Optim = TypeVar("Optim", bound=Optimizer)
Indices = list[Tensor | None]
"""Of a tensor that becomes smaller: the indices that stay along each dimension, None for all."""


def cut(tensor: Tensor, indices: Indices) -> Tensor:
    """What stays of a tensor; a dimension of size 1, as of a factored moment, is left as it is."""
    for dim, index in enumerate(indices):
        if index is not None and (tensor.shape[dim] > 1 or len(index) == 0):
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def carry(optimizer: Optim, model: nn.Module, smaller: nn.Module, indices: Mapping[str, Indices]) -> Optim:
    """An optimizer of the same class for the smaller model.

    Args:
        optimizer: of the model; not changed.
        model: that it steps.
        smaller: the model without channels.
        indices: parameter -> what stays of it, if not all.
    """
    _check(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    carried = copy.copy(optimizer)  # of what pickle takes: without hooks, and without what a scheduler hung into it
    carried.state = defaultdict(dict)
    carried.param_groups = []
    _copy_others(optimizer, carried)
    for number, group in enumerate(optimizer.param_groups):
        params = []
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"optimizer must step parameters of the model that is shrunk alone, but group {number} has one of "
                    f"shape {tuple(p.shape)} that is not in it; shrink without optimizer=, and make a new one"
                )
            name = names[id(p)]
            params.append(smaller.get_parameter(name))
            if p in optimizer.state:
                carried.state[params[-1]] = {
                    key: _carried(x, p, indices.get(name), f"{type(optimizer).__name__}'s {key!r} of {name}")
                    for key, x in optimizer.state[p].items()
                }
        others = {key: copy.deepcopy(x) for key, x in group.items() if key != "params"}
        carried.param_groups.append({"params": params, **others})
    return carried


def _check(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS remembers all parameters as one vector, which cannot be carried over; make a new one")


def _copy_others(optimizer: Optimizer, carried: Optimizer) -> None:
    """Attributes of an optimizer that is not torch's own."""
    for name, value in vars(optimizer).items():
        if name in vars(carried) or callable(value) or name.startswith("_"):
            continue
        if any(isinstance(x, (Tensor, Optimizer)) for x in tree_leaves(value)):
            raise ValueError(
                f"{type(optimizer).__name__} keeps tensors in its attribute {name!r}, of which nothing is known; "
                "shrink without optimizer=, and make a new one"
            )
        setattr(carried, name, copy.deepcopy(value))


def _carried(x: Any, p: Tensor, indices: Indices | None, what: str) -> Any:
    if indices is None or isinstance(x, (bool, int, float, str)) or x is None:
        return copy.deepcopy(x)
    if isinstance(x, Tensor) and not x.ndim:
        return x.clone()
    if isinstance(x, Tensor) and x.ndim == p.ndim and all(a in (b, 1) for a, b in zip(x.shape, p.shape, strict=True)):
        return cut(x, indices).clone(memory_format=torch.preserve_format)
    form = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise ValueError(
        f"{what}, {form}, does not have an entry for each entry of the parameter of shape {tuple(p.shape)}, so it "
        "cannot be carried over; shrink without optimizer=, and make a new one"
    )
