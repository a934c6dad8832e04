"""ONNX by torch's exporter, checked in ONNX Runtime; sparse weights as sparse initializers where that is smaller.

A sparse initializer takes 8 bytes of position beside each stored weight, so it is smaller where fewer than a third of
the float32 weights are left. It is storage only: ONNX Runtime makes it dense when it loads, and runs no faster.

The batch is free, and so is every other dimension of a text, a signal or a mask that the model leaves free. That a
dimension is free is believed after ONNX Runtime gave torch's outputs at other sizes; if it did not, the model is
exported again with fewer of them.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pomona.example import Example, Returned, evaluating, randomness_kept, returning_tensors
from pomona.exporters import free
from pomona.exporters.source import Source
from pomona.files.sparse import Sparse

Case = tuple[Example, list[NDArray[Any]]]  # what a model is called with, and what it gives

_CANNOT = "give a module whose forward takes and returns tensors, or dictionaries, tuples and dataclasses of them"
_FIXED_BATCH = "the batch is fixed to that of the example, with which the model computes as with a constant"
_LOUD = ("torch.onnx", "torch._export", "torch.export", "onnxscript", "onnx_ir")  # they log what is no concern of users


def write(source: Source, path: Path) -> tuple[str, ...]:
    """Write the file; returns what is to be known about its inputs and outputs."""
    model, example = network_of(source, "onnx")
    onnx = _import("onnx", "onnx")
    _import("onnxscript", "torch's exporter")
    runtime = _import("onnxruntime", "checking the file")
    with evaluating(model), randomness_kept(), _without_fast_path():
        example = example.in_order(model)
        returned = Returned.of(example.run(model))
        _check_types(model, example, returned)
        maker = _Maker(onnx, runtime, model, example, _arrays(returned))
        if source.dynamic_shapes is None:
            proto, notes = maker.freest()
        else:
            proto, notes = maker.make(example, source.dynamic_shapes or None), []
    proto.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in source.metadata.items())
    path.write_bytes(proto.SerializeToString())
    notes += [f"inputs: {free.describe(proto)}"]
    notes += [f"left out: the output {name} ({kind}), which is no tensor" for name, kind in returned.left_out.items()]
    return tuple(notes)


def network_of(source: Source, format: str) -> tuple[nn.Module, Example]:
    """Model and example, which formats of whole networks cannot do without."""
    if source.model is None or source.example is None:
        missing = "a model (not a state dict)" if source.model is None else "example=, inputs of the model"
        raise ValueError(f"format {format!r} holds what the network computes; export needs {missing}")
    return source.model, source.example


def export_dense(model: nn.Module, example: Example, path: Path, dynamic_shapes: Any = None) -> Any:
    """Write what torch's exporter makes of the model in evaluation mode; returns the program that it read.

    Raises:
        ValueError: it cannot; says why.
    """
    _import("onnxscript", "torch's exporter")
    names = _names_of_outputs(model, example)
    with evaluating(model), returning_tensors(model), torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of the exporter about itself
        try:
            made = torch.onnx.export(
                model,
                example.args,
                kwargs=example.kwargs,
                output_names=names,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                verbose=False,
            )
            assert made is not None
            made.save(path, external_data=False)
        except Exception as error:  # torch documents no closed list
            raise ValueError(
                f"torch cannot export {type(model).__name__} to ONNX ({_cause(error)}); {_CANNOT}"
            ) from error
    return made.exported_program


class _Maker:
    """Makes the file of one model, as often as it takes."""

    def __init__(
        self, onnx: Any, runtime: Any, model: nn.Module, example: Example, expected: list[NDArray[Any]]
    ) -> None:
        self._onnx, self._runtime, self._model = onnx, runtime, model
        self._example, self._expected = example, expected

    def freest(self) -> tuple[Any, list[str]]:
        """The file with as many free dimensions as ONNX Runtime agrees to, and why there are not more."""
        why = ""
        for freedom in free.freedoms(self._example):
            notes = [f"{freedom.says}, since with more: {why}"] if why else []
            example = freedom.enlarged(self._example)
            try:
                shapes = freedom.dynamic_shapes(self._model, example)
                proto = self.make(example, shapes, is_tried=True)
                is_said = notes or freedom.is_none() or free.has_free_batch(proto)
                return proto, notes if is_said else [_FIXED_BATCH]
            except Exception as error:  # neither torch nor ONNX Runtime documents a closed list
                if freedom.is_none():
                    raise
                why = _first_line(error)
        raise AssertionError("the last one frees nothing")

    def make(self, example: Example, dynamic_shapes: Any, *, is_tried: bool = False) -> Any:
        """The file that torch makes of this example, checked at the user's, and if it is tried out at other sizes."""
        with tempfile.TemporaryDirectory() as folder:
            dense = Path(folder) / "model.onnx"
            program = export_dense(self._model, example, dense, dynamic_shapes)
            proto = self._onnx.load(dense)
        free.settle(proto, program, example)
        cases = [(self._example, self._expected)]
        if is_tried:
            cases += self._answered(free.others(proto, self._example))
        return self._checked(proto, cases)

    def _checked(self, proto: Any, cases: Sequence[Case]) -> Any:
        """The file, with sparse initializers if ONNX Runtime takes them, after it gave the model's outputs."""
        smaller = _with_sparse_initializers(self._onnx, proto)
        try:
            _check(self._runtime, smaller, cases)
            return smaller
        except Exception as error:  # ONNX Runtime documents no closed list
            refusal = error
        try:
            if smaller is proto:
                raise refusal
            _check(self._runtime, proto, cases)
        except Exception as error:
            raise ValueError(f"ONNX Runtime does not reproduce the model: {error}") from None
        warnings.warn(f"ONNX Runtime refuses sparse initializers here, so weights stay dense: {refusal}", stacklevel=6)
        return proto

    def _answered(self, others: Sequence[Example]) -> list[Case]:
        """Those sizes at which the model itself runs, with its outputs."""
        answered: list[Case] = []
        why = ""
        for other in others:
            try:
                answered.append((other, _arrays(Returned.of(other.run(self._model)))))
            except Exception as error:  # a model may raise anything
                why = _first_line(error)
        if others and not answered:
            raise ValueError(f"the model itself takes no other size ({why})")
        return answered


