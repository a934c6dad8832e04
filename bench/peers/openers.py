"""Paths that only bench/inference.py has: MNN, and DeepSparse, whose licence allows evaluation only."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

from pomona.benchmark.paths import PATHS, Arrays, Call, Case, serve


def open_mnn(case: Case, threads: int) -> Call:
    return _session(case, threads, [])


def open_mnn_sparse(case: Case, threads: int) -> Call:
    return _session(case, threads, ["--detectSparseSpeedUp"])


def _session(case: Case, threads: int, options: list[str]) -> Call:
    """The package's converter is called as a function: its command line would install packages and phone home."""
    import _tools
    import MNN

    converted = f"{case.onnx}{len(options)}.mnn"
    if not Path(converted).exists():
        files = ["-f", "ONNX", "--modelFile", case.onnx, "--MNNModel", converted, "--bizCode", "bench"]
        _tools.mnnconvert(["mnnconvert", *files, *options])
    interpreter = MNN.Interpreter(converted)
    session = interpreter.createSession({"backend": "CPU", "precision": "high", "numThread": threads})
    inputs = list(interpreter.getSessionInputAll(session).values())
    outputs = list(interpreter.getSessionOutputAll(session).values())

    def run(arrays: Arrays) -> Arrays:
        for tensor, x in zip(inputs, arrays, strict=True):
            tensor.copyFrom(MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, MNN.Tensor_DimensionType_Caffe))
        interpreter.runSession(session)
        results = []
        for tensor in outputs:
            shape = tensor.getShape()
            y = np.empty(shape, np.float32)
            host = MNN.Tensor(shape, MNN.Halide_Type_Float, y, MNN.Tensor_DimensionType_Caffe)
            tensor.copyToHostTensor(host)
            results.append(np.array(host.getNumpyData(), copy=True).reshape(shape))
        return results

    run.keep = interpreter, session  # type: ignore[attr-defined]  # the tensors do not keep them alive
    return run


def open_deepsparse(case: Case, threads: int) -> Call:
    """The engine alone: importing the whole package would need the requirements left out in `PEERS`, and report use."""
    if "deepsparse" not in sys.modules:
        spec = importlib.util.find_spec("deepsparse")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("deepsparse is not installed")
        package = types.ModuleType("deepsparse")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["deepsparse"] = package
    from deepsparse.lib import init_deepsparse_lib

    batch = len(case.read_inputs()[0])
    engine = init_deepsparse_lib().deepsparse_engine(case.onnx, batch, threads, 1, "single_stream", None, None)
    return lambda inputs: list(engine.execute_list_out(inputs))


OPENERS = PATHS | {"mnn": open_mnn, "mnn sparse": open_mnn_sparse, "deepsparse": open_deepsparse}

if __name__ == "__main__":
    serve(OPENERS)
