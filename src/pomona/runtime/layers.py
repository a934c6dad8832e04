"""Layers of torch that skip their zeros: the modules, the operations that they call, and the engines behind these.

A sparse layer calls one of two custom operations, ``torch.ops.pomona.sparse_conv2d`` and ``sparse_linear``. They take
the dense weight: ``torch.compile`` and ``torch.export`` see an ordinary operation with a fake kernel, and a saved
program runs in any process that imports this module. The engines made for a weight are kept as long as the weight is,
and made again when the memory or the version counter of the tensor shows that it has changed.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pomona.files.sparse import Sparse
from pomona.native import library
from pomona.runtime.engine import Engine
from pomona.runtime.graph import Graph, Node, Pair, Shape

_ENGINES_PER_WEIGHT = 8  # kept at once, for inputs of different shapes


class SparseConv2d(nn.Conv2d):
    """A ``Conv2d`` that skips its zeros in eval mode; made by :func:`compile`."""

    threads: int

    def forward(self, input: Tensor) -> Tensor:  # torch's name: a model may call layer(input=x)
        if self.training or input.ndim != 4 or not _takes(input, self.weight, self.bias):
            return super().forward(input)
        padding = padding_of(self)
        assert padding is not None
        settings = self.stride, padding, self.dilation, self.groups, self.threads
        return sparse_conv2d(input, self.weight, self.bias, *settings)


class SparseLinear(nn.Linear):
    """A ``Linear`` that skips its zeros in eval mode; made by :func:`compile`."""

    threads: int

    def forward(self, input: Tensor) -> Tensor:
        if self.training or input.ndim == 0 or not _takes(input, self.weight, self.bias):
            return super().forward(input)
        return sparse_linear(input, self.weight, self.bias, self.threads)


# The sparse class of each class of layers; those of subclasses are added when they are first asked for.
_SPARSE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}


class Within(TorchFunctionMode):
    """While it is on, calls of ``conv2d`` or ``linear`` with the weight of ``layer`` skip its zeros."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, threads: int) -> None:
        super().__init__()
        self._weight, self._threads = layer.weight, threads
        self.num_calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.conv2d or func is F.linear:
            weight = args[1] if len(args) > 1 else given.get("weight")
            if weight is self._weight:
                found = (self._conv2d if func is F.conv2d else self._linear)(*args, **given)
                if found is not None:
                    self.num_calls += 1
                    return found
        return func(*args, **given)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if isinstance(padding, str) or input.ndim != 4 or not _takes(input, weight, bias):
            return None
        return sparse_conv2d(input, weight, bias, _both(stride), _both(padding), _both(dilation), groups, self._threads)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if input.ndim == 0 or not _takes(input, weight, bias):
            return None
        return sparse_linear(input, weight, bias, self._threads)


