"""The step of ``torch.optim.SGD`` on masked gradients, in one pass over weights, gradients and momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from pomona import core
from pomona.method import Weight
from pomona.selection import CPUSelection, JoinedSelection, Selection


def check_fused(optimizer: Optimizer, weights: Sequence[Weight]) -> None:
    """ValueError, with the reason and the way out, if ``fused_step_`` cannot work."""
    reason = _why_not(optimizer, weights)
    if reason:
        raise ValueError(f"fused=True {reason}; leave it out: the numbers are the same, in about twice the time")


def _why_not(optimizer: Optimizer, weights: Sequence[Weight]) -> str:
    if not core.is_available():
        return f"needs the compiled core: {core.why_not()}"
    if type(optimizer) is not SGD:
        return f"is the step of torch.optim.SGD, not of {type(optimizer).__name__}"
    for w in weights:
        if w.shard is not None:
            return "is for weights that one process holds, and these are sharded"
        if not (w.value.is_cpu and w.value.dtype is torch.float32 and w.value.is_contiguous()):
            return f"needs contiguous float32 weights on a CPU, and {w.name} is not"
        for key in ("maximize", "differentiable"):
            if w.group[key]:
                return f"cannot go along with SGD({key}=True)"
        if _rounding(w.group) is None:
            return "finds no way to round as this torch does on this machine"
    return ""


def fused_step_(optimizer: Optimizer, weights: Mapping[Tensor, Weight], selection: Selection) -> None:
    """What ``optimizer.step()`` does to these weights once gradients outside of the selection are dropped, bit for bit.

    Momentum is kept where the optimizer keeps it, so that its ``state_dict()`` is what it would be. Weights without a
    gradient in this step are passed over, as SGD does.
    """
    thresholds, ties = _cuts(selection)
    moving = [(i, parameter, w) for i, (parameter, w) in enumerate(weights.items()) if w.moves]
    settings = {id(w.group): w.group for w in weights.values()}
    places = {key: place for place, key in enumerate(settings)}
    is_first, buffers = [], []
    for _, parameter, w in moving:
        state = optimizer.state[parameter]
        is_first.append(w.group["momentum"] != 0 and state.get("momentum_buffer") is None)
        if is_first[-1]:
            state["momentum_buffer"] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        buffers.append(state["momentum_buffer"] if w.group["momentum"] != 0 else None)
    roundings = {_rounding(group) for group in settings.values()}
    for rounding in roundings:
        assert rounding is not None  # or else check_fused has refused it
        mine = [j for j, (_, _, w) in enumerate(moving) if _rounding(w.group) == rounding]
        core.gsm_step_(
            [moving[j][2].value for j in mine],
            [moving[j][2].grad for j in mine],
            [buffers[j] for j in mine],
            groups=[_scalars(group) for group in settings.values()],
            group_of=[places[id(moving[j][2].group)] for j in mine],
            thresholds=[thresholds[moving[j][0]] for j in mine],
            num_ties=[ties[moving[j][0]] for j in mine],
            is_first=[is_first[j] for j in mine],
            rounding=rounding,
        )


def _cuts(selection: Selection) -> tuple[list[int], list[int]]:
    """Of each tensor the threshold, and how many of the scores equal to it stay."""
    if isinstance(selection, CPUSelection):
        return [selection.key] * len(selection.scores), selection.ties
    assert isinstance(selection, JoinedSelection)  # on a CPU there is no other
    parts = [(places, _cuts(part)) for places, part in selection.parts]
    found = {place: cut for places, cuts in parts for place, cut in zip(places, zip(*cuts, strict=True), strict=True)}
    return [found[i][0] for i in range(len(found))], [found[i][1] for i in range(len(found))]


def _rounding(group: Mapping[str, Any]) -> int | None:
    return core.sgd_rounding(fused=bool(group["fused"]))


def _scalars(group: Mapping[str, Any]) -> core.SGD:
    names = ("lr", "momentum", "dampening", "weight_decay")
    return core.SGD(**{name: float(group[name]) for name in names}, nesterov=bool(group["nesterov"]))
