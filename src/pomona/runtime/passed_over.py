"""Weights with zeros that :func:`pomona.compile` leaves alone, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pomona.pages.text import table

_SHOWN = 4  # of one kind, line by line; more are one line


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A weight with zeros in a layer that has no sparse counterpart.

    Attributes:
        name: of the weight, as in the state dict.
        kind: the class of the module that owns it.
        num_weights: how many weights it holds.
        num_zeros: how many of them are zero.
        reason: why its zeros are of no use here.
    """

    name: str
    kind: str
    num_weights: int
    num_zeros: int
    reason: str


def passed_over(model: nn.Module, taken: Sequence[nn.Module]) -> tuple[PassedOver, ...]:
    """Every weight of two or more dimensions with zeros that none of the modules in ``taken`` owns, each once."""
    seen = {id(weight) for layer in taken for weight in layer.parameters()}
    found = []
    for path, owner in model.named_modules():
        for leaf, weight in owner.named_parameters(path, recurse=False):
            if id(weight) in seen or weight.ndim < 2 or not weight.is_floating_point() or weight.is_meta:
                continue
            seen.add(id(weight))
            num_zeros = weight.numel() - int(torch.count_nonzero(weight))
            if num_zeros:
                found.append(PassedOver(leaf, type(owner).__name__, weight.numel(), num_zeros, _reason(owner)))
    return tuple(found)


def _reason(owner: nn.Module) -> str:
    kind = type(owner).__name__
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "its rows are looked up, not multiplied"
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return f"torch's own {kind} multiplies with it"
    if isinstance(owner, nn.MultiheadAttention):
        return f"{kind} multiplies with it itself"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return f"there is no sparse operation for a {kind}"
    if kind == "Conv1D" and type(owner).__module__.startswith("transformers."):
        return "stored as (inputs, outputs), for which there is no sparse operation; an equal nn.Linear is taken"
    return f"only a {kind} knows what it computes with it"


def listing(found: Sequence[PassedOver]) -> str:
    """A table of them; where there are many of a kind, one line for all."""
    groups: dict[tuple[str, str], list[PassedOver]] = {}
    for one in found:
        groups.setdefault((one.kind, one.reason), []).append(one)
    rows: list[tuple[str, ...]] = [("not looked at", "zeros", "of a", "why")]
    for group in groups.values():
        rows += [_row([one]) for one in group] if len(group) <= _SHOWN else [_row(group)]
    return table(rows, right=(1,))


def _row(group: Sequence[PassedOver]) -> tuple[str, ...]:
    name = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
    zeros = sum(one.num_zeros for one in group) / sum(one.num_weights for one in group)
    return name, f"{100 * zeros:.1f}%", group[0].kind, group[0].reason
