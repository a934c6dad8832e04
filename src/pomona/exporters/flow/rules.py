"""What each operator does to channels and constants; one without a rule holds all that reaches it.

A rule must hold for every input of the network, and for every size of a picture or a sequence: a convolution with zeros
around its input, say, makes no constant of a constant, even where the example has one place only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from pomona.exporters.flow.state import NO_SLOT, Flow, Reader, Value, number, placed, plain

Rule = Callable[[Flow, Node, Any, Any], Any]
"""Takes the operator's node and its arguments, with values for tensors; returns what it yields."""


def name_of(node: Node) -> str:
    """The operator, without overload; in place or not is one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = node.target._schema.name.removeprefix("aten::")
    return name.removesuffix("_") if node.target._schema.is_mutable else name


def rule_of(node: Node) -> Rule:
    """The operator's rule."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return unknown
    name, tags = name_of(node), node.target.tags
    if name in _RULES:
        return _RULES[name]
    is_pointwise = (torch.Tag.pointwise in tags or name in _POINTWISE) and isinstance(node.meta.get("val"), Tensor)
    return _pointwise if is_pointwise and torch.Tag.nondeterministic_seeded not in tags else unknown


def _given(node: Node, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return defaults | dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs)


def _values(args: Any, kwargs: Any = None) -> list[Value]:
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Value)]


def _loose(flow: Flow, x: Value) -> Value:
    """A parameter that is used as a value stays as it is."""
    if x.axes is None:
        return x
    flow.pin(x)
    return plain(x.shape, constant=x.constant)


# Constants


def _run(node: Node, args: Any, kwargs: Any) -> Any:
    """What the operator yields for constants, as far as they are known; not in place, and on the CPU."""
    assert isinstance(node.target, torch._ops.OpOverload)
    leaves, spec = tree_flatten((args, kwargs))
    nodes = tree_leaves((node.args, node.kwargs))
    concrete = [
        x.constant.to(n.meta["val"].dtype) if isinstance(x, Value) else torch.device("cpu") if _is_device(x) else x
        for n, x in zip(nodes, leaves, strict=True)
    ]
    args, kwargs = tree_unflatten(concrete, spec)
    with torch.no_grad():
        return _functional(node.target)(*args, **kwargs)


def _functional(target: Any) -> Any:
    """The operator that does not work in place."""
    if not target._schema.is_mutable:
        return target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, target._overloadname)


def _is_device(x: Any) -> bool:
    return isinstance(x, torch.device)


def _vector(x: Value, dim: int) -> Tensor:
    """The constant at each index along a dimension; NaN where there is none."""
    rows = x.constant.movedim(dim, 0).reshape(x.constant.shape[dim], -1)
    return torch.where((rows == rows[:, :1]).all(1), rows[:, 0], math.nan).expand(x.shape[dim])


# What is not known, or is known altogether


