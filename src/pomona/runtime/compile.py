"""Any torch model, in which the layers that gain from their zeros are executed sparsely; the rest stays in torch.

A layer that gains calls one of two custom operations, ``torch.ops.pomona.sparse_conv2d`` and ``sparse_linear``. They
take the dense weight: ``torch.compile`` and ``torch.export`` see an ordinary operation with a fake kernel, and a saved
program runs in any process that imports ``pomona.runtime.compile``. What the engine made of a weight is kept beside it,
and made anew when torch says that the weight has changed: by its memory or its version counter.
"""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

_GAIN = 0.95  # a replaced layer takes at most this share of the dense one's time, so that noise replaces nothing
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 50, 0.1  # of measuring one layer at one shape
_ENGINES_A_WEIGHT = 8  # kept at once, for inputs of different shapes


Replaced = tuple[nn.Conv2d | nn.Linear, type[nn.Module], type[nn.Module]]  # a layer, its class, and the sparse one


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided about one layer, and why.

    Attributes:
        name: of the module.
        sparsity: fraction of zeros of its weight.
        calls: input shape -> how often it was called with that in one run of the example.
        dense_us: median time of the torch layer, in microseconds, summed over these calls; None if not measured.
        sparse_us: the same of the sparse one.
        is_sparse: whether it was replaced.
        reason: in a few words.
    """

    name: str
    sparsity: float
    calls: dict[Shape, int]
    dense_us: float | None
    sparse_us: float | None
    is_sparse: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Compilation:
    """The choices for all convolutions and dense layers of a model; ``str(compilation)`` is a table."""

    layers: tuple[Choice, ...]
    whole_us: tuple[float, float] | None = None
    """A call of the whole model, without and with its sparse layers; None if no layer gains alone."""

    @property
    def num_sparse(self) -> int:
        """How many layers were replaced."""
        return sum(choice.is_sparse for choice in self.layers)

    def __str__(self) -> str:
        width = max([5, *(len(choice.name) for choice in self.layers)])
        lines = [f"{'layer':<{width}}  zeros   dense us  sparse us  choice"]
        for c in self.layers:
            times = "".join(f"{t:11.1f}" if t is not None else f"{'-':>11}" for t in (c.dense_us, c.sparse_us))
            lines.append(f"{c.name:<{width}} {100 * c.sparsity:5.1f}%{times}  {_choice(c)}")
        lines.append(f"{self.num_sparse} of {len(self.layers)} layers run sparsely")
        if self.whole_us:
            dense, sparse = self.whole_us
            lines[-1] += f"; the whole model takes {sparse:.1f} us with sparse layers, {dense:.1f} without"
        return "\n".join(lines)


def _choice(choice: Choice) -> str:
    return ("sparse: " if choice.is_sparse else "torch: ") + choice.reason


def compile(model: nn.Module, example: Tensor | Sequence[Any], *, threads: int | None = None) -> nn.Module:
    """A copy of ``model`` in which the layers that gain from their zeros are executed sparsely.

    Every ``Conv2d`` and ``Linear`` with zeros is measured at the shapes that it sees in ``model(example)``: medians of
    alternating runs of the torch layer and of the sparse one. It is replaced where the sparse one takes less time, by
    more than 5 %. If then the whole model is no faster, all of them stay in torch: a layer alone finds its input in the
    cache. What was chosen and why is ``compiled.compilation``; print it. A subclass with a ``forward`` of its
    own runs that, and in it the calls of ``conv2d`` or ``linear`` with its weight itself are executed sparsely.

    The copy shares all parameters and buffers with ``model`` (as ``torch.compile`` does), has the same module names and
    the same ``state_dict()``. It follows any change of the weights that torch's version counters record: optimizers,
    ``load_state_dict``, in-place operations, another tensor in their place. Writing through ``weight.data`` is recorded
    nowhere and is not seen. In training mode, on other devices and in other dtypes than float32 a replaced layer does
    what it did before; gradients in eval mode are those of the dense layer.

    Args:
        model: any module on the CPU, in eval mode.
        example: its input, or a sequence of its arguments, of the shapes for which it is to be fast.
        threads: how many a sparse layer may use. Default: ``torch.get_num_threads()``.

    Raises:
        ValueError: the model is in training mode, or ``threads`` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> _ = model[0].weight.data.mul_(torch.rand(512, 512) > 0.98)
        >>> compiled = pomona.compile(model, torch.zeros(1, 512))
        >>> [choice.name for choice in compiled.compilation.layers]
        ['0', '2']
        >>> compiled.state_dict().keys() == model.state_dict().keys()
        True
    """
    if model.training:
        raise ValueError("pomona.compile takes a model in eval mode: call model.eval() first")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    arguments = (example,) if isinstance(example, Tensor) else tuple(example)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    compiled = copy.deepcopy(model, shared)
    calls = _calls(compiled, arguments)
    choices = []
    replaced: list[Replaced] = []
    for name, layer in compiled.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            kind = type(layer)
            choice = _choose(name, layer, calls.get(name, Counter()), threads or torch.get_num_threads())
            choices.append(choice)
            if choice.is_sparse:
                replaced.append((layer, kind, type(layer)))
    whole = None
    if replaced:
        dense, sparse = whole = _race(replaced, partial(compiled, *arguments))
        if sparse >= max(_GAIN, 1.0) * dense:
            _switch(replaced, False)
            for layer, _, _ in replaced:
                del layer.threads
                _forget(layer.weight)
            lost = f"alone it gains, but the whole model takes {sparse:.0f} us instead of {dense:.0f}"
            choices = [replace(c, is_sparse=False, reason=lost) if c.is_sparse else c for c in choices]
    compiled.compilation = Compilation(tuple(choices), whole)  # type: ignore[assignment]  # modules have any attributes
    return compiled


def _calls(model: nn.Module, arguments: Sequence[Any]) -> dict[str, Counter[Shape]]:
    """Of each layer the shapes of its inputs, and how often."""
    calls: dict[str, Counter[Shape]] = {}

    def record(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                calls.setdefault(name, Counter())[tuple(inputs[0].shape)] += 1

        return hook

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _choose(name: str, layer: nn.Conv2d | nn.Linear, calls: Counter[Shape], threads: int) -> Choice:
    """Decide about one layer, and replace it in place if it gains."""
    weight = layer.weight
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    reason = _why_not(layer, calls)
    if reason is not None or sparsity == 0:
        return Choice(name, sparsity, dict(calls), None, None, False, reason or "no zeros")
    kind = type(layer)
    sparse_kind = _sparse_kind(kind)
    layer.threads = threads  # type: ignore[assignment]
    dense = sparse = 0.0
    for shape, count in calls.items():
        one, other = _race([(layer, kind, sparse_kind)], partial(layer, torch.randn(shape)))
        dense, sparse = dense + count * one, sparse + count * other
    is_sparse = sparse < _GAIN * dense
    layer.__class__ = sparse_kind if is_sparse else kind  # type: ignore[assignment]
    if not is_sparse:
        del layer.threads
        _forget(weight)
    return Choice(name, sparsity, dict(calls), dense, sparse, is_sparse, f"{dense / sparse:.2f} times as fast")


def _why_not(layer: nn.Conv2d | nn.Linear, calls: Counter[Shape]) -> str | None:
    if not library.is_available():
        return f"no compiled core ({library.why_not()})"
    if not calls:
        return "not called with the example"
    if not layer.weight.is_cpu or layer.weight.dtype != torch.float32:
        return f"{layer.weight.dtype} on {layer.weight.device}, not float32 on the CPU"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return _why_not_within(layer, calls)
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or _padding(layer) is None:
            return f"padding {layer.padding!r} of {layer.padding_mode}"
        if any(len(shape) != 4 for shape in calls):
            return "an input without a batch"
    return None


def _why_not_within(layer: nn.Conv2d | nn.Linear, calls: Counter[Shape]) -> str | None:
    """Of a subclass, which may do anything: look what it does."""
    name = type(layer).__name__
    for shape in calls:
        mode = _Within(layer, threads=1)
        try:
            with torch.no_grad(), mode:
                layer(torch.randn(shape))
        except Exception as error:  # whatever its forward throws
            return f"a {name}, which cannot be called by itself: {type(error).__name__}"
        if not mode.num_calls:
            return f"a {name}, which computes something else with its weight"
    return None


def _padding(layer: nn.Conv2d) -> Pair | None:
    """By how much it pads each side; None if not both by the same."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    assert not isinstance(layer.padding, str)
    return layer.padding[0], layer.padding[1]


