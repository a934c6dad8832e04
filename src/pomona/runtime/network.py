"""Networks ready to run: from a file, from a graph and its tensors, or from a torch model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pomona.files import unpack
from pomona.files.sparse import Sparse
from pomona.files.stored import FLOATS, File, Stored, to_float32
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.engine import Engine, Precision, check_precision
from pomona.runtime.fold import fold
from pomona.runtime.graph import MAX_BYTES, Graph
from pomona.runtime.ranges import with_ranges

if TYPE_CHECKING:
    import torch


def load(
    file: str | os.PathLike[str] | File,
    *,
    threads: int = 1,
    max_bytes: int | None = None,
    precision: Precision = "float32",
    shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] = (),
) -> Network:
    """The network of a file, ready to run.

    Args:
        file: a path, or what :func:`pomona.files.unpack.read` returned. A path that ends in ``.onnx`` is read by the
            package onnx; see :mod:`pomona.runtime.readers.onnx`.
        threads: how many threads the network may use.
        max_bytes: the most that its tensors may take as dense ones, and the most that the engine's copy of them and
            the activations may take. Default: that of :func:`pomona.files.unpack.read`, and 16 GiB.
        precision: see :class:`Network`; an ONNX file has no ranges, so that int16 takes :meth:`Network.calibrated`.
        shapes: of an ONNX file that leaves dimensions beside the batch free: name of an input -> its shape without the
            batch, or the shapes of all inputs in their order.

    Raises:
        UnsupportedError: the ONNX file has an operator that the runtime lacks; a ValueError that names it.
        ImportError: the file is ONNX, and the package onnx is not installed.
        FormatError: this is no such file, or it is damaged; a ValueError.
        ValueError: the file holds no graph, a graph that does not fit its tensors, or, for int16, no ranges.
    """
    if not isinstance(file, File) and os.fspath(file).endswith(".onnx"):
        from pomona.runtime.readers import onnx

        graph, dense = onnx.read(file, shapes=shapes, max_bytes=max_bytes)
        return Network(graph, dense, threads=threads, max_bytes=max_bytes, precision=precision)
    if shapes:
        raise ValueError("shapes= is for ONNX files, which may leave dimensions free")
    read = file if isinstance(file, File) else unpack.read(file, max_bytes=max_bytes)
    where = "the file" if isinstance(file, File) else os.fspath(file)
    if read.graph is None:
        raise ValueError(
            f"{where} holds tensors but not what is computed with them; write it again with pomona.export(model, path, "
            "example=...), or load it into the model with pomona.load"
        )
    try:
        graph = Graph.from_json(read.graph)
        graph.shapes(read.tensors)
        tensors = tensors_of(graph, read.tensors)
        return Network(
            graph, tensors, threads=threads, max_bytes=max_bytes, metadata=read.metadata, precision=precision
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class Network:
    """A graph with its tensors, ready to run.

    It computes in float32 or in 16-bit fixed point (``precision="int16"``). The latter is up to twice as fast where
    layers have many positions, and halves the memory of activations; :mod:`pomona.runtime.engine` says how it rounds.
    It needs the ranges of values (:meth:`calibrated`, or ``pomona.export(calibrate=...)``).

    Attributes:
        graph: what the network computes, after folding (:func:`pomona.runtime.fold.fold`).
        tensors: its weights by name, float32, dense or :class:`~pomona.files.sparse.Sparse`.
        metadata: what the file says about it.
        threads: how many threads it may use.
        precision: as given; without the compiled core everything is computed in float32.
        is_compiled: whether the compiled core runs it.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, NDArray[Any] | Sparse],
        *,
        threads: int = 1,
        max_bytes: int | None = None,
        metadata: Mapping[str, str] | None = None,
        precision: Precision = "float32",
    ) -> None:
        limit = MAX_BYTES if max_bytes is None else max_bytes
        graph.shapes(tensors, max_bytes=limit)
        self.graph, self.tensors = fold(graph, tensors)
        self.metadata = dict(metadata or {})
        self.threads = threads
        self.precision = precision
        check_precision(precision, graph)
        self._max_bytes = max_bytes
        self.is_compiled = library.is_available()
        self._execute: Callable[..., list[NDArray[np.float32]]]
        if self.is_compiled:
            self._execute = Engine(self.graph, self.tensors, threads=threads, max_bytes=limit, precision=precision)
        else:
            self._execute = partial(reference.run, self.graph, self.tensors)

    @classmethod
    def from_model(cls, model: torch.nn.Module, example: Any, *, threads: int = 1) -> Network:
        """Make a network of a torch model in eval mode; see :func:`pomona.runtime.readers.trace.trace`.

        Raises:
            UnsupportedError: the model has an operation that the runtime lacks; :func:`pomona.compile` takes any model.
        """
        from pomona.runtime.readers.trace import trace

        return cls(*trace(model, example), threads=threads)

    def calibrated(self, *inputs: Any) -> Network:
        """Make the same network in fixed point, with the ranges that values have on these samples.

        Args:
            inputs: as for :meth:`run`; a few dozen typical samples.

        Raises:
            ValueError: shapes do not fit, or a value is not finite.
        """
        graph = with_ranges(self.graph, self.tensors, *inputs)
        return Network(
            graph,
            self.tensors,
            threads=self.threads,
            max_bytes=self._max_bytes,
            metadata=self.metadata,
            precision="int16",
        )

    def run(self, *inputs: Any) -> Any:
        """The outputs for a batch.

        Args:
            inputs: arrays, (batch, ...) each: of real numbers, which are computed with as float32; of integers where
                the network takes these.

        Returns:
            A float32 array (batch, ...), or a list of them where the network has several outputs.

        Raises:
            ValueError: their number, a shape or a dtype is wrong.
        """
        outputs = self._execute(*reference.arrays_of(self.graph, inputs))
        return outputs[0] if len(outputs) == 1 else outputs

    __call__ = run


def tensors_of(graph: Graph, stored: Mapping[str, Stored]) -> dict[str, NDArray[np.float32] | Sparse]:
    """The tensors that a graph names, in float32: exact unless they have 64 bits.

    Raises:
        ValueError: one of them is not floating point.
    """
    return {name: _in_float32(name, stored[name]) for name in graph.names()}


def _in_float32(name: str, stored: Stored) -> NDArray[np.float32] | Sparse:
    if stored.dtype not in FLOATS:
        raise ValueError(f"tensor {name[:100]!r} is of {stored.dtype}; the runtime computes with {', '.join(FLOATS)}")
    value = stored.value
    if isinstance(value, Sparse):
        return replace(value, values=to_float32(value.values, stored.dtype))
    return to_float32(value, stored.dtype)
