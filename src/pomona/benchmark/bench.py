"""How fast a network runs by Pomona's engine, and by what else would run it: side by side, outputs compared first.

Every path has a process of its own (:mod:`pomona.benchmark.paths`), so that its peak memory is its own and no library
disturbs another. They take turns, round by round, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pomona import runtime
from pomona.benchmark.paths import PATHS, Arrays, Case, open_module, relative_error
from pomona.files.sparse import Sparse
from pomona.native import library

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-3  # relative error of outputs above which a path that computes in float32 is called wrong

_BLOCK = 0.03  # seconds that a path runs before the next takes its turn, at least one call
_ANSWER_WITHIN = 600.0  # seconds; compilers may be slow

_PACKAGES = {
    "torch": "torch",
    "torch.compile": "torch",
    "onnxruntime": "onnxruntime onnx",
    "openvino": "openvino onnx",
    "onnxruntime int8": "onnxruntime onnx",
    "openvino int8": "openvino onnxruntime onnx",
}
_READ_ONNX = [name for name, packages in _PACKAGES.items() if "onnx" in packages]


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


@dataclass(frozen=True, slots=True)
class PathResult:
    """What one path did; numbers are None where it did not come so far, and then `why_not` tells why."""

    name: str
    timing: Timing | None = None
    error: float | None = None  # relative, of the outputs
    peak_bytes: int | None = None  # of its process
    accuracy: float | None = None  # percent
    why_not: str | None = None

    @property
    def is_int8(self) -> bool:
        return "int8" in self.name

    @property
    def is_mine(self) -> bool:
        return self.name.startswith("pomona")

    @property
    def is_wrong(self) -> bool:
        """Whether it computes in float32 and outputs differ all the same."""
        return self.error is not None and " int" not in self.name and not self.error < TOLERANCE


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
    dense_seconds: float | None  # the same, zeros computed too

    @property
    def is_faster_dense(self) -> bool:
        """By more than what two measurements of one thing may differ by; of a layer that has zeros."""
        if self.kept == self.weights or self.seconds is None or self.dense_seconds is None:
            return False
        return self.dense_seconds < 0.9 * self.seconds


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that `pomona bench` finds out."""

    model: str
    inputs: tuple[tuple[int, ...], ...]  # with the batch
    threads: int
    machine: str
    weights: int  # of convolutions and linear layers
    kept: int
    macs: int  # of one sample
    kept_macs: int
    dense_bytes: int  # of all tensors, zeros included
    file_bytes: int  # of the .pomona.safetensors file
    paths: tuple[PathResult, ...]
    layers: tuple[LayerResult, ...]  # the last is all that is no layer with weights

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def path(self, name: str) -> PathResult:
        return next(path for path in self.paths if path.name == name)

    def verdict(self) -> list[str]:
        """Who is fastest, in plain sentences, wherever it is not Pomona too."""
        mine = self.path("pomona").timing
        if mine is None:
            return [f"pomona did not run: {self.path('pomona').why_not}"]
        told = []
        for path in self.paths:
            for kind in ("float32", "int8") if path.is_mine and path.timing else ():
                rivals = self._rivals(is_int8=kind == "int8")
                if not rivals and path.name == "pomona":
                    told.append(f"no dense {kind} path ran, so nothing is known against one")
                if not rivals:
                    continue
                best = min(rivals, key=lambda path: path.timing.median if path.timing else math.inf)
                assert best.timing is not None and path.timing is not None
                ratio = best.timing.median / path.timing.median
                if ratio >= 1:
                    told.append(f"{path.name} is {ratio:.2f}x as fast as the fastest dense {kind} path, {best.name}")
                else:
                    told.append(f"dense {kind} wins: {best.name} is {1 / ratio:.2f}x as fast as {path.name}")
        slower = [layer for layer in self.layers if layer.is_faster_dense]
        if slower:
            names = ", ".join(layer.name for layer in slower[:5]) + ", ..." * (len(slower) > 5)
            told.append(
                f"{len(slower)} of {len(self.layers) - 1} layers would be faster computed with their zeros: {names}"
            )
        wrong = [path.name for path in self.paths if path.is_wrong]
        if wrong:
            told.append(f"outputs of {', '.join(wrong)} are wrong and do not count")
        return told

    def _rivals(self, *, is_int8: bool) -> list[PathResult]:
        return [
            path
            for path in self.paths
            if not path.is_mine and path.is_int8 == is_int8 and path.timing is not None and not path.is_wrong
        ]

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        lines = [
            f"{self.model}, input {sizes}",
            *(f"{name}: {value}" for name, value in facts(self).items()),
            "",
            *_columns(path_rows(self)),
            "",
            *_columns(layer_rows(self)),
            "",
            *self.verdict(),
        ]
        return "\n".join(lines)


