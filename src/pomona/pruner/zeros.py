"""Exact zeros, and keeping them: through momentum, Adam, weight decay and copies of the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pomona.distributed import Shard, local, reshard, sum_counts
from pomona.method import Method
from pomona.native import core
from pomona.ops import PIECE
from pomona.scope import Scope
from pomona.weight import Weight, Weights

if TYPE_CHECKING:
    from pomona.pruner import Pruner


@torch.no_grad()
def zero_(value: Tensor, pruned: Tensor) -> Tensor:
    """Write exact +0.0 where ``pruned`` is True, in place, even over NaN."""
    return value.masked_fill_(pruned, 0.0)


@torch.no_grad()
def zero_all_(values: Sequence[Tensor], pruned: Sequence[Tensor]) -> None:
    """``zero_`` each tensor, without a word from a device to the host."""
    if _fit_core(values, pruned):
        core.zero_(values, pruned)
        return
    for value, mask in zip(values, pruned, strict=True):
        zero_(value, mask)


@torch.no_grad()
def cut_(values: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[float]:
    """``zero_`` each tensor and return the largest magnitude that it lost, 0 where nothing is pruned."""
    if _fit_core(values, pruned):
        return core.zero_(values, pruned)
    largest = []
    for value, mask in zip(values, pruned, strict=True):
        largest.append(largest_among(value, mask))
        zero_(value, mask)
    return largest


def _fit_core(values: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
    return core.is_available() and all(core.fits_mask(v, mask) for v, mask in zip(values, masks, strict=True))


@torch.no_grad()
def largest_among(value: Tensor, chosen: Tensor) -> float:
    """The largest magnitude where ``chosen`` is True, 0 where nowhere; a piece at a time."""
    pieces = zip(torch.split(value.reshape(-1), PIECE), torch.split(chosen.reshape(-1), PIECE), strict=True)
    maxima = [piece.abs().masked_fill_(~mask, 0.0).max() for piece, mask in pieces if piece.numel()]
    return float(torch.stack(maxima).max()) if maxima else 0.0


@torch.no_grad()
def zero_copy_(copy: nn.Module, pruned: Mapping[str, Tensor]) -> None:
    """Write the zeros of a pruned model into a copy of it, such as an exponential moving average.

    An average of zeros stays zero, so once is enough. Parameters are found by name, with or without the
    ``module.`` that ``AveragedModel`` and ``DistributedDataParallel`` put in front. Of a sharded model each rank
    zeroes its blocks of a copy that is sharded alike.
    """
    for name, value in same_names(copy, pruned).items():
        zero_(value, pruned[name].to(value.device))


def same_names(copy: nn.Module, pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's blocks of the copy's weights, by the names of the pruned model, whose blocks are of their shapes."""
    reshard(copy)
    parameters = dict(copy.named_parameters(remove_duplicate=False))  # tied ones under each of their names
    found = {}
    for name, mask in pruned.items():
        parameter = next(
            (parameters[n] for n in (name, f"module.{name}", name.removeprefix("module.")) if n in parameters), None
        )
        if parameter is None or local(parameter).shape != mask.shape:
            have = "no such parameter" if parameter is None else f"shape {tuple(local(parameter).shape)}"
            raise ValueError(
                f"{type(copy).__name__} is not a copy of the pruned model: {name} has shape {tuple(mask.shape)} "
                f"there and {have} here"
            )
        found[name] = local(parameter)
    return found


def count_revived(copy: nn.Module, pruned: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, int]:
    """Name -> number of weights that should be zero in ``copy`` and are not, where there are any, on all ranks."""
    found = same_names(copy, pruned)
    here = [(value[pruned[name].to(value.device)] != 0).sum() for name, value in found.items()]
    counts = sum_counts(here, [shards.get(name) for name in found])
    return {name: count for name, count in zip(found, counts, strict=True) if count}


@dataclass(frozen=True, slots=True)
class _Zeros(Method):
    """What is zero now stays zero."""

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        return [w.value != 0 for w in weights]

    def why(self, w: Weight, kept: int, density: float) -> str:
        return "what was not zero when hold() was called"


def hold(model: nn.Module, optimizer: Optimizer, *, scope: Scope | None = None) -> Pruner:
    """Keep the zeros that ``model`` has now while ``optimizer`` trains the rest, whoever made them.

    At each step the gradients of zero weights are dropped and, after the step, exact zeros are written again, so
    that neither momentum nor Adam's moments nor weight decay can revive a weight. Works with every optimizer that
    evaluates its gradients once a step. One byte per weight.

    Args:
        model: a sparse model.
        optimizer: the one that trains it.
        scope: where zeros count; default: every trainable weight of two or more dimensions.

    Returns:
        The Pruner that holds them; its ``verify()`` proves it and its ``state_dict()`` resumes it.

    A tensor that is zero throughout, such as a head initialised to zero, will stay so: this is warned of.

    Raises:
        ValueError: there is not one zero in scope. (When resuming, load the model's state first.)

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> model.weight.data = torch.tensor([[0.5, 0.0, 2.0]])
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> pruner = hold(model, optimizer)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> model.weight[0, 1].item()
        0.0
    """
    from pomona.pruner import Pruner

    pruner = Pruner(model, optimizer, _Zeros(), scope=scope)
    report = pruner.harden()
    if report.nonzero == report.total:
        pruner.detach()
        raise ValueError(
            "hold() found no zero in the weights in scope; prune the model first (when "
            "resuming: load its state first), or widen the scope"
        )
    empty = [layer.name for layer in report.layers if not layer.nonzero]
    if empty:
        warnings.warn(
            f"{', '.join(empty)} is zero throughout and will stay so; Scope(exclude=[...]) lets it train",
            stacklevel=2,
        )
    return pruner
