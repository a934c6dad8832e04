"""From a torch model to a graph and its tensors, by ``torch.export``.

Why ``torch.export`` and not ``torch.fx.symbolic_trace``: it runs the model on tensors without data, so every shape is
known, functional forms, methods, parametrizations and control flow on shapes come out as the same few ATen operations,
and each remembers the module it is in. The operations are read as exported, without decompositions: there ``linear``,
``conv2d`` and ``batch_norm`` are still one operation each. What is computed of parameters alone is computed here.

The batch is no part of a graph. The model is exported with a batch size that hardly occurs elsewhere; whatever mixes
samples is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from pomona.runtime.fold import fold, pad_weight, prune_graph
from pomona.runtime.graph import ELEMENTWISE, Graph, Node, Pair, Shape, num_channels, shape_after

_BATCH = 13
_TORCH = str(Path(torch.__file__).parent)


class UnsupportedError(ValueError):
    """The model computes something that the runtime's graph cannot say."""


def trace(
    model: nn.Module, example: Tensor | Sequence[Tensor], *, folded: bool = True
) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
    """What ``model`` computes, as a graph, and the tensors that it needs.

    Weights keep the names of the state dict. What had to be made (batch norm as scale and shift, a transposed matrix,
    the selection of channels) has a name with an ``@`` in it. Dropout and copies vanish.

    Args:
        model: in eval mode, of any floating dtype; it is left as it is.
        example: its input with the batch in front, or a sequence of them; only shape and dtype are looked at.
        folded: fold scales into the layers before them, and padding into those behind (``pomona.runtime.fold``).
            Without it all weights keep their values, as a file wants them.

    Returns:
        The graph, and float32 copies of its tensors by name.

    Raises:
        UnsupportedError: names the operation and where it is.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> graph, tensors = trace(model, torch.zeros(1, 1, 28, 28))
        >>> [node.op for node in graph.nodes], list(tensors)
        (['conv', 'relu'], ['0.weight@1@scale', '1@shift'])
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    for i, x in enumerate(examples):
        if not isinstance(x, Tensor) or not x.is_floating_point() or not 2 <= x.ndim <= 4:
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
            raise ValueError(
                f"example {i} must be a floating-point tensor of 2 to 4 dimensions, batch first; got {what}"
            )
    with torch.no_grad():
        inputs = tuple(x.new_zeros((_BATCH, *x.shape[1:])) for x in examples)
        try:
            program = torch.export.export(model, inputs, strict=False)
        except Exception as error:  # torch documents no closed list
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            shapes = ", ".join(str(tuple(x.shape)) for x in examples)
            raise UnsupportedError(
                f"torch.export could not trace the model for an example of shape {shapes} ({reason}); {_WAY_OUT}"
            ) from error
        graph, tensors = _Tracer(program).run()
    return fold(graph, tensors) if folded else (graph, tensors)  # type: ignore[return-value]  # dense stays dense


_WAY_OUT = "pomona.compile(model, example) takes any model, and replaces only the layers that gain"


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of the graph as torch sees it: (batch, *shape) or, of positions, (batch * positions, features)."""

    number: int
    shape: Shape  # torch's
    is_loose: bool = False  # (C, 1, 1) as torch expanded it, which only `mul` takes, or (F,) as (batch, F, 1)


@dataclass(frozen=True, slots=True)
class _Constant:
    name: str
    tensor: Tensor
    transposed: _Constant | None = None  # what it is the transpose of


@dataclass(frozen=True, slots=True)
class _Pick:
    """A value that is made of channels of another, or zeros (-1), at every so many-th row and column."""

    source: int
    channels: tuple[int, ...]
    stride: Pair


