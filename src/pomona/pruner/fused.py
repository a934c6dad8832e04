"""The step of ``torch.optim.SGD`` on masked gradients, in one pass over weights, gradients and momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from pomona.method import Method, Weight
from pomona.native import core
from pomona.selection import CPUSelection, JoinedSelection, Selection

_ALL = -1  # ties


def check_fused(optimizer: Optimizer, method: Method, weights: Sequence[Weight]) -> None:
    """ValueError, with the reason and the way out, if ``fused_step_`` cannot work."""
    reason = _why_not(optimizer, method, weights)
    if reason:
        raise ValueError(f"fused=True {reason}; leave it out: the numbers are the same, at up to 1.5 times the cost")


def _why_not(optimizer: Optimizer, method: Method, weights: Sequence[Weight]) -> str:
    if method.granularity != "weight":
        return f"drops the gradients of single weights, and granularity={method.granularity!r} those of groups"
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


def fused_step_(optimizer: Optimizer, weights: Mapping[Tensor, Weight], selection: Selection) -> list[Tensor]:
    """What ``optimizer.step()`` does once gradients outside of the selection are dropped, bit for bit.

    For the weights, and for all of its other parameters that the core can take, so that it has nothing left to do for
    them. Momentum is kept where the optimizer keeps it: its ``state_dict()`` is what it would be.

    Returns:
        The parameters that have made their step; they are not to make another.
    """
    place_of = {id(parameter): i for i, parameter in enumerate(weights)}
    thresholds, ties = _cuts(selection)
    done: list[Tensor] = []
    for group in optimizer.param_groups:
        rounding = _rounding(group)
        if rounding is None or group["maximize"] or group["differentiable"]:
            continue  # none of the weights is in it: check_fused has seen to that
        pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
        pairs = [(p, grad) for p, grad in pairs if id(p) in place_of or _fits(p, grad)]
        moving = [p for p, _ in pairs]
        is_first, buffers = _momentum(optimizer, group, moving)
        places = [place_of.get(id(p)) for p in moving]
        core.gsm_step_(
            moving,
            [
                grad.contiguous() for _, grad in pairs
            ],  # the core walks through memory: of weights it is the order of all
            buffers,
            groups=[_scalars(group)],
            group_of=[0] * len(moving),
            thresholds=[0 if i is None else thresholds[i] for i in places],
            num_ties=[_ALL if i is None else ties[i] for i in places],
            is_first=is_first,
            rounding=rounding,
        )
        done += moving
    return done


def _fits(parameter: Tensor, grad: Tensor) -> bool:
    return (
        parameter.dtype is grad.dtype is torch.float32
        and parameter.is_cpu
        and grad.is_cpu
        and grad.layout is torch.strided
        and parameter.is_contiguous()
        and not grad.is_neg()
    )


def _momentum(
    optimizer: Optimizer, group: Mapping[str, Any], parameters: Sequence[Tensor]
) -> tuple[list[bool], list[Tensor | None]]:
    """Whether it is yet to be set, and the buffers; None without momentum."""
    if group["momentum"] == 0:
        return [False] * len(parameters), [None] * len(parameters)
    states = [optimizer.state[p] for p in parameters]
    is_first = []
    for state, parameter in zip(states, parameters, strict=True):
        buffer = state.get("momentum_buffer")
        is_first.append(buffer is None)
        if buffer is None:
            state["momentum_buffer"] = torch.empty_like(parameter)
        elif not buffer.is_contiguous():  # torch lays out the first one as the gradient was
            state["momentum_buffer"] = buffer.contiguous()
    return is_first, [state["momentum_buffer"] for state in states]


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