def facts(result: BenchResult) -> dict[str, str]:
    """What is to be told beside the tables."""
    weights, macs = result.weights, result.macs
    return {
        "weights kept": f"{result.kept:,} of {weights:,} ({_percent(result.kept, weights)})",
        "multiplications": f"{_million(result.kept_macs)} of {_million(macs)} ({_percent(result.kept_macs, macs)})",
        "size": f"{result.file_bytes:,} bytes as a file of pomona, {result.dense_bytes:,} with all zeros "
        f"({result.dense_bytes / result.file_bytes:.1f}x)",
        "threads": str(result.threads),
        "machine": result.machine,
    }


def path_rows(result: BenchResult) -> list[list[str]]:
    """A table of texts; headings that begin with `>` are of columns that align to the right."""
    mine = result.path("pomona").timing
    has_accuracy = any(path.accuracy is not None for path in result.paths)
    head = ["path", ">median", ">p90", ">CPU time", ">pomona is", ">peak memory"]
    rows = [head + [">accuracy"] * has_accuracy + ["outputs"]]
    for path in result.paths:
        t = path.timing
        cells = [path.name, *(_NONE for _ in head[1:])]
        if t:
            faster = f"{t.median / mine.median:.2f}x" if mine and path.name != "pomona" else ""
            cells = [
                path.name,
                duration(t.median),
                duration(t.p90),
                duration(t.cpu),
                faster,
                _mebibytes(path.peak_bytes),
            ]
        cells += [_NONE if path.accuracy is None else f"{path.accuracy:.2f} %"] * has_accuracy
        rows.append([*cells, _outputs(path)])
    return rows


def _outputs(path: PathResult) -> str:
    if path.why_not:
        return path.why_not
    assert path.error is not None
    return "WRONG: " * path.is_wrong + f"differ by {path.error:.1e}"


def layer_rows(result: BenchResult) -> list[list[str]]:
    """The same of the layers in Pomona's engine."""
    rows = [["layer", ">weight", ">kept", ">multiplications", ">time", ">with zeros", ""]]
    for layer in result.layers:
        times = [_NONE if s is None else duration(s) for s in (layer.seconds, layer.dense_seconds)]
        if not layer.weights:
            rows.append([layer.name, "", "", "", *times, ""])
            continue
        faster = "dense is faster" if layer.is_faster_dense else ""
        kept = _percent(layer.kept, layer.weights)
        rows.append([layer.name, "x".join(map(str, layer.shape)), kept, _million(layer.kept_macs), *times, faster])
    return rows


_NONE = "-"


