"""How fast a network runs in Pomona's engine and in other runtimes, after their outputs were compared.

Every path runs in its own process (:mod:`pomona.benchmark.paths`), so that its peak memory is its own and libraries do
not disturb one another. The paths take turns, round by round, so that other load on the machine affects all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.onnx
from numpy.typing import NDArray
from torch import Tensor, nn

from pomona import runtime
from pomona.benchmark.paths import PATHS, Arrays, Case, open_module, relative_error
from pomona.benchmark.result import BenchResult, LayerResult, PathResult
from pomona.benchmark.worker import Worker, WorkerError, machine, take_turns
from pomona.files.pack import write
from pomona.files.sparse import Sparse
from pomona.files.stored import Stored
from pomona.native import library
from pomona.runtime.ranges import with_ranges
from pomona.runtime.readers import onnx
from pomona.runtime.readers.trace import trace
from pomona.train.finished import open_finished

_PACKAGES = {
    "torch": "torch",
    "torch.compile": "torch",
    "onnxruntime": "onnxruntime onnx",
    "openvino": "openvino onnx",
    "onnxruntime int8": "onnxruntime onnx",
    "openvino int8": "openvino onnxruntime onnx",
}
_READ_ONNX = [name for name, packages in _PACKAGES.items() if "onnx" in packages]


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
        model: a run's folder, a ``.pomona.safetensors`` file with a graph, an ONNX file, or ``MODULE:FUNCTION`` that
            returns a torch module; see :func:`pomona.benchmark.paths.open_module`.
        inputs: shapes with the batch dimension. Default for a file or a run: a batch of one.
        threads: number of threads of each path.
        seconds: time to spend on each path; at least three rounds are run.
        paths: keys of :data:`pomona.benchmark.paths.PATHS`. If the packages of one are missing, the result says so.
        data: an .npz file with ``x``, float32 [n, ...], and ``y``, integers [n], or the folder of a run's data.
            Accuracy is then measured, and the timed batch is taken from there. It also calibrates int8, and int16 if
            the file has no ranges.

    Raises:
        ValueError: the model, the shapes or the data cannot be used, or the model computes what the runtime cannot.
    """
    unknown = [name for name in paths if name not in PATHS]
    if unknown:
        raise ValueError(f"paths must be among {', '.join(PATHS)}; got {', '.join(unknown)}")
    names = ["pomona", *(name for name in paths if name != "pomona")]
    known = _read_data(model, data)
    with tempfile.TemporaryDirectory() as folder:
        source = _from_onnx(model, inputs, folder) if _is_onnx(model) else model
        module = open_module(source).eval().requires_grad_(False)
        shapes = _shapes(source, inputs, known)
        examples = [torch.zeros(shape) for shape in shapes]
        case = Case(
            inputs=str(Path(folder) / "inputs.npz"),
            file=source if _is_file(source) else str(Path(folder) / "net.pomona.safetensors"),
            onnx=model if _is_onnx(model) else str(Path(folder) / "net.onnx"),
            int8=str(Path(folder) / "int8.onnx"),
            source=source,
            state="" if _is_file(source) else str(Path(folder) / "state.pt"),
        )
        arrays = _arrays(shapes, known)
        np.savez(case.inputs, **{str(i): x for i, x in enumerate(arrays)})  # type: ignore[arg-type]  # by name
        with torch.no_grad():
            outputs = module(*map(torch.from_numpy, arrays))
        right = [y.numpy() for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]
        if not _is_file(source):
            torch.save(module.state_dict(), case.state)
            write_network(case.file, module, examples)
        unfit = None
        try:
            if importlib.util.find_spec("onnx") is None:
                raise ImportError("the package onnx is missing: pip install 'pomona[bench]'")
            if not _is_onnx(model):
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


def _is_onnx(model: str) -> bool:
    return model.endswith(".onnx")


def _from_onnx(model: str, inputs: Sequence[Sequence[int]], folder: str) -> str:
    """The network of an ONNX model as a file of Pomona's."""
    graph, tensors = onnx.read(model, shapes=[tuple(shape)[1:] for shape in inputs])
    path = str(Path(folder) / "net.pomona.safetensors")
    write(path, {name: Stored("F32", tensor) for name, tensor in tensors.items()}, {}, graph.to_json())
    return path


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
    """The arrays of an .npz file, or from a folder the test set of the run in `model`."""
    if data is None:
        return None
    if Path(data).is_dir() and Path(model).is_dir():
        known = open_finished(Path(model)).load_data(data)
        return known.test_inputs.numpy(), known.test_labels.numpy()
    if Path(data).is_dir():
        raise ValueError(f"data {data} is a folder, which works only if the model is a run's folder; give an .npz file")
    with np.load(data) as arrays:
        if not {"x", "y"} <= set(arrays.files):
            raise ValueError(f"{data} must hold arrays x and y, got {', '.join(arrays.files)}")
        x, y = np.asarray(arrays["x"], np.float32), arrays["y"]
    if y.ndim != 1 or len(x) != len(y) or not len(x):
        raise ValueError(f"{data} must hold x [n, ...] and y [n], got {list(x.shape)} and {list(y.shape)}")
    return x, y


def _arrays(shapes: Sequence[tuple[int, ...]], data: _Data | None) -> Arrays:
    """A batch of the data, repeated if there are too few; without data normal random numbers."""
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
    """Write the module's graph and tensors to a file, with the ranges of values on the samples to calibrate on."""
    graph, tensors = trace(module, examples, folded=False)
    if calibrate:
        graph = with_ranges(graph, tensors, *(x.numpy() for x in calibrate))
    stored = {name: Stored("F32", tensor) for name, tensor in tensors.items()}
    write(path, stored, {}, graph.to_json())


def export_onnx(module: nn.Module, examples: Sequence[Tensor], path: str) -> None:
    """Write the module as ONNX with torch's older exporter, which needs only the package onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns that it is the older one
        torch.onnx.export(module, tuple(examples), path, dynamo=False, opset_version=13)


def _measure(
    case: Case, right: Arrays, threads: int, seconds: float, names: Sequence[str], data: _Data | None, unfit: str | None
) -> list[PathResult]:
    """Measure all paths; `unfit` is the reason why those that read ONNX cannot run."""
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
    """The layers of the file's graph as the engine runs it; times are None without the compiled core."""
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
    return [*layers, LayerResult("all others", (), 0, 0, 0, 0, *others)]
