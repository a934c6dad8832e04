"""A model run on the side: what it is called with, and no trace of the run left behind."""

from __future__ import annotations

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