def _check_types(model: nn.Module, example: Example, returned: Returned) -> None:
    if any(x.dtype == torch.bfloat16 for x in (*example.tensors(), *returned.tensors.values())):
        raise ValueError(
            f"{type(model).__name__} takes or returns bfloat16, which ONNX Runtime cannot be given to check the file; "
            "export model.float() with an example in float32"
        )


def _names_of_outputs(model: nn.Module, example: Example) -> list[str] | None:
    """Names of what the model returns by name; None where it does not, and torch makes some up."""
    with evaluating(model):
        names = list(Returned.of(example.run(model)).tensors)
    if not names:
        raise ValueError(f"{type(model).__name__} returns no tensor for the example; a network of a file has to")
    if any(not name.isidentifier() for name in names):
        return None
    return [f"{name}_output" if name in example.named(model) else name for name in names]


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Torch's transformers take their ordinary path; the fast one writes zeros where a batch is padded."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The error at the bottom of a pile of them, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 200 else line[:197] + "..."


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


def _arrays(returned: Returned) -> list[NDArray[Any]]:
    return [x.detach().cpu().numpy() for x in returned.tensors.values()]


def _check(runtime: Any, proto: Any, cases: Sequence[Case]) -> None:
    """Run it, and compare to a hundred-thousandth of the largest output: sums are in another order there."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for example, expected in cases:
        given = [x.detach().cpu().numpy() for x in example.tensors()]
        for got, wanted in zip(session.run(None, dict(zip(names, given, strict=True))), expected, strict=True):
            _compare(got, wanted)


def _compare(got: NDArray[Any], wanted: NDArray[Any]) -> None:
    if got.shape != wanted.shape:
        raise ValueError(f"an output has the shape {got.shape} instead of {wanted.shape}")
    differs = got != wanted  # where both are infinite, as masked scores are, they do not
    error = float(np.abs(np.subtract(got, wanted, where=differs, out=np.zeros(got.shape, np.float64))).max(initial=0))
    largest = float(np.abs(wanted).max(initial=0, where=np.isfinite(wanted)))
    if not error <= 1e-5 * max(1.0, largest):
        raise ValueError(f"outputs differ by {error:.3g}")
