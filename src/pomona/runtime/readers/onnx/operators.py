"""Operators of ONNX as operations of a graph: one handler per operator, by name in ``HANDLERS``.

A handler returns the number of the value that the operator yields, a :class:`Value` where ONNX sees it in another
shape, an array where it depends on shapes alone, or a list of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.node import Pair
from pomona.runtime.readers.onnx.builder import Constant, Erf, Found, Given, OnnxBuilder, Value
from pomona.runtime.readers.onnx.folds import axes_of, slices_of

Array: TypeAlias = NDArray[Any]
_RSQRT2 = math.sqrt(0.5)


def _shape(a: Given) -> Array:
    shape: Array = np.asarray(a.value().shape, np.int64)
    return np.asarray(shape[a.attributes.get("start", 0) : a.attributes.get("end")])


def _window(a: Given, size: Pair, kernel: Pair) -> tuple[Pair, Pair, tuple[int, int, int, int]]:
    """Stride, dilation, and padding (left, right, top, bottom)."""
    stride = a.attributes.get("strides", (1, 1))
    dilation = a.attributes.get("dilations", (1, 1))
    pads = a.attributes.get("pads", (0, 0, 0, 0))
    auto = a.attributes.get("auto_pad", b"NOTSET")
    if not len(kernel) == len(stride) == len(dilation) == 2 or len(pads) != 4:
        raise a.refuse(f"over {len(kernel)} dimensions")
    top, left, bottom, right = pads
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        both = []
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
            total = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
            less = total // 2
            both.append((less, total - less) if auto == b"SAME_UPPER" else (total - less, less))
        (top, bottom), (left, right) = both
    elif auto == b"VALID":
        top = left = bottom = right = 0
    return (stride[0], stride[1]), (dilation[0], dilation[1]), (left, right, top, bottom)


def _image(a: Given, i: int = 0) -> Value:
    x = a.value(i)
    if len(x.shape) != 4:
        raise a.refuse(f"of {x.shape}, which is no batch of images")
    return x


def _conv(a: Given) -> int:
    x, weight = _image(a), a.t.weight(a.input(1))
    kernel = a.t.tensors[weight].shape[2:]
    if len(kernel) != 2:
        raise a.refuse(f"over {len(kernel)} dimensions")
    stride, dilation, (left, right, top, bottom) = _window(a, (x.shape[2], x.shape[3]), (kernel[0], kernel[1]))
    number, padding = x.number, (top, left)
    if (top, left) != (bottom, right):
        number, padding = a.t.padded(number, left, right, top, bottom), (0, 0)
    bias = a.t.weight(a.input(2)) if a.input(2) is not None else None
    groups = a.attributes.get("group", 1)
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return a.t.emit("conv", number, weight=weight, bias=bias, **how)


def _pool(op: str) -> Callable[[Given], int]:
    def handler(a: Given) -> int:
        x = _image(a)
        if a.t.num_outputs > 1 or a.attributes.get("storage_order"):
            raise a.refuse("with indices")
        kernel = tuple(a.attributes["kernel_shape"])
        size = x.shape[2], x.shape[3]
        stride, dilation, (left, right, top, bottom) = _window(a, size, kernel)
        if dilation != (1, 1) or (left, top) != (right, bottom):
            raise a.refuse(f"with dilation {dilation} and padding {(top, left, bottom, right)}")
        ceil = bool(a.attributes.get("ceil_mode"))
        rooms = [n + 2 * p - k for n, k, p in zip(size, kernel, (top, left), strict=True)]
        if all(room % s == 0 for room, s in zip(rooms, stride, strict=True)):
            ceil = False
        how: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": (top, left), "ceil": ceil}
        if op == "avg_pool":
            if ceil:
                raise a.refuse("with a last window that is not whole")
            how["count_padding"] = bool(a.attributes.get("count_include_pad"))
        return a.t.emit(op, x.number, **how)

    return handler


def _global_max(a: Given) -> int:
    x = _image(a)
    return a.t.emit("max_pool", x.number, kernel=x.shape[2:], stride=x.shape[2:])


def _reduce_mean(a: Given) -> Value:
    x = a.value()
    axes = axes_of(a, 1, len(x.shape))
    if len(x.shape) != 4 or axes is None or sorted(axes) != [2, 3]:
        raise a.refuse(f"over dimensions {axes} of {x.shape}")
    mean = a.t.now(a.t.emit("mean", x.number))
    return mean if a.attributes.get("keepdims", 1) else a.t.seen_as(mean, mean.shape[:2])


def _batch_norm(a: Given) -> int:
    x = a.value()
    if a.t.num_outputs > 1 or a.attributes.get("training_mode") or not a.attributes.get("spatial", 1):
        raise a.refuse("by the statistics of the batch itself")
    if len(x.shape) == 3:
        raise a.refuse("over positions")
    factor, shift, mean, var = (a.array(i) for i in range(1, 5))
    return a.t.normalized(x.number, mean, var, a.attributes.get("epsilon", 1e-5), factor, shift)


def _gemm(a: Given) -> int:
    x = a.value()
    alpha, beta = a.attributes.get("alpha", 1.0), a.attributes.get("beta", 1.0)
    if a.attributes.get("transA"):
        raise a.refuse("of a transposed value")
    is_turned = bool(a.attributes.get("transB"))

    def rows(array: Array) -> Array:
        if array.ndim != 2:
            raise a.refuse(f"with a weight of shape {array.shape}")
        return np.asarray((array if is_turned else array.T) * alpha)

    weight = a.t.weight(a.input(1), None if is_turned and alpha == 1.0 else rows)
    num = a.t.tensors[weight].shape[0]
    bias = None
    if a.input(2) is not None and beta:
        array = a.array(2)
        if array.size not in (1, num) or (array.ndim and array.shape[-1] != array.size):
            raise a.refuse(f"with a bias of shape {array.shape}")
        is_plain = beta == 1.0 and array.shape == (num,)
        bias = a.t.weight(a.input(2), None if is_plain else lambda b: np.broadcast_to(b.reshape(-1), (num,)) * beta)
    return a.t.emit("linear", x.number, weight=weight, bias=bias)


def _matmul(a: Given) -> Value:
    x = a.value()
    if a.array(1).ndim != 2:
        raise a.refuse(f"with a weight of shape {a.array(1).shape}")
    number = a.t.emit("linear", x.number, weight=a.t.weight(a.input(1), lambda w: w.T))
    return Value(number, (*x.shape[:-1], a.array(1).shape[1]))


def _scaled(a: Given, x: Value, factor: Any, shift: Any) -> Value:
    """factor x + shift, where these are numbers, or one per channel or feature."""
    t = a.t
    if np.ndim(factor) == 0 and float(factor) == 0.5 and not np.any(shift) and x.number in t._doubled:
        return Value(t._doubled[x.number], x.shape)
    return Value(t.scaled_along(x.number, x.shape, factor, shift), x.shape)


def _number(x: Constant) -> Array:
    """One number as a scalar, whatever its shape."""
    array = x.array.astype(np.float64)
    return array.reshape(()) if array.size == 1 else array


def _add(a: Given, sign: float = 1.0) -> Found:
    x, y = a.input(0), a.input(1)
    if (isinstance(x, Erf) and isinstance(y, Constant)) or (isinstance(y, Erf) and isinstance(x, Constant)):
        erf, other = (x, y) if isinstance(x, Erf) else (y, x)
        assert isinstance(erf, Erf) and isinstance(other, Constant)
        if sign == 1.0 and other.array.size == 1:
            return Erf(erf.source, erf.shape, erf.shift + float(other.array.reshape(-1)[0]))
    if isinstance(x, Value) and isinstance(y, Value):
        if x.shape != y.shape:
            raise a.refuse(f"of shapes {x.shape} and {y.shape}")
        other_number = y.number if sign == 1.0 else _scaled(a, y, sign, 0.0).number
        return Value(a.t.emit("add", x.number, other_number), x.shape)
    if isinstance(x, Value):
        return _scaled(a, x, 1.0, sign * _number(a.t.constant(y, "an operand")))
    return _scaled(a, a.t.value(y), sign, _number(a.t.constant(x, "an operand")))


def _sub(a: Given) -> Found:
    return _add(a, -1.0)


def _mul(a: Given) -> Found:
    x, y = a.input(0), a.input(1)
    if isinstance(y, Erf) or (isinstance(x, Constant) and not isinstance(y, Constant)):
        x, y = y, x
    if isinstance(x, Erf):
        return _gelu_of(a, x, y)
    if not isinstance(y, Value):
        return _scaled(a, a.t.value(x), _number(a.t.constant(y, "an operand")), 0.0)
    left, right = a.t.value(x), y
    if left.shape[1:] != right.shape[1:] and left.shape[2:] == (1, 1):
        left, right = right, left
    if len(left.shape) != len(right.shape):
        raise a.refuse(f"of shapes {left.shape} and {right.shape}")
    return Value(a.t.emit("mul", left.number, right.number), left.shape)


def _gelu_of(a: Given, erf: Erf, y: Found) -> Value:
    """x (1 + erf(x / sqrt 2)) is two GELUs; with x / 2 it is one."""
    t = a.t
    if erf.shift != 1.0 or not isinstance(y, Value):
        raise a.refuse("of an erf")
    gelu = t.emit("gelu", erf.source)
    if y.number == erf.source:
        doubled = t.scaled(gelu, np.asarray(2.0), np.asarray(0.0))
        t._doubled[doubled] = gelu
        return Value(doubled, y.shape)
    if _factor(t, y.number) == (erf.source, 0.5):
        return Value(gelu, y.shape)
    raise a.refuse("of an erf")


def _factor(t: OnnxBuilder, number: int) -> tuple[int, float] | None:
    """What a value is a multiple of, and by which one number."""
    node = t.nodes[number - len(t.inputs)] if number >= len(t.inputs) else None
    if node is None or node.op != "scale" or node.bias is not None:
        return None
    factors = t.tensors[node.weight or ""]
    return (node.operands[0], float(factors[0])) if (factors == factors[0]).all() else None


def _div(a: Given) -> Found:
    if not isinstance(a.input(1), Constant):
        raise a.refuse("by what is computed from the input")
    return _scaled(a, a.value(), 1.0 / _number(a.t.constant(a.input(1), "an operand")), 0.0)


def _erf(a: Given) -> Erf:
    found = _factor(a.t, a.value().number)
    if found is None or abs(found[1] - _RSQRT2) > 1e-6:
        raise a.refuse("of anything but x / sqrt(2)")
    return Erf(found[0], a.value().shape, 0.0)


def _clip(a: Given) -> Value:
    x = a.value()
    low, high = (a.setting(name, place) for name, place in (("min", 1), ("max", 2)))
    low, high = (None if bound is None else float(np.asarray(bound).reshape(-1)[0]) for bound in (low, high))
    if low == 0.0 and high is None:
        return Value(a.t.emit("relu", x.number), x.shape)
    given = {"low": low, "high": high}
    given = {k: v for k, v in given.items() if v is not None and abs(v) <= 3.4e38}
    return Value(a.t.emit("clip", x.number, **given), x.shape)


def _hard_sigmoid(a: Given) -> Value:
    alpha, beta = a.attributes.get("alpha", 0.2), a.attributes.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return Value(a.t.emit("hardsigmoid", a.value().number), a.value().shape)
    number = _scaled(a, a.value(), alpha, beta).number
    return Value(a.t.emit("clip", number, low=0.0, high=1.0), a.value().shape)


def _gelu(a: Given) -> Value:
    op = "gelu_tanh" if a.attributes.get("approximate") == b"tanh" else "gelu"
    return Value(a.t.emit(op, a.value().number), a.value().shape)


def _elementwise(op: str) -> Callable[[Given], Value]:
    return lambda a: Value(a.t.emit(op, a.value().number), a.value().shape)


def _same(a: Given) -> Value:
    if a.t.operation == "Cast" and a.attributes["to"] not in (1, 10, 11, 16):  # floats
        raise a.refuse("to what is no floating point")
    if a.t.operation == "Dropout" and (a.t.num_outputs > 1 or (a.input(2) is not None and a.array(2).any())):
        raise a.refuse("in training mode")
    return a.value()


def _reshape(a: Given) -> Value:
    x = a.value()
    wanted = [int(n) for n in a.array(1)]
    if not a.attributes.get("allowzero"):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    if wanted.count(-1) == 1:
        rest = -math.prod(wanted)
        wanted = [math.prod(x.shape) // rest if n == -1 else n for n in wanted] if rest > 0 else wanted
    if math.prod(wanted) != math.prod(x.shape) or min(wanted, default=0) < 1:
        raise ValueError(f"{x.shape} has no shape {wanted}")
    return a.t.seen_as(x, tuple(wanted))


def _flatten(a: Given) -> Value:
    x, axis = a.value(), a.attributes.get("axis", 1) % (len(a.value().shape) + 1)
    return a.t.seen_as(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _squeeze(a: Given) -> Value:
    x = a.value()
    axes = axes_of(a, 1, len(x.shape))
    axes = tuple(i for i, n in enumerate(x.shape) if n == 1) if axes is None else axes
    return a.t.seen_as(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _unsqueeze(a: Given) -> Value:
    x = a.value()
    axes = [int(axis) for axis in np.atleast_1d(a.setting("axes", 1))]
    return a.t.seen_as(
        x, np.expand_dims(np.empty((0, *x.shape)), tuple(i % (len(x.shape) + len(axes)) + 1 for i in axes)).shape[1:]
    )


def _transpose(a: Given) -> Value:
    x = a.value()
    perm = a.attributes.get("perm") or list(range(len(x.shape)))[::-1]
    if list(perm) != list(range(len(x.shape))):
        raise a.refuse(f"of {x.shape} to the order {tuple(perm)}")
    return x


def _concat(a: Given) -> int:
    values = [a.value(i) for i in range(len(a.inputs))]
    axis = a.attributes["axis"] % len(values[0].shape)
    if axis != 1:
        raise a.refuse(f"along dimension {axis}")
    return a.t.emit("concat", *(x.number for x in values))


def _slice(a: Given) -> int:
    x = a.value()
    number = x.number
    for dim, each in enumerate(slices_of(a, x.shape)):
        number = a.t.sliced(number, x.shape, dim, range(x.shape[dim])[each])
    return number


def _split(a: Given) -> list[int]:
    x = a.value()
    dim = a.attributes.get("axis", 0) % len(x.shape)
    sizes = a.setting("split", 1)
    if sizes is None:
        num = a.attributes.get("num_outputs", a.t.num_outputs)
        each = math.ceil(x.shape[dim] / num)
        sizes = [min(each, x.shape[dim] - i * each) for i in range(num)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [a.t.sliced(x.number, x.shape, dim, range(s, s + n)) for s, n in zip(starts, sizes, strict=False)]


def _pad(a: Given) -> int:
    x = _image(a)
    if a.attributes.get("mode", b"constant") != b"constant":
        raise a.refuse(f"by {a.attributes['mode'].decode()}")
    pads = [int(n) for n in a.setting("pads", 1)]
    axes = [int(i) for i in a.array(3)] if a.input(3) is not None else list(range(4))
    value = a.setting("value", 2)
    if (value is not None and np.any(np.asarray(value))) or min(pads) < 0 or len(pads) != 2 * len(axes):
        raise a.refuse(f"by {pads} with {value}")
    both = {axis % 4: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    if any(both.get(0, (0, 0))):
        raise a.refuse("of the batch")
    channels, rows, columns = (both.get(axis, (0, 0)) for axis in (1, 2, 3))
    return a.t.surrounded(x.number, channels, rows, columns)


# How ONNX may round places between pixels, with the least factor from which that is not the nearest pixel.
_NEAREST = {
    ("asymmetric", "floor"): math.inf,
    ("asymmetric", "round_prefer_floor"): 3,
    ("half_pixel", "round_prefer_floor"): math.inf,
    ("half_pixel", "round_prefer_ceil"): math.inf,
    ("pytorch_half_pixel", "round_prefer_floor"): math.inf,
    ("pytorch_half_pixel", "round_prefer_ceil"): math.inf,
}


def _resize(a: Given) -> int:
    x = _image(a)
    is_old = a.t.operation == "Upsample" or a.t.opset < 11
    mode = a.attributes.get("mode", b"nearest").decode()
    places = a.attributes.get("coordinate_transformation_mode", b"asymmetric" if is_old else b"half_pixel").decode()
    rounding = a.attributes.get("nearest_mode", b"floor" if is_old else b"round_prefer_floor").decode()
    if "axes" in a.attributes or a.attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise a.refuse("of some axes, or with a policy")
    scales, sizes = a.setting("scales", 1 if is_old else 2), None if is_old else a.setting("sizes", 3)
    if scales:
        factors = [float(s) for s in scales]
    else:
        factors = [m / n for m, n in zip(sizes or (), x.shape, strict=True)]
    most = _NEAREST.get((places, rounding), 0)
    if mode != "nearest" or factors[:2] != [1.0, 1.0] or any(f % 1 or not 1 <= f < most for f in factors[2:]):
        raise a.refuse(f"of {x.shape} by {factors} ({mode}, {places}, {rounding})")
    return a.t.emit("upsample", x.number, stride=(int(factors[2]), int(factors[3])))


HANDLERS: dict[str, Callable[[Given], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "MaxPool": _pool("max_pool"),
    "AveragePool": _pool("avg_pool"),
    "GlobalAveragePool": lambda a: a.t.emit("mean", _image(a).number),
    "GlobalMaxPool": _global_max,
    "ReduceMean": _reduce_mean,
    "Relu": _elementwise("relu"),
    "Sigmoid": _elementwise("sigmoid"),
    "Tanh": _elementwise("tanh"),
    "HardSwish": _elementwise("hardswish"),
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Clip": _clip,
    "Erf": _erf,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Neg": lambda a: _scaled(a, a.value(), -1.0, 0.0),
    "Resize": _resize,
    "Upsample": _resize,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Shape": _shape,
    **dict.fromkeys(("Identity", "Dropout", "Cast"), _same),
}
