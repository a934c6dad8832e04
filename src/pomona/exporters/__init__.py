"""Ship it: a model as a file, one format in one module.

``export`` writes, ``load`` gives back a plain state dict, without pickle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor, nn

from pomona._version import __version__
from pomona.example import Example, evaluating
from pomona.exporters import bitmask, csr, mnn, onnx, plain, pomona_file, two_four
from pomona.exporters.channels import shrink
from pomona.exporters.source import Exported, Source, from_state, sparsity, to_tensors
from pomona.files.quantize import Quantization, half
from pomona.files.quantize import quantize as quantized
from pomona.files.safetensors import FormatError, read_metadata
from pomona.files.stored import Stored
from pomona.torch_compile import plain_names, unwrapped

if TYPE_CHECKING:
    from pomona.pruner import Pruner

__all__ = ["FORMATS", "Exported", "FormatError", "export", "load", "shrink"]

FORMATS: dict[str, ModuleType] = {
    "pomona": pomona_file,
    "safetensors": plain,
    "csr": csr,
    "2:4": two_four,
    "bitmask": bitmask,
    "onnx": onnx,
    "mnn": mnn,
}
"""Format -> the module with its ``write``, and its ``read`` where ``load`` reads it."""

_SUFFIXES = {
    ".pomona.safetensors": "pomona",
    ".csr.safetensors": "csr",
    ".2of4.safetensors": "2:4",
    ".bitmask.safetensors": "bitmask",
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".mnn": "mnn",
}

Model = TypeVar("Model", bound=nn.Module)


def export(
    model: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    quantize: str | Quantization | None = None,
    evaluate: Callable[[], float] | None = None,
    graph: Any = None,
    example: Any = None,
    calibrate: Any = None,
    dynamic_shapes: Any = None,
    pruner: Pruner | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a model to a file.

    Args:
        model: a module, or a state dict.
        path: the file. Its suffix chooses the format: `.pomona.safetensors`, `.safetensors`, `.csr.safetensors`,
            `.2of4.safetensors`, `.bitmask.safetensors`, `.onnx`, `.mnn`.
        format: a key of `FORMATS` instead: "pomona", "safetensors", "csr", "2:4", "bitmask", "onnx", "mnn".
        quantize: let weights share values: "k-means:16" (2 to 256 values), "uniform:4" (2, 3, 4 or 8 bits), with
            ":shared" for one codebook instead of one per tensor, and ":biases=16" for a codebook shared by all biases
            (otherwise stored in half precision). Format "pomona" only. The model itself is not changed.
        evaluate: returns the model's accuracy (any number). It is called before and after quantisation, the second
            time with the quantised weights in the model. Both numbers are in the file and in the result.
        graph: what the network computes (`pomona.runtime.graph`), if you already have it; format "pomona".
        example: what the model is called with, batch in front: a tensor; a dictionary of keyword arguments; or a tuple
            or list of arguments, whose last element, if it is a dictionary, holds the keyword arguments. Format
            "pomona": the graph is traced, and the file runs without torch (`pomona.runtime.load`); a network that the
            runtime cannot run is an error, and without an example the file holds its tensors. "onnx" and "mnn" need it.
        calibrate: the same with a few dozen typical samples. The file then also holds the ranges of all values on
            them, and can be run in 16-bit fixed point (`pomona.runtime.load(path, precision="int16")`); format
            "pomona", with a graph.
        dynamic_shapes: format "onnx": which dimensions are free. By default the batch is, and in tensors of up to three
            dimensions and of integers every other one that the model leaves free, such as the length of a text.
            ``{}`` fixes all to those of the example, ``{"input_ids": {0: torch.export.Dim.DYNAMIC}}`` and the like go
            to `torch.export` as they are.
        pruner: whose method and scope the file is to name.
        metadata: further strings for the file to hold.

    Returns:
        What was written; print it.

    Names are those of the model itself, also where `torch.compile` has wrapped it or parts of it.

    Raises:
        ValueError: the model or the options do not fit the format; says why.
        ImportError: the format needs a package that is not there; says which.

    Example:
        >>> import tempfile, torch
        >>> model = nn.Linear(3, 2)
        >>> model.weight.data = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
        >>> path = Path(tempfile.mkdtemp()) / "x.pomona.safetensors"
        >>> round(export(model, path).sparsity, 3)
        0.667
        >>> load(path)["weight"]
        tensor([[0., 0., 1.],
                [0., 2., 0.]])
    """
    path = Path(path)
    format = _format_of(path, format)
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"export takes a module or a state dict, got {type(model).__name__}")
    if evaluate and (quantize is None or not isinstance(model, nn.Module)):
        raise ValueError("export(evaluate=...) measures what quantize=... changes, in a module: give both")
    if dynamic_shapes is not None and format != "onnx":
        raise ValueError(f"export(dynamic_shapes=...) is for format 'onnx', got {format!r}")
    called = None if example is None else Example.of(example)
    with _opened(model) as (module, tensors):
        dense_bytes = sum(s.dense().nbytes for s in {id(s): s for s in tensors.values()}.values())
        described = _metadata(tensors, pruner) | dict(metadata or {})
        before = after = None
        if quantize is not None:
            how = _quantization(quantize, format)
            tensors = quantized(tensors, how)
            described |= {"quantize": str(how), "sparsity": f"{sparsity(tensors):.6g}"}
            if evaluate and module is not None:
                before = float(evaluate())
                with _holding(module, to_tensors(tensors)):
                    after = float(evaluate())
                described |= {"accuracy_before": f"{before:.10g}", "accuracy_after": f"{after:.10g}"}
        zeros = sparsity(tensors)
        if format == "pomona" and graph is None and called is not None:
            graph, tensors = _traced(module, called, tensors)
        if calibrate is not None:
            graph = _calibrated(graph, tensors, module, Example.of(calibrate))
        graph = graph.to_json() if hasattr(graph, "to_json") else graph
        source = Source(tensors, described, graph, module, called, dynamic_shapes)
        notes = FORMATS[format].write(source, path) or ()
    return Exported(path, format, path.stat().st_size, dense_bytes, zeros, before, after, notes)


