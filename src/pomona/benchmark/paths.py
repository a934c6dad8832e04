"""The ways to run one network that `pomona bench` compares, and the process that each of them runs in.

A *path* opens a network (:class:`Case`) in one runtime and returns a function that runs it. It imports its runtime when
it opens, and this module itself needs only numpy, so that the peak memory of the process is that of the path.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pomona import runtime
from pomona.files.unpack import read
from pomona.runtime.engine import Engine
from pomona.zoo.source import make_module

Arrays = list[NDArray[Any]]
Call = Callable[[Arrays], Arrays]


@dataclass(frozen=True, slots=True)
class Case:
    """One network in the forms that paths read, as file names."""

    inputs: str  # .npz of one batch: arrays 0, 1, ...
    file: str = ""  # .pomona.safetensors with a graph
    onnx: str = ""
    int8: str = ""  # ONNX, quantised by `quantise`
    source: str = ""  # names the torch module, see `open_module`
    state: str = ""  # its state dict, written by torch.save; empty for a file

    def read_inputs(self) -> Arrays:
        with np.load(self.inputs) as arrays:
            return [arrays[str(i)] for i in range(len(arrays.files))]


Open = Callable[[Case, int], Call]  # the case, and the number of threads


def open_pomona(case: Case, threads: int) -> Call:
    return _run_network(runtime.load(case.file, threads=threads))


def open_pomona_int16(case: Case, threads: int) -> Call:
    """In fixed point, with the ranges in the file, or without any with those of the case's inputs."""
    file = read(case.file)
    if "ranges" in (file.graph or {}):
        return _run_network(runtime.load(file, threads=threads, precision="int16"))
    return _run_network(runtime.load(file, threads=threads).calibrated(*case.read_inputs()))


def _run_network(network: runtime.Network) -> Call:
    def run(inputs: Arrays) -> Arrays:
        outputs = network.run(*inputs)
        return outputs if isinstance(outputs, list) else [outputs]

    return run


def open_eager(case: Case, threads: int) -> Call:
    return _run_module(_module(case, threads))


def open_compiled(case: Case, threads: int) -> Call:
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True  # weights are constants, laid out for the machine
    return _run_module(torch.compile(_module(case, threads)))


