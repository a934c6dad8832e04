"""Code of the user's own, named as ``MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def find_function(source: str) -> Callable[..., Any]:
    """The function that ``MODULE:FUNCTION`` names, in a module that Python finds from the current folder.

    Raises:
        ValueError: there is no such module, or no such function in it.

    Example:
        >>> find_function("math:sqrt")(9)
        3.0
    """
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise ValueError(f"a function is named as MODULE:FUNCTION (my_package.nets:make), got {source!r}")
    if os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot take {name!r} from module {place!r}: {error}") from None
    return function


def make_module(source: str) -> nn.Module:
    """The torch module that the function named ``MODULE:FUNCTION`` returns; it is called without arguments.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    from torch import nn  # here, so that a process of `pomona bench` without a torch module does without torch

    module = find_function(source)()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{source} must return a torch.nn.Module, got {type(module).__name__}")
    return module