def duration(seconds: float) -> str:
    """With three digits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} us"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else _NONE


def _million(number: int) -> str:
    return f"{number / 1e6:,.4g} M"


def _mebibytes(number: int | None) -> str:
    return _NONE if number is None else f"{number / 2**20:,.0f} MiB"


def _columns(rows: list[list[str]]) -> list[str]:
    """Aligned; the last column is not padded."""
    is_right = [head.startswith(">") for head in rows[0]]
    rows = [[head.removeprefix(">") for head in rows[0]], *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        ).rstrip()
        for row in rows
    ]


def bench(
    model: str,
    *,
    inputs: Sequence[Sequence[int]] = (),
    threads: int = 1,
    seconds: float = 1.0,
    paths: Sequence[str] = tuple(PATHS),
    data: str | Path | None = None,
) -> BenchResult:
    """Compare the paths of one network.

    Args:
        model: a run's folder, a ``.pomona.safetensors`` file with a graph, or ``MODULE:FUNCTION`` that returns a torch
            module; see :func:`pomona.benchmark.paths.open_module`.
        inputs: shapes with the batch. A file and a run know theirs: without shapes they get a batch of one.
        threads: of each path.
        seconds: for each path, and three rounds at least.
        paths: which, of :data:`pomona.benchmark.paths.PATHS`. One whose packages are missing is told so in the result.
        data: .npz file of ``x``, float32 [n, ...], and ``y``, integers [n], or the folder of a run's data: also measure
            accuracy, and take the batch that is timed and that calibrates int8, and int16 if the file has no ranges,
            from there.

    Raises:
        ValueError: the model, the shapes or the data cannot be used, or the model computes what the runtime cannot.
    """
    import torch

    unknown = [name for name in paths if name not in PATHS]
    if unknown:
        raise ValueError(f"paths are {', '.join(PATHS)}; got {', '.join(unknown)}")
    names = ["pomona", *(name for name in paths if name != "pomona")]
    known = _read_data(model, data)
    with tempfile.TemporaryDirectory() as folder:
        module = open_module(model).eval().requires_grad_(False)
        shapes = _shapes(model, inputs, known)
        examples = [torch.zeros(shape) for shape in shapes]
        case = Case(
            inputs=str(Path(folder) / "inputs.npz"),
            file=model if _is_file(model) else str(Path(folder) / "net.pomona.safetensors"),
            onnx=str(Path(folder) / "net.onnx"),
            int8=str(Path(folder) / "int8.onnx"),
            source=model,
            state="" if _is_file(model) else str(Path(folder) / "state.pt"),
        )
        arrays = _arrays(shapes, known)
        np.savez(case.inputs, **{str(i): x for i, x in enumerate(arrays)})  # type: ignore[arg-type]  # by name
        with torch.no_grad():
            outputs = module(*map(torch.from_numpy, arrays))
        right = [y.numpy() for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]
        if not _is_file(model):
            torch.save(module.state_dict(), case.state)
            write_network(case.file, module, examples)
        unfit = None
        try:
            if importlib.util.find_spec("onnx") is None:
                raise ImportError("the package onnx is missing: pip install 'pomona[bench]'")
            export_onnx(module, examples, case.onnx)
        except Exception as error:  # torch documents no closed list
            unfit = f"torch.onnx cannot export it: {str(error).partition(chr(10))[0]}"
        measured = _measure(case, right, threads, seconds, names, known, unfit)
        layers = _layers(case, threads)
        return BenchResult(
            model=model,
            inputs=tuple(shapes),
            threads=threads,
            machine=machine(),
            weights=sum(layer.weights for layer in layers),
            kept=sum(layer.kept for layer in layers),
            macs=sum(layer.macs for layer in layers),
            kept_macs=sum(layer.kept_macs for layer in layers),
            dense_bytes=sum(t.numel() * t.element_size() for t in module.state_dict().values()),
            file_bytes=Path(case.file).stat().st_size,
            paths=tuple(measured),
            layers=tuple(layers),
        )


def _is_file(model: str) -> bool:
    return Path(model).is_file()


def _shapes(model: str, inputs: Sequence[Sequence[int]], data: _Data | None) -> list[tuple[int, ...]]:
    if inputs:
        return [tuple(shape) for shape in inputs]
    if _is_file(model):
        return [(1, *shape) for shape in runtime.load(model).graph.inputs]
    if data is not None:
        return [(1, *data[0].shape[1:])]
    raise ValueError(f"the shape of {model}'s input is not known: give it with the batch, e.g. --input 1x3x224x224")


_Data = tuple[NDArray[np.float32], NDArray[Any]]  # x [n, ...], y [n]


def _read_data(model: str, data: str | Path | None) -> _Data | None:
    """Of an .npz file; or of a folder, the test set that a run in `model` was tested on."""
    if data is None:
        return None
    if Path(data).is_dir() and Path(model).is_dir():
        from pomona.train.stages import read_run
        from pomona.zoo.data import DATA

        known = DATA[read_run(Path(model))["recipe"]["data"]](data)
        return known.test_inputs.numpy(), known.test_labels.numpy()
    if Path(data).is_dir():
        raise ValueError(f"data {data} is a folder, which is understood for a run of pomona only; give an .npz file")
    with np.load(data) as arrays:
        if not {"x", "y"} <= set(arrays.files):
            raise ValueError(f"{data} must hold arrays x and y, got {', '.join(arrays.files)}")
        x, y = np.asarray(arrays["x"], np.float32), arrays["y"]
    if y.ndim != 1 or len(x) != len(y) or not len(x):
        raise ValueError(f"{data} must hold x [n, ...] and y [n], got {list(x.shape)} and {list(y.shape)}")
    return x, y


def _arrays(shapes: Sequence[tuple[int, ...]], data: _Data | None) -> Arrays:
    """A batch of the data, again from the start if they are fewer; else normal random numbers."""
    if data is None:
        random = np.random.default_rng(0)
        return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
    if len(shapes) != 1 or data[0].shape[1:] != shapes[0][1:]:
        wanted = " and ".join(str(list(shape[1:])) for shape in shapes)
        raise ValueError(f"samples of the data have the shape {list(data[0].shape[1:])}, the model takes {wanted}")
    return [np.resize(data[0], shapes[0])]


def write_network(
    path: str, module: nn.Module, examples: Sequence[Tensor], *, calibrate: Sequence[Tensor] = ()
) -> None:
    """What the module computes, and its tensors, as a file; with the ranges of values on these samples, if any."""
    from pomona.files.pack import write
    from pomona.files.stored import Stored
    from pomona.runtime.ranges import with_ranges
    from pomona.runtime.readers.trace import trace

    graph, tensors = trace(module, examples, folded=False)
    if calibrate:
        graph = with_ranges(graph, tensors, *(x.numpy() for x in calibrate))
    stored = {name: Stored("F32", tensor) for name, tensor in tensors.items()}
    write(path, stored, {}, graph.to_json())


def export_onnx(module: nn.Module, examples: Sequence[Tensor], path: str) -> None:
    """By torch's exporter that needs the package onnx and nothing else."""
    import torch.onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the older one
        torch.onnx.export(module, tuple(examples), path, dynamo=False, opset_version=13)


