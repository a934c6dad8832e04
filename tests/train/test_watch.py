"""`pomona watch` of real runs: while another process trains, after a kill and a resume, in a pipe and on a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pomona.train.watch
from pomona.train.folder import claim, is_running
from pomona.train.run import describe
from pomona.train.watch import watch
from tests.runs import (
    DESCRIPTION,
    Finished,
    command_in_child,
    command_line,
    finish,
    rows_of,
    run_of,
    start,
)
from tests.studies.test_progressive_run import CHAIN, write_recipe

# These runs are far too short for passive weights to vanish, which is not what they are about.
pytestmark = pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed")
TITLE = ["LeNet-300-100 at 60x with GSM, small, seed 0", f"data: {DESCRIPTION}"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pomona.train.watch, "_SECONDS", 0.02)
    monkeypatch.setattr(pomona.train.watch, "_GRACE", 0.2)


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(digits, tmp_path_factory.mktemp("watched") / "run")


def lines_of(folder: Path) -> list[str]:
    """A line for each epoch: two of the base, four of pruning, or as many as there were."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {stage: max(row["epoch"] for row in rows if row["stage"] == stage) for stage in ("base", "prune")}
    return [describe(row, last[row["stage"]]) for row in rows]


def test_of_a_finished_run_all_epochs_are_told_and_the_result(finished: Finished) -> None:
    done = command_line(["watch", str(finished.folder)])
    assert done.status == 0 and done.err == ""
    told = done.out.splitlines()
    assert told[:2] == TITLE and told[2:8] == lines_of(finished.folder)
    assert told[8:] == finished.out.splitlines()[-2:] and "10.0x compression" in told[-1]


class Late(io.StringIO):
    """Notes what was told before the run had a result."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.before = folder, 0

    def write(self, text: str) -> int:
        if not (self.folder / "result.json").exists():
            self.before += text.startswith(("base ", "prune "))
        return super().write(text)


def test_epochs_are_told_while_they_happen_and_the_end_ends_it(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(run_of(digits, folder, "prune.epochs=12"), tmp_path / "out.txt")
    while not (folder / "run.json").exists() or not is_running(folder):
        assert process.exitcode is None, (tmp_path / "out.txt").read_text()
        time.sleep(0.01)
    stream = Late(folder)
    assert watch(folder, stream)
    assert stream.getvalue().splitlines() == [*TITLE, *lines_of(folder)]
    assert stream.before > 7  # of 14
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.check
def test_a_killed_run_is_told_and_what_a_resumed_one_repeats_is_told_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert command_in_child(run_of(digits, folder), 35, signal.SIGKILL)[0] == -signal.SIGKILL
    done = command_line(["watch", str(folder)])
    assert done.status == 1
    *told, last = done.out.splitlines()
    assert told[:4] == [*TITLE, *(line for line in told if line.startswith("base "))] and len(told) == 5
    assert last == f"nothing is training in {folder}, and the run has not finished; run its command again to resume it"

    monkeypatch.setattr(pomona.train.watch, "_GRACE", 60.0)  # until the next process has started
    with (folder / "metrics.jsonl").open("a") as file:  # an epoch that no checkpoint counts, and half of another
        file.write(json.dumps(rows_of(folder)[-1] | {"epoch": 2, "seconds": 1.0}) + '\n{"stage": "pru')
    stream = io.StringIO()
    watcher = threading.Thread(target=watch, args=(folder, stream))
    watcher.start()
    while stream.getvalue().count("\n") < 6:
        time.sleep(0.01)
    status, out = command_in_child(run_of(digits, folder))
    assert status == 0, out
    watcher.join(30)
    told = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in told[2:]] == [
        *(f"base {epoch}/2" for epoch in (1, 2)),
        *(f"prune {epoch}/4" for epoch in (1, 2, 3, 4)),
    ]
    assert told[6:] == lines_of(folder)[4:]


# On a terminal


class Terminal(io.StringIO):
    """Does what the few sequences of `watch` ask for."""

    encoding = "utf-8"
    lines: list[str]

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        lines: list[str] = [""]
        row = 0
        for part in re.findall(r"\x1b\[\d*[A-Z]|\n|[^\x1b\n]+", self.getvalue()):
            if part == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif part == "\x1b[K":
                lines[row] = lines[row][: self._column]
            elif part == "\x1b[J":
                del lines[row + 1 :]
            elif part.startswith("\x1b"):
                row -= int(part[2:-1])
            else:
                lines[row] = part
            self._column = 0 if part == "\n" or part.endswith("F") else len(part)
        return lines


def test_a_terminal_gets_one_view_that_stays_in_place(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setenv("LINES", "30")
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    result = (folder / "result.json").rename(tmp_path / "result.json")
    terminal = Terminal()
    watcher = threading.Thread(target=watch, args=(folder, terminal))
    with (folder / "run.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for count, text in (
            (0, "no epoch has ended yet"),
            (1, "base 1/2  ["),
            (5, "prune 3/4  ["),
            (6, "prune 4/4  ["),
        ):
            (folder / "metrics.jsonl").write_text("".join(rows[:count]))
            if not watcher.is_alive():
                watcher.start()
            while not any(line.startswith(text) for line in terminal.shown):
                assert watcher.is_alive()
                time.sleep(0.01)
        result.rename(folder / "result.json")
    watcher.join(10)
    *shown, end = terminal.shown
    assert end == "" and all(len(line) < 72 for line in shown)
    assert shown[:2] == TITLE
    assert shown[2].startswith("prune 4/4  [################################] 100%  finis")
    last = rows_of(folder)[-1]
    assert shown[4].split()[:3] == ["test", "accuracy", f"{last['test_accuracy']:.2f}"]
    assert shown[5].split()[:4] == ["if", "cut", "now", f"{last['accuracy_if_cut']:.2f}"]
    assert shown[-4] == "a cut now would keep"
    for line, (name, density) in zip(shown[-3:], last["density_if_cut"].items(), strict=True):
        found, share, _, curve = line.split()
        assert (found, share) == (name, f"{100 * density:.3g}") and len(curve) == 4


@pytest.mark.parametrize(
    ("lines", "layers"),
    [
        (6, []),
        (10, []),
        (11, ["a cut now would keep", "fc1.weight", "and 2 more layers"]),
        (12, ["a cut now would keep", "fc1.weight", "fc2.weight", "fc3.weight"]),
    ],
)
def test_a_small_terminal_gets_what_fits(
    lines: int, layers: list[str], finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", str(lines))
    terminal = Terminal()
    assert watch(finished.folder, terminal)
    *shown, end = terminal.shown
    assert end == "" and len(shown) < lines and all(len(line) < 40 for line in shown)
    assert [line.split("  ")[0] for line in shown[7:]] == layers


@pytest.mark.check
def test_control_c_ends_it_without_a_trace(finished: Finished, tmp_path: Path) -> None:
    """On a pseudo terminal, with the command as it is installed; letters that it cannot show are replaced."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    master, slave = pty.openpty()
    with (folder / "run.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "pomona", "watch", str(folder)]
        process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            start_new_session=True,
        )
        out = b""
        while b"a cut now would keep" not in out or b"fc3.weight" not in out:
            out += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    os.close(slave)
    out += os.read(master, 65536)
    assert out.rstrip().endswith(b"no longer watching; the run is not affected") and b"Traceback" not in out
    assert out.isascii() and b"%  0:00 left" in out