def _module(case: Case, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    module = open_module(case.source)
    if case.state:
        module.load_state_dict(torch.load(case.state, weights_only=True))
    return module.eval().requires_grad_(False)


def _run_module(module: Any) -> Call:
    import torch

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = module(*map(torch.from_numpy, inputs))
        return [y.numpy() for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]

    return run


def open_module(source: str) -> Any:
    """The torch module that a source names: a run's folder, a ``.pomona.safetensors`` file, or ``MODULE:FUNCTION``.

    The function is called without arguments, in a module that Python finds from the current folder.

    Raises:
        ValueError: there is nothing of that name, or it is not a torch module.
    """
    if Path(source).is_dir():
        from pomona.train.finished import open_finished  # here, because it imports torch

        return open_finished(Path(source)).make_model()
    if Path(source).is_file():
        return _module_of_file(source)
    if ":" not in source:
        raise ValueError(
            f"a model is a run's folder, a .pomona.safetensors file or MODULE:FUNCTION (my_package.nets:make), got "
            f"{source!r}, which is none of them"
        )
    return make_module(source)


def _module_of_file(path: str) -> Any:
    from pomona.runtime.module import GraphModule

    network = runtime.load(path)
    return GraphModule(network.graph, network.tensors)


def open_onnxruntime(case: Case, threads: int) -> Call:
    return _session(case.onnx, threads)


def open_onnxruntime_int8(case: Case, threads: int) -> Call:
    return _session(case.int8, threads)


def _session(path: str, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


def open_openvino(case: Case, threads: int) -> Call:
    return _request(case.onnx, threads)


def open_openvino_int8(case: Case, threads: int) -> Call:
    return _request(case.int8, threads)


def _request(path: str, threads: int) -> Call:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # its own choice is bfloat16 where the CPU has that
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(inputs: Arrays) -> Arrays:
        results = request.infer(dict(enumerate(inputs)), share_inputs=True)
        return [results[i] for i in range(len(results))]

    return run


PATHS: dict[str, Open] = {
    "pomona": open_pomona,
    "pomona int16": open_pomona_int16,
    "torch": open_eager,
    "torch.compile": open_compiled,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "onnxruntime int8": open_onnxruntime_int8,
    "openvino int8": open_openvino_int8,
}


def quantise(case: Case) -> None:
    """Write ``case.int8``: unsigned activations, signed weights per channel, calibrated on the inputs of the case.

    The speed does not depend on the calibration; the accuracy depends on how typical the inputs are.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.batches = [case.read_inputs()]

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return dict(zip(names, self.batches.pop(), strict=True)) if self.batches else None

    names = [x.name for x in onnx.load(case.onnx, load_external_data=False).graph.input]
    quantize_static(
        case.onnx,
        case.int8,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


class Served:
    """The state of a process between requests, and its answers."""

    def __init__(self, paths: Mapping[str, Open]) -> None:
        self._paths = paths
        self._opened: dict[str, tuple[Call, Arrays]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        do: Callable[..., dict[str, Any]] = getattr(self, f"do_{request.pop('do')}")
        return do(**request)

    def do_open(self, *, key: str, path: str, case: dict[str, Any], threads: int, cpus: list[int] | None) -> Any:
        """Open a network and run it once; its outputs are written to an .npz file next to its inputs."""
        if cpus:
            os.sched_setaffinity(0, cpus)
        start = time.perf_counter()
        opened = Case(**case)
        inputs = opened.read_inputs()
        run = self._paths[path](opened, threads)
        outputs = run(inputs)
        seconds = time.perf_counter() - start
        self._opened[key] = run, inputs
        answers = f"{opened.inputs}.{os.getpid()}.npz"
        np.savez(answers, **{str(i): y for i, y in enumerate(outputs)})  # type: ignore[arg-type]  # by name
        return {"outputs": answers, "seconds": seconds}

    def do_close(self) -> dict[str, Any]:
        self._opened.clear()
        return {}

    def do_time(self, *, key: str, calls: int) -> dict[str, Any]:
        """The seconds of each call, and the CPU time of this process in all of them."""
        run, inputs = self._opened[key]
        wall = []
        start_cpu = time.process_time()
        for _ in range(calls):
            start = time.perf_counter()
            run(inputs)
            wall.append(time.perf_counter() - start)
        return {"wall": wall, "cpu": time.process_time() - start_cpu}

    def do_score(self, *, key: str, data: str) -> dict[str, Any]:
        """How many labels of an .npz file with x and y the network ranks first."""
        run, inputs = self._opened[key]
        batch = len(inputs[0])
        with np.load(data) as arrays:
            x, y = arrays["x"], arrays["y"]
        right = 0
        for start in range(0, len(x), batch):
            images = x[start : start + batch]
            padded = np.concatenate([images, np.zeros_like(x[: batch - len(images)])])  # some take one batch size only
            logits = run([padded])[0][: len(images)]
            right += int((logits.reshape(len(images), -1).argmax(axis=1) == y[start : start + batch]).sum())
        return {"right": right, "total": len(y)}

    def do_layers(self, *, case: dict[str, Any], threads: int) -> dict[str, Any]:
        """Seconds per node in Pomona's engine, as it runs and with all zeros computed; medians over rounds."""
        opened = Case(**case)
        inputs = opened.read_inputs()
        network = runtime.load(opened.file)
        engines = {
            key: Engine(network.graph, network.tensors, threads=threads, dense=dense)
            for key, dense in (("", None), ("dense_", True))
        }
        start = time.perf_counter()
        for engine in engines.values():
            engine(*inputs)
        calls = min(max(round(0.02 / (time.perf_counter() - start)), 1), 1000)
        rounds: dict[str, list[list[float]]] = {key: [] for key in engines}
        for _ in range(5):
            for key, engine in engines.items():
                rounds[key].append(engine.profile(*inputs, repeats=calls))
        return {f"{key}seconds": np.median(times, axis=0).tolist() for key, times in rounds.items()}

    def do_peak(self) -> dict[str, Any]:
        return {"bytes": peak_memory()}

    def do_version(self, *, package: str) -> dict[str, Any]:
        from importlib.metadata import version

        return {"version": version(package)}

    def do_quantise(self, *, case: dict[str, Any]) -> dict[str, Any]:
        quantise(Case(**case))
        return {}


def peak_memory() -> int | None:
    """The peak memory of this process in bytes, or None if the system does not report it.

    Not the number from getrusage, which on Linux starts with that of the parent process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def serve(paths: Mapping[str, Open] = PATHS) -> None:
    """Answer requests, one line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # runtimes may print, and that must not mix with answers
    served = Served(paths)
    for line in sys.stdin:
        try:
            answer = served.answer(json.loads(line))
        except Exception as error:  # runtimes raise all kinds
            answer = {"error": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)}
        print(json.dumps(answer), file=answers, flush=True)


def relative_error(outputs: Arrays, wanted: Arrays) -> float:
    """The largest difference over the largest wanted number; infinite if shapes differ or a value is not finite."""
    worst = 0.0
    for y, right in zip(outputs, wanted, strict=True):
        if y.shape != right.shape or not np.isfinite(y).all():
            return math.inf
        worst = max(worst, float(np.abs(y - right).max()) / max(float(np.abs(right).max()), 1e-30))
    return worst
