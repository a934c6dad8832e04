"""Networks with sparse weights, executed as a whole by the compiled core; numpy only.

``core/include/pomona_net.h`` is the interface, ``graph.py`` says how a network is written down. Here a graph and its
tensors are handed over. The core copies them, lays them out, and decides for each layer whether skipping zeros pays.

Memory: 8 bytes for every weight that is not zero, once for single samples and once more for batches, in addition to
the weights as given. Activations share one arena.

Deviations from float32 arithmetic, one operation after the other: sums are taken in another order, and products are
fused with them. The error is that of a float32 dot product in any order. ``gelu`` is within 2e-7 of the true value for
|x| <= 1, and beyond that relative to |x|.

With ``precision="int16"`` the arithmetic is 16-bit fixed point. A value v of range r, the largest magnitude it had on
some samples, is kept as an int16 q with v = u q, u = 4 r / 32767 (the 4 is POMONA_HEADROOM: what exceeds four times the
range is cut off; units are larger where the rules of ``pomona_net.h`` say so). Sums of a layer have the unit
s = 2^d u_out, mostly with d = 0, 1 or 2; a weight w is kept as W = round(2^15 w u_in / s), in several equal parts where
that is 2^15 or more (each counts as a weight), and a layer is

    q_out = 2^d (bias + sum over its weights of floor(W q_in / 2^15 + 1/2))

so that an output of n weights whose magnitudes sum to S is off by at most (n + 1) / 2 s (products and bias), S / 2 u_in
(the input) and n 2^-16 |q_in| s (weights). Everything else, and layers of one position where samples go one by one, is
computed in float32 and rounded once. Results have the same bits on every machine, except what goes through float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from pomona.files.sparse import Sparse
from pomona.native import library
from pomona.runtime.graph import Graph, Node
from pomona.runtime.node import ATTRIBUTES
from pomona.runtime.operations import DTYPES, MAX_DIMENSIONS, OPERATIONS, DType
from pomona.runtime.reference import arrays_of, check_inputs

Array = NDArray[np.float32]
Precision: TypeAlias = Literal["float32", "int16"]

_RANKS = {"vector": (1,), "matrix": (2,), "kernel": (2, 4)}
_DENSE = {None: 0, False: 1, True: 2}
_ERRORS = {
    -2: "a size that overflows, or more memory than max_bytes",
    -3: "a null pointer",
    -4: "an operation, operand, attribute, tensor or shape that does not fit",
    -6: "an internal error",
}

_LISTS = ("inputs", "nodes", "operands", "attributes", "tensors", "outputs")

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Node(ctypes.Structure):
    _fields_ = (
        ("op", _int32),
        ("first_operand", _int32),
        ("num_operands", _int32),
        ("first_attribute", _int32),
        ("num_attributes", _int32),
    )


class _Setting(ctypes.Union):
    _fields_ = (("integers", _int32 * 4), ("numbers", ctypes.c_float * 4))


class _Attribute(ctypes.Structure):
    _fields_ = (("name", _int32), ("value", _Setting))


class _Type(ctypes.Structure):
    _fields_ = (("dtype", _int32), ("rank", _int32), ("dims", _int32 * MAX_DIMENSIONS))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("values", _pointer),
        ("columns", _pointer),
        ("starts", _pointer),
        ("rows", _int64),
        ("cols", _int64),
        ("num_values", _int64),
    )


class _Graph(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in _LISTS),
        *((f"num_{name}", _int32) for name in _LISTS),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("max_bytes", _int64),
        ("micro_batch", _int32),
        ("dense", _int32),
        ("ranges", _pointer),
        ("num_ranges", _int32),
    )


class _About(ctypes.Structure):
    _fields_ = tuple((name, _int64) for name in ("activation_bytes", "weight_bytes", "macs", "dense_macs"))


@dataclass(frozen=True, slots=True)
class About:
    """What a network takes.

    Attributes:
        activation_bytes: all arenas; there is one for each number of samples that ran together.
        weight_bytes: weights as laid out for execution, for each of these numbers.
        macs: multiplications per sample.
        dense_macs: multiplications per sample of the same network without zeros.
    """

    activation_bytes: int
    weight_bytes: int
    macs: int
    dense_macs: int


class Engine:
    """A network that is ready to run.

    Args:
        graph: what it computes.
        tensors: its weights by name, numpy arrays or :class:`~pomona.files.sparse.Sparse`, floating point; cast to
            float32.
        threads: how many it may use.
        dense: True runs all layers as if they had no zeros, False skips zeros everywhere, None chooses for each layer.
        micro_batch: samples that go through the network together; 0 chooses as many as the cache holds.
        max_bytes: the most that weights and activations may take together.
        precision: of values and weights; "int16" is faster by up to two times and needs ``graph.ranges``.

    Raises:
        RuntimeError: the core is not available (:func:`pomona.native.library.why_not`).
        ValueError: the graph does not fit together; names the node.

    One call at a time: an engine has one memory. Engines of several threads are independent.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, NDArray[Any] | Sparse],
        *,
        threads: int = 1,
        dense: bool | None = None,
        micro_batch: int = 0,
        max_bytes: int = 1 << 34,
        precision: Precision = "float32",
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if micro_batch < 0:
            raise ValueError(f"micro_batch must be at least 0, got {micro_batch}")
        check_precision(precision, graph)
        self._handle = None
        self._library = _declare(library.load())
        self.graph = graph
        self.threads = threads
        lists = _Lists(tensors)
        nodes = (_Node * len(graph.nodes))(*(lists.node(node) for node in graph.nodes))
        types = (_Type * graph.num_inputs)(*map(_type, graph.inputs, graph.dtypes))
        attributes = (_Attribute * len(lists.attributes))(*lists.attributes)
        matrices = (_Tensor * len(lists.tensors))(*lists.tensors)
        operands, outputs = np.asarray(lists.operands, np.int32), np.asarray(graph.outputs, np.int32)
        described = _Graph(
            inputs=ctypes.addressof(types),
            nodes=ctypes.addressof(nodes),
            operands=operands.ctypes.data,
            attributes=ctypes.addressof(attributes),
            tensors=ctypes.addressof(matrices),
            outputs=outputs.ctypes.data,
            num_inputs=len(types),
            num_nodes=len(nodes),
            num_operands=len(operands),
            num_attributes=len(attributes),
            num_tensors=len(matrices),
            num_outputs=len(outputs),
        )
        ranges = np.asarray(graph.ranges if precision == "int16" else [], np.float32)
        options = _Options(
            max_bytes, micro_batch, _DENSE[dense], ranges.ctypes.data if len(ranges) else None, len(ranges)
        )
        handle, bad_node = _pointer(), _int32(-1)
        status = self._library.pomona_net_new(
            ctypes.byref(described), ctypes.byref(options), ctypes.byref(handle), ctypes.byref(bad_node)
        )
        _check(status, graph, bad_node.value)
        self._handle = handle
        self.shapes = [self._shape_of(value) for value in graph.outputs]

    def __call__(self, *inputs: NDArray[Any]) -> list[Array]:
        """The outputs of a batch, float32: each input and each output is (batch, *shape)."""
        arrays = arrays_of(self.graph, inputs)
        batch = check_inputs(self.graph, arrays)
        results = [np.empty((batch, *shape), np.float32) for shape in self.shapes]
        self.run_at(batch, [_address(x) for x in arrays], [_address(x) for x in results])
        return results

    def run_at(self, batch: int, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """What a call does, for addresses of contiguous arrays, whose sizes and dtypes are not checked."""
        from_, to = (_pointer * len(inputs))(*inputs), (_pointer * len(outputs))(*outputs)
        _check(self._library.pomona_net_run(self._handle, batch, from_, to, self.threads), self.graph, -1)

    def about(self) -> About:
        """Its memory and its multiplications."""
        about = _About()
        _check(self._library.pomona_net_about(self._handle, ctypes.byref(about)), self.graph, -1)
        return About(about.activation_bytes, about.weight_bytes, about.macs, about.dense_macs)

    def profile(self, *inputs: NDArray[Any], repeats: int = 1) -> list[float]:
        """Mean seconds that a run spends in each node; nodes that are done together count as their first."""
        seconds = np.zeros(len(self.graph.nodes))
        self._library.pomona_net_profile(self._handle, 1, seconds.ctypes.data)
        for _ in range(repeats):
            self(*inputs)
        self._library.pomona_net_profile(self._handle, 0, seconds.ctypes.data)
        return [float(s) / repeats for s in seconds]

    def _shape_of(self, value: int) -> tuple[int, ...]:
        found = _Type()
        _check(self._library.pomona_net_type(self._handle, value, ctypes.byref(found)), self.graph, -1)
        return tuple(found.dims[: found.rank])

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self._library.pomona_net_free(self._handle)


def check_precision(precision: str, graph: Graph) -> None:
    """ValueError if a network cannot be computed in it."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "int16" and graph.ranges is None:
        raise ValueError(
            'precision="int16" needs the ranges of values, which the graph does not have; export the model with '
            "calibrate=samples, or take Network.calibrated(samples)"
        )


class _Lists:
    """Collects operands, attributes and tensors; keeps what their addresses point to alive."""

    def __init__(self, tensors: Mapping[str, NDArray[Any] | Sparse]) -> None:
        self.given = tensors
        self.operands: list[int] = []
        self.attributes: list[_Attribute] = []
        self.tensors: list[_Tensor] = []
        self._places: dict[tuple[str, str], int] = {}
        self._alive: list[NDArray[Any]] = []

    def node(self, node: Node) -> _Node:
        first_operand, first_attribute = len(self.operands), len(self.attributes)
        self.operands += node.operands
        operation = OPERATIONS[node.op]
        for name in operation.attributes:
            value = getattr(node, name)
            if ATTRIBUTES[name].kind == "tensor":
                value = self._place(value, operation.weight if name == "weight" else "vector")
            self._set(name, value)
        if operation.weight == "kernel":
            self._set("kernel", self._kernel(node))
        return _Node(
            operation.number,
            first_operand,
            len(node.operands),
            first_attribute,
            len(self.attributes) - first_attribute,
        )

    def _set(self, name: str, value: Any) -> None:
        attribute = _Attribute(ATTRIBUTES[name].number)
        values = value if isinstance(value, tuple) else (value,)
        to = attribute.value.numbers if ATTRIBUTES[name].kind == "number" else attribute.value.integers
        to[: len(values)] = values
        self.attributes.append(attribute)

    def _kernel(self, node: Node) -> tuple[int, int]:
        shape = self._find(node.weight or "").shape
        if len(shape) == 2:
            return 1, 1
        if len(shape) != 4:
            raise ValueError(f"the weight {node.weight!r} of a convolution has shape {shape}, not (O, C, kh, kw)")
        return shape[2], shape[3]

    def _find(self, name: str) -> NDArray[Any] | Sparse:
        if name not in self.given:
            raise ValueError(f"the graph names the tensor {name!r}, which is not there")
        return self.given[name]

    def _place(self, name: str | None, form: str) -> int:
        if name is None:
            return -1
        if (name, form) not in self._places:
            tensor = self._find(name)
            shape = tensor.shape
            if len(shape) not in _RANKS[form]:
                raise ValueError(f"the tensor {name!r} is used as a {form}, but has the shape {list(shape)}")
            rows, cols = shape[0], int(np.prod(shape[1:]))
            self._places[name, form] = len(self.tensors)
            self.tensors.append(self._tensor(tensor, rows, cols, form == "vector"))
        return self._places[name, form]

    def _tensor(self, tensor: NDArray[Any] | Sparse, rows: int, cols: int, as_dense: bool) -> _Tensor:
        if isinstance(tensor, Sparse) and not as_dense:
            starts, columns = tensor.csr(rows)
            values = self._keep(tensor.values, np.float32)
            return _Tensor(
                values.ctypes.data,
                self._keep(columns, np.int32).ctypes.data,
                self._keep(starts, np.int64).ctypes.data,
                rows,
                cols,
                len(values),
            )
        dense = self._keep(tensor.dense() if isinstance(tensor, Sparse) else tensor, np.float32)
        return _Tensor(dense.ctypes.data, None, None, rows, cols, dense.size)

    def _keep(self, array: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
        self._alive.append(np.ascontiguousarray(array, dtype))
        return self._alive[-1]


def _type(shape: Sequence[int], dtype: DType) -> _Type:
    return _Type(DTYPES[dtype], len(shape), (*shape, *[1] * (MAX_DIMENSIONS - len(shape))))


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])  # in a third of the time of array.ctypes.data


def _check(status: int, graph: Graph, bad_node: int) -> None:
    if status == 0:
        return
    if status == -5:
        raise MemoryError("pomona's runtime: out of memory")
    where = f"node {bad_node} ({graph.nodes[bad_node].op})" if bad_node >= 0 else "the network"
    raise ValueError(f"pomona's runtime refuses {where}: {_ERRORS.get(status, status)}")


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.pomona_net_new.argtypes = (_pointer, _pointer, _pointer, _pointer)
    loaded.pomona_net_free.argtypes = (_pointer,)
    loaded.pomona_net_free.restype = None
    loaded.pomona_net_type.argtypes = (_pointer, _int32, _pointer)
    loaded.pomona_net_run.argtypes = (_pointer, _int64, _pointer, _pointer, ctypes.c_int)
    loaded.pomona_net_profile.argtypes = (_pointer, ctypes.c_int, _pointer)
    loaded.pomona_net_about.argtypes = (_pointer, _pointer)
    return loaded
