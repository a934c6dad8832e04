"""Models that ``torch.compile`` has wrapped, and the plain names of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

_WRAPPED = "_orig_mod"  # what torch.compile(model) calls the model

Value = TypeVar("Value")


def plain(model: Any) -> Any:
    """The model itself, where it is wrapped as a whole."""
    while isinstance(model, nn.Module) and _WRAPPED in model._modules:
        model = model._modules[_WRAPPED]
    return model


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model without wrappers, of the whole and of parts; the parts are wrapped again afterwards.

    In between all names are plain, and nothing that is compiled runs.
    """
    inner: nn.Module = plain(model)
    wrapped = unwrap_(inner)
    try:
        yield inner
    finally:
        for parent, name, part in wrapped:
            parent._modules[name] = part


def unwrap_(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put what was wrapped in the place of the wrappers of parts, and return these with their parents and names."""
    wrapped = []
    for parent in list(model.modules()):
        for name, part in parent._modules.items():
            if part is not None and _WRAPPED in part._modules:
                wrapped.append((parent, name, part))
    for parent, name, part in wrapped:
        parent._modules[name] = plain(part)
    return wrapped


def plain_name(name: str) -> str:
    """The name that a weight has in the model itself.

    Example:
        >>> plain_name("_orig_mod.encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != _WRAPPED) if _WRAPPED in name else name


def plain_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict with plain names.

    Raises:
        ValueError: two tensors would have one name.
    """
    found = {plain_name(name): value for name, value in state.items()}
    if len(found) < len(state):
        names = [plain_name(name) for name in state]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the state dict holds {twice!r} twice, once with {_WRAPPED!r} in its name; leave one out")
    return found
