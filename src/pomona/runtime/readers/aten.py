"""Torch's operators (ATen) as operations of a graph: one handler per operator, by name in ``HANDLERS``.

A handler takes the builder and the operator's arguments by name. It returns the number of the value that the operator
yields, or a :class:`Value` (a tuple of them) where torch sees that value in another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pomona.runtime.node import Pair, Shape
from pomona.runtime.readers.builder import BATCH, GraphBuilder

WAY_OUT = "pomona.compile(model, example) takes any model, and replaces only the layers that gain"
"""What to do about a model that the runtime cannot run."""

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph as torch sees it: (batch, *shape) or, of positions, (batch * positions, features)."""

    number: int
    shape: Shape  # torch's
    is_loose: bool = False  # (C, 1, 1) as torch expanded it, which only `mul` takes, or (F,) as (batch, F, 1)


@dataclass(frozen=True, slots=True)
class Constant:
    """A parameter, a buffer, or what was computed of these alone."""

    name: str
    tensor: Tensor
    transposed: Constant | None = None  # what it is the transpose of


class AtenBuilder(GraphBuilder):
    """A graph that grows as a torch program is read.

    Attributes:
        at: the node of torch's program that is being read.
    """

    def __init__(self) -> None:
        super().__init__(way_out=WAY_OUT)
        self.at: torch.fx.Node

    def go_to(self, node: torch.fx.Node) -> None:
        """Read this node of torch's program from now on."""
        self.at = node
        self.operation = str(node.target)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.path = stack[-1][0] if stack else ""
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
        files = [i for i, line in enumerate(lines) if line.startswith("File") and _TORCH not in line]
        self.source = " ".join(lines[files[-1] : files[-1] + 2]) if files else ""

    @property
    def out(self) -> Shape:
        """The shape that torch says the operator yields."""
        return tuple(self.at.meta["val"].shape)

    def value(self, x: Any) -> int:
        """The number of what must be a value."""
        if not isinstance(x, Value):
            raise self.refuse(f"{self.operation} of a parameter or number")
        if x.is_loose:
            raise self.refuse(f"{self.operation} of a value expanded to {x.shape}")
        return x.number

    def weight(self, x: Any) -> str:
        """The name of what must be a parameter, now among the tensors."""
        if not isinstance(x, Constant):
            raise self.refuse(f"{self.operation} with a weight that is computed from the input")
        if x.name not in self.tensors:
            self.tensors[x.name] = _numpy(x.tensor)
        return x.name


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().to("cpu", torch.float32).contiguous().numpy())


def _pair(x: int | Sequence[int]) -> Pair:
    if isinstance(x, int):
        return x, x
    return x[0], x[-1]


Given = dict[str, Any]


