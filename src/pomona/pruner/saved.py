"""What a Pruner saves, and whether what was saved fits the one that is to go on with it."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
from collections.abc import Mapping
from typing import Any

import torch

from pomona.distributed import like, local, take
from pomona.method import Method
from pomona.pruner.placement import Placement
from pomona.pruner.zeros import Frozen, Zeros
from pomona.weight import Weight, Weights

FORMAT = 2  # of Pruner.state_dict()
_KEYS = {
    "method",
    "num_steps",
    "num_skipped",
    "hardened_at",
    "accuracy",
    "is_hardened",
    "cuts",
    "shapes",
    "shared",
    "state",
    "pruned",
}


def collect(method: Method, placement: Placement, zeros: Zeros) -> dict[str, Any]:
    """What the method remembers and what is pruned; the tensors are the live ones."""
    parameters = placement.parameters()
    # Present from the start: distributed checkpoints restore only the keys that they are shown.
    pruned = zeros.pruned or {n: torch.zeros_like(local(p), dtype=torch.bool) for n, p in parameters.items()}
    return {
        "format": FORMAT,
        "method": describe(method),
        "is_hardened": zeros.are_written,
        "cuts": {name: _cut_of(name, zeros, placement) for name in parameters},
        "shapes": placement.shapes(),
        "state": {
            name: {key: like(parameters[name], t) if t.ndim else t for key, t in state.items()}
            for name, state in placement.state.items()
        },
        "shared": dict(placement.shared),
        "pruned": {name: like(parameters[name], mask) for name, mask in pruned.items()},
    }


def _cut_of(name: str, zeros: Zeros, placement: Placement) -> float | list[int]:
    """The largest magnitude that was cut; of a frozen weight, of which nothing was or will be cut, since when and why.

    Under one key, because distributed checkpoints of earlier versions have no other.
    """
    if zeros.are_written:
        return list(zeros.frozen[name]) if name in zeros.frozen else zeros.cuts.get(name, 0.0)
    return [placement.frozen_since[name], 0] if name in placement.frozen_since else 0.0


def restore(state: Mapping[str, Any], method: Method, placement: Placement) -> Zeros:
    """Fill what the method remembers from a saved state, and return what is pruned there.

    Raises:
        ValueError: the state is of another method, or of other weights; nothing has been changed then.
    """
    weights = placement.weights()
    is_first = isinstance(state, Mapping) and state.get("format") == 1
    if is_first:
        state = {**state, "format": FORMAT, "shared": {}}  # before methods had state of the whole network
    try:
        check_state(state, method, placement.shapes(), weights)
    except ValueError as error:
        if not is_first:
            raise
        raise ValueError(
            f"this state was saved by an earlier version of Pomona (format 1) and cannot be converted ({error}); "
            f"finish that run with the version that began it"
        ) from None
    parameters = placement.parameters()
    for w in weights:
        for key, mine in w.state.items():
            mine.copy_(take(state["state"][w.name][key], parameters[w.name], w.shard))
    for key, mine in weights.shared.items():
        mine.copy_(take(state["shared"][key], mine, None))
    cuts = {name: cut for name, cut in state["cuts"].items() if not isinstance(cut, list)}
    frozen = {name: Frozen(*cut) for name, cut in state["cuts"].items() if isinstance(cut, list)}
    placement.frozen_since = {name: one.since for name, one in frozen.items()}
    if not state["is_hardened"]:
        return Zeros()
    masks = {w.name: take(state["pruned"][w.name], parameters[w.name], w.shard) for w in weights}
    pruned = {w.name: masks[w.name].to(w.value.device, torch.bool, copy=True) for w in weights}
    return Zeros(pruned, {**dict.fromkeys(frozen, 0.0), **cuts}, frozen)


def check_state(state: Mapping[str, Any], method: Method, shapes: Mapping[str, list[int]], weights: Weights) -> None:
    """ValueError unless ``state`` is of this method and these weights; names what differs."""
    if not isinstance(state, Mapping):
        raise TypeError(f"the state of a Pruner is what state_dict() returned, got {type(state).__name__}")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"this is not the state of a Pruner of this version (format {state.get('format')!r}, expected {FORMAT})"
        )
    missing = _KEYS - state.keys()
    if missing:
        raise ValueError(f"the state lacks {', '.join(sorted(missing))}; it was not made by state_dict()")
    mine, theirs = describe(method), state["method"]
    if mine != theirs:
        raise ValueError(f"the state is of {theirs}, but this Pruner has {mine}; make it with the same method")
    for name in [*shapes, *state["shapes"]]:
        if shapes.get(name) != state["shapes"].get(name):
            raise ValueError(
                f"the state does not fit this model and scope: {name} has shape {state['shapes'].get(name)} "
                f"there and {shapes.get(name)} here (names begin with module. or _orig_mod. in a wrapped model)"
            )
    for part in ("state", "pruned"):
        if state[part].keys() != shapes.keys():
            differing = ", ".join(sorted(state[part].keys() ^ shapes.keys()))
            raise ValueError(f"the state is damaged: {part!r} lacks, or has beside the weights in scope, {differing}")
    for w in weights:
        _check_tensors(w.name, state["state"][w.name], _whole_shapes(w))
    _check_tensors("the network", state["shared"], {key: t.shape for key, t in weights.shared.items()})


def _check_tensors(name: str, found: Mapping[str, Any], wanted: Mapping[str, torch.Size]) -> None:
    if wanted.keys() != found.keys():
        raise ValueError(f"the state of {name} has {sorted(found)}, expected {sorted(wanted)}")
    for key, shape in wanted.items():
        if shape != found[key].shape:
            raise ValueError(f"{key} of {name} has shape {tuple(found[key].shape)} in the state")


def _whole_shapes(w: Weight) -> dict[str, torch.Size]:
    """Shapes of the state of a weight as it is saved: of the whole tensor."""
    return {key: w.shape if t.ndim and t.shape == w.value.shape else t.shape for key, t in w.state.items()}


def check_method_state(method: Method, weights: Weights) -> None:
    """ValueError if the method remembers something that cannot be saved."""
    for w in weights:
        for key, t in w.state.items() if w.shard else ():
            if t.ndim and t.shape != w.value.shape:
                raise ValueError(
                    f"{type(method).__name__} remembers {key} of shape {tuple(t.shape)} for {w.name}, which "
                    f"is sharded over ranks; state that can be saved then is of the shape of w.value "
                    f"({tuple(w.value.shape)} here) or of no dimension"
                )


def describe(value: Any) -> str:
    """A method with its hyper-parameters, or one of these: equal text for equal ones, in every process."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return repr(float(value))
    if isinstance(value, functools.partial):
        arguments = [*map(describe, value.args), *(f"{key}={describe(v)}" for key, v in value.keywords.items())]
        return f"{describe(value.func)}({', '.join(arguments)})"
    if isinstance(value, types.MethodType):
        return f"{describe(value.__self__)}.{value.__name__}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return value.__qualname__
    anonymous: Any = object.__repr__  # shows an address, which no other run has
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: Mapping[str, Any] = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif type(value).__repr__ is anonymous:
        fields = getattr(value, "__dict__", {})
    else:
        return repr(value)
    return f"{type(value).__name__}({', '.join(f'{k}={describe(v)}' for k, v in fields.items())})"
