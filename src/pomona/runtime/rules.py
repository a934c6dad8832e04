"""What each operation yields: the shape, and in numpy, literally, the numbers.

A rule of shapes takes the node, the shapes of its operands and the tensors, and raises ValueError where these do not
fit. A formula takes the node, its operands with the batch in front, its weight and its bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pomona.runtime.node import MAX_INT, Node, Pair, Shape, short

Array = NDArray[Any]
Rule = Callable[[Node, list[Shape], "Tensors"], Shape]
Formula = Callable[[Node, list[Array], Array | None, Array | None], Array]

_MAX_WINDOW = 1 << 16  # elements of a kernel, without its channels


class HasShape(Protocol):
    """A tensor: a numpy array, or a sparse one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


# Shapes.


class Tensors:
    """Shapes by name."""

    def __init__(self, tensors: Mapping[str, HasShape]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> Shape:
        if name not in self._tensors:
            raise ValueError(f"there is no tensor {short(name)}")
        return tuple(self._tensors[name].shape)

    def check_vector(self, name: str | None, size: int) -> None:
        if name is not None and self.shape(name) != (size,):
            raise ValueError(f"{short(name)} must have the shape [{size}], got {list(self.shape(name))}")


def _image(x: Shape) -> Shape:
    if len(x) != 3:
        raise ValueError(f"it takes (channels, height, width), got {list(x)}")
    return x


def _windows(size: Pair, kernel: Pair, node: Node) -> Pair:
    """How many windows fit, by height and width."""
    if math.prod(kernel) > _MAX_WINDOW:
        raise ValueError(f"a kernel has at most {_MAX_WINDOW} elements, got {list(kernel)}")
    num = []
    for n, k, stride, padding, dilation in zip(size, kernel, node.stride, node.padding, node.dilation, strict=True):
        room = n + 2 * padding - dilation * (k - 1) - 1
        if room < 0 or n + 2 * padding > MAX_INT:
            raise ValueError(
                f"a kernel of {list(kernel)} with dilation {list(node.dilation)} and padding {list(node.padding)} "
                f"does not fit the input of {list(size)}"
            )
        count = (room + node.ceil * (stride - 1)) // stride + 1
        num.append(count - (node.ceil and (count - 1) * stride >= n + padding))
    return num[0], num[1]


def conv_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    c, h, w = _image(x[0])
    weight = tensors.shape(node.weight or "")
    if len(weight) not in (2, 4) or min(weight) < 1:
        raise ValueError(f"{short(node.weight)} must be (outputs, channels / groups, kh, kw), got {list(weight)}")
    out, per_group, kh, kw = (*weight, 1, 1)[:4]
    if per_group * node.groups != c or out % node.groups:
        raise ValueError(f"{short(node.weight)} of {list(weight)} in {node.groups} groups does not fit {c} channels")
    tensors.check_vector(node.bias, out)
    return (out, *_windows((h, w), (kh, kw), node))


def linear_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    weight = tensors.shape(node.weight or "")
    if len(x[0]) > 2 or len(weight) != 2 or weight[1] != x[0][-1] or weight[0] < 1:
        raise ValueError(f"{short(node.weight)} of {list(weight)} does not fit {list(x[0])}")
    tensors.check_vector(node.bias, weight[0])
    return (*x[0][:-1], weight[0])


def same_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    return x[0]


def clip_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    if not node.low <= node.high:
        raise ValueError(f"low must not be above high, got {node.low} and {node.high}")
    return x[0]


def add_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    if x[0] != x[1]:
        raise ValueError(f"it takes values of one shape, got {list(x[0])} and {list(x[1])}")
    return x[0]


def mul_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    if x[0] != x[1] and not (len(x[0]) == 3 and x[1] == (x[0][0], 1, 1)):
        raise ValueError(f"it takes values of one shape, or (C, H, W) and (C, 1, 1); got {list(x[0])} and {list(x[1])}")
    return x[0]


def scale_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    if len(x[0]) > 3:
        raise ValueError(f"it takes (channels, height, width), (positions, features) or (features,); got {list(x[0])}")
    size = num_channels(x[0])
    tensors.check_vector(node.weight, size)
    tensors.check_vector(node.bias, size)
    return x[0]


def pool_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    c, h, w = _image(x[0])
    if any(2 * p > k for p, k in zip(node.padding, node.kernel, strict=True)):
        raise ValueError(f"padding {list(node.padding)} is more than half of the kernel {list(node.kernel)}")
    return (c, *_windows((h, w), node.kernel, node))


def mean_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    return _image(x[0])[0], 1, 1


def flatten_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    if len(x[0]) == 2:
        raise ValueError(f"it takes any number of dimensions but two, got {list(x[0])}")
    return (math.prod(x[0]),)


def concat_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    if len(x[0]) not in (1, 3) or any(len(s) != len(x[0]) or s[1:] != x[0][1:] for s in x):
        some = ", ".join(str(list(s)) for s in x[:4])
        raise ValueError(f"it takes (C, H, W) of one height and width, or (F,); got {some}{', ...' * (len(x) > 4)}")
    return (sum(s[0] for s in x), *x[0][1:])


def upsample_shape(node: Node, x: list[Shape], tensors: Tensors) -> Shape:
    c, h, w = _image(x[0])
    size = h * node.stride[0], w * node.stride[1]
    if max(size) > MAX_INT:
        raise ValueError(f"an image of {[h, w]} cannot become {node.stride[0]} by {node.stride[1]} times as large")
    return (c, *size)


def num_channels(shape: Shape) -> int:
    """By how many numbers ``scale`` multiplies: channels of (C, H, W), features of (F,) and (P, F)."""
    return shape[0] if len(shape) == 3 else shape[-1]


# Numbers.


def _by_channel(vector: Array | None, x: Array) -> Array | float:
    """Shaped so that it broadcasts along channels of (N, C, H, W), or features of (N, F) and (N, P, F)."""
    if vector is None:
        return 0.0
    return vector.reshape(-1, 1, 1) if x.ndim == 4 else vector


def _padded(x: Array, node: Node, fill: float, *, reach: tuple[int, int] = (0, 0)) -> Array:
    """With the padding around it, and so much more below and to the right that windows may reach into it."""
    (ph, pw), (more_h, more_w) = node.padding, reach
    return np.pad(x, ((0, 0), (0, 0), (ph, ph + more_h), (pw, pw + more_w)), constant_values=fill)


def taps(x: Array, node: Node, kernel: tuple[int, int], out: tuple[int, int]) -> list[Array]:
    """For each place of the kernel what lies under it, (N, C, H', W') each."""
    found = []
    for i, j in itertools.product(*map(range, kernel)):
        top, left = i * node.dilation[0], j * node.dilation[1]
        bottom, right = top + (out[0] - 1) * node.stride[0] + 1, left + (out[1] - 1) * node.stride[1] + 1
        found.append(x[:, :, top : bottom : node.stride[0], left : right : node.stride[1]])
    return found


def conv(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    assert weight is not None
    weight = weight.reshape((*weight.shape, 1, 1)[:4])
    out, per_group, kh, kw = weight.shape
    padded = _padded(x[0], node, 0.0)
    spread = tuple(d * (k - 1) + 1 for d, k in zip(node.dilation, (kh, kw), strict=True))
    h, w = ((n - k) // s + 1 for n, k, s in zip(padded.shape[2:], spread, node.stride, strict=True))
    n = x[0].shape[0]
    y = np.zeros((n, node.groups, out // node.groups, h * w), weight.dtype)
    for k, tap in enumerate(taps(padded, node, (kh, kw), (h, w))):
        matrix = weight[:, :, k // kw, k % kw].reshape(node.groups, out // node.groups, per_group)
        y += matrix @ tap.reshape(n, node.groups, per_group, h * w)
    y = y.reshape(n, out, h, w)
    return y + _by_channel(bias, y)


def linear(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    assert weight is not None
    return np.asarray(x[0] @ weight.T + (0.0 if bias is None else bias))


def scale(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    return x[0] * _by_channel(weight, x[0]) + _by_channel(bias, x[0])


def _pool_sizes(x: Array, node: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many windows there are, and by how much the last ones reach beyond the padding."""
    out, reach = [], []
    for n, k, s, p in zip(x.shape[2:], node.kernel, node.stride, node.padding, strict=True):
        # torch with ceil: one window more, if the last one does not end at the end and the next begins inside.
        starts = [i for i in range(-p, n + p, s) if i + k <= n + p or (node.ceil and i + k < n + p + s and i < n)]
        out.append(len(starts))
        reach.append(max(0, starts[-1] + k - n - p))
    return (out[0], out[1]), (reach[0], reach[1])


def max_pool(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    out, reach = _pool_sizes(x[0], node)
    return np.asarray(np.maximum.reduce(taps(_padded(x[0], node, -np.inf, reach=reach), node, node.kernel, out)))


def avg_pool(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    out, reach = _pool_sizes(x[0], node)
    counted = np.ones((1, 1, *x[0].shape[2:]), x[0].dtype)
    ones = _padded(counted, node, float(node.count_padding))
    ones = np.pad(ones, ((0, 0), (0, 0), (0, reach[0]), (0, reach[1])))
    total = sum(taps(_padded(x[0], node, 0.0, reach=reach), node, node.kernel, out))
    return np.asarray(total / sum(taps(ones, node, node.kernel, out)))


def concat(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    return np.concatenate(x, axis=1)


def upsample(node: Node, x: list[Array], weight: Array | None, bias: Array | None) -> Array:
    return x[0].repeat(node.stride[0], 2).repeat(node.stride[1], 3)


def elementwise(function: Callable[[Array], Array]) -> Formula:
    """A function of one array as a formula."""
    return lambda node, x, weight, bias: function(x[0])


def erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), dtype=x.dtype)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def hardsigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x + 3, 0, 6) / 6)


def gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