def _conv2d(t: AtenBuilder, a: Given) -> int:
    if a.get("transposed"):
        raise t.refuse("a transposed convolution")
    x, weight = t.value(a["input"]), t.weight(a["weight"])
    kernel = t.tensors[weight].shape[2:]
    stride, dilation, padding = _pair(a["stride"]), _pair(a["dilation"]), a["padding"]
    if padding == "same":
        spread = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        (top, bottom), (left, right) = ((s // 2, s - s // 2) for s in spread)
        padding = top, left
        if (top, left) != (bottom, right):
            x, padding = t.padded(x, left, right, top, bottom), (0, 0)
    elif padding == "valid":
        padding = 0, 0
    return t.emit(
        "conv",
        x,
        weight=weight,
        bias=None if a["bias"] is None else t.weight(a["bias"]),
        stride=stride,
        padding=_pair(padding),
        dilation=dilation,
        groups=a["groups"],
    )


def _linear(t: AtenBuilder, a: Given) -> int:
    bias = None if a["bias"] is None else t.weight(a["bias"])
    return t.emit("linear", t.value(a["input"]), weight=t.weight(a["weight"]), bias=bias)


def _matmul(t: AtenBuilder, a: Given) -> int:
    matrix = a.get("other", a.get("mat2"))
    return t.emit("linear", t.value(a["self"]), weight=_turned(t, matrix))


def _addmm(t: AtenBuilder, a: Given) -> int:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise t.refuse(f"addmm with beta {a['beta']} and alpha {a['alpha']}")
    number, weight = t.value(a["mat1"]), _turned(t, a["mat2"])
    bias = t.weight(a["self"])
    if t.tensors[bias].shape != (t.tensors[weight].shape[0],):
        bias = t.vector("bias", np.broadcast_to(t.tensors[bias], (1, t.tensors[weight].shape[0]))[0])
    return t.emit("linear", number, weight=weight, bias=bias)


def _turned(t: AtenBuilder, matrix: Any) -> str:
    """The transpose of a parameter; if that is itself one's transpose, the parameter."""
    if isinstance(matrix, Constant) and matrix.transposed is not None:
        return t.weight(matrix.transposed)
    return t.vector(f"{t.weight(matrix).rpartition('.')[2]}.T", t.tensors[t.weight(matrix)].T)


_STATISTICS = ("running_mean", "running_var", "weight", "bias")


def _batch_norm(t: AtenBuilder, a: Given) -> int:
    number = t.value(a["input"])
    if a["training"] or a["running_mean"] is None:
        raise t.refuse("batch norm by the statistics of the batch itself (is the model in eval mode? model.eval())")
    if len(a["input"].shape) == 3:
        raise t.refuse("batch norm over positions")
    given = (a[name] and a[name].tensor.detach().cpu().double().numpy() for name in _STATISTICS)
    mean, var, factor, shift = given
    return t.normalized(number, mean, var, a["eps"], factor, shift)


def _dropout(t: AtenBuilder, a: Given) -> int:
    if a["train"]:
        raise t.refuse("dropout in training mode (call model.eval() first)")
    return t.value(a["self" if "self" in a else "input"])  # dropout_, of inplace=True, has another name for it


def _same(t: AtenBuilder, a: Given) -> int:
    if not t.at.meta["val"].is_floating_point():
        raise t.refuse(f"{t.operation} to {t.at.meta['val'].dtype}")
    return t.value(a["self"])


def _reshape(t: AtenBuilder, a: Given) -> int | Value:
    x = a["self"]
    number = x.number if x.is_loose and len(x.shape) == 3 else t.value(x)
    old, new = t.shapes[number], t.out
    if len(old) == 1 and new == (BATCH, *old, 1):
        return Value(number, new, is_loose=True)
    found = t.reshaped(number, new)
    if found is not None:
        return found
    raise t.refuse(f"{t.operation} from {x.shape} to {new}")


def _expand(t: AtenBuilder, a: Given) -> int | Value:
    x = a["self"]
    if t.out == x.shape:
        return t.value(x)
    if len(t.out) == 4 and x.shape == (*t.out[:2], 1, 1):
        return Value(t.value(x), t.out, is_loose=True)
    raise t.refuse(f"{t.operation} from {x.shape} to {t.out}")


def _clip(low: str, high: str) -> Callable[[AtenBuilder, Given], int]:
    def handler(t: AtenBuilder, a: Given) -> int:
        least, most = a.get(low), a.get(high)
        if not all(x is None or isinstance(x, (int, float)) for x in (least, most)):
            raise t.refuse(f"{t.operation} with bounds that are tensors")
        if least == 0 and most is None:
            return t.emit("relu", t.value(a["self"]))
        given = {"low": least, "high": most}
        return t.emit("clip", t.value(a["self"]), **{k: float(x) for k, x in given.items() if x is not None})

    return handler


def _gelu(t: AtenBuilder, a: Given) -> int:
    return t.emit("gelu" if a["approximate"] == "none" else "gelu_tanh", t.value(a["self"]))


def _elementwise(op: str) -> Callable[[AtenBuilder, Given], int]:
    return lambda t, a: t.emit(op, t.value(a["self"]))


def _add(t: AtenBuilder, a: Given, sign: int = 1) -> int:
    x, y, factor = a["self"], a["other"], sign * a.get("alpha", 1)
    if isinstance(x, Value) and isinstance(y, Value):
        if x.shape != y.shape:
            raise t.refuse(f"{t.operation} of shapes {x.shape} and {y.shape}")
        other = t.value(y) if factor == 1 else _scaled(t, y, factor, 0)
        return t.emit("add", t.value(x), other)
    if isinstance(x, Value):
        return _scaled(t, x, 1, factor * _plain(y))
    return _scaled(t, y, factor, _plain(x))


def _sub(t: AtenBuilder, a: Given) -> int:
    return _add(t, a, sign=-1)


def _rsub(t: AtenBuilder, a: Given) -> int:
    return _sub(t, {**a, "self": a["other"], "other": a["self"]})


def _neg(t: AtenBuilder, a: Given) -> int:
    return _scaled(t, a["self"], -1, 0)


def _mul(t: AtenBuilder, a: Given) -> int:
    x, y = a["self"], a["other"]
    if not isinstance(x, Value):
        x, y = y, x
    if not isinstance(y, Value):
        return _scaled(t, x, _plain(y), 0)
    if x.is_loose or t.shapes[x.number] != (*t.out[1:],):
        x, y = y, x
    if len(x.shape) != len(y.shape) or x.shape[0] != y.shape[0]:
        raise t.refuse(f"{t.operation} of shapes {x.shape} and {y.shape}")
    return t.emit("mul", t.value(x), y.number)


def _div(t: AtenBuilder, a: Given) -> int:
    if not isinstance(a["self"], Value) or isinstance(a["other"], Value) or a.get("rounding_mode"):
        raise t.refuse(f"{t.operation} by what is computed from the input, or rounded")
    return _scaled(t, a["self"], 1 / _plain(a["other"]), 0)


def _plain(x: Any) -> NDArray[np.float64]:
    return np.asarray(_numpy(x.tensor) if isinstance(x, Constant) else x, np.float64)


def _scaled(t: AtenBuilder, x: Value, factor: Any, shift: Any) -> int:
    """factor x + shift, where these are numbers, or one per channel or feature."""
    return t.scaled_along(t.value(x), x.shape, factor, shift)


def _max_pool(t: AtenBuilder, a: Given) -> int:
    if _pair(a["dilation"]) != (1, 1):
        raise t.refuse("max pooling with dilation")
    return t.emit("max_pool", t.value(a["self"]), **_window(a))


def _max_pool_with_indices(t: AtenBuilder, a: Given) -> tuple[Value, None]:
    number = _max_pool(t, a)
    return Value(number, (BATCH, *t.shapes[number])), None


def _avg_pool(t: AtenBuilder, a: Given) -> int:
    number = t.value(a["self"])
    if a["divisor_override"] is not None:
        raise t.refuse("average pooling with a divisor of its own")
    window = _window(a)
    if window["kernel"] == t.shapes[number][1:] and window["padding"] == (0, 0):
        return t.emit("mean", number)
    return t.emit("avg_pool", number, count_padding=a["count_include_pad"], **window)


def _window(a: Given) -> dict[str, Any]:
    kernel = _pair(a["kernel_size"])
    stride = _pair(a["stride"]) if a["stride"] else kernel
    return {"kernel": kernel, "stride": stride, "padding": _pair(a["padding"]), "ceil": a["ceil_mode"]}


def _adaptive(op: str) -> Callable[[AtenBuilder, Given], int]:
    def handler(t: AtenBuilder, a: Given) -> int:
        number, out = t.value(a["self"]), t.out[-2:]
        size = t.shapes[number][1:]
        if op == "avg_pool" and out == (1, 1):
            return t.emit("mean", number)
        if any(n % m for n, m in zip(size, out, strict=True)):
            raise t.refuse(f"{t.operation} from {size} to {out}, windows of unequal size,")
        kernel = size[0] // out[0], size[1] // out[1]
        return t.emit(op, number, kernel=kernel, stride=kernel)

    return handler


def _adaptive_max_pool(t: AtenBuilder, a: Given) -> tuple[Value, None]:
    shape = tuple(t.at.meta["val"][0].shape)
    size = t.shapes[t.value(a["self"])][1:]
    if any(n % m for n, m in zip(size, shape[-2:], strict=True)):
        raise t.refuse(f"{t.operation} from {size} to {shape[-2:]}, windows of unequal size,")
    kernel = size[0] // shape[-2], size[1] // shape[-1]
    return Value(t.emit("max_pool", t.value(a["self"]), kernel=kernel, stride=kernel), shape), None


def _mean(t: AtenBuilder, a: Given) -> int:
    x = a["self"]
    dims = sorted(d % len(x.shape) for d in a["dim"] or range(len(x.shape)))
    if len(x.shape) != 4 or dims != [2, 3]:
        raise t.refuse(f"a mean over dimensions {a['dim']} of {x.shape}")
    number = t.emit("mean", t.value(x))
    return number if a["keepdim"] else t.emit("flatten", number)


def _cat(t: AtenBuilder, a: Given) -> int:
    values = [t.value(x) for x in a["tensors"]]
    if a["dim"] % len(t.out) != 1:
        raise t.refuse(f"{t.operation} along dimension {a['dim']}")
    return t.emit("concat", *values)


def _pad(t: AtenBuilder, a: Given) -> int:
    amounts = [*a["pad"], *[0] * 8][:8]
    left, right, top, bottom, front, back, first, last = amounts
    if a.get("mode", "constant") != "constant" or a["value"] not in (None, 0) or min(amounts) < 0 or first or last:
        raise t.refuse(f"{t.operation} by {a['pad']} ({a.get('mode', 'constant')}, value {a['value']})")
    number = t.value(a["self"])
    if len(t.shapes[number]) != 3:
        raise t.refuse(f"{t.operation} of {a['self'].shape}")
    return t.surrounded(number, (front, back), (top, bottom), (left, right))


def _slice(t: AtenBuilder, a: Given) -> int:
    x = a["self"]
    number, dim = t.value(x), a["dim"] % len(x.shape)
    return t.sliced(number, x.shape, dim, range(x.shape[dim])[a["start"] : a["end"] : a["step"]])


def _split(t: AtenBuilder, a: Given) -> tuple[Value, ...]:
    x, shapes = a["self"], [tuple(v.shape) for v in t.at.meta["val"]]
    if a["dim"] % len(x.shape) != 1 or len(x.shape) not in (2, 4) or x.shape[0] != BATCH:
        raise t.refuse(f"{t.operation} along dimension {a['dim']} of {x.shape}")
    starts = np.cumsum([0, *(s[1] for s in shapes)]).tolist()
    number = t.value(x)
    return tuple(
        Value(t.picked(number, tuple(range(start, start + s[1])), (1, 1)), s)
        for start, s in zip(starts, shapes, strict=False)
    )


def _upsample_nearest(t: AtenBuilder, a: Given) -> int:
    number, out = t.value(a.get("input", a.get("self"))), t.out[-2:]
    size = t.shapes[number][1:]
    if any(m % n for n, m in zip(size, out, strict=True)):
        raise t.refuse(f"{t.operation} from {size} to {out}, by no whole number,")
    return t.emit("upsample", number, stride=(out[0] // size[0], out[1] // size[1]))


_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_RESHAPES = ("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze")
_COPIES = ("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh", "lift_fresh_copy")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
VIEWS = {*_SPLITS, *_RESHAPES, *_COPIES, *_DROPOUTS, "slice", "expand", "expand_as", "getitem"} - {"clone", "_to_copy"}
NOT_VALUES = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")

HANDLERS: dict[str, Callable[[AtenBuilder, Given], Any]] = {
    "conv2d": _conv2d,
    "convolution": _conv2d,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "gelu": _gelu,
    "clamp": _clip("min", "max"),
    "clip": _clip("min", "max"),
    "clamp_min": _clip("min", ""),
    "clamp_max": _clip("", "max"),
    "hardtanh": _clip("min_val", "max_val"),
    "relu6": lambda t, a: t.emit("clip", t.value(a["self"]), low=0.0, high=6.0),
    **{op: _elementwise(op) for op in ("relu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid")},
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool_with_indices,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive("avg_pool"),
    "adaptive_max_pool2d": _adaptive_max_pool,
    "mean": _mean,
    "upsample_nearest2d": _upsample_nearest,
    "cat": _cat,
    "concat": _cat,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "slice": _slice,
    "expand": _expand,
    "expand_as": _expand,
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys(_DROPOUTS, _dropout),
}