@contextmanager
def _opened(model: nn.Module | Mapping[str, Any]) -> Iterator[tuple[nn.Module | None, dict[str, Stored]]]:
    """The model, if it is one, and its tensors, all with plain names for a while."""
    if not isinstance(model, nn.Module):
        yield None, from_state(plain_names(model))
        return
    with unwrapped(model) as module:
        yield module, from_state(module.state_dict())


def _quantization(quantize: str | Quantization, format: str) -> Quantization:
    if format != "pomona":
        raise ValueError(f"quantize={str(quantize)!r} is for format 'pomona', got {format!r}, which cannot hold it")
    return Quantization.parse(quantize) if isinstance(quantize, str) else quantize


def _format_of(path: Path, format: str | None) -> str:
    if format is None:
        found = next((format for suffix, format in _SUFFIXES.items() if path.name.endswith(suffix)), None)
        if found is None:
            raise ValueError(
                f"the name {path.name!r} does not show the format; end it in {', '.join(_SUFFIXES)}, or give format="
            )
        return found
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return format


def _metadata(tensors: Mapping[str, Stored], pruner: Pruner | None) -> dict[str, str]:
    metadata = {"pomona": __version__, "sparsity": f"{sparsity(tensors):.6g}"}
    if pruner is not None:
        metadata |= {"method": repr(pruner.method), "scope": repr(pruner.scope)}
    return metadata


def _traced(module: nn.Module | None, example: Example, tensors: Mapping[str, Stored]) -> tuple[Any, dict[str, Stored]]:
    """The graph of the module with these tensors in it, and the tensors with those that the graph adds.

    Their names have an ``@`` in them: batch norms as scale and shift, say. ``load`` leaves them out.
    """
    from pomona.runtime.readers.trace import UnsupportedError, trace

    if module is None:
        raise ValueError("export(example=...) traces what a module computes; a state dict does not say that")
    taken = [name for name in tensors if "@" in name]
    if taken:
        raise ValueError(f"export(example=...) keeps names with an '@' for itself, but the model has {taken[0]!r}")
    try:
        with _holding(module, to_tensors(tensors)), evaluating(module):
            graph, used = trace(module, example, folded=False)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{error}. Leave out example= to write the file without a graph; it then holds the tensors, for pomona.load"
        ) from error
    is_exact = all(not s.storage for s in tensors.values())
    derived = {name: Stored("F32", array) for name, array in used.items() if name not in tensors}
    return graph, {**tensors, **(derived if is_exact else {name: half(s) for name, s in derived.items()})}


def _calibrated(graph: Any, tensors: Mapping[str, Stored], module: nn.Module | None, samples: Example) -> Any:
    """The graph with ranges, as it will be computed with what the file holds."""
    from pomona.runtime import Graph
    from pomona.runtime.network import tensors_of
    from pomona.runtime.ranges import with_ranges

    if graph is None:
        raise ValueError(
            "export(calibrate=...) measures the values of a graph: give example= too, and the format 'pomona'"
        )
    graph = graph if isinstance(graph, Graph) else Graph.from_json(graph)
    given = samples if module is None else samples.in_order(module)
    inputs = [x for x in (*given.args, *given.kwargs.values()) if x is not None]
    arrays = [x.detach().cpu().float().numpy() if isinstance(x, Tensor) else x for x in inputs]
    return with_ranges(graph, tensors_of(graph, tensors), *arrays)


@contextmanager
def _holding(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """These weights in the module for a while, and then its own again, bit for bit."""
    own = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    try:
        yield
    finally:
        module.load_state_dict(own)


@overload
def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Model, *, max_bytes: int | None = None) -> Model: ...


def load(path: str | os.PathLike[str], model: Any = None, *, max_bytes: int | None = None) -> Any:
    """The state dict in a file that ``export`` wrote (formats pomona, safetensors, csr, 2:4, bitmask), bit for bit.

    Args:
        path: of the file; which format it is stands in it. Nothing in it is executed.
        model: filled with the tensors, if given; `torch.compile` may have wrapped it.
        max_bytes: the most that the tensors may take; default: a thousand times the file, and at least 1 GiB.

    Returns:
        The state dict, on the CPU, or the model.

    Raises:
        FormatError: the file is damaged or hostile; says where.
        RuntimeError: of `load_state_dict`, if the tensors are not those of the model.
    """
    path = Path(path)
    name = read_metadata(path).get("format", "")
    name = "pomona" if name.startswith("pomona ") else name
    reader = FORMATS.get(name, plain)
    state = to_tensors(reader.read(path, max_bytes))
    if model is None:
        return state
    with unwrapped(model) as inner:
        inner.load_state_dict(plain_names(state))
    return model
