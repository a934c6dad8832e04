"""The folder of a run: which run it belongs to, whether one is training in it, and its rows of metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pomona.train.checkpoint import write_atomically
from pomona.train.recipe import Recipe
from pomona.zoo.data import Dataset

_LOCK_SECONDS = 0.3  # how long to wait for a process that only checks whether one is running


class FolderError(ValueError):
    """The folder cannot be used for this run."""


def commit_of_source() -> str | None:
    """The commit of the source tree that this package runs from, with "+" if files differ from it."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The complete rows; a full disk or a power cut may have cut off the last one."""
    rows = []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def identity_of(
    command: str, recipe: Recipe, data: Dataset, threads: int, device: str = "cpu", compiled: bool = False
) -> dict[str, Any]:
    """Everything that a bit-for-bit repeat of a run needs, for its manifest; a device is named by its kind only."""
    kind = device.partition(":")[0]
    special = {"device": kind if kind != "cpu" else None, "compiled": compiled or None}
    return {
        **{key: value for key, value in special.items() if value},
        "command": command,
        "recipe": base_of(recipe) if command == "base" else recipe.to_dict(),
        "data": data.description,
        "checksum": data.checksum,
        "threads": threads,
    }


def base_of(recipe: Recipe) -> dict[str, Any]:
    """Everything that the dense network of a recipe depends on; recipes that agree in it can share the network."""
    plain = recipe.to_dict()
    keys = ("model", "data", "batch_size", "seed", "validation", "precision", "base")
    held_out = recipe.progressive.validation if recipe.progressive else recipe.validation
    return {key: plain[key] for key in keys} | {"validation": held_out}


def claim(folder: Path, identity: dict[str, Any]) -> TextIO:
    """Make the folder this run's unless it already is; returns the lock that is held on it."""
    manifest, option = folder / "run.json", "--base" if identity["command"] == "base" else "--out"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            if any(path.name != f".{manifest.name}.tmp" for path in folder.iterdir()):  # left by a kill
                raise FolderError(f"{folder} is not empty and holds no run; name another with {option}")
            write_atomically(manifest, json.dumps(identity, indent=2).encode())
    except OSError as error:
        raise FolderError(f"cannot write to {folder}: {error}; name another with {option}") from None
    if not os.access(folder, os.W_OK):
        raise FolderError(f"cannot write to {folder}; name another with {option}")
    try:
        there = json.loads(manifest.read_text())
        del there["data"]  # names a folder, which may have moved; the checksum shows whether the data are the same
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise FolderError(f"{manifest} cannot be read: {error!r}; delete {folder} to start again") from None
    different = differences(there, {key: value for key, value in identity.items() if key != "data"})
    if different:
        raise FolderError(
            f"{folder} belongs to another run: {different}. Name another folder with {option}, or delete it"
        )
    return _lock(manifest)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first four differences between a manifest and the values here; empty if there are none."""
    a, b = _flatten(there), _flatten(json.loads(json.dumps(here)))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return "; ".join(f"{key} is {a.get(key)!r} there and {b.get(key)!r} here" for key in keys[:4])


def _lock(manifest: Path) -> TextIO:
    """A lock held until it is closed or the process ends in any way; on Windows nothing is locked."""
    lock = manifest.open()
    if sys.platform != "win32":
        import fcntl

        until = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    lock.close()
                    raise FolderError(
                        f"another process is running in {manifest.parent}; wait for it or end it"
                    ) from None
            time.sleep(0.02)
    return lock


def is_running(folder: Path) -> bool:
    """Whether a process is training in the folder; always True on Windows, where there is no way to know."""
    if sys.platform == "win32":
        return True
    import fcntl

    with (folder / "run.json").open() as manifest:  # closing it gives the lock back
        try:
            fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