def _both(x: int | Sequence[int]) -> Sequence[int]:
    return (x, x) if isinstance(x, int) else tuple(x) * (2 // len(x))


def sparse_kind_of(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _SPARSE:
        _SPARSE[kind] = _kind_within(kind)
    return _SPARSE[kind]


def _kind_within(kind: type[nn.Module]) -> type[nn.Module]:
    """Subclass a subclass of ``Conv2d`` or ``Linear``: its own ``forward``, inside of :class:`Within` in eval mode."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return kind.forward(self, *args, **kwargs)
        with Within(self, self.threads):
            return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module) -> tuple[Any, ...]:  # pickle cannot find the class by its name
        return _new_within, (kind,), self.__dict__

    members = {"forward": forward, "__reduce__": reduce, "__module__": __name__, "__doc__": _kind_within.__doc__}
    return type(f"Sparse{kind.__name__}", (kind,), members)


def _new_within(kind: type[nn.Module]) -> nn.Module:
    made = sparse_kind_of(kind)
    return made.__new__(made)


def _takes(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.device.type == "cpu" and t.dtype is torch.float32 and _is_plain(t)) for t in tensors)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor: the fast path of torch's transformers makes nested ones of padded batches."""
    return tensor.layout is torch.strided and not tensor.is_nested


# The operations. Defined by a `Library`: calls of a `custom_op` take 10 us longer.

_LAYER = "Tensor x, Tensor weight, Tensor? bias"
_operations = torch.library.Library("pomona", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    f"sparse_conv2d({_LAYER}, int[2] stride, int[2] padding, int[2] dilation, int groups, int threads) -> Tensor",
    f"sparse_linear({_LAYER}, int threads) -> Tensor",
):
    _operations.define(_schema)  # type: ignore[no-untyped-call]


@torch.library.impl(_operations, "sparse_conv2d", "CPU")
def _sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threads: int,
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, dilation, groups)`` without the zeros of the weight."""
    settings = (_pair(stride), _pair(padding), _pair(dilation), groups)
    layer = _layer("conv", tuple(x.shape[1:]), weight, bias, threads, settings)
    if layer is None:
        return F.conv2d(x, weight, bias, *settings).contiguous()
    return layer(x)


@torch.library.register_fake("pomona::sparse_conv2d")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threads: int,
) -> Tensor:
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *size))


@torch.library.impl(_operations, "sparse_linear", "CPU")
def _sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threads: int) -> Tensor:
    """``F.linear(x, weight, bias)`` without the zeros of the weight; x has one dimension or more."""
    layer = _layer("linear", (x.shape[-1],), weight, bias, threads, ())
    if layer is None:
        return F.linear(x, weight, bias)
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("pomona::sparse_linear")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, bias: Tensor | None, threads: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_size = None if bias is None else list(bias.shape)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups, _ = ctx.settings
    wanted = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.bias_size is not None]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias_size, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return (*found, *[None] * 5)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return (
        grad @ weight if ctx.needs_input_grad[0] else None,
        rows.T @ inputs if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
        None,
    )


torch.library.register_autograd("pomona::sparse_conv2d", _conv2d_backward, setup_context=_keep_for_backward)
torch.library.register_autograd("pomona::sparse_linear", _linear_backward, setup_context=_keep_for_backward)

sparse_conv2d: Callable[..., Tensor] = torch.ops.pomona.sparse_conv2d.default
sparse_linear: Callable[..., Tensor] = torch.ops.pomona.sparse_linear.default


# The engines.


class _Layer:
    """An engine for one layer and one state of its weight. Calls from several threads wait for each other."""

    def __init__(self, graph: Graph, tensors: dict[str, Any], threads: int) -> None:
        self._engine = Engine(graph, tensors, threads=threads)
        self._shape = self._engine.shapes[0]
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty((x.shape[0], *self._shape))
        with self._lock:
            self._engine.run_at(x.shape[0], [x.data_ptr()], [y.data_ptr()])
        return y


class _Made:
    """The engines of one weight, by everything else they depend on."""

    def __init__(self, weight: Tensor) -> None:
        # A weak reference keeps the address of the storage from being used again, not the memory.
        self._storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        self.layers: OrderedDict[Any, _Layer] = OrderedDict()

    def is_alive(self) -> bool:
        """Whether the weight still exists."""
        return not self._storage.expired()  # type: ignore[no-untyped-call]


Place = tuple[int, int]  # of a weight in memory: storage and address

_made: dict[Place, _Made] = {}
_made_lock = threading.Lock()
_counts: Counter[Place] | None = None  # of sparse operations by their weights, while somebody counts


@contextmanager
def counted() -> Iterator[Counter[Place]]:
    """Count how often the zeros of each weight are skipped, by :func:`place_of` the weight."""
    global _counts
    _counts = Counter()
    try:
        yield _counts
    finally:
        _counts = None


def _layer(
    op: str, shape: Shape, weight: Tensor, bias: Tensor | None, threads: int, settings: tuple[Any, ...]
) -> _Layer | None:
    """The engine for the layer, or None if there is no core or changes of the weight would go unnoticed."""
    if not library.is_available() or weight.is_inference() or (bias is not None and bias.is_inference()):
        return None
    state = (_state(weight), None if bias is None else _state(bias), op, shape, threads, settings)
    with _made_lock:
        made = _made.get(place_of(weight))
        layer = made.layers.get(state) if made is not None and made.is_alive() else None
        if _counts is not None:
            _counts[place_of(weight)] += 1
        return _make(weight, bias, state) if layer is None else layer


def place_of(weight: Tensor) -> Place:
    return weight.untyped_storage()._cdata, weight.data_ptr()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """A value that differs once the tensor is another one or has changed."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


def _make(weight: Tensor, bias: Tensor | None, state: tuple[Any, ...]) -> _Layer:
    _, _, op, shape, threads, settings = state
    given = dict(zip(("stride", "padding", "dilation", "groups"), settings, strict=False))
    node = Node(op, (0,), weight="weight", bias=None if bias is None else "bias", **given)
    tensors: dict[str, Any] = {"weight": Sparse.from_dense(weight.detach().numpy())}
    if bias is not None:
        tensors["bias"] = bias.detach().numpy()
    layer = _Layer(Graph((shape,), (node,), (1,)), tensors, threads)
    for place in [place for place, made in _made.items() if not made.is_alive()]:
        del _made[place]
    made = _made.setdefault(place_of(weight), _Made(weight))
    for old in [old for old in made.layers if old[0] != state[0]]:
        del made.layers[old]  # of the weight as it was before
    made.layers[state] = layer
    while len(made.layers) > _ENGINES_PER_WEIGHT:
        made.layers.popitem(last=False)
    return layer


def forget(weight: Tensor) -> None:
    with _made_lock:
        _made.pop(place_of(weight), None)


def _pair(x: Sequence[int]) -> Pair:
    return x[0], x[1]


def padding_of(layer: nn.Conv2d) -> Pair | None:
    """Padding of height and width, or None if the two sides of one differ."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    assert not isinstance(layer.padding, str)
    return layer.padding[0], layer.padding[1]
