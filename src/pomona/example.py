"""A model run on the side: what it is called with, what it returns, and no trace of the run left behind."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True, eq=False)
class Example:
    """What a model is called with: ``model(*args, **kwargs)``.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> Example:
        """Read an example as users give it.

        A dictionary holds the keyword arguments. A tuple or a list holds the positional arguments; if its last element
        is a dictionary, that holds the keyword arguments. Anything else, a tensor above all, is the only argument. So
        a model whose only argument is a dictionary takes ``({...}, {})``, and one whose only argument is a list
        ``([...],)``.

        Raises:
            TypeError: a name of an argument is no string.

        Example:
            >>> Example.of((1, None, {"mask": 2}))
            Example(args=(1, None), kwargs={'mask': 2})
        """
        if isinstance(example, Example):
            return example
        args: tuple[Any, ...]
        if isinstance(example, Mapping):
            args, kwargs = (), dict(example)
        elif not isinstance(example, (tuple, list)):
            args, kwargs = (example,), {}
        elif example and isinstance(example[-1], Mapping):
            args, kwargs = tuple(example[:-1]), dict(example[-1])
        else:
            args, kwargs = tuple(example), {}
        for name in kwargs:
            if not isinstance(name, str):
                raise TypeError(
                    f"a dictionary in an example holds keyword arguments by name, but one name is {name!r}; a "
                    "dictionary that is an argument itself goes in front of another, empty one: ({...}, {})"
                )
        return cls(args, kwargs)

    def run(self, model: Callable[..., Any]) -> Any:
        """What the model returns, computed without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)

    def named(self, model: nn.Module) -> dict[str, Any]:
        """The arguments by the names that ``model.forward`` has for them, in its order.

        Raises:
            TypeError: they do not fit ``forward``.
        """
        try:
            return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)
        except TypeError as error:
            raise TypeError(f"the example does not fit {type(model).__name__}.forward: {error}") from None

    def in_order(self, model: nn.Module) -> Example:
        """The same with the keyword arguments in the order of ``model.forward``."""
        names = list(self.named(model))
        return Example(self.args, dict(sorted(self.kwargs.items(), key=lambda item: _place(item[0], names))))

    def tensors(self) -> list[Tensor]:
        """All tensors, also those inside of lists and dictionaries, in the order of the arguments."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def map(self, change: Callable[[Tensor], Any]) -> Example:
        """The same with every tensor changed."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Example(args, kwargs)


def _place(name: str, names: list[str]) -> int:
    return names.index(name) if name in names else len(names)  # the latter: taken by **kwargs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; every part of it has its own mode again afterwards."""
    modes = {part: part.training for part in model.modules()}
    try:
        yield model.eval()
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def randomness_kept() -> Iterator[None]:
    """The global random states of torch (on the CPU), numpy and Python are as before afterwards."""
    torchs, numpys, pythons = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torchs)
        np.random.set_state(numpys)
        random.setstate(pythons)


@dataclass(frozen=True, slots=True)
class Returned:
    """What a model returned.

    Attributes:
        tensors: by name: the key of a dictionary, the field of a dataclass, the place in a tuple, joined by ``_``.
        left_out: name -> class of what is no tensor, such as the cache of a language model; None is nothing.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, outputs: Any) -> Returned:
        """Sort what a call of a model gave."""
        found = cls()
        for name, value in _parts("", outputs):
            if isinstance(value, Tensor):
                found.tensors[name] = value
            elif value is not None:
                found.left_out[name] = type(value).__name__
        return found


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    inside: dict[Any, Any]
    if isinstance(value, Mapping):
        inside = dict(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = dict(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        inside = dict(enumerate(value))
    else:
        yield name, value
        return
    for key, part in inside.items():
        yield from _parts(f"{name}_{key}" if name else str(key), part)


@contextmanager
def returning_tensors(model: nn.Module) -> Iterator[dict[str, str]]:
    """For a while the model returns a tensor, or a tuple of all its tensors, as exporters take it.

    Yields the names and classes of what that leaves out (:class:`Returned`), known once the model has been called.
    """
    own, forward = vars(model).get("forward"), model.forward
    left_out: dict[str, str] = {}

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        outputs = forward(*args, **kwargs)
        returned = Returned.of(outputs)
        left_out.update(returned.left_out)
        return outputs if isinstance(outputs, Tensor) else tuple(returned.tensors.values())

    vars(model)["forward"] = returning
    try:
        yield left_out
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own