def _measure(
    case: Case, right: Arrays, threads: int, seconds: float, names: Sequence[str], data: _Data | None, unfit: str | None
) -> list[PathResult]:
    """All paths; `unfit` is why those that read ONNX cannot run."""
    done = {name: PathResult(name, why_not=unfit) for name in names if unfit and name in _READ_ONNX}
    if any("int8" in name for name in names) and not unfit:
        with Worker("quantise") as worker:
            try:
                worker.ask("quantise", case=dataclasses.asdict(case))
            except WorkerError as error:
                done |= {name: PathResult(name, why_not=_why_not(name, error)) for name in names if "int8" in name}
    with ExitStack() as stack:
        opened: list[tuple[str, Worker, float]] = []
        for name in names:
            if name in done:
                continue
            worker = stack.enter_context(Worker(name))
            try:
                answer = worker.ask(
                    "open", key="", path=name, case=dataclasses.asdict(case), threads=threads, cpus=None
                )
            except WorkerError as error:
                done[name] = PathResult(name, why_not=_why_not(name, error))
                continue
            with np.load(answer["outputs"]) as outputs:
                difference = relative_error([outputs[str(i)] for i in range(len(outputs.files))], right)
            opened.append((name, worker, difference))
        times = take_turns([(worker, "") for _, worker, _ in opened], seconds=seconds)
        for (name, worker, difference), timing in zip(opened, times, strict=True):
            if isinstance(timing, WorkerError):
                done[name] = PathResult(name, error=difference, why_not=str(timing))
                continue
            peak = worker.ask("peak")["bytes"]
            done[name] = PathResult(name, timing, difference, peak, _accuracy(worker, case, data))
    return [done[name] for name in names]


def _why_not(name: str, error: WorkerError) -> str:
    reason = str(error).partition("\n")[0]
    return f"{reason}: pip install {_PACKAGES[name]}" if error.is_missing and name in _PACKAGES else reason


def _accuracy(worker: Worker, case: Case, data: _Data | None) -> float | None:
    if data is None:
        return None
    file = str(Path(case.inputs).with_name("data.npz"))
    if not Path(file).exists():
        np.savez(file, x=data[0], y=data[1])
    answer = worker.ask("score", key="", data=file)
    return 100 * float(answer["right"]) / float(answer["total"])


def _layers(case: Case, threads: int) -> list[LayerResult]:
    """Of the file's graph, as it is run; times are None where the core is missing."""
    network = runtime.load(case.file)
    graph, tensors = network.graph, network.tensors
    shapes = graph.shapes(tensors)
    times: dict[str, list[float]] = {}
    if library.is_available():
        with Worker("pomona") as worker:
            times = worker.ask("layers", case=dataclasses.asdict(case), threads=threads)
    layers, rest = [], []
    for i, node in enumerate(graph.nodes):
        seconds, dense_seconds = (times[key][i] if times else None for key in ("seconds", "dense_seconds"))
        if node.op not in ("conv", "linear"):
            rest.append((seconds, dense_seconds))
            continue
        assert node.weight is not None
        weight, output = tensors[node.weight], shapes[graph.num_inputs + i]
        size = math.prod(weight.shape)
        kept = len(weight.values) if isinstance(weight, Sparse) else int(np.count_nonzero(weight))
        places = math.prod(output) // weight.shape[0]
        name = node.weight.partition("@")[0].removesuffix(".weight")
        layers.append(LayerResult(name, weight.shape, size, kept, places * size, places * kept, seconds, dense_seconds))
    others = (sum(column) if times else None for column in (zip(*rest, strict=True) if rest else ((), ())))
    return [*layers, LayerResult("all else", (), 0, 0, 0, 0, *others)]


def machine() -> str:
    """The processor, and what of it the compiled core uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {library.isa() if library.is_available() else f'no compiled core: {library.why_not()}'}"
