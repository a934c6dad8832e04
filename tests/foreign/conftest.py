"""The packages of requirements.txt, for these tests only.

Ultralytics replaces functions of torch and Pillow when it is imported. Tests of other folders run in the same process,
so its functions are in place while a test of this folder runs, and ours otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest
import torch

from tests.foreign.packages import prepare

_REPLACED: list[tuple[Any, str]] = [(torch, "load"), (torch, "save"), (PIL.Image, "open")]
_ours = [getattr(module, name) for module, name in _REPLACED]
_theirs = list(_ours)

prepare()


def _put_back() -> None:
    for i, (module, name) in enumerate(_REPLACED):
        _theirs[i] = getattr(module, name)
        setattr(module, name, _ours[i])


def pytest_collection_finish() -> None:
    _put_back()  # modules of this folder import Ultralytics at their head


@pytest.fixture(autouse=True)
def as_ultralytics_wants_it() -> Iterator[None]:
    for (module, name), function in zip(_REPLACED, _theirs, strict=True):
        setattr(module, name, function)
    yield
    _put_back()