def _race(layers: Sequence[Replaced], call: Callable[[], Any]) -> tuple[float, float]:
    """Median microseconds of a call with the layers as they were and with the sparse ones, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    with torch.no_grad():
        for i in range(1 + _MOST_ROUNDS):
            for is_sparse, taken in zip((False, True), times, strict=True):
                _switch(layers, is_sparse)
                start = time.perf_counter()
                call()
                if i:  # the first one is slow: memory, and the engine is made
                    taken.append(1e6 * (time.perf_counter() - start))
            if i == 0:
                began = time.perf_counter()
            if i >= _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS:
                break
    return statistics.median(times[0]), statistics.median(times[1])


def _switch(layers: Sequence[Replaced], is_sparse: bool) -> None:
    for layer, kind, sparse_kind in layers:
        layer.__class__ = sparse_kind if is_sparse else kind  # type: ignore[assignment]


class SparseConv2d(nn.Conv2d):
    """A ``Conv2d`` that skips its zeros in eval mode; made by :func:`compile`."""

    threads: int

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.ndim != 4 or not _takes(x, self.weight, self.bias):
            return super().forward(x)
        padding = _padding(self)
        assert padding is not None
        return sparse_conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, self.threads)


class SparseLinear(nn.Linear):
    """A ``Linear`` that skips its zeros in eval mode; made by :func:`compile`."""

    threads: int

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.ndim == 0 or not _takes(x, self.weight, self.bias):
            return super().forward(x)
        return sparse_linear(x, self.weight, self.bias, self.threads)


# What a layer becomes; subclasses are added as they come.
_SPARSE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: SparseConv2d, nn.Linear: SparseLinear}


class _Within(TorchFunctionMode):
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


def _sparse_kind(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _SPARSE:
        _SPARSE[kind] = _kind_within(kind)
    return _SPARSE[kind]


def _kind_within(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a subclass of ``Conv2d`` or ``Linear``: does the same, with :class:`_Within` in eval mode."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return kind.forward(self, *args, **kwargs)
        with _Within(self, self.threads):
            return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module) -> tuple[Any, ...]:  # pickle cannot find the class by its name
        return _new_within, (kind,), self.__dict__

    members = {"forward": forward, "__reduce__": reduce, "__module__": __name__, "__doc__": _kind_within.__doc__}
    return type(f"Sparse{kind.__name__}", (kind,), members)


def _new_within(kind: type[nn.Module]) -> nn.Module:
    made = _sparse_kind(kind)
    return made.__new__(made)


def _takes(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.device.type == "cpu" and t.dtype is torch.float32) for t in tensors)


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


# What was made of weights.


class _Layer:
    """An engine of one layer, for one state of its weight. Calls of several threads wait for each other."""

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
        """Whether the weight still is."""
        return not self._storage.expired()  # type: ignore[no-untyped-call]


_made: dict[tuple[int, int], _Made] = {}  # by storage and address
_made_lock = threading.Lock()


def _layer(
    op: str, shape: Shape, weight: Tensor, bias: Tensor | None, threads: int, settings: tuple[Any, ...]
) -> _Layer | None:
    """What runs the layer; None where there is no core, or changes of the weight could not be noticed."""
    if not library.is_available() or weight.is_inference() or (bias is not None and bias.is_inference()):
        return None
    state = (_state(weight), None if bias is None else _state(bias), op, shape, threads, settings)
    with _made_lock:
        made = _made.get(_place(weight))
        layer = made.layers.get(state) if made is not None and made.is_alive() else None
        return _make(weight, bias, state) if layer is None else layer


def _place(weight: Tensor) -> tuple[int, int]:
    return weight.untyped_storage()._cdata, weight.data_ptr()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Differs when the tensor is another one, or was changed."""
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
    made = _made.setdefault(_place(weight), _Made(weight))
    for old in [old for old in made.layers if old[0] != state[0]]:
        del made.layers[old]  # of the weight as it was before
    made.layers[state] = layer
    while len(made.layers) > _ENGINES_A_WEIGHT:
        made.layers.popitem(last=False)
    return layer


def _forget(weight: Tensor) -> None:
    with _made_lock:
        _made.pop(_place(weight), None)


def _pair(x: Sequence[int]) -> Pair:
    return x[0], x[1]
