"""The compiled library, which is optional: whether it is there, and what it uses of the machine. Torch is not needed.

``POMONA_CORE=0`` in the environment switches it off; ``portable``, ``avx2`` or ``avx512`` limit it to an instruction
set.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pomona._version import __version__

_ABI = 5  # POMONA_ABI of pomona.h
_ISAS = ("portable", "avx2", "avx512")

_is_off = False


def is_available() -> bool:
    """Whether the functions below can be called."""
    return not _is_off and _load()[0] is not None


def why_not() -> str | None:
    """Why the core is not available, in one clause; None if it is."""
    return "switched(False)" if _is_off else _load()[1]


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside the block the core is off (or on, where it is available); for tests and measurements."""
    global _is_off
    before, _is_off = _is_off, not on
    try:
        yield
    finally:
        _is_off = before


def isa() -> str:
    """The instruction set in use: ``portable``, ``avx2`` or ``avx512``."""
    return _ISAS[load().pomona_isa()]


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine and build have."""
    return _ISAS[: load().pomona_max_isa() + 1]


def use_isa(name: str) -> None:
    """Use another of ``isas()`` from now on, in the whole process; for tests and measurements."""
    if name not in isas():
        raise ValueError(f"the instruction set must be one of {', '.join(isas())} on this machine, got {name!r}")
    load().pomona_set_isa(_ISAS.index(name))


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library and None, or None and the reason."""

    wanted = os.environ.get("POMONA_CORE", "1")
    if wanted not in ("0", "1", *_ISAS):
        raise ValueError(f"POMONA_CORE must be 0, 1 or one of {', '.join(_ISAS)}, got {wanted!r}")
    if wanted == "0":
        return None, "POMONA_CORE=0"
    path = library_path()
    if not path.exists():
        return None, "it was not built (reinstall pomona where CMake and a C++ compiler are)"
    try:
        library = ctypes.CDLL(str(path))
        library.pomona_version.restype = ctypes.c_char_p
        built = library.pomona_version().decode(), library.pomona_abi()
    except (OSError, AttributeError) as error:
        return None, f"it cannot be loaded: {error}"
    if built != (__version__, _ABI):
        return None, f"it was built for pomona {built[0]} (interface {built[1]}); reinstall pomona"
    if wanted in _ISAS and library.pomona_set_isa(_ISAS.index(wanted)) != 0:
        raise ValueError(f"POMONA_CORE={wanted}: this machine or build does not have that instruction set")
    return library, None


def library_path() -> Path:
    """Where the library is, if it is built."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return Path(__file__).parent / f"_core{suffix}"


def load() -> ctypes.CDLL:
    """The library; RuntimeError where it was not built or cannot be loaded."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"pomona's compiled core is not available: {reason}")
    return library
