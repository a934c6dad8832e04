"""How often each weight is multiplied in one pass through a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pomona.example import Example, evaluating, randomness_kept
from pomona.torch_compile import unwrapped


@dataclass(frozen=True, slots=True)
class MultiplyAdds:
    """Of one sample.

    Attributes:
        dense: weight -> one for each time that each of its entries is multiplied; None if it went into an operator
            that is not known here.
        kept: the same without entries that are zero.
        others: of all that is not asked for: other weights, and values times values, as in attention.
    """

    dense: dict[str, int | None]
    kept: dict[str, int | None]
    others: int


def count_multiply_adds(model: nn.Module, weights: Mapping[str, Tensor], example: Any) -> MultiplyAdds:
    """Run the model once on the example, in evaluation mode, and count.

    Matrix products, convolutions, recurrent layers and attention count, but not what depends on parameters alone. A
    convolution multiplies each of its weights once for each place of its output (a transposed one: of its input), with
    zeros around the input like any others. Biases, norms, activations, pooling and lookups do not count. The model and
    the state of random numbers stay as they are.

    Args:
        model: on one process.
        weights: what to count, by any names: parameters of the model, or what shares their memory.
        example: the model's input with the batch in front, a tuple of its inputs, or a dictionary of keyword arguments.
    """
    called = Example.of(example)
    tensors = called.tensors()
    if not tensors or not tensors[0].ndim or not len(tensors[0]):
        raise ValueError(f"example must hold a tensor with at least one sample, batch first, got {_shapes(tensors)}")
    batch = len(tensors[0])
    with unwrapped(model) as inner, evaluating(inner), _products_seen(inner):
        watch = _Watch(inner, weights)
        with watch:
            called.run(inner)
    lost = {name for name in watch.lost if not watch.dense[name]}
    dense, kept = (
        {name: None if name in lost else round(n / batch) for name, n in counts.items()}
        for counts in (watch.dense, watch.kept)
    )
    return MultiplyAdds(dense, kept, round(watch.others / batch))


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors) or "none"


@contextmanager
def _products_seen(model: nn.Module) -> Iterator[None]:
    """Without torch's fused layers, which would hide their products; random numbers are put back."""
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(list(devices)), randomness_kept(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class _Static:
    """A tensor that depends on parameters alone."""

    tensor: Tensor  # held, so that its memory is no other tensor's
    name: str | None  # whose entries its own are, one for one, of the weights that are counted


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees all products, and follows weights through whatever is computed of parameters alone."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense = dict.fromkeys(weights, 0)
        self.kept = dict.fromkeys(weights, 0)
        self.others = 0
        self.lost: set[str] = set()
        self._static: dict[int, list[_Static]] = {}  # by memory, of which several may have a part
        for name, x in (*weights.items(), *((None, x) for x in (*model.parameters(), *model.buffers()))):
            if self._find(x) is None:
                self._hold(x, name)
        self._nonzero: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in _PRODUCTS and not all(map(self._find, inputs)):
            self._multiply(name, args, found)
        else:
            self._follow(name, inputs, found)
        return found

    def _multiply(self, name: str, args: Any, found: Any) -> None:
        for factors, times in _PRODUCTS[name](args, found):
            named = [(x, n) for x, n in zip(factors, times, strict=True) if self._name(x)]
            if len(named) != 1:
                self.others += factors[0].numel() * times[0]
                self.lost.update(filter(None, (self._name(x) for x, _ in named)))
                continue
            ((weight, n),) = named
            key = self._name(weight)
            assert key is not None
            self.dense[key] += weight.numel() * n
            self.kept[key] += self._count(weight) * n

    def _follow(self, name: str, inputs: list[Tensor], found: Any) -> None:
        known = [self._find(x) for x in inputs]
        if not any(known):
            return
        outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        if all(known):
            for x in outputs:
                same = {self._name(y) for y in inputs if y.numel() == x.numel()} - {None}
                if self._find(x) is None:
                    self._hold(x, same.pop() if len(same) == 1 else None)
        if name not in _LOOKUPS:
            followed = {self._name(x) for x in outputs}
            self.lost.update(n for n in (self._name(x) for x in inputs) if n is not None and n not in followed)

    def _name(self, x: Tensor) -> str | None:
        static = self._find(x)
        return static.name if static else None

    def _hold(self, x: Tensor, name: str | None) -> None:
        self._static.setdefault(x.untyped_storage()._cdata, []).append(_Static(x, name))

    def _find(self, x: Tensor) -> _Static | None:
        """The tensor that this is, or is a part of."""
        for static in self._static.get(x.untyped_storage()._cdata, ()):
            if static.tensor.data_ptr() <= x.data_ptr() < static.tensor.data_ptr() + _extent(static.tensor):
                return static
        return None

    def _count(self, x: Tensor) -> int:
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version)
        if key not in self._nonzero:
            self._nonzero[key] = int(x.count_nonzero())
        return self._nonzero[key]


def _extent(x: Tensor) -> int:
    """Bytes from its first entry to its last."""
    places = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return places * x.element_size()


# Products: pairs of factors, and how often each entry of each of them is multiplied

_Product = Iterator[tuple[tuple[Tensor, ...], tuple[int, ...]]]


def _matrices(first: int) -> Callable[[Any, Any], _Product]:
    """(..., n, k) @ (..., k, m), from this argument on."""

    def product(args: Any, found: Any) -> _Product:
        a, b = args[first : first + 2]
        rows = a.shape[-2] if a.ndim > 1 else 1
        yield (a, b), (b.shape[-1] if b.ndim > 1 else 1, rows)

    return product


def _convolution(args: Any, found: Tensor) -> _Product:
    x, weight, is_transposed = args[0], args[1], args[6]
    places = x if is_transposed else found
    times = len(places) * math.prod(places.shape[2:])
    yield (weight, x), (times, 0)


def _trilinear(args: Any, found: Tensor) -> _Product:
    x, weight = args[0], args[1]
    yield (weight, x), (len(x), 0)


def _attention(args: Any, found: Any) -> _Product:
    query, key = args[:2]
    outputs = found[0] if isinstance(found, tuple) else found
    yield (query, key), (key.shape[-2], 0)
    yield (outputs, key), (key.shape[-2], 0)


def _grouped(args: Any, found: Any) -> _Product:
    """Rows in groups, each times its own matrix."""
    x, matrices = args[:2]
    ends = args[2] if len(args) > 2 else None
    if ends is None or x.ndim != 2 or matrices.ndim != 3:
        yield (x, matrices), (found.shape[-1], 0)
        return
    starts = [0, *ends.tolist()]
    for matrix, start, end in zip(matrices, starts, ends.tolist(), strict=False):
        yield (matrix, x), (end - start, 0)


def _recurrent(weights: slice) -> Callable[[Any, Any], _Product]:
    """Matrices, each of which every step of every sequence goes through."""

    def product(args: Any, found: Any) -> _Product:
        x = args[0]
        for weight in tree_leaves(args[weights]):
            if weight.ndim == 2:
                yield (weight, x), (x.numel() // x.shape[-1], 0)

    return product


_PRODUCTS: dict[str, Callable[[Any, Any], _Product]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "_int_mm"), _matrices(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation"), _matrices(1)),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "_trilinear": _trilinear,
    "_grouped_mm": _grouped,
    "mkldnn_rnn_layer": _recurrent(slice(1, 3)),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrent(slice(1, 2))),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
}

_LOOKUPS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select", "gather")
