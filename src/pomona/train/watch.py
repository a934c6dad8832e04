"""Follow a run from its folder, while another process trains it or after it has ended."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pomona.train.folder import FolderError, is_running, read_rows
from pomona.train.progress import duration
from pomona.train.run import describe

_SECONDS = 1.0  # between two reads
_GRACE = 3.0  # a run without a process may be about to start, or about to write its result
_RAMP, _PLAIN_RAMP = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "_.-=+*%#"
_WIDTH = 32  # width of a curve, in characters


@dataclass(frozen=True)
class View:
    """The state of a run's folder at one moment.

    Attributes:
        head: what is trained, and on which data.
        rows: rows of metrics, each with the part of a progressive run that it belongs to, and the epochs of its stage.
        is_running: whether a process is training.
        is_finished: whether the recipe is completed.
    """

    head: list[str]
    rows: list[tuple[str, dict[str, Any], int]]
    is_running: bool
    is_finished: bool


def look(folder: Path) -> View:
    """Read the folder of a run.

    Raises:
        FolderError: it holds no run, or its ``run.json`` is damaged.
    """
    manifest = _manifest(folder)
    recipe = manifest["recipe"]
    running = is_running(folder)  # before the files are read: a run that has ended by now has written all of them
    parts = [folder, *(sorted(folder.glob("*/"), key=_began) if manifest["command"] == "progressive" else [])]
    rows = [
        (part.name if part != folder else "", row, epochs_of(_manifest(part)["recipe"], row["stage"]))
        for part in parts
        if (part / "run.json").exists()
        for row in read_rows(part / "metrics.jsonl")
    ]
    if manifest["command"] == "base":
        finished = not running and bool(rows) and rows[-1][1]["epoch"] == rows[-1][2]
        title = f"dense {recipe['model']}"
    else:
        finished = not running and (folder / "result.json").exists()
        title = recipe["title"]
    return View([f"{title}, seed {recipe['seed']}", f"data: {manifest['data']}"], rows, running, finished)


def epochs_of(recipe: Mapping[str, Any], stage: str) -> int:
    """The number of epochs of a stage; tickets are trained like the dense network."""
    stages = {name: recipe[name]["epochs"] for name in ("base", "prune", "retrain") if recipe.get(name)}
    return int(stages.get(stage, stages.get("base", 0)))


def watch(folder: Path, stream: TextIO) -> bool:
    """Report on a run until it ends: one line per epoch, or on a terminal a view that stays in place.

    Returns:
        Whether the run has finished; False if it was stopped or killed and can be resumed.

    Raises:
        FolderError: the folder holds no run.
    """
    screen = _Screen(stream) if stream.isatty() else None
    num_shown, idle_since = 0, None
    view = look(folder)
    if screen is None:
        stream.write("\n".join([*view.head, ""]))
    while True:
        if screen:
            screen.show(_picture(view, screen))
        for row in view.rows[num_shown:] if screen is None else ():
            stream.write(_line(*row) + "\n")
        stream.flush()
        num_shown = max(num_shown, len(view.rows))  # a resumed run repeats rows after its last checkpoint, bit for bit
        if view.is_finished:
            return True
        if view.is_running:
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > _GRACE:
            return False
        time.sleep(_SECONDS)
        view = look(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        manifest["recipe"]["seed"], manifest["command"], manifest["data"]
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(found.parent.name for found in folder.glob("*/run.json"))[:3]
        what = f"; it contains runs: name one of them, such as {', '.join(inside)}" if inside else ""
        raise FolderError(f"{folder} holds no run of pomona (there is no run.json in it){what}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderError(f"{path} cannot be read: {error!r}") from None
    return manifest


def _began(part: Path) -> float:
    manifest = part / "run.json"
    return manifest.stat().st_mtime if manifest.exists() else math.inf


def _line(part: str, row: Mapping[str, Any], epochs: int) -> str:
    return f"{part}  {describe(row, epochs)}" if part else describe(row, epochs)


class _Screen:
    """A block of lines on a terminal that the next one overwrites."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._height = 0
        try:
            _RAMP.encode(stream.encoding or "ascii")
            self.ramp = _RAMP
        except UnicodeEncodeError:
            self.ramp = _PLAIN_RAMP

    @property
    def size(self) -> tuple[int, int]:
        columns, lines = shutil.get_terminal_size()
        return columns - 1, lines - 1

    def show(self, lines: list[str]) -> None:
        columns, height = self.size
        up = f"\x1b[{self._height}F" if self._height else ""
        shown = [line[:columns] for line in lines[:height]]
        self._stream.write(up + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J")
        self._height = len(shown)


def _picture(view: View, screen: _Screen) -> list[str]:
    lines = list(view.head)
    if not view.rows:
        return [*lines, "no epoch has ended yet" if view.is_running else "nothing is training here"]
    part, row, epochs = view.rows[-1]
    of_stage = [r for p, r, _ in view.rows if p == part and r["stage"] == row["stage"]]
    share = row["epoch"] / epochs if epochs else 1.0
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    filled = round(share * _WIDTH)
    bar = "#" * filled + "." * (_WIDTH - filled)
    state = f"{duration(left)} left" if view.is_running else "finished" if view.is_finished else "not running"
    lines.append(f"{part + '  ' if part else ''}{row['stage']} {row['epoch']}/{epochs}  [{bar}] {share:.0%}  {state}")
    for key, name, form in _CURVES:
        values = [r[key] for r in of_stage if r.get(key) is not None]
        if values:
            lines.append(f"{name:14} {format(values[-1], form):>10}  {_curve(values, screen.ramp)}")
    return lines + _layers([r["density_if_cut"] for r in of_stage if r.get("density_if_cut")], screen, len(lines))


_CURVES = (
    ("loss", "training loss", ".4f"),
    ("test_accuracy", "test accuracy", ".2f"),
    ("accuracy_if_cut", "if cut now", ".2f"),
    ("sparsity", "sparsity", ".4f"),
    ("decay_exponent", "decay exponent", ".2f"),
)


def _layers(history: list[Mapping[str, float]], screen: _Screen, above: int) -> list[str]:
    """The share of each layer that a cut would keep, with its history on a logarithmic scale; as many as fit."""
    if not history:
        return []
    names, room = list(history[-1]), screen.size[1] - above - 1
    shown = names if len(names) <= room else names[: max(0, room - 1)]
    if not shown:
        return []
    width = max(map(len, shown))
    lines = [f"{'a cut now would keep':{width}}"]
    for name in shown:
        curve = [math.log10(max(of[name], 1e-6)) for of in history]
        lines.append(f"{name:{width}}  {100 * history[-1][name]:8.3g} %  {_curve(curve, screen.ramp)}")
    return lines + ([f"and {len(names) - len(shown)} more layers"] if len(names) > len(shown) else [])


def _curve(values: list[float], ramp: str) -> str:
    """Values as characters, taller for larger ones; of more than ``_WIDTH`` the last of each stretch."""
    ends = [values[math.ceil(len(values) * (i + 1) / _WIDTH) - 1] for i in range(_WIDTH)]
    points = values if len(values) <= _WIDTH else ends
    low, high = min(points), max(points)
    if high == low:
        return ramp[0] * len(points)
    return "".join(ramp[min(len(ramp) - 1, int(len(ramp) * (v - low) / (high - low)))] for v in points)
