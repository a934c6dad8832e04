"""The processes that run a network, one per path, and their taking turns."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pomona.native import library

if TYPE_CHECKING:
    pass


_BLOCK = 0.03  # seconds that a path runs before the next one takes its turn; at least one call
_ANSWER_WITHIN = 600.0  # seconds; compilers may be slow


class WorkerError(RuntimeError):
    """The process of a path could not answer a request.

    Attributes:
        is_missing: whether the reason is a package that is not installed.
    """

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


class Worker:
    """The process of one path.

    Args:
        path: name of the path.
        python: the interpreter; default: this one.
        code: the code that it runs; in the end it must serve ``path``.
        places: folders to import from, in addition to those of this process.
    """

    def __init__(
        self,
        path: str,
        *,
        python: str = sys.executable,
        code: str = "from pomona.benchmark.paths import serve; serve()",
        places: Sequence[str | Path] = (),
    ) -> None:
        self.path = path
        package = Path(__file__).parents[2]
        known = os.environ.get("PYTHONPATH")
        everything = [str(package), *map(str, places), *([known] if known else [])]
        self._process = subprocess.Popen(
            [python, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(everything)},
        )

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerError: it failed, the process ended, or it took more than ten minutes.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(_ANSWER_WITHIN, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"its process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], is_missing=answer["missing"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call."""

    median: float
    p90: float
    cpu: float  # CPU time of the process with all its threads: the median over rounds
    num_calls: int


def take_turns(opened: Sequence[tuple[Worker, str]], *, seconds: float) -> list[Timing | WorkerError]:
    """Time networks that workers have opened under these keys, in turns, each for about this many seconds."""
    num = len(opened)
    wall: list[list[float]] = [[] for _ in range(num)]
    cpu: list[list[float]] = [[] for _ in range(num)]
    calls, failed = [1] * num, {}
    longest = 0.0
    for i, (worker, key) in enumerate(opened):
        try:
            seconds_each = worker.ask("time", key=key, calls=1)["wall"][0]  # the second call: opening made one
            calls[i] = max(1, math.ceil(_BLOCK / max(seconds_each, 1e-7)))
            if calls[i] > 1:
                seconds_each = statistics.median(worker.ask("time", key=key, calls=calls[i])["wall"])
                calls[i] = max(1, math.ceil(_BLOCK / max(seconds_each, 1e-7)))
            longest = max(longest, calls[i] * seconds_each)
        except WorkerError as error:
            failed[i] = error
    for _ in range(min(max(round(seconds / max(longest, _BLOCK)), 3), 100)):
        for i, (worker, key) in enumerate(opened):
            if i in failed:
                continue
            try:
                answer = worker.ask("time", key=key, calls=calls[i])
            except WorkerError as error:
                failed[i] = error
                continue
            wall[i] += answer["wall"]
            cpu[i].append(answer["cpu"] / calls[i])
    return [
        failed[i]
        if i in failed
        else Timing(
            statistics.median(wall[i]), float(np.quantile(wall[i], 0.9)), statistics.median(cpu[i]), len(wall[i])
        )
        for i in range(num)
    ]


def machine() -> str:
    """The processor, and the instruction set that the compiled core uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {library.isa() if library.is_available() else f'no compiled core: {library.why_not()}'}"
