"""What a Pruner saves, and whether what was saved fits the one that is to go on with it."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from pomona.method import Method
from pomona.weight import Weight

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


def check_state(
    state: Mapping[str, Any],
    method: Method,
    shapes: Mapping[str, list[int]],
    shapes_of: Mapping[str, Mapping[str, torch.Size]],
    shared: Mapping[str, torch.Size],
) -> None:
    """ValueError unless ``state`` is of this method, these weights and state of these shapes; names what differs.

    Args:
        state: as loaded.
        method: the Pruner's own.
        shapes: weight -> its shape.
        shapes_of: weight -> the shapes of its state.
        shared: the shapes of the network's state.
    """
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
    for part, wanted in (("state", shapes_of.keys()), ("pruned", shapes.keys())):
        if state[part].keys() != wanted:
            differing = ", ".join(sorted(state[part].keys() ^ wanted))
            raise ValueError(f"the state is damaged: {part!r} lacks, or has beside the weights in scope, {differing}")
    for name, wanted_of in shapes_of.items():
        _check_tensors(name, state["state"][name], wanted_of)
    _check_tensors("the network", state["shared"], shared)


def _check_tensors(name: str, found: Mapping[str, Any], wanted: Mapping[str, torch.Size]) -> None:
    if wanted.keys() != found.keys():
        raise ValueError(f"the state of {name} has {sorted(found)}, expected {sorted(wanted)}")
    for key, shape in wanted.items():
        if shape != found[key].shape:
            raise ValueError(f"{key} of {name} has shape {tuple(found[key].shape)} in the state")


def whole_shapes(w: Weight) -> dict[str, torch.Size]:
    """Shapes of the state of a weight, as it is saved: of the whole tensor."""
    return {key: w.shape if t.ndim and t.shape == w.value.shape else t.shape for key, t in w.state.items()}


def describe(value: Any) -> str:
    """A method with its hyper-parameters, or one of these: equal text for equal ones, in every process."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return repr(float(value))
    anonymous: Any = object.__repr__  # shows an address, which no other run has
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: Mapping[str, Any] = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif type(value).__repr__ is anonymous:
        fields = getattr(value, "__dict__", {})
    else:
        return repr(value)
    return f"{type(value).__name__}({', '.join(f'{k}={describe(v)}' for k, v in fields.items())})"