def unknown(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    """What goes in stays whole. What comes out is known only if all that goes in is."""
    values = _values(args, kwargs)
    flow.pin(*values)
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and not target._schema.is_mutable:
        is_fixed = torch.Tag.nondeterministic_seeded not in target.tags and node.meta.get("val") is not None
        if is_fixed and all(x.is_known for x in values):
            found = _run(node, *tree_map_only(Value, _whole, (args, kwargs)))
            return tree_map_only(Tensor, lambda x: plain(x.shape, constant=number(x)), found)
    return blank(flow, node, args, kwargs)


def blank(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    """What goes in stays whole, and nothing is known of what comes out."""
    flow.pin(*_values(args, kwargs))
    return tree_map_only(Tensor, lambda x: plain(x.shape), node.meta.get("val"))


def _whole(x: Value) -> Value:
    return Value(x.shape, x.slots, x.constant.expand(x.shape))


# Each element alone


_POINTWISE = (
    *("hardswish", "log_sigmoid", "multiply", "divide", "subtract", "rsub", "where", "masked_fill", "floor_divide"),
    *("special_expit", "zeros_like", "ones_like", "full_like"),
)


def _pointwise(flow: Flow, node: Node, args: Any, kwargs: Any) -> Value:
    shape, values = tuple(node.meta["val"].shape), _values(args, kwargs)
    constant = _pointwise_constant(node, args, kwargs, values)
    if len(values) == 1 and values[0].axes is not None and values[0].shape == shape:
        return Value(shape, values[0].slots, constant, values[0].axes)
    return plain(shape, _joined(flow, values, shape), constant)


def _pointwise_constant(node: Node, args: Any, kwargs: Any, values: Sequence[Value]) -> Tensor:
    ones = (1,) * len(node.meta["val"].shape)
    hidden = torch.zeros(ones, dtype=torch.bool)
    for x in values:
        hidden = hidden | x.constant.isnan()
    found = torch.full(hidden.shape, math.nan) if bool(hidden.all()) else number(_run(node, args, kwargs))
    found = torch.where(hidden, math.nan, found)
    if name_of(node) in ("mul", "multiply"):
        for x in values:
            found = torch.where(x.constant == 0, 0.0, found)  # times whatever finite number
    return found


def _joined(flow: Flow, values: Sequence[Value], shape: tuple[int, ...]) -> Tensor | None:
    """The slots of what is computed of the same element of each; those go together."""
    varies = set[int]().union(*(x.varies for x in values if x.axes is None))
    parts = [(_in_line(flow, x, varies), x.shape) for x in values]
    tracked = [slots for slots, _ in parts if bool((slots != NO_SLOT).any())]
    if not tracked:
        return None
    together = []
    for slots, sizes in parts:
        sizes = (1,) * (len(shape) - len(sizes)) + sizes
        if bool((slots == NO_SLOT).all()) and all(sizes[d] == 1 for d in varies):
            continue  # the same for all channels
        if any(sizes[d] != shape[d] for d in varies):
            flow.pin(*tracked)
            return None
        together.append(slots.reshape((1,) * (len(shape) - slots.ndim) + slots.shape))
    first, *others = torch.broadcast_tensors(*together)  # type: ignore[no-untyped-call]
    for slots in others:
        flow.tie(first, slots)
    return torch.stack([first, *others]).max(0).values


def _in_line(flow: Flow, x: Value, varies: set[int]) -> Tensor:
    """The slots of an operand; a parameter's are those along the dimension in which the others vary."""
    if x.axes is None:
        return x.slots
    dim = next(iter(varies)) if len(varies) == 1 else 0
    axis = x.axes[dim] if -len(x.shape) <= dim < 0 else None
    if axis is None or x.shape[dim] == 1:
        flow.pin(x)
        return torch.full((1,) * len(x.shape), NO_SLOT)
    flow.pin(Value(x.shape, x.slots, x.constant, tuple(a for a in x.axes if a != axis)))
    return placed(flow.along_parameter(axis), dim, len(x.shape))


def _same(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    given = _given(node, args, kwargs)
    if given.get("train"):  # of dropout
        return unknown(flow, node, args, kwargs)
    x, dtype = args[0], node.meta["val"].dtype
    constant = torch.where(x.constant.isnan(), math.nan, number(x.constant.to(dtype)))
    return Value(x.shape, x.slots, constant, x.axes)


def _prelu(flow: Flow, node: Node, args: Any, kwargs: Any) -> Value:
    x, weight = _loose(flow, args[0]), args[1]
    dim, slopes = 1 - len(x.shape), weight.constant
    if slopes.numel() == 1:
        flow.pin(weight)
        constant = torch.where(x.constant < 0, x.constant * slopes.flatten(), x.constant)
        return plain(x.shape, x.slots, constant)
    slots, c = flow.along(x, dim), _vector(x, dim)
    _tie_parameter(flow, slots, weight)
    return _per_channel(x.shape, dim, slots, torch.where(c < 0, c * slopes, c))


def _glu(flow: Flow, node: Node, args: Any, kwargs: Any) -> Value:
    given = _given(node, args, kwargs)
    x, dim = _loose(flow, given["self"]), given["dim"]
    a, b = x.slots.expand(x.shape).chunk(2, dim)
    flow.tie(a, b)
    left, right = x.constant.expand(x.shape).chunk(2, dim)
    return plain(a.shape, a, torch.where(left == 0, 0.0, left * right.sigmoid()))


# Each channel alone


def _per_channel(shape: Sequence[int], dim: int, slots: Tensor, constants: Tensor | None = None) -> Value:
    constant = None if constants is None else placed(constants, dim, len(shape))
    return plain(shape, placed(slots, dim, len(shape)), constant)


def _tie_parameter(flow: Flow, slots: Tensor, parameter: Value | None) -> None:
    """The entries of a vector of parameters go with these slots."""
    if parameter is None:
        return
    if parameter.axes is None or len(parameter.axes) != 1 or parameter.axes[0] is None:
        flow.pin(parameter, slots)
    else:
        flow.tie(slots, flow.along_parameter(parameter.axes[0]))


def _norm_by_channel(flow: Flow, node: Node, args: Any, kwargs: Any) -> Value:
    """Batch norm and instance norm. By its running statistics it is a line; by those of its input it is no constant."""
    given = _given(node, args, kwargs)
    x = _loose(flow, given["input"])
    weight, bias, mean, var = (given[name] for name in ("weight", "bias", "running_mean", "running_var"))
    slots, c = flow.along(x, 1 - len(x.shape)), _vector(x, 1 - len(x.shape))
    for parameter in (weight, bias, mean, var):
        _tie_parameter(flow, slots, parameter)
    shift = torch.zeros_like(c) if bias is None else bias.constant
    scale = torch.ones_like(c) if weight is None else weight.constant
    if given.get("training") or given.get("use_input_stats") or mean is None or var is None:
        line = torch.where(c == 0, shift, math.nan)
    else:
        line = ((c.double() - mean.constant) / (var.constant.double() + given["eps"]).sqrt() * scale + shift).to(c)
    return _per_channel(x.shape, 1 - len(x.shape), slots, torch.where(scale == 0, shift, line))


def _pool(num_dims: int, keeps: Callable[[dict[str, Any]], bool] = lambda given: True) -> Rule:
    """Of places, in the last dimensions; whether a constant stays one, depends on the padding."""

    def rule(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
        given = _given(node, args, kwargs)
        x = _loose(flow, args[0])
        dim = -num_dims - 1
        if len(x.shape) <= num_dims:
            return unknown(flow, node, args, kwargs)
        slots, c = flow.along(x, dim), _vector(x, dim)
        c = c if keeps(given) else torch.where(c == 0, c, math.nan)
        results = node.meta["val"]
        if isinstance(results, Tensor):
            return _per_channel(results.shape, dim, slots, c)
        values, indices = results
        return _per_channel(values.shape, dim, slots, c), _per_channel(indices.shape, dim, slots)

    return rule


def _is_unpadded(given: dict[str, Any]) -> bool:
    """Whether an average pool never counts zeros around its input."""
    is_full = not any(_list(given["padding"])) or not given["count_include_pad"]
    return is_full and given.get("divisor_override") is None


def _list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (list, tuple)) else [x]


# Along dimensions: what the channels do not vary in may be mixed


def _dims(given: dict[str, Any], num_dims: int) -> set[int]:
    """The dimensions that an operator names, counted from the last."""
    dims = given.get("dim")
    chosen = range(num_dims) if dims is None or dims == [] else _list(dims)
    return {d % num_dims - num_dims for d in chosen} if num_dims else set()


def _reduced(keeps: str) -> Rule:
    """Mean, largest and the like. Of copies of "any" constant, of "zero" or of "none" it makes the constant itself."""

    def rule(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
        if len(_values(args)) > 1:  # max(a, b)
            return _pointwise(flow, node, args, kwargs)
        given = _given(node, args, kwargs)
        x = _loose(flow, args[0])
        dims = _dims(given, len(x.shape))
        if x.varies & dims or (x.is_tracked and not x.varies):
            return unknown(flow, node, args, kwargs)
        others = [d for d in range(len(x.shape)) if d - len(x.shape) not in dims or given.get("keepdim")]
        c = torch.where(x.constant == 0, x.constant, math.nan) if keeps == "zero" else x.constant
        if keeps == "none" or any(c.shape[d] > 1 for d in dims):
            c = torch.full((1,) * len(x.shape), math.nan)

        def result(out: Tensor) -> Value:
            return plain(out.shape, x.slots.reshape([x.slots.shape[d] for d in others]))

        found = tree_map_only(Tensor, result, node.meta["val"])
        if isinstance(found, Value):
            return plain(found.shape, found.slots, c.reshape([c.shape[d] for d in others]))
        return found

    return rule


def _within(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    """Mixes what lies along some dimensions, such as softmax, and keeps the shape."""
    x = _loose(flow, args[0])
    given = _given(node, args, kwargs)
    if x.varies & _dims(given, len(x.shape)) or (x.is_tracked and not x.varies):
        return unknown(flow, node, args, kwargs)
    return plain(x.shape, x.slots)


def _embedding(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    weight, indices = args[0], args[1]
    if weight.axes is None or None in weight.axes:
        return unknown(flow, node, args, kwargs)
    flow.pin(indices, Value(weight.shape, weight.slots, weight.constant, weight.axes[:1]))
    return _per_channel(node.meta["val"].shape, -1, flow.along_parameter(weight.axes[1]), _vector(weight, 1))


# Layers that mix channels


def _mix(
    flow: Flow, x: Value, weight: Value, bias: Value | None, at: int, shape: Sequence[int], *, dims: Any, keeps: bool
) -> Value:
    """A matrix, or one for each place of a kernel.

    Args:
        at: the dimension of the channels, in what it reads and in what it yields.
        dims: the dimensions of outputs and inputs in the weight.
        keeps: whether a constant adds a constant to the outputs.
    """
    x = _loose(flow, x)
    matrix = weight.constant.expand(weight.shape).movedim(dims, (0, 1))
    matrix = matrix.reshape(*matrix.shape[:2], -1)
    c = _vector(x, at)
    constants = _mixed(matrix[None], c[None], bias, keeps)
    if weight.axes is None or weight.axes[dims[0]] is None or weight.axes[dims[1]] is None:
        flow.pin(x, weight, *(() if bias is None else (bias,)))
        return plain(shape, constant=placed(constants, at, len(shape)))
    outputs, inputs = (flow.along_parameter(weight.axes[d]) for d in dims)
    flow.pin(Value(weight.shape, weight.slots, weight.constant, tuple(_without(weight.axes, dims))))
    flow.tie(flow.along(x, at), inputs)
    _tie_parameter(flow, outputs, bias)
    own = _own_bias(flow, weight, bias)
    folds = (c == 0) | ((~c.isnan()) & (keeps and own is not None))
    flow.readers.append(Reader(inputs, outputs, (matrix != 0).any(2), c, folds, matrix, own))
    return _per_channel(shape, at, outputs, constants)


def _without(axes: Sequence[Any], dims: Sequence[int]) -> list[Any]:
    return [a for d, a in enumerate(axes) if d not in dims]


def _own_bias(flow: Flow, weight: Value, bias: Value | None) -> str | None:
    """The bias's name, if the layer is called once, and nothing else uses its parameters."""
    names = {axis[0] for x in (weight, bias) if x is not None for axis in x.axes or () if axis is not None}
    is_own = bias is not None and bias.axes and len(names) == 2 and all(flow.num_uses[name] == 1 for name in names)
    return bias.axes[0][0] if is_own and bias is not None and bias.axes and bias.axes[0] else None


def _mixed(matrix: Tensor, c: Tensor, bias: Value | None, keeps: bool) -> Tensor:
    """Constant outputs: those that read nothing but constants. ``matrix`` is (groups, outputs, inputs, places)."""
    lost = c.isnan() if keeps else c != 0  # NaN is not 0
    known = ~((matrix != 0).any(3) & lost[:, None]).any(2)
    found = torch.where(known, 0.0, math.nan).double()
    for group, rows in enumerate(known) if keeps else ():
        if bool(rows.any()) and bool((columns := ~lost[group] & (c[group] != 0)).any()):
            found[group, rows] = matrix[group][rows][:, columns].double().sum(2) @ c[group, columns].double()
    return (found.flatten() + (0 if bias is None else bias.constant)).to(matrix.dtype)


def _linear(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    given, shape = _given(node, args, kwargs), node.meta["val"].shape
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if len(weight.shape) != 2 or not weight.is_known:
        return unknown(flow, node, args, kwargs)
    return _mix(flow, x, weight, bias, -1, shape, dims=(0, 1), keeps=True)


def _matmul(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    given, shape = _given(node, args, kwargs), node.meta["val"].shape
    matrix = given["mat2"] if "mat2" in given else given["other"]
    x = given.get("mat1", given["self"])
    bias = given["self"] if "mat1" in given else None
    is_plain = given.get("alpha", 1) == given.get("beta", 1) == 1 and (bias is None or len(bias.shape) == 1)
    if len(matrix.shape) != 2 or not matrix.is_known or x.is_known or not is_plain:
        return unknown(flow, node, args, kwargs)
    return _mix(flow, x, matrix, bias, -1, shape, dims=(1, 0), keeps=True)


def _convolution(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    given, shape = _given(node, args, kwargs), node.meta["val"].shape
    x, weight, bias, groups = given["input"], given["weight"], given["bias"], given["groups"]
    is_turned = given.get("transposed") or "transpose" in name_of(node)
    if not weight.is_known:
        return unknown(flow, node, args, kwargs)
    at = 1 - len(weight.shape)
    keeps = not is_turned and not _has_edge(given["padding"], weight.shape[2:])
    if groups == 1:
        return _mix(flow, x, weight, bias, at, shape, dims=(1, 0) if is_turned else (0, 1), keeps=keeps)
    if weight.axes is None or weight.axes[0] is None or (is_turned and weight.shape[:2] != (groups, 1)):
        return unknown(flow, node, args, kwargs)
    return _grouped(flow, _loose(flow, x), weight, bias, at, shape, groups, keeps=keeps)


def _has_edge(padding: Any, kernel: Sequence[int]) -> bool:
    """Whether zeros are put around what a convolution reads."""
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in kernel)
    return any(_list(padding))


def _grouped(
    flow: Flow, x: Value, weight: Value, bias: Value | None, at: int, shape: Sequence[int], groups: int, *, keeps: bool
) -> Value:
    """A group goes as a whole, with what it reads and what it yields; in depthwise layers it is one channel."""
    assert weight.axes is not None and weight.axes[0] is not None
    outputs = flow.along_parameter(weight.axes[0])
    flow.pin(Value(weight.shape, weight.slots, weight.constant, weight.axes[1:]))
    inputs = flow.along(x, at).reshape(groups, -1)
    flow.tie(inputs[:, :1], inputs)
    flow.tie(inputs[:, :1], outputs.view(groups, -1))
    _tie_parameter(flow, outputs, bias)
    matrix = weight.constant.expand(weight.shape)
    matrix = matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1], -1)
    return _per_channel(shape, at, outputs, _mixed(matrix, _vector(x, at).reshape(groups, -1), bias, keeps))


# Elements in other places


_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "expand", "broadcast_to", "repeat", "tile")
_LIKE = ("view_as", "reshape_as", "expand_as")
_SPLITS = ("chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes")
_CUTS = ("slice", "narrow", "select")
_INDEXED = ("index", "index_select")
MOVES = (
    *(*_RESHAPES, *_LIKE, *_SPLITS, *_CUTS, *_INDEXED, "tensor_split", "unbind"),
    *("squeeze", "unsqueeze", "permute", "transpose", "t", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("mT", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "flip", "roll", "repeat_interleave"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
)
"""Operators that put elements elsewhere, and compute nothing: they do the same to slots and to constants."""


def _move(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    values = _values(args, kwargs)
    if len(values) == 1 and values[0].axes is not None and (turned := _reordered(node, args, kwargs, values[0])):
        return turned
    moving = {id(x) for x in _values(args[0])}
    others = [x for x in values if id(x) not in moving]
    if name_of(node) not in _LIKE:
        if not all(x.is_known for x in others):
            return unknown(flow, node, args, kwargs)
        flow.pin(*others)
    args = (tree_map_only(Value, lambda x: _loose(flow, x), args[0]), *args[1:])
    slots = moved(node, args, kwargs, lambda x: x.slots)
    constants = slots
    if not all(bool(x.constant.isnan().all()) for x in _values(args[0])):
        constants = moved(node, args, kwargs, lambda x: number(x.constant).double())
    blank = constants is slots
    found = [plain(s.shape, s, None if blank else c) for s, c in zip(slots, constants, strict=True)]
    if name_of(node) in ("chunk", "unsafe_chunk"):  # halves of a gated unit stay as long as each other
        for other in found[1:]:
            if other.shape == found[0].shape:
                flow.tie(found[0].slots, other.slots)
    return found[0] if isinstance(node.meta["val"], Tensor) else found


def moved(node: Node, args: Any, kwargs: Any, pick: Callable[[Value], Tensor]) -> list[Tensor]:
    """The operator, done to something else that its first argument's elements have."""
    first = tree_map_only(Value, lambda x: pick(x).expand(x.shape), args[0])
    places = iter([n.meta["val"].dtype for n in tree_leaves((node.args[1:], node.kwargs)) if isinstance(n, Node)])
    rest, named = tree_map_only(Value, lambda x: x.constant.expand(x.shape).to(next(places)), (args[1:], kwargs))
    return [x for x in tree_leaves(_functional(node.target)(first, *rest, **named)) if isinstance(x, Tensor)]


def _reordered(node: Node, args: Any, kwargs: Any, x: Value) -> Value | None:
    """A parameter with its dimensions in another order, if that is all that the operator does; seen by the strides."""
    assert x.axes is not None and isinstance(node.target, torch._ops.OpOverload)
    whole = torch.empty(x.shape, device="meta")
    rest, named = args[1:], dict(kwargs)
    found = node.target(whole, *rest, **named)
    if not isinstance(found, Tensor) or found.storage_offset() or 0 in x.shape:
        return None
    places = {stride: d for d, (stride, size) in enumerate(zip(whole.stride(), x.shape, strict=True)) if size > 1}
    axes: list[Any] = []
    for stride, size in zip(found.stride(), found.shape, strict=True):
        d = places.pop(stride, None) if size > 1 and stride else None
        if size > 1 and stride and (d is None or x.shape[d] != size):
            return None
        axes.append(None if d is None else x.axes[d])
    if places:
        return None
    constant = node.target(x.constant.expand(x.shape), *rest, **named)
    return Value(tuple(found.shape), torch.full((1,) * found.ndim, NO_SLOT), constant, tuple(axes))


def _pad(flow: Flow, node: Node, args: Any, kwargs: Any) -> Any:
    """What is put beside channels is a channel that stays; what is put around each of them is part of it."""
    given = _given(node, args, kwargs)
    x, mode = _loose(flow, given["self"]), given.get("mode", "constant")
    shape, value = node.meta["val"].shape, float(given.get("value") or 0)
    amounts = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))
    padded = {-d - 1: amount for d, amount in enumerate(amounts) if any(amount)}
    if mode != "constant":
        if x.varies & set(padded) or any(x.constant.shape[d] > 1 for d in padded):
            return unknown(flow, node, args, kwargs)
        return plain(shape, x.slots, x.constant)
    slots, constant = x.slots, number(x.constant)
    for d, amount in padded.items():
        around = [0, 0] * (-d - 1) + list(amount)
        slots = F.pad(slots, around, value=NO_SLOT) if slots.shape[d] > 1 else slots
        if constant.shape[d] > 1:
            constant = F.pad(constant, around, value=value)
        elif max(amount) > 0:
            constant = torch.where(constant == value, constant, math.nan)
    return plain(shape, slots, constant)


# The table


_AVG = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
_ADAPTIVE = ("adaptive_avg_pool", "adaptive_max_pool", "max_pool")
_UPSAMPLES = {"linear1d": 1, "bilinear2d": 2, "trilinear3d": 3} | {f"nearest{k}d": k for k in (1, 2, 3)}

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("matmul", "mm", "addmm"), _matmul),
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("batch_norm", "instance_norm"), _norm_by_channel),
    "embedding": _embedding,
    "prelu": _prelu,
    "glu": _glu,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("mean", "amax", "amin", "max", "min"), _reduced("any")),
    **dict.fromkeys(("sum", "norm", "linalg_vector_norm"), _reduced("zero")),
    **dict.fromkeys(("var", "std", "logsumexp"), _reduced("none")),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"), _within),
    **{f"{kind}{k}d{tail}": _pool(k) for kind in _ADAPTIVE for k in (1, 2, 3) for tail in ("", "_with_indices")},
    **{name: _pool(k, _is_unpadded) for k, name in enumerate(_AVG, 1)},
    **{f"upsample_{kind}": _pool(k) for kind, k in _UPSAMPLES.items()},
    **{f"_upsample_nearest_exact{k}d": _pool(k) for k in (1, 2, 3)},
    **dict.fromkeys(("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as"), _same),
    **dict.fromkeys(("lift_fresh", "lift_fresh_copy", "positive"), _same),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _same),
    **dict.fromkeys(MOVES, _move),
}


def sizes_follow(node: Node, smaller: Node, operand: Value) -> bool:
    """Whether other numbers in an operator's arguments can only be what the new shapes say, which were compared."""
    name = name_of(node)
    if name in ("convolution", "conv1d", "conv2d", "conv3d") or "conv_transpose" in name:
        return _literals(node)[:-1] == _literals(smaller)[:-1]  # the last is the number of groups
    if name in _CUTS:
        dim = next(iter(node.args[1:]), 0)
        assert isinstance(dim, int)
        slots = operand.slots.movedim(dim, 0).reshape(operand.slots.shape[dim], -1)[:, 0]
        return len(set(slots.tolist())) == operand.shape[dim]  # each place has its own, and those were compared
    return name in (*_RESHAPES, *_SPLITS)


def _literals(node: Node) -> list[Any]:
    return [x for x in tree_leaves((node.args, node.kwargs)) if not isinstance(x, Node)]


def arguments_agree(node: Node, smaller: Node, operand: Value | None) -> bool:
    """Whether two operators have the same numbers in their arguments, but for sizes that follow."""
    same = [(type(a), a) for a in _literals(node)] == [(type(b), b) for b in _literals(smaller)]
    return same or (operand is not None and sizes_follow(node, smaller, operand))
