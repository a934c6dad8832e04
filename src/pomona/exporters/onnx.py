"""ONNX by torch's exporter, checked in ONNX Runtime; sparse weights as sparse initializers where that is smaller.

A sparse initializer takes 8 bytes of position beside each stored weight, so it is smaller where fewer than a third of
the float32 weights are left. It is storage only: ONNX Runtime makes it dense when it loads, and runs no faster.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pomona.exporters.source import Source
from pomona.files.sparse import Sparse


def write(source: Source, path: Path) -> None:
    model, example = network_of(source, "onnx")
    onnx = _import("onnx", "onnx")
    _import("onnxscript", "torch's exporter")
    runtime = _import("onnxruntime", "checking the file")
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "model.onnx"
        export_dense(model, example, dense)
        proto = onnx.load(dense)
    proto.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in source.metadata.items())
    smaller = _with_sparse_initializers(onnx, proto)
    expected = _outputs_of(model, example)
    try:
        _check(runtime, smaller, example, expected)
    except Exception as error:  # ONNX Runtime documents no closed list
        if smaller is proto:
            raise ValueError(f"ONNX Runtime does not reproduce the model: {error}") from None
        _check(runtime, proto, example, expected)
        warnings.warn(f"ONNX Runtime refuses sparse initializers here, so weights stay dense: {error}", stacklevel=3)
        smaller = proto
    path.write_bytes(smaller.SerializeToString())


def network_of(source: Source, format: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Model and example, which formats of whole networks cannot do without."""
    if source.model is None or source.example is None:
        missing = "a model (not a state dict)" if source.model is None else "example=, inputs of the model"
        raise ValueError(f"format {format!r} holds what the network computes; export needs {missing}")
    return source.model, source.example


def export_dense(model: nn.Module, example: tuple[Any, ...], path: Path) -> None:
    """Write what torch's exporter makes of the model in evaluation mode; the mode is restored."""
    _import("onnxscript", "torch's exporter")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            torch.onnx.export(model, example, path, dynamo=True, external_data=False, verbose=False)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _import(name: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{purpose} needs the package {name}: pip install 'pomona[onnx]'") from None


def _with_sparse_initializers(onnx: Any, proto: Any) -> Any:
    """A copy with sparse initializers where they are smaller, or `proto` itself where there are none."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    kept = []
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        sparse = Sparse.from_dense(array)
        count = len(sparse.positions)
        if array.ndim < 2 or array.dtype != np.float32 or count * (array.itemsize + 8) >= array.nbytes:
            kept.append(tensor)
            continue
        values = onnx.numpy_helper.from_array(sparse.values, tensor.name)
        places = onnx.numpy_helper.from_array(sparse.positions, f"{tensor.name}_positions")
        copy.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, list(array.shape)))
    if len(kept) == len(proto.graph.initializer):
        return proto
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


def _outputs_of(model: nn.Module, example: tuple[Any, ...]) -> list[np.ndarray[Any, Any]]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(*example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [output.detach().cpu().numpy() for output in outputs]


def _check(runtime: Any, proto: Any, example: tuple[Any, ...], expected: list[np.ndarray[Any, Any]]) -> None:
    """Run it, and compare to a hundred-thousandth of the largest output: sums are in another order there."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {i.name: x.detach().cpu().numpy() for i, x in zip(session.get_inputs(), example, strict=True)}
    for got, wanted in zip(session.run(None, inputs), expected, strict=True):
        error = float(np.abs(got - wanted).max(initial=0))
        if not error <= 1e-5 * max(1.0, float(np.abs(wanted).max(initial=0))):
            raise ValueError(f"outputs differ by {error:.3g}")
