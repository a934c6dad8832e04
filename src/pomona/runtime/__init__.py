"""Networks with sparse weights, executed as a whole, from a file or from a torch model; numpy only.

    >>> import pomona.runtime  # doctest: +SKIP
    >>> logits = pomona.runtime.load("lenet.pomona.safetensors").run(images)  # doctest: +SKIP

Torch is needed by :meth:`Network.from_model` alone. Without the compiled core a network runs too, literally and slowly
(:mod:`pomona.runtime.reference`); ``Network.is_compiled`` tells.
"""

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
from pomona.files.stored import File, Stored
from pomona.native import library
from pomona.runtime import reference
from pomona.runtime.engine import Engine, Precision, check_precision
from pomona.runtime.fold import fold
from pomona.runtime.graph import MAX_BYTES, Graph
from pomona.runtime.ranges import with_ranges

if TYPE_CHECKING:
    import torch

__all__ = ["Graph", "Network", "load"]

_FLOATS = ("F64", "F32", "F16", "BF16")


def load(
    file: str | os.PathLike[str] | File,
    *,
    threads: int = 1,
    max_bytes: int | None = None,
    precision: Precision = "float32",
) -> Network:
    """The network of a file, ready to run.

    Args:
        file: a path, or what :func:`pomona.files.unpack.read` gave.
        threads: how many the network may use.
        max_bytes: the most that its tensors may take as dense ones, and the most for what is made of them and for
            activations. Default: that of :func:`pomona.files.unpack.read`, and 16 GiB.
        precision: see :class:`Network`.

    Raises:
        FormatError: it is not such a file, or damaged; a ValueError.
        ValueError: it holds no graph, one that does not fit its tensors, or no ranges where int16 is asked for.
    """
    read = file if isinstance(file, File) else unpack.read(file, max_bytes=max_bytes)
    where = "the file" if isinstance(file, File) else os.fspath(file)
    if read.graph is None:
        raise ValueError(
            f"{where} holds tensors but not what is computed with them; write it anew from the model and an example of "
            "its input, or load it into the model with pomona.load"
        )
    try:
        graph = Graph.from_json(read.graph)
        graph.shapes(read.tensors)
        tensors = {name: to_float32(name, read.tensors[name]) for name in graph.names()}
        return Network(
            graph, tensors, threads=threads, max_bytes=max_bytes, metadata=read.metadata, precision=precision
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class Network:
    """A graph with its tensors, ready to run.

    In float32, or in 16-bit fixed point (``precision="int16"``), which is faster by up to two times where layers have
    many positions, and takes half the memory for activations: :mod:`pomona.runtime.engine` says how it rounds. It needs
    the ranges of values (:meth:`calibrated`, or ``pomona.export(calibrate=...)``).

    Attributes:
        graph: what it computes, after folding (:func:`pomona.runtime.fold.fold`).
        tensors: its weights by name, float32, dense or :class:`~pomona.files.sparse.Sparse`.
        metadata: what the file says of it.
        threads: how many it may use.
        precision: as asked for; without the compiled core everything is computed in float32 all the same.
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
    def from_model(
        cls, model: torch.nn.Module, example: torch.Tensor | Sequence[torch.Tensor], *, threads: int = 1
    ) -> Network:
        """The network that a torch model in eval mode is; see :func:`pomona.runtime.readers.trace.trace`.

        Raises:
            UnsupportedError: the runtime cannot say what the model computes; :func:`pomona.compile` takes any.
        """
        from pomona.runtime.readers.trace import trace

        return cls(*trace(model, example), threads=threads)

    def calibrated(self, *inputs: Any) -> Network:
        """The same network in fixed point, with the ranges that values have on these samples.

        Args:
            inputs: as of :meth:`run`; a few dozen typical samples.

        Raises:
            ValueError: shapes do not fit, or a value is not finite.
        """
        graph = with_ranges(self.graph, self.tensors, *(np.ascontiguousarray(x, np.float32) for x in inputs))
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
            inputs: arrays of real numbers, (batch, ...) each; computed with as float32.

        Returns:
            A float32 array (batch, ...), or a list of them where the network has several outputs.

        Raises:
            ValueError: their number or a shape is wrong.
        """
        outputs = self._execute(*(np.ascontiguousarray(x, np.float32) for x in inputs))
        return outputs[0] if len(outputs) == 1 else outputs

    __call__ = run


def to_float32(name: str, stored: Stored) -> NDArray[np.float32] | Sparse:
    """The numbers, exactly but for those of 64 bits."""
    if stored.dtype not in _FLOATS:
        raise ValueError(f"tensor {name[:100]!r} is of {stored.dtype}; the runtime computes with {', '.join(_FLOATS)}")

    def cast(values: NDArray[Any]) -> NDArray[np.float32]:
        if stored.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return values.astype(np.float32)

    value = stored.value
    return replace(value, values=cast(value.values)) if isinstance(value, Sparse) else cast(value)
