"""Choose the layers of a torch model that gain from their zeros, and run these sparsely; the rest stays in torch.

A process that loads an exported program with such layers imports this module, or :mod:`pomona.runtime.layers`, first.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pomona.example import Example, randomness_kept
from pomona.native import library
from pomona.pages.text import table
from pomona.runtime.graph import Shape
from pomona.runtime.layers import Within, counted, forget, padding_of, place_of, sparse_kind_of
from pomona.runtime.passed_over import PassedOver, listing, passed_over
from pomona.torch_compile import plain, unwrap_

_GAIN = 0.95  # a replaced layer takes at most this share of the dense one's time, so that noise replaces nothing
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 50, 0.1  # of measuring one layer at one shape
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # compute with weights of layers inside of them


Replaced = tuple[nn.Conv2d | nn.Linear, type[nn.Module], type[nn.Module]]  # a layer, its class, and the sparse one


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided about one layer, and why.

    Attributes:
        name: the module's name.
        sparsity: the fraction of zeros in its weight.
        calls: how often the layer is called with each input shape in one run of the example.
        dense_us: median time of the torch layer, in microseconds, summed over these calls; None if not measured.
        sparse_us: the same for the sparse layer.
        is_sparse: whether the layer was replaced.
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
    """Microseconds per call of the whole model, without and with its sparse layers; None if no layer gains alone."""
    passed_over: tuple[PassedOver, ...] = ()
    """Weights with zeros of all other layers, which stay in torch."""

    @property
    def num_sparse(self) -> int:
        """How many layers were replaced."""
        return sum(choice.is_sparse for choice in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "zeros", "dense us", "sparse us", "choice"), *map(_row, self.layers)]
        summary = f"{self.num_sparse} of {len(self.layers)} layers run sparsely"
        if self.whole_us:
            dense, sparse = self.whole_us
            summary += f"; the whole model takes {sparse:.1f} us with sparse layers, {dense:.1f} without"
        tables = [table(rows, right=(1, 2, 3)), *([listing(self.passed_over)] if self.passed_over else [])]
        return "\n".join([*tables, summary])


def _row(choice: Choice) -> tuple[str, ...]:
    times = ("-" if us is None else f"{us:.1f}" for us in (choice.dense_us, choice.sparse_us))
    kind = "sparse" if choice.is_sparse else "torch"
    return choice.name, f"{100 * choice.sparsity:.1f}%", *times, f"{kind}: {choice.reason}"


def compile(model: nn.Module, example: Any, *, threads: int | None = None) -> nn.Module:
    """A copy of ``model`` in which the layers that gain from their zeros are executed sparsely.

    Every ``Conv2d`` and ``Linear`` with zeros is measured at the shapes that it sees when the model runs the example:
    the torch layer and the sparse one run in turns, and their medians are compared. A layer is replaced if the sparse
    one is faster by more than 5 %. Then the model runs once as it will be used, without gradients and without hooks of
    ours, and a layer whose zeros were not skipped in it goes back to torch. If the whole model is then no faster, all
    layers stay in torch; measured alone, a layer finds its input in the cache, so it can gain there and not here.
    Print ``compiled.compilation`` to see the choices and the reasons, and the weights with zeros of other layers. A
    subclass keeps its own ``forward``: calls of ``conv2d`` or ``linear`` in it that take exactly its weight are
    executed sparsely.

    The copy shares all parameters and buffers with ``model`` (as ``torch.compile`` does), has the same module names and
    the same ``state_dict()``. It follows any change of the weights that torch's version counters record: optimizers,
    ``load_state_dict``, in-place operations, another tensor in their place. Torch does not record writes through
    ``weight.data``, so these are not noticed. In training mode, on other devices and in other dtypes than float32, a
    replaced layer does what it did before. In eval mode its gradients are those of the dense layer. Of a model that
    ``torch.compile`` has wrapped, as a whole or in parts, the plain model is taken; wrap the copy again. Global random
    states are left as they are.

    Args:
        model: any module on the CPU, in eval mode.
        example: what it is called with, with the shapes for which it should be fast: a tensor; a dictionary of keyword
            arguments; or a tuple or list of arguments, whose last element, if it is a dictionary, holds the keyword
            arguments.
        threads: how many threads a sparse layer may use. Default: ``torch.get_num_threads()``.

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
    model = plain(model)
    if model.training:
        raise ValueError("pomona.compile takes a model in eval mode: call model.eval() first")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    compiled = copy.deepcopy(model, shared)
    unwrap_(compiled)
    called = Example.of(example)
    with randomness_kept(), torch.no_grad():
        run = partial(compiled, *called.args, **called.kwargs)
        compilation = _compile_(compiled, run, threads or torch.get_num_threads())
    compiled.compilation = compilation  # type: ignore[assignment]  # modules have any attributes
    return compiled


