"""Walks a program of ``torch.export`` by the rules, and compares the program of a smaller model with it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from pomona.example import Example, returning_tensors
from pomona.exporters.flow.rules import MOVES, arguments_agree, blank, moved, name_of, rule_of
from pomona.exporters.flow.state import NO_SLOT, Flow, Value, compact, number, plain, restricted


class UnreadableError(ValueError):
    """``torch.export`` cannot read the model."""


def export(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The operators that a model runs for inputs like these."""
    try:
        with torch.no_grad(), warnings.catch_warnings(), returning_tensors(model):
            warnings.simplefilter(
                "ignore"
            )  # about what matters to the exported program only, such as its inputs' names
            return torch.export.export(model, example.args, example.kwargs, strict=False)
    except Exception as error:  # torch documents no closed list
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UnreadableError(
            f"shrink follows channels through the operators of the model, but torch.export could not read it for this "
            f"example ({reason}); give shrink() the part of the model that it can read, such as its backbone"
        ) from error


def read(model: nn.Module, example: Example, slots: Mapping[str, list[Tensor]] | None = None) -> Flow:
    """Walk the program of a model in evaluation mode.

    Args:
        model: not changed, and not run.
        example: of which only shapes and types matter.
        slots: those that the parameters have already; others are numbered on.
    """
    return _Walk(model, example, Flow(dict(slots or {}))).flow


class _Walk:
    def __init__(self, model: nn.Module, example: Example, flow: Flow) -> None:
        self.flow = flow
        self.program = export(model, example)
        self.names = _names(model)
        self.specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        self.known: dict[Node, Any] = {}
        spoilt = _spoilt(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = self._placeholder(node, node in spoilt)
            elif node.op == "call_function":
                self._call(node, node in spoilt)
            else:
                self.known[node] = None
                self._pin(self._args(node.args))
            if not node.users and not _written(node):  # an output that is left out today may be wanted in training
                self._pin(self.known[node])
        for name, dims in flow.slots.items():
            flow.pins += [slots for d, slots in enumerate(dims) if (name, d) not in flow.bound]

    def _args(self, args: Any) -> Any:
        return torch.fx.map_arg(args, lambda node: self.known[node])

    def _pin(self, values: Any) -> None:
        self.flow.pin(*(x for x in tree_leaves(values) if isinstance(x, Value)))

    def _placeholder(self, node: Node, is_spoilt: bool) -> Any:
        given, spec, flow = node.meta.get("val"), self.specs[node.target], self.flow
        if not isinstance(given, Tensor) or spec.kind is InputKind.USER_INPUT or is_spoilt:
            return plain(given.shape) if isinstance(given, Tensor) else given
        state, name = self.program.state_dict, self.names.get(spec.target)
        tensor = (state if spec.target in state else self.program.constants)[spec.target].detach().cpu()
        tensor = number(tensor)
        if name is None:  # a tensor that is neither parameter nor buffer
            return Value(tuple(tensor.shape), plain(tensor.shape).slots, tensor)
        flow.num_uses[name] = flow.num_uses.get(name, 0) + len(node.users)
        if name not in flow.slots:
            ends = torch.tensor([flow.num_slots, *tensor.shape]).cumsum(0).tolist()
            flow.slots[name] = [torch.arange(*ends[d : d + 2]) for d in range(tensor.ndim)]
            flow.num_slots = ends[-1]
        axes = tuple((name, d) for d in range(tensor.ndim))
        return Value(tuple(tensor.shape), plain(tensor.shape).slots, tensor, axes)

    def _call(self, node: Node, is_spoilt: bool) -> None:
        args, kwargs = self._args(node.args), self._args(node.kwargs)
        if node.target is operator.getitem:
            self.known[node] = args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
            return
        rule = blank if is_spoilt else rule_of(node)
        self.flow.operands[node] = (args, kwargs)
        found = self.known[node] = rule(self.flow, node, args, kwargs)
        for changed in _written(node):
            self.known[changed] = found
        self.flow.results[node] = [x for x in tree_leaves(found) if isinstance(x, Value)]


def _names(model: nn.Module) -> dict[str, str]:
    """Each name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


# Operators that change a tensor in place


def _written(node: Node) -> list[Node]:
    """The arguments that an operator changes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | dict(node.kwargs)
    written = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
    return [x for x in written if isinstance(x, Node)]


_MAY_RETURN_THEIR_INPUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "to", "type_as")


