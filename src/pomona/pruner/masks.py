"""Putting the masks of one model on another, such as the weights that it began with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pomona.distributed import local, reshard, shards_of, take
from pomona.pruner.zeros import zero_


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write exact zeros into the weights of ``model`` outside of the masks, in place.

    ``pomona.hold(model, optimizer)`` then keeps these zeros while the model trains. With the weights that a pruned
    network began with, this is a lottery ticket.

    Args:
        model: any model with parameters of these names and shapes; the ``module.`` and ``_orig_mod.`` of wrappers do
            not matter. If it is sharded, call this on every rank.
        masks: name -> boolean tensor of the parameter's shape, True = kept, as ``Pruner.masks()`` returns them. Other
            parameters stay as they are.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: the model has no parameter of a name, its shape differs, or two names of one tied parameter have
            masks that differ; names it. Nothing has been changed then.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> model.weight.data = torch.tensor([[0.5, -1.0, 2.0]])
        >>> apply_masks(model, {"weight": torch.tensor([[True, False, True]])})
        >>> model.weight.tolist()
        [[0.5, 0.0, 2.0]]
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of names to tensors, as Pruner.masks() returns, got {masks!r}")
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: _find(name, mask, parameters, type(model).__name__) for name, mask in masks.items()}
    first_of: dict[int, str] = {}
    for name, parameter in found.items():
        first = first_of.setdefault(id(parameter), name)
        if first != name and not torch.equal(masks[first], masks[name]):
            raise ValueError(f"{first} and {name} are one tied parameter here, and their masks differ; leave one out")
    shards = shards_of(found)
    for name, parameter in found.items():
        value = local(parameter)
        zero_(value, ~take(masks[name], parameter, shards.get(name)).to(value.device))


def _plain(name: str) -> str:
    """The name without what DistributedDataParallel, AveragedModel and torch.compile put before a part of it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _find(name: str, mask: Tensor, parameters: Mapping[str, nn.Parameter], kind: str) -> nn.Parameter:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        raise TypeError(f"the mask of {name} must be a boolean tensor, True = kept, got {got}")
    parameter = parameters.get(name)
    if parameter is None:
        parameter = {_plain(other): p for other, p in parameters.items()}.get(_plain(name))
    if parameter is None:
        close = difflib.get_close_matches(name, list(parameters), n=3, cutoff=0.4)
        raise ValueError(f"{kind} has no parameter {name}{'; closest: ' if close else ''}{', '.join(close)}")
    if parameter.shape != mask.shape:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)} in {kind} and {tuple(mask.shape)} in the masks")
    return parameter