class _Tracer:
    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.inputs: list[Shape] = []
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = []
        self.tensors: dict[str, NDArray[np.float32]] = {}
        self.picks: dict[int, _Pick] = {}
        self.known: dict[torch.fx.Node, Any] = {}
        self.at: torch.fx.Node  # the one in work

    def run(self) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        _check_in_place(self.program.graph)
        outputs: list[int] = []
        for node in self.program.graph.nodes:
            self.at = node
            if node.op == "placeholder":
                self.known[node] = self._placeholder(specs[node.target])
            elif node.op == "output":
                outputs = [self._output(x) for x in tree_leaves(self._read(node.args[0]))]
            elif node.op == "call_function":
                self._call(node)
            else:
                raise self.refuse(f"a {node.op}")
        graph, tensors = prune_graph(tuple(self.inputs), self.nodes, outputs, self.tensors)
        graph.shapes(tensors)
        return graph, tensors  # type: ignore[return-value]  # all dense

    def _placeholder(self, spec: Any) -> _Value | _Constant:
        if spec.kind is not InputKind.USER_INPUT:
            state = self.program.state_dict
            return _Constant(spec.target, (state if spec.target in state else self.program.constants)[spec.target])
        shape = tuple(self.at.meta["val"].shape)
        self.inputs.append(shape[1:])
        self.shapes.append(shape[1:])
        return _Value(len(self.inputs) - 1, shape)

    def _output(self, x: Any) -> int:
        if not isinstance(x, _Value) or x.shape != (_BATCH, *self.shapes[x.number]):
            raise self.refuse("an output that is no value of (batch, ...)")
        return x.number

    def _read(self, args: Any) -> Any:
        return torch.fx.map_arg(args, lambda node: self.known[node])

    def _call(self, node: torch.fx.Node) -> None:
        args, kwargs = self._read(node.args), self._read(node.kwargs)
        if node.target is operator.getitem:
            self.known[node] = args[0][args[1]]
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self.refuse(str(node.target))
        schema = node.target._schema
        name = schema.name.removeprefix("aten::")
        if name in _NOT_VALUES:
            return
        values = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (_Value, _Constant))]
        if not any(isinstance(x, _Value) for x in values):
            self.known[node] = self._constant(node, args, kwargs)
            return
        handler = _HANDLERS.get(name.removesuffix("_"))
        if handler is None:
            raise self.refuse(str(node.target))
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
        for argument in schema.arguments:
            if argument.has_default_value():
                given.setdefault(argument.name, argument.default_value)
        try:
            found = handler(self, given)
        except UnsupportedError:
            raise
        except ValueError as error:
            raise self.refuse(f"{node.target}: {error}") from None
        self.known[node] = found if isinstance(found, (_Value, tuple)) else self._as_torch_sees(found)
        if _is_in_place(name):
            assert isinstance(node.args[0], torch.fx.Node)
            self.known[node.args[0]] = self.known[node]

    def _as_torch_sees(self, number: int) -> _Value:
        shape, wanted = self.shapes[number], self.out
        fits = wanted == (_BATCH, *shape) or (len(shape) == 2 and wanted == (_BATCH * shape[0], shape[1]))
        if not fits:
            raise self.refuse(f"{self.at.target} with a result of shape {wanted}")
        return _Value(number, wanted)

    def _constant(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        """What depends on parameters alone, computed."""
        assert isinstance(node.target, torch._ops.OpOverload)
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise self.refuse(f"{node.target}, random numbers,")
        is_in_place = _is_in_place(_name(node))  # then on a copy: the model's own tensors are left as they are
        read = tree_map_only(_Constant, lambda c: c.tensor.clone() if is_in_place else c.tensor, (args, kwargs))
        found = node.target(*read[0], **read[1])
        turned = None
        if _name(node) in ("t", "transpose", "permute", "numpy_T") and found.ndim == 2 and args[0].tensor.ndim == 2:
            turned = (
                args[0] if found.shape == args[0].tensor.shape[::-1] and torch.equal(found.T, args[0].tensor) else None
            )
        made = tree_map_only(Tensor, lambda tensor: _Constant(self.made(node.name), tensor, turned), found)
        if is_in_place:
            self.known[node.args[0]] = made  # type: ignore[index]  # a node
        return made

    # What handlers use.

    @property
    def out(self) -> Shape:
        """The shape that torch says the operation in work yields."""
        return tuple(self.at.meta["val"].shape)

    def made(self, what: str) -> str:
        """A name for a tensor made here."""
        name = f"{self.path()}@{what}"
        while name in self.tensors:
            name += "'"
        return name

    def path(self) -> str:
        """The module that the operation in work is in."""
        stack = list((self.at.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] if stack else ""

    def refuse(self, what: str) -> UnsupportedError:
        path = self.path()
        where = f" in {path}" if path else ""
        lines = [line.strip() for line in (self.at.meta.get("stack_trace") or "").splitlines()]
        files = [i for i, line in enumerate(lines) if line.startswith("File") and _TORCH not in line]
        source = ": " + " ".join(lines[files[-1] : files[-1] + 2]) if files else ""
        return UnsupportedError(f"pomona's runtime cannot run {what}{where}{source}; {_WAY_OUT}")

    def emit(self, op: str, *operands: int, **attributes: Any) -> int:
        node = Node(op, operands, **attributes)
        self.shapes.append(shape_after(node, [self.shapes[v] for v in operands], self.tensors))
        self.nodes.append(node)
        return len(self.shapes) - 1

    def value(self, x: Any) -> int:
        """The number of what must be a value."""
        if not isinstance(x, _Value):
            raise self.refuse(f"{self.at.target} of a parameter or number")
        if x.is_loose:
            raise self.refuse(f"{self.at.target} of a value expanded to {x.shape}")
        return x.number

    def weight(self, x: Any) -> str:
        """The name of what must be a parameter, now among the tensors."""
        if not isinstance(x, _Constant):
            raise self.refuse(f"{self.at.target} with a weight that is computed from the input")
        if x.name not in self.tensors:
            self.tensors[x.name] = _numpy(x.tensor)
        return x.name

    def vector(self, what: str, array: NDArray[Any]) -> str:
        """The name of a tensor made here."""
        name = self.made(what)
        self.tensors[name] = np.ascontiguousarray(array, np.float32)
        return name


def _check_in_place(graph: torch.fx.Graph) -> None:
    """Refuse in-place operations on what is also read through another view of it: values of a graph never change."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    views: dict[torch.fx.Node, list[torch.fx.Node]] = {}  # of one memory, all the same list
    for node in graph.nodes:
        name = _name(node)
        first = node.args[0] if node.args else None
        if not isinstance(first, torch.fx.Node) or not (_is_in_place(name) or name in _VIEWS):
            continue
        family = views.setdefault(first, [first])
        if _is_in_place(name) and any(place[user] > place[node] for v in family if v is not first for user in v.users):
            raise UnsupportedError(f"{node.target} changes a tensor of which a view is read later; {_WAY_OUT}")
        family.append(node)
        views[node] = family


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


def _name(node: torch.fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().to("cpu", torch.float32).contiguous().numpy())


def _pair(x: int | Sequence[int]) -> Pair:
    if isinstance(x, int):
        return x, x
    return x[0], x[-1]


Given = dict[str, Any]


def _conv2d(t: _Tracer, a: Given) -> int:
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
            x, padding = _pad_image(t, x, left, right, top, bottom), (0, 0)
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


def _linear(t: _Tracer, a: Given) -> int:
    bias = None if a["bias"] is None else t.weight(a["bias"])
    return t.emit("linear", t.value(a["input"]), weight=t.weight(a["weight"]), bias=bias)


def _matmul(t: _Tracer, a: Given) -> int:
    matrix = a.get("other", a.get("mat2"))
    return t.emit("linear", t.value(a["self"]), weight=_turned(t, matrix))


def _addmm(t: _Tracer, a: Given) -> int:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise t.refuse(f"addmm with beta {a['beta']} and alpha {a['alpha']}")
    number, weight = t.value(a["mat1"]), _turned(t, a["mat2"])
    bias = t.weight(a["self"])
    if t.tensors[bias].shape != (t.tensors[weight].shape[0],):
        bias = t.vector("bias", np.broadcast_to(t.tensors[bias], (1, t.tensors[weight].shape[0]))[0])
    return t.emit("linear", number, weight=weight, bias=bias)


def _turned(t: _Tracer, matrix: Any) -> str:
    """The transpose of a parameter; if that is itself one's transpose, the parameter."""
    if isinstance(matrix, _Constant) and matrix.transposed is not None:
        return t.weight(matrix.transposed)
    return t.vector(f"{t.weight(matrix).rpartition('.')[2]}.T", t.tensors[t.weight(matrix)].T)


def _batch_norm(t: _Tracer, a: Given) -> int:
    number = t.value(a["input"])
    if a["training"] or a["running_mean"] is None:
        raise t.refuse("batch norm by the statistics of the batch itself (is the model in eval mode? model.eval())")
    if len(a["input"].shape) == 3:
        raise t.refuse("batch norm over positions")
    mean, var = (a[name].tensor.double() for name in ("running_mean", "running_var"))
    scale = (var + a["eps"]).rsqrt()
    if a["weight"] is not None:
        scale = scale * a["weight"].tensor.double()
    shift = -mean * scale
    if a["bias"] is not None:
        shift = shift + a["bias"].tensor.double()
    weight, bias = t.vector("scale", _numpy(scale)), t.vector("shift", _numpy(shift))
    return t.emit("scale", number, weight=weight, bias=bias)


def _dropout(t: _Tracer, a: Given) -> int:
    if a["train"]:
        raise t.refuse("dropout in training mode (call model.eval() first)")
    return t.value(a["input"])


def _same(t: _Tracer, a: Given) -> int:
    if not t.at.meta["val"].is_floating_point():
        raise t.refuse(f"{t.at.target} to {t.at.meta['val'].dtype}")
    return t.value(a["self"])


def _reshape(t: _Tracer, a: Given) -> int | _Value:
    x = a["self"]
    number = x.number if x.is_loose and len(x.shape) == 3 else t.value(x)
    old, new = t.shapes[number], t.out
    if len(old) == 1 and new == (_BATCH, *old, 1):
        return _Value(number, new, is_loose=True)
    if new == (_BATCH, *old) or (len(old) == 2 and new == (_BATCH * old[0], old[1])):
        return number
    if new == (_BATCH, math.prod(old)):
        return t.emit("flatten", number)
    if len(old) == 1 and new == (_BATCH, *old, 1, 1):
        return _unflattened(t, number)
    raise t.refuse(f"{t.at.target} from {x.shape} to {new}")


def _unflattened(t: _Tracer, number: int) -> int:
    """The value (F,) as (F, 1, 1): layers since it was an image, made again as 1 x 1 convolutions."""
    node = t.nodes[number - len(t.inputs)] if number >= len(t.inputs) else None
    if node is not None and node.op == "flatten" and t.shapes[node.operands[0]][1:] == (1, 1):
        return node.operands[0]
    if node is None or node.op not in (*ELEMENTWISE, "linear", "scale"):
        raise t.refuse(f"{t.at.target} of features to an image of one pixel")
    image = _unflattened(t, node.operands[0])
    node = replace(node, op="conv" if node.op == "linear" else node.op, operands=(image,))
    t.shapes.append(shape_after(node, [t.shapes[image]], t.tensors))
    t.nodes.append(node)
    return len(t.shapes) - 1


def _expand(t: _Tracer, a: Given) -> int | _Value:
    x = a["self"]
    if t.out == x.shape:
        return t.value(x)
    if len(t.out) == 4 and x.shape == (*t.out[:2], 1, 1):
        return _Value(t.value(x), t.out, is_loose=True)
    raise t.refuse(f"{t.at.target} from {x.shape} to {t.out}")


def _clip(low: str, high: str) -> Callable[[_Tracer, Given], int]:
    def handler(t: _Tracer, a: Given) -> int:
        least, most = a.get(low), a.get(high)
        if not all(x is None or isinstance(x, (int, float)) for x in (least, most)):
            raise t.refuse(f"{t.at.target} with bounds that are tensors")
        if least == 0 and most is None:
            return t.emit("relu", t.value(a["self"]))
        given = {"low": least, "high": most}
        return t.emit("clip", t.value(a["self"]), **{k: float(x) for k, x in given.items() if x is not None})

    return handler


def _gelu(t: _Tracer, a: Given) -> int:
    return t.emit("gelu" if a["approximate"] == "none" else "gelu_tanh", t.value(a["self"]))


def _elementwise(op: str) -> Callable[[_Tracer, Given], int]:
    return lambda t, a: t.emit(op, t.value(a["self"]))


def _add(t: _Tracer, a: Given, sign: int = 1) -> int:
    x, y, factor = a["self"], a["other"], sign * a.get("alpha", 1)
    if isinstance(x, _Value) and isinstance(y, _Value):
        if x.shape != y.shape:
            raise t.refuse(f"{t.at.target} of shapes {x.shape} and {y.shape}")
        other = t.value(y) if factor == 1 else _scaled(t, y, factor, 0)
        return t.emit("add", t.value(x), other)
    if isinstance(x, _Value):
        return _scaled(t, x, 1, factor * _plain(y))
    return _scaled(t, y, factor, _plain(x))


def _sub(t: _Tracer, a: Given) -> int:
    return _add(t, a, sign=-1)


def _rsub(t: _Tracer, a: Given) -> int:
    return _sub(t, {**a, "self": a["other"], "other": a["self"]})


def _neg(t: _Tracer, a: Given) -> int:
    return _scaled(t, a["self"], -1, 0)


def _mul(t: _Tracer, a: Given) -> int:
    x, y = a["self"], a["other"]
    if not isinstance(x, _Value):
        x, y = y, x
    if not isinstance(y, _Value):
        return _scaled(t, x, _plain(y), 0)
    if x.is_loose or t.shapes[x.number] != (*t.out[1:],):
        x, y = y, x
    if len(x.shape) != len(y.shape) or x.shape[0] != y.shape[0]:
        raise t.refuse(f"{t.at.target} of shapes {x.shape} and {y.shape}")
    return t.emit("mul", t.value(x), y.number)


def _div(t: _Tracer, a: Given) -> int:
    if not isinstance(a["self"], _Value) or isinstance(a["other"], _Value) or a.get("rounding_mode"):
        raise t.refuse(f"{t.at.target} by what is computed from the input, or rounded")
    return _scaled(t, a["self"], 1 / _plain(a["other"]), 0)


def _plain(x: Any) -> NDArray[np.float64]:
    return np.asarray(_numpy(x.tensor) if isinstance(x, _Constant) else x, np.float64)


def _scaled(t: _Tracer, x: _Value, factor: Any, shift: Any) -> int:
    """factor x + shift, where these are numbers, or one of each channel or feature."""
    number = t.value(x)
    shape = t.shapes[number]
    size, by_channel = num_channels(shape), len(shape) == 3
    vectors = []
    along = 1 if by_channel else len(x.shape) - 1
    for array in map(np.asarray, (factor, shift)):
        aligned = (1,) * (len(x.shape) - array.ndim) + array.shape
        if len(aligned) != len(x.shape) or any(n != 1 for i, n in enumerate(aligned) if i != along):
            raise t.refuse(f"{t.at.target} with a parameter of shape {array.shape}, neither a number nor by channel,")
        vectors.append(np.broadcast_to(array.reshape(-1), (size,)))
    weight = t.vector("factor", vectors[0])
    return t.emit("scale", number, weight=weight, bias=t.vector("shift", vectors[1]) if vectors[1].any() else None)


def _max_pool(t: _Tracer, a: Given) -> int:
    if _pair(a["dilation"]) != (1, 1):
        raise t.refuse("max pooling with dilation")
    return t.emit("max_pool", t.value(a["self"]), **_window(a))


def _max_pool_with_indices(t: _Tracer, a: Given) -> tuple[_Value, None]:
    number = _max_pool(t, a)
    return _Value(number, (_BATCH, *t.shapes[number])), None


def _avg_pool(t: _Tracer, a: Given) -> int:
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


def _adaptive(op: str) -> Callable[[_Tracer, Given], int]:
    def handler(t: _Tracer, a: Given) -> int:
        number, out = t.value(a["self"]), t.out[-2:]
        size = t.shapes[number][1:]
        if op == "avg_pool" and out == (1, 1):
            return t.emit("mean", number)
        if any(n % m for n, m in zip(size, out, strict=True)):
            raise t.refuse(f"{t.at.target} from {size} to {out}, windows of unequal size,")
        kernel = size[0] // out[0], size[1] // out[1]
        return t.emit(op, number, kernel=kernel, stride=kernel)

    return handler


def _adaptive_max_pool(t: _Tracer, a: Given) -> tuple[_Value, None]:
    shape = tuple(t.at.meta["val"][0].shape)
    size = t.shapes[t.value(a["self"])][1:]
    if any(n % m for n, m in zip(size, shape[-2:], strict=True)):
        raise t.refuse(f"{t.at.target} from {size} to {shape[-2:]}, windows of unequal size,")
    kernel = size[0] // shape[-2], size[1] // shape[-1]
    return _Value(t.emit("max_pool", t.value(a["self"]), kernel=kernel, stride=kernel), shape), None


def _mean(t: _Tracer, a: Given) -> int:
    x = a["self"]
    dims = sorted(d % len(x.shape) for d in a["dim"] or range(len(x.shape)))
    if len(x.shape) != 4 or dims != [2, 3]:
        raise t.refuse(f"a mean over dimensions {a['dim']} of {x.shape}")
    number = t.emit("mean", t.value(x))
    return number if a["keepdim"] else t.emit("flatten", number)


def _cat(t: _Tracer, a: Given) -> int:
    values = [t.value(x) for x in a["tensors"]]
    if a["dim"] % len(t.out) != 1:
        raise t.refuse(f"{t.at.target} along dimension {a['dim']}")
    return t.emit("concat", *values)


def _pad(t: _Tracer, a: Given) -> int:
    amounts = [*a["pad"], *[0] * 8][:8]
    left, right, top, bottom, front, back, first, last = amounts
    if a.get("mode", "constant") != "constant" or a["value"] not in (None, 0) or min(amounts) < 0 or first or last:
        raise t.refuse(f"{t.at.target} by {a['pad']} ({a.get('mode', 'constant')}, value {a['value']})")
    number = t.value(a["self"])
    if len(t.shapes[number]) != 3:
        raise t.refuse(f"{t.at.target} of {a['self'].shape}")
    if front or back:
        channels = (*[-1] * front, *range(t.shapes[number][0]), *[-1] * back)
        number = _picked(t, number, channels, (1, 1))
    return _pad_image(t, number, left, right, top, bottom) if any(amounts[:4]) else number


def _pad_image(t: _Tracer, number: int, left: int, right: int, top: int, bottom: int) -> int:
    channels = t.shapes[number][0]
    weight, padding = pad_weight(channels, left, right, top, bottom)
    return t.emit("conv", number, weight=t.vector("pad", weight), padding=padding, groups=channels)


def _picked(t: _Tracer, number: int, channels: tuple[int, ...], stride: Pair) -> int:
    """Channels of a value, -1 for zeros, at every so many-th row and column: a 1 x 1 convolution with ones."""
    before = t.picks.get(number, _Pick(number, tuple(range(t.shapes[number][0])), (1, 1)))
    channels = tuple(-1 if c < 0 else before.channels[c] for c in channels)
    stride = before.stride[0] * stride[0], before.stride[1] * stride[1]
    shape = t.shapes[before.source]
    weight = np.zeros((len(channels), num_channels(shape)), np.float32)
    for row, c in enumerate(channels):
        weight[row, c] = c >= 0
    if len(shape) == 3:
        name = t.vector("pick", weight[:, :, None, None])
        made = t.emit("conv", before.source, weight=name, stride=stride)
    else:
        made = t.emit("linear", before.source, weight=t.vector("pick", weight))
    t.picks[made] = _Pick(before.source, channels, stride)
    return made


def _slice(t: _Tracer, a: Given) -> int:
    x = a["self"]
    number, dim = t.value(x), a["dim"] % len(x.shape)
    size = x.shape[dim]
    picked = range(size)[a["start"] : a["end"] : a["step"]]
    if picked == range(size):
        return number
    if dim == 1 and len(x.shape) in (2, 4) and x.shape[0] == _BATCH:
        return _picked(t, number, tuple(picked), (1, 1))
    if dim < 2 or len(x.shape) != 4:
        raise t.refuse(f"{t.at.target} along dimension {dim} of {x.shape}")
    start, step, num = picked.start, picked.step, len(picked)
    kernel = max(start + 1, size - num * step + 1)  # the least with which no more windows fit
    stride = (step, 1) if dim == 2 else (1, step)
    channels = x.shape[1]
    if kernel == 1:
        return _picked(t, number, tuple(range(channels)), stride)
    weight = np.zeros((channels, 1, kernel if dim == 2 else 1, kernel if dim == 3 else 1), np.float32)
    weight.reshape(channels, kernel)[:, start] = 1
    return t.emit("conv", number, weight=t.vector("pick", weight), stride=stride, groups=channels)


def _split(t: _Tracer, a: Given) -> tuple[_Value, ...]:
    x, shapes = a["self"], [tuple(v.shape) for v in t.at.meta["val"]]
    if a["dim"] % len(x.shape) != 1 or len(x.shape) not in (2, 4) or x.shape[0] != _BATCH:
        raise t.refuse(f"{t.at.target} along dimension {a['dim']} of {x.shape}")
    starts = np.cumsum([0, *(s[1] for s in shapes)]).tolist()
    number = t.value(x)
    return tuple(
        _Value(_picked(t, number, tuple(range(start, start + s[1])), (1, 1)), s)
        for start, s in zip(starts, shapes, strict=False)
    )


_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_RESHAPES = ("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze")
_COPIES = ("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh", "lift_fresh_copy")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
_VIEWS = {*_SPLITS, *_RESHAPES, *_COPIES, *_DROPOUTS, "slice", "expand", "expand_as", "getitem"} - {"clone", "_to_copy"}
_NOT_VALUES = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")

_HANDLERS: dict[str, Callable[[_Tracer, Given], Any]] = {
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