def _may_be_a_view(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return name_of(node) in _MAY_RETURN_THEIR_INPUT or any(a.alias_info for a in node.target._schema.arguments)


def _spoilt(graph: torch.fx.Graph) -> set[Node]:
    """Tensors of which nothing is known: changed in place under a view that is read later, or from call to call."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    families: dict[Node, list[Node]] = {}  # of one memory, all the same list
    spoilt: set[Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes if _may_be_a_view(node) else ():
            family, other = families.setdefault(source, [source]), families.get(node, [node])
            if family is not other:
                family += other
                families.update(dict.fromkeys(family, family))
    for node in graph.nodes:
        for changed in _written(node):
            family = families.get(changed, [changed])
            before = [v for v in family if v is not changed and place[v] < place[node]]
            if any(place[user] > place[node] for v in before for user in v.users) or any(
                v.op == "placeholder" for v in family
            ):
                spoilt.update(family)
    return spoilt


def sizes_by_module(flow: Flow, removed: Tensor) -> dict[str, int]:
    """Name of an instance norm -> number of channels that it gets; one without parameters cannot tell by itself."""
    found = {}
    for node, values in flow.results.items():
        if name_of(node) == "instance_norm" and (stack := node.meta.get("nn_module_stack")):
            found[list(stack.values())[-1][0]] = restricted(values[0], removed).shape[1]
    return found


# A model without the slots that can go, against the one that has them


def differing(flow: Flow, removed: Tensor, smaller: Flow) -> list[Tensor] | None:
    """Slots that stand in the way, where the smaller model's program is not the old one without the removed slots.

    Operator by operator, the results must be the old ones without the slots, and the numbers in the arguments the same,
    but for sizes that follow. None if all are; an empty list if nothing can be blamed.
    """
    if [name_of(node) for node in flow.results] != [name_of(node) for node in smaller.results]:
        return []
    for old, new in zip(flow.results, smaller.results, strict=True):
        wanted, found = [restricted(value, removed) for value in flow.results[old]], smaller.results[new]
        agrees = [(a.shape, a.slots.tolist()) for a in wanted] == [(b.shape, b.slots.tolist()) for b in found]
        first = next(iter(_values(flow, old)), None)
        if not agrees or not arguments_agree(old, new, first):
            return _blamed(flow, old, removed)
    return None


def _blamed(flow: Flow, node: Node, removed: Tensor) -> list[Tensor]:
    """What reaches an operator, if some of it was to go; else what comes out of it."""
    reaching = [x.slots[x.slots != NO_SLOT] for x in _values(flow, node)]
    if any(bool(removed[slots].any()) for slots in reaching):
        return reaching
    return [x.slots[x.slots != NO_SLOT] for x in flow.results[node]]


def _values(flow: Flow, node: Node) -> list[Value]:
    """What goes into an operator."""
    return [x for x in tree_leaves(flow.operands[node]) if isinstance(x, Value)]


def rigid(flow: Flow, removed: Tensor) -> list[Tensor]:
    """Slots that pass an operator whose arguments fit the old sizes alone; they may be written in the model's code."""
    return [
        slots
        for node in flow.operands
        if name_of(node) in MOVES and _needs_old_sizes(flow, node, removed)
        for slots in _blamed(flow, node, removed)
    ]


def _needs_old_sizes(flow: Flow, node: Node, removed: Tensor) -> bool:
    args, kwargs = flow.operands[node]
    args = (tree_map_only(Value, lambda x: restricted(x, removed), args[0]), *args[1:])
    try:
        found = moved(node, args, kwargs, lambda x: x.slots)
    except (RuntimeError, IndexError, ValueError):
        return True
    wanted = [restricted(value, removed) for value in flow.results[node]]
    return [(x.shape, x.slots.tolist()) for x in wanted] != [(x.shape, compact(x).tolist()) for x in found]
