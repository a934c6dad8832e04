"""From a torch model to a graph and its tensors, by ``torch.export``.

Why ``torch.export`` and not ``torch.fx.symbolic_trace``: it runs the model on tensors without data, so every shape is
known, functional forms, methods, parametrizations and control flow on shapes come out as the same few ATen operations,
and each remembers the module it is in. The operations are read as exported, without decompositions, so that ``linear``,
``conv2d`` and ``batch_norm`` are still one operation each. What depends on parameters alone is computed here.

The batch is no part of a graph. The model is exported with a batch size that hardly occurs elsewhere, and everything
that mixes samples is refused.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from pomona.example import Example, returning_tensors
from pomona.runtime.fold import fold
from pomona.runtime.graph import Graph
from pomona.runtime.operations import MAX_DIMENSIONS, DType
from pomona.runtime.readers.aten import HANDLERS, NOT_VALUES, VIEWS, WAY_OUT, AtenBuilder, Constant, Value
from pomona.runtime.readers.builder import BATCH, UnsupportedError
from pomona.torch_compile import unwrapped

__all__ = ["UnsupportedError", "trace"]

_INTEGERS: dict[torch.dtype, DType] = {torch.int32: "int32", torch.int64: "int64"}


def trace(model: nn.Module, example: Any, *, folded: bool = True) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
    """Read a model into a graph and the tensors that it needs.

    Weights keep the names of the state dict. Tensors made here (batch norm as scale and shift, a transposed matrix, the
    selection of channels) have an ``@`` in their names. Dropout and copies vanish.

    Args:
        model: in eval mode, of any floating dtype; it is not changed.
        example: its input with the batch in front; a dictionary of keyword arguments; or a tuple or list of arguments,
            whose last element, if it is a dictionary, holds the keyword arguments. Only shapes and dtypes matter. The
            inputs of the graph are its tensors, in the order of the model's ``forward``.
        folded: fold scales into the layers before them, and padding into those after it (``pomona.runtime.fold``).
            Otherwise all weights keep their values, as in a file.

    Returns:
        The graph, and float32 copies of its tensors by name.

    Raises:
        UnsupportedError: the runtime lacks an operation; the message names it and says where it is.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> graph, tensors = trace(model, torch.zeros(1, 1, 28, 28))
        >>> [node.op for node in graph.nodes], list(tensors)
        (['conv', 'relu'], ['0.weight@1@scale', '1@shift'])
    """
    called = Example.of(example)
    _check(called)
    with unwrapped(model) as plain, torch.no_grad(), returning_tensors(plain) as left_out:
        inputs = called.in_order(plain).map(lambda x: x.new_zeros((BATCH, *x.shape[1:])))
        try:
            program = torch.export.export(plain, inputs.args, inputs.kwargs, strict=False)
        except Exception as error:  # torch documents no closed list
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            shapes = ", ".join(str(tuple(x.shape)) for x in called.tensors())
            raise UnsupportedError(
                f"torch.export could not trace the model for an example of shape {shapes} ({reason}); {WAY_OUT}"
            ) from error
        graph, tensors = _Tracer(program).run()
    for name, kind in left_out.items():
        raise UnsupportedError(f"the model returns {name} ({kind}), which is no value of a graph; {WAY_OUT}")
    return fold(graph, tensors) if folded else (graph, tensors)  # type: ignore[return-value]  # dense stays dense


def _check(called: Example) -> None:
    given = [x for x in tree_leaves((called.args, called.kwargs)) if x is not None]
    for i, x in enumerate(given):
        is_fitting = isinstance(x, Tensor) and (x.is_floating_point() or x.dtype in _INTEGERS)
        if not is_fitting or not 2 <= x.ndim <= 1 + MAX_DIMENSIONS:
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
            raise UnsupportedError(
                f"example {i} must be a tensor of floats, int32 or int64 with 2 to {1 + MAX_DIMENSIONS} dimensions, "
                f"batch first; got {what}. The runtime takes no other inputs; {WAY_OUT}"
            )


class _Tracer:
    """Walks a torch program; `known` says what each of its nodes is in the graph."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.builder = AtenBuilder()
        self.known: dict[torch.fx.Node, Any] = {}

    def run(self) -> tuple[Graph, dict[str, NDArray[np.float32]]]:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        _check_in_place(self.program.graph)
        outputs: list[int] = []
        for node in self.program.graph.nodes:
            self.builder.go_to(node)
            if node.op == "placeholder":
                self.known[node] = self._placeholder(node, specs[node.target])
            elif node.op == "output":
                outputs = [self._output(x) for x in tree_leaves(self._read(node.args[0]))]
            elif node.op == "call_function":
                self._call(node)
            else:
                raise self.builder.refuse(f"a {node.op}")
        return self.builder.finish(outputs)

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> Value | Constant | None:
        if spec.kind is not InputKind.USER_INPUT:
            state = self.program.state_dict
            return Constant(spec.target, (state if spec.target in state else self.program.constants)[spec.target])
        given = node.meta["val"]
        if given is None:
            return None
        return Value(
            self.builder.input(tuple(given.shape[1:]), _INTEGERS.get(given.dtype, "float32")), tuple(given.shape)
        )

    def _output(self, x: Any) -> int:
        if not isinstance(x, Value) or x.shape != (BATCH, *self.builder.shapes[x.number]):
            raise self.builder.refuse("an output that is no value of (batch, ...)")
        return x.number

    def _read(self, args: Any) -> Any:
        return torch.fx.map_arg(args, lambda node: self.known[node])

    def _call(self, node: torch.fx.Node) -> None:
        args, kwargs = self._read(node.args), self._read(node.kwargs)
        if node.target is operator.getitem:
            self.known[node] = args[0][args[1]]
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self.builder.refuse(str(node.target))
        schema = node.target._schema
        name = schema.name.removeprefix("aten::")
        if name in NOT_VALUES:
            return
        values = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (Value, Constant))]
        if not any(isinstance(x, Value) for x in values):
            self.known[node] = self._constant(node, args, kwargs)
            return
        handler = HANDLERS.get(name.removesuffix("_"))
        if handler is None:
            raise self.builder.refuse(str(node.target))
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
        for argument in schema.arguments:
            if argument.has_default_value():
                given.setdefault(argument.name, argument.default_value)
        try:
            found = handler(self.builder, given)
        except UnsupportedError:
            raise
        except ValueError as error:
            raise self.builder.refuse(f"{node.target}: {error}") from None
        self.known[node] = found if isinstance(found, (Value, tuple)) else self._as_torch_sees(found)
        if _is_in_place(name):
            assert isinstance(node.args[0], torch.fx.Node)
            self.known[node.args[0]] = self.known[node]

    def _as_torch_sees(self, number: int) -> Value:
        shape, wanted = self.builder.shapes[number], self.builder.out
        fits = wanted == (BATCH, *shape) or (len(shape) == 2 and wanted == (BATCH * shape[0], shape[1]))
        if not fits:
            raise self.builder.refuse(f"{self.builder.operation} with a result of shape {wanted}")
        return Value(number, wanted)

    def _constant(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        """Compute what depends on parameters alone."""
        assert isinstance(node.target, torch._ops.OpOverload)
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise self.builder.refuse(f"{node.target}, random numbers,")
        is_in_place = _is_in_place(_name(node))  # then on a copy: the model's own tensors are left as they are
        read = tree_map_only(Constant, lambda c: c.tensor.clone() if is_in_place else c.tensor, (args, kwargs))
        found = node.target(*read[0], **read[1])
        turned = None
        if _name(node) in ("t", "transpose", "permute", "numpy_T") and found.ndim == 2 and args[0].tensor.ndim == 2:
            turned = (
                args[0] if found.shape == args[0].tensor.shape[::-1] and torch.equal(found.T, args[0].tensor) else None
            )
        made = tree_map_only(Tensor, lambda tensor: Constant(self.builder.made(node.name), tensor, turned), found)
        if is_in_place:
            self.known[node.args[0]] = made  # type: ignore[index]  # a node
        return made


def _check_in_place(graph: torch.fx.Graph) -> None:
    """Refuse in-place operations on what is also read through another view of it: values of a graph never change."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    views: dict[torch.fx.Node, list[torch.fx.Node]] = {}  # of one memory, all the same list
    for node in graph.nodes:
        name = _name(node)
        first = node.args[0] if node.args else None
        if not isinstance(first, torch.fx.Node) or not (_is_in_place(name) or name in VIEWS):
            continue
        family = views.setdefault(first, [first])
        if _is_in_place(name) and any(place[user] > place[node] for v in family if v is not first for user in v.users):
            raise UnsupportedError(f"{node.target} changes a tensor of which a view is read later; {WAY_OUT}")
        family.append(node)
        views[node] = family


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


def _name(node: torch.fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return node.target._schema.name.removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""