# Other folders


@pytest.mark.check
def test_a_dense_network_tickets_and_rounds_are_watched_too(digits: Path, tmp_path: Path) -> None:
    finish(digits, tmp_path / "ticket", command="ticket")
    done = command_line(["watch", str(tmp_path / "ticket")])
    assert done.status == 0
    assert [line.split("  ")[0] for line in done.out.splitlines()[-6:-2]] == [
        "ticket by method 1/2",
        "ticket by method 2/2",
        "ticket by magnitude 1/2",
        "ticket by magnitude 2/2",
    ]

    recipe = write_recipe(tmp_path, CHAIN, 32)
    words = ["train", str(recipe), "--data-dir", str(digits), "--out", str(tmp_path / "rounds"), "--threads", "1"]
    assert command_line(words).status == 0
    done = command_line(["watch", str(tmp_path / "rounds")])
    assert done.status == 0
    parts = [line.split("  lr")[0] for line in done.out.splitlines()[2:-2]]
    assert parts == ["dense  base 1/1"] + [
        f"{part}  {stage} 1/1"
        for part in ("8x-from-dense", "9x-from-8x", "32x-from-9x")
        for stage in ("prune", "retrain")
    ]
    done = command_line(["watch", str(tmp_path / "rounds/dense")])
    assert done.status == 0
    assert done.out.splitlines()[0] == "dense lenet-300-100, seed 0"
    assert [line.split("  ")[0] for line in done.out.splitlines()[2:]] == ["base 1/1"]


def test_a_folder_without_a_run_is_told(finished: Finished, tmp_path: Path) -> None:
    for folder, more in (
        (tmp_path, ""),
        (tmp_path / "none", ""),
        (finished.folder.parent, "name one of them, such as run"),
    ):
        done = command_line(["watch", str(folder)])
        assert done.status == 2 and done.out == ""
        assert done.err.startswith(f"pomona: error: {folder} holds no run of pomona (there is no run.json in it)")
        assert more in done.err
    for content in ("", "[]", '{"command": "train"}'):
        (tmp_path / "run.json").write_text(content)
        done = command_line(["watch", str(tmp_path)])
        assert done.status == 2 and f"{tmp_path / 'run.json'} cannot be read: " in done.err


def test_watching_never_keeps_a_run_from_starting(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    identity = json.loads((folder / "run.json").read_text())
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            is_running(folder)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(30):
            with claim(folder, identity):
                assert is_running(folder)
    finally:
        over.set()
    assert not is_running(folder)
