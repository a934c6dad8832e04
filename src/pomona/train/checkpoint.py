"""Checkpoints that survive a kill at any moment, a damaged file and a full disk.

A checkpoint is one file, so that nothing can come apart: `checkpoint-00001200-0123456789abcdef.pt` holds
step 1200, and the first 16 hex digits of the sha256 of its content are in its name. The content is what
`torch.save` writes; `torch.load(path, weights_only=True)` opens it without this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

_NAME = re.compile(r"checkpoint-([0-9]{8,})-([0-9a-f]{16})\.pt")
_LEFTOVER = re.compile(rf"\.{_NAME.pattern}\.tmp")


class Checkpoints:
    """Atomic, checksummed checkpoints of one run; keeps the newest two.

    An older checkpoint is deleted only when the new one is durable and the others to be kept have been read back
    and are whole, so the folder holds `keep + 1` of them for a moment. Only one process at a time may save.

    Args:
        folder: the folder of the run; created by the first `save`. Files with other names are left alone.
        keep: how many whole checkpoints to keep, at least 1.

    Example:
        >>> import tempfile
        >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
        >>> checkpoints.load() is None
        True
        >>> path = checkpoints.save({"model": {"weight": torch.ones(2)}}, step=3)
        >>> checkpoints.load()
        ({'model': {'weight': tensor([1., 1.])}}, 3)
    """

    damaged: list[str]
    """What the last `load` had to skip: one sentence per file, with the reason."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = folder
        self.keep = keep
        self.damaged = []
        self._passed_over: set[Path] = set()

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write `state` as the newest checkpoint, then delete all but the newest `keep`.

        Args:
            state: tensors, numbers, str, bool and None, in dicts, lists and tuples to any depth.
            step: at least 0, and not before that of a whole checkpoint in the folder; the same step is replaced.

        Raises:
            TypeError: something in `state` would not load with `weights_only=True`; the message says where it is.
            OSError: the file could not be written, for example because the disk is full. Earlier checkpoints
                are not lost; the message names the last good one.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        _check_loadable(state)
        for path in self._newest_first():
            if _step(path) > step and self._is_whole(path):
                raise ValueError(
                    f"step {step} is behind {path.name} in {self.folder}: "
                    "load() it and continue from there, or use another folder"
                )

        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        path = self.folder / f"checkpoint-{step:08d}-{_digest(content)}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_leftovers()
        try:
            write_atomically(path, content)
        except OSError as error:
            good = next(filter(self._is_whole, self._newest_first()), None)
            rest = f"{good.name} is still good" if good else "there is no earlier checkpoint"
            raise OSError(error.errno, f"{error.strerror}; {rest}") from error
        self._passed_over.discard(path)
        self._delete_older_than(path)
        return path

    def load(self) -> tuple[dict[str, Any], int] | None:
        """The newest whole checkpoint as `(state, step)`, on the CPU, or None where there is none.

        Damaged files are skipped and listed in `damaged`; they stay until `save` reaches their step.

        Raises:
            ValueError: there are checkpoints, but none is whole. Silently starting over would hide lost work.
        """
        self.damaged = []
        for path in self._newest_first():
            reason = _damage(path)
            if not reason:
                try:
                    return torch.load(path, map_location="cpu", weights_only=True), _step(path)
                except Exception as error:  # torch.load documents no closed list
                    reason = f"torch.load(weights_only=True) raises {type(error).__name__}"
            self.damaged.append(f"{path.name} was passed over: {reason}")
            self._passed_over.add(path)
        if self.damaged:
            reasons = "; ".join(self.damaged)
            raise ValueError(f"delete {self.folder} to start again, no checkpoint in it is whole: {reasons}")
        return None

    def _newest_first(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        # A kill after a step is rewritten and before its old file is deleted leaves both: the later one counts.
        return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)

    def _is_whole(self, path: Path) -> bool:
        return path not in self._passed_over and not _damage(path)

    def _delete_leftovers(self) -> None:
        """Delete the temporary files of a killed process; before the write, because they take space."""
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                with contextlib.suppress(OSError):  # in a read-only folder the write itself says why
                    path.unlink()

    def _delete_older_than(self, saved: Path) -> None:
        kept = {_step(saved)}
        for path in self._newest_first():
            if path == saved or _step(path) > _step(saved):  # ahead of us are only damaged ones
                continue
            if len(kept) < self.keep and _step(path) not in kept and self._is_whole(path):
                kept.add(_step(path))
                continue
            path.unlink()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that a kill or a power cut leaves the old file or the new one, never a part.

    Raises:
        OSError: with the original errno; names the path, the size and the reason. The old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        message = f"could not write {path} ({len(data):,} bytes): {error.strerror}"
        raise OSError(error.errno, message) from error
    finally:
        with contextlib.suppress(OSError):  # after os.replace there is none
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and needs no fsync of it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _damage(path: Path) -> str:
    """Why the file does not match its name; empty if it does."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if path.stem.endswith(_digest(content)):
        return ""
    return f"the sha256 of its {len(content):,} bytes begins with {_digest(content)}, unlike its name"


def _check_loadable(value: Any, place: str = "") -> None:
    """Raise TypeError unless `torch.load(weights_only=True)` will open `value`.

    Types are compared exactly: a subclass, such as numpy.float64 of float, is pickled under its own name.
    """
    kind = type(value)
    parts: Iterable[tuple[Any, Any]] = ()
    if kind in (dict, OrderedDict):
        for key in value:
            _check_loadable(key, f"the key {key!r} of {place or 'the state'}")
        parts = value.items()
    elif kind in (list, tuple):
        parts = enumerate(value)
    elif kind in (Tensor, nn.Parameter):
        parts = vars(value).items()  # attributes hung on a tensor are pickled with it
    elif kind not in (NoneType, bool, int, float, complex, str):
        raise TypeError(
            f"cannot save {place or 'the state'}, a {kind.__module__}.{kind.__qualname__}: "
            "a checkpoint holds tensors, numbers, str, bool and None in dicts, lists and tuples"
        )
    for name, part in parts:
        _check_loadable(part, f"{place}.{name}" if place else str(name))
