"""How fast a network runs by Pomona's engine, and by what else would run it: side by side, outputs compared first.

Every path has a process of its own (:mod:`pomona.runtime.paths`), so that its peak memory is its own and no library
disturbs another. They take turns, round by round, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pomona.runtime.graph import Graph
from pomona.runtime.paths import PATHS, Arrays, Case, relative_error
from pomona.sparse import Sparse

TOLERANCE = 1e-3  # relative error of outputs above which a path that computes in float32 is called wrong

_BLOCK = 0.03  # seconds that a path runs before the next takes its turn, at least one call
_ANSWER_WITHIN = 600.0  # seconds; compilers may be slow

# What to install for a path, and whether it computes in float32.
_PACKAGES = {
    "torch": "torch",
    "torch.compile": "torch",
    "onnxruntime": "onnxruntime onnx",
    "openvino": "openvino onnx",
    "onnxruntime int8": "onnxruntime onnx",
    "openvino int8": "openvino onnxruntime onnx",
}


class WorkerError(RuntimeError):
    """A path's process could not do what it was asked for.

    Attributes:
        is_missing: because a package is not installed.
    """

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing


class Worker:
    """The process of one path.

    Args:
        path: its name.
        python: the interpreter, if it is not this one.
        code: what it runs; it serves ``path`` in the end.
        places: folders to import from, besides those of this process.
    """

    def __init__(
        self,
        path: str,
        *,
        python: str = sys.executable,
        code: str = "from pomona.runtime.paths import serve; serve()",
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
    """Seconds of a call."""

    median: float
    p90: float
    cpu: float  # of the process, whatever number of threads: the median over rounds
    num_calls: int


def take_turns(opened: Sequence[tuple[Worker, str]], *, seconds: float) -> list[Timing | WorkerError]:
    """Time networks that workers have opened under these keys, each for about so many seconds, in turns."""
    num = len(opened)
    wall: list[list[float]] = [[] for _ in range(num)]
    cpu: list[list[float]] = [[] for _ in range(num)]
    calls, failed = [1] * num, {}
    longest = 0.0
    for i, (worker, key) in enumerate(opened):
        try:
            warm = worker.ask("time", key=key, calls=2)["wall"][-1]
            calls[i] = max(1, math.ceil(_BLOCK / max(warm, 1e-7)))
            warm = statistics.median(worker.ask("time", key=key, calls=calls[i])["wall"])
            calls[i] = max(1, math.ceil(_BLOCK / max(warm, 1e-7)))
            longest = max(longest, calls[i] * warm)
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


@dataclass(frozen=True, slots=True)
class PathResult:
    """What one path did; numbers are None where it did not come so far, and then `why_not` tells why."""

    name: str
    timing: Timing | None = None
    error: float | None = None  # relative, of the outputs
    peak_bytes: int | None = None  # of its process
    accuracy: float | None = None  # percent
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A convolution or linear layer, with what is fused into it."""

    name: str
    shape: tuple[int, ...]  # of the weight
    weights: int
    kept: int
    macs: int  # of one sample
    kept_macs: int
    seconds: float | None  # of one batch, in Pomona's engine
    dense_seconds: float | None  # the same without a look at zeros


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that `pomona bench` found out."""

    model: str
    inputs: tuple[tuple[int, ...], ...]  # with the batch
    threads: int
    machine: str
    weights: int  # of convolutions and linear layers
    kept: int
    macs: int  # of one sample
    kept_macs: int
    dense_bytes: int  # of all tensors, as they are
    file_bytes: int  # of the .pomona.safetensors file
    paths: tuple[PathResult, ...]
    layers: tuple[LayerResult, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)