def _compile_(model: nn.Module, run: Callable[[], Any], threads: int) -> Compilation:
    """Replace layers of the model, and say which; ``run`` calls it with the example."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    calls = _calls(model, layers, run)
    choices, replaced = {}, {}
    for name, layer in layers.items():
        kind = type(layer)
        idle = _reader_of(model, name, calls) or "not called with the example"
        choices[name] = _choose(name, layer, calls[name], threads, idle)
        if choices[name].is_sparse:
            replaced[name] = (layer, kind, type(layer))
    for name in _never_sparse(replaced, run):
        _put_back([replaced.pop(name)])
        gained = choices[name].reason
        choices[name] = replace(
            choices[name], is_sparse=False, reason=f"never run sparsely by the model, though alone {gained}"
        )
    whole = None
    if replaced:
        dense, sparse = whole = _race(list(replaced.values()), run)
        if sparse >= max(_GAIN, 1.0) * dense:
            _put_back(list(replaced.values()))
            lost = f"alone it gains, but the whole model takes {sparse:.0f} us instead of {dense:.0f}"
            choices |= {name: replace(choices[name], is_sparse=False, reason=lost) for name in replaced}
    return Compilation(tuple(choices.values()), whole, passed_over(model, list(layers.values())))


def _calls(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Counter[Shape]]:
    """How often each layer is called with each input shape, and so the modules that may read a layer's weight."""
    readers = {name: m for name, m in model.named_modules() if isinstance(m, _FAST_PATHS)}
    calls: dict[str, Counter[Shape]] = {name: Counter() for name in (*layers, *readers)}
    with _recording(layers, calls), _recording(readers, calls):
        run()
    return calls


@contextmanager
def _recording(modules: Mapping[str, nn.Module], calls: Mapping[str, Counter[Shape]]) -> Iterator[None]:
    """Count calls by the shape of the input. Not by hooks: where there are any, torch leaves out its fast paths."""
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        vars(module)["forward"] = _recorded(module.forward, calls[name], has_shape=not isinstance(module, _FAST_PATHS))
    try:
        yield
    finally:
        for name, module in modules.items():
            del vars(module)["forward"]
            if before[name] is not None:
                vars(module)["forward"] = before[name]


def _recorded(forward: Callable[..., Any], calls: Counter[Shape], *, has_shape: bool) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        given = next(iter((*args, *kwargs.values())), None)
        if not has_shape:
            calls[()] += 1
        elif isinstance(given, Tensor) and not given.is_nested:
            calls[tuple(given.shape)] += 1
        return forward(*args, **kwargs)

    return recorded


def _reader_of(model: nn.Module, name: str, calls: Mapping[str, Counter[Shape]]) -> str | None:
    """Why a layer is not called, if a module around it, which is called, computes with the layer's weight itself."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, _FAST_PATHS) and calls[name]:
            return f"not called: {type(module).__name__} computes with its weight itself"
    return None


def _never_sparse(replaced: Mapping[str, Replaced], run: Callable[[], Any]) -> list[str]:
    """The layers whose zeros are not skipped when the model runs as its users run it."""
    if not replaced:
        return []
    _switch(list(replaced.values()), True)
    with counted() as counts:
        run()
    return [name for name, (layer, _, _) in replaced.items() if not counts[place_of(layer.weight)]]


def _put_back(layers: Sequence[Replaced]) -> None:
    _switch(layers, False)
    for layer, _, _ in layers:
        del layer.threads
        forget(layer.weight)


def _choose(name: str, layer: nn.Conv2d | nn.Linear, calls: Counter[Shape], threads: int, idle: str) -> Choice:
    """Decide about one layer, and replace it in place if it gains; ``idle`` is the reason if it is not called."""
    weight = layer.weight
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    reason = _why_not(layer, calls) if calls or not library.is_available() else idle
    if reason is not None or sparsity == 0:
        return Choice(name, sparsity, dict(calls), None, None, False, reason or "no zeros")
    kind = type(layer)
    sparse_kind = sparse_kind_of(kind)
    layer.threads = threads  # type: ignore[assignment]
    dense = sparse = 0.0
    for shape, count in calls.items():
        one, other = _race([(layer, kind, sparse_kind)], partial(layer, torch.randn(shape)))
        dense, sparse = dense + count * one, sparse + count * other
    is_sparse = sparse < _GAIN * dense
    layer.__class__ = sparse_kind if is_sparse else kind  # type: ignore[assignment]
    if not is_sparse:
        del layer.threads
        forget(weight)
    return Choice(name, sparsity, dict(calls), dense, sparse, is_sparse, f"{dense / sparse:.2f} times as fast")


def _why_not(layer: nn.Conv2d | nn.Linear, calls: Counter[Shape]) -> str | None:
    if not library.is_available():
        return f"no compiled core ({library.why_not()})"
    if not layer.weight.is_cpu or layer.weight.dtype != torch.float32:
        return f"{layer.weight.dtype} on {layer.weight.device}, not float32 on the CPU"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return _why_not_within(layer, calls)
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or padding_of(layer) is None:
            return f"padding {layer.padding!r} of {layer.padding_mode}"
        if any(len(shape) != 4 for shape in calls):
            return "an input without a batch"
    return None


def _why_not_within(layer: nn.Conv2d | nn.Linear, calls: Counter[Shape]) -> str | None:
    """Why a subclass stays in torch. It may compute anything, so run it and look."""
    name = type(layer).__name__
    for shape in calls:
        mode = Within(layer, threads=1)
        try:
            with torch.no_grad(), mode:
                layer(torch.randn(shape))
        except Exception as error:  # its forward may raise anything
            return f"a {name}, which cannot be called by itself: {type(error).__name__}"
        if not mode.num_calls:
            return f"a {name}, which computes something else with its weight"
    return None


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
