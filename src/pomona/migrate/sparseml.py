"""SparseML's pruning recipes, read as methods and scopes."""

from __future__ import annotations

import ast
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from torch import nn

from pomona.granularity import Granularity
from pomona.method import Method
from pomona.methods.magnitude import Magnitude
from pomona.schedule import Cubic, Linear, Schedule, check_count
from pomona.scope import Scope

_GRADUAL = {
    "GMPruningModifier": "uniform",
    "MagnitudePruningModifier": "uniform",
    "GlobalMagnitudePruningModifier": "global",
}
# Modifiers that are read -> the keys that each must have, and those that it may have.
_OF_GRADUAL = (
    ("init_sparsity", "final_sparsity", "start_epoch", "end_epoch", "update_frequency", "params"),
    ("leave_enabled", "inter_func", "log_types", "mask_type"),
)
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{kind: _OF_GRADUAL for kind in _GRADUAL},
    "ConstantPruningModifier": (("params",), ("start_epoch", "end_epoch", "update_frequency", "log_types")),
    "EpochRangeModifier": (("start_epoch", "end_epoch"), ()),
}
# Modifiers that are not read -> what does their work; what stands in backquotes is code, and a test runs it.
_INSTEAD = {
    "SetLearningRateModifier": "set lr in the optimizer",
    "LearningRateFunctionModifier": "use `torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)`",
    "LearningRateModifier": "use `torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[30, 60])`",
    "SetWeightDecayModifier": "set weight_decay in the optimizer",
    "TrainableParamsModifier": "call `parameter.requires_grad_(False)` on each frozen parameter",
    "SetParamModifier": "set the parameter yourself",
    "DistillationModifier": "add the teacher's loss to your own",
    "QuantizationModifier": "export with `pomona.export(model, path, quantize='uniform:8')`, or use torchao",
    "LegacyQuantizationModifier": "export with `pomona.export(model, path, quantize='uniform:8')`, or use torchao",
    "RigLPruningModifier": "use `pomona.RigL(sparsity=0.9)`",
    "StructuredPruningModifier": "prune channels with `pomona.Magnitude(sparsity=0.5, granularity='channel')`, "
    "and take them out of the model with `pomona.shrink(model, example)`",
    "LayerPruningModifier": "remove the layers from the model yourself",
}


@dataclass(frozen=True, slots=True)
class SparseMLRecipe:
    """What a SparseML recipe says about pruning.

    Attributes:
        parts: for each pruning modifier a method and the scope that it prunes, in the order of the recipe; modifiers
            that differ only in their ``params`` become one. The method None means that existing zeros are held
            (``ConstantPruningModifier``), as :func:`pomona.hold` does.
        epochs: the last epoch that the recipe names, at which its training ends; 0 if it names none.
    """

    parts: tuple[tuple[Method | None, Scope], ...]
    epochs: float


def from_sparseml(
    recipe: str | os.PathLike[str],
    model: nn.Module,
    *,
    steps_per_epoch: int,
    ignore: Iterable[str] = (),
) -> SparseMLRecipe:
    """Read an epoch-based SparseML recipe: YAML, or a Markdown card that begins with it.

    ``GMPruningModifier``, ``MagnitudePruningModifier`` (each layer by itself) and ``GlobalMagnitudePruningModifier``
    (one ranking of all its layers) become :class:`Magnitude`, ``ConstantPruningModifier`` becomes the method None, and
    ``EpochRangeModifier`` the number of epochs. Variables are replaced, and ``eval(...)`` of numbers and + - * / is
    computed. Anything else (a modifier, a key, a value, a pattern that matches no parameter) is an error that says
    what to use instead.

    Differences from SparseML: a pruned weight never returns, and the optimizer's state for it is cleared. Cuts are
    counted backwards from ``end_epoch``, so that the last one comes exactly there. No cut is made before the first
    step: if a recipe begins at epoch 0, its first cut is merged with the next. Global ranking leaves each layer at
    least 1/10,000 of its weights. ``log_types`` is ignored.

    Args:
        recipe: a path, or the text itself: any string with a line break.
        model: the model to prune; the names and regular expressions of ``params`` are looked up in it.
        steps_per_epoch: optimizer steps per epoch, >= 1: ``len(loader)`` divided by the number of accumulated batches.
        ignore: names of modifiers to leave out, such as ``"LearningRateFunctionModifier"``, because your training loop
            does their work. A name that the recipe does not have is an error.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: the recipe has something that is not read; the message names it.

    Example:
        >>> text = '''
        ... num_epochs: 10.0
        ... modifiers:
        ...   - !EpochRangeModifier
        ...     start_epoch: 0.0
        ...     end_epoch: eval(num_epochs)
        ...   - !GMPruningModifier
        ...     init_sparsity: 0.05
        ...     final_sparsity: 0.8
        ...     start_epoch: 1.0
        ...     end_epoch: eval(num_epochs * 0.8)
        ...     update_frequency: 0.5
        ...     params: ["re:.*weight"]
        ... '''
        >>> model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> recipe = from_sparseml(text, model, steps_per_epoch=100)
        >>> ((method, scope),) = recipe.parts
        >>> method.sparsity
        Cubic(start=0.05, end=0.8, steps=700, begin=100)
        >>> pruner = pomona.Pruner(model, optimizer, method, scope=scope)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_count("steps_per_epoch", steps_per_epoch)
    modifiers = _leave_out(_modifiers(_load(recipe)), (ignore,) if isinstance(ignore, str) else tuple(ignore))
    ends = [_number(f"{kind}.end_epoch", keys["end_epoch"]) for kind, keys in modifiers if "end_epoch" in keys]
    epochs = max([0.0, *ends])

    parts: list[tuple[Method | None, list[str]]] = []
    taken: dict[str, str] = {}
    for kind, keys in modifiers:
        for method, names in _read(kind, keys, model, steps_per_epoch, epochs):
            for name in names:
                if name in taken:
                    raise ValueError(
                        f"{name} is in the params of two modifiers, {taken[name]} and {kind}, but only one can prune a "
                        f"weight; put them into two recipes and read one after the other"
                    )
                taken[name] = kind
            alike = next((old for one, old in parts if one == method and _may_merge(method)), None)
            if alike is None:
                parts.append((method, list(names)))
            else:
                alike += names
    if not parts:
        raise ValueError(
            f"the recipe prunes nothing: it has none of {', '.join([*_GRADUAL, 'ConstantPruningModifier'])}"
        )
    return SparseMLRecipe(tuple((method, _scope(names)) for method, names in parts), epochs)


def _may_merge(method: Method | None) -> bool:
    """Two modifiers with the same settings become one, unless their layers share a budget."""
    return not (isinstance(method, Magnitude) and method.allocation == "global")


def _scope(names: Sequence[str]) -> Scope:
    """These parameters, whatever they are, and no others."""
    escaped = [escape(name) for name in names]
    return Scope(include=escaped, also=escaped)


# One modifier


def _read(
    kind: str, keys: Mapping[str, Any], model: nn.Module, steps_per_epoch: int, epochs: float
) -> list[tuple[Method | None, list[str]]]:
    """For each level of sparsity the method and the names of its parameters."""
    _check_keys(kind, keys)
    if kind == "EpochRangeModifier":
        return []
    if kind == "ConstantPruningModifier":
        start, end = (_number(f"{kind}.{key}", keys.get(key, -1.0)) for key in ("start_epoch", "end_epoch"))
        if start > 0 or 0 <= end < epochs:
            raise ValueError(
                f"{kind} from epoch {start:g} to {end:g} of {epochs:g}: zeros are held for the whole training; leave "
                f"out start_epoch and end_epoch, or read the recipe at the epoch where holding begins"
            )
        return [(None, _names(kind, keys["params"], model))]

    final = keys["final_sparsity"]
    if isinstance(final, Mapping):
        if _GRADUAL[kind] == "global" or keys["params"]:
            goes_with = "params: [] only" if keys["params"] else "GMPruningModifier only: one ranking has one sparsity"
            raise ValueError(
                f"{kind}.final_sparsity is a mapping of sparsities to params, which works with {goes_with}"
            )
        levels = [(level, _names(kind, params, model)) for level, params in final.items()]
    else:
        levels = [(final, _names(kind, keys["params"], model))]
    return [(_gradual(kind, keys, level, names, model, steps_per_epoch), names) for level, names in levels]


def _gradual(
    kind: str, keys: Mapping[str, Any], final: Any, names: Sequence[str], model: nn.Module, steps_per_epoch: int
) -> Magnitude:
    if keys.get("leave_enabled", True) is not True:
        raise ValueError(
            f"{kind}.leave_enabled must be True, got {keys['leave_enabled']!r}: a pruned weight stays zero until "
            f"`pruner.detach()` releases all of them"
        )
    shapes: dict[Any, type[Linear | Cubic]] = {"linear": Linear, "cubic": Cubic}
    shape = shapes.get(keys.get("inter_func", "cubic"))
    if shape is None:
        raise ValueError(f"{kind}.inter_func must be linear or cubic, got {keys['inter_func']!r}")

    start, end, period = (
        _number(f"{kind}.{key}", keys[key]) for key in ("start_epoch", "end_epoch", "update_frequency")
    )
    first, last = (round(max(0.0, epoch) * steps_per_epoch) for epoch in (start, end))
    if last <= first:
        raise ValueError(
            f"{kind} must end after it starts, got start_epoch {start:g} and end_epoch {end:g}, which are the steps "
            f"{first} and {last} at steps_per_epoch={steps_per_epoch}"
        )
    every = max(1, round(period * steps_per_epoch))
    initial = _initial(kind, keys["init_sparsity"], names, model)
    target = _number(f"{kind}.final_sparsity", final)
    sparsity: float | Schedule = target
    begin = max(1, first)
    if initial != target:
        sparsity = shape(initial, target, steps=last - first, begin=first)
        begin = first + (last - first) % every or min(every, last)
    try:
        return Magnitude(
            sparsity,
            every=every,
            begin=begin,
            allocation=_GRADUAL[kind],  # type: ignore[arg-type]
            granularity=_granularity(f"{kind}.mask_type", keys.get("mask_type", "unstructured")),
        )
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None


_GRANULARITIES: dict[str, Granularity] = {"unstructured": "weight", "block4": "1x4", "tensorrt": "2:4"}


def _granularity(name: str, mask_type: Any) -> Granularity:
    """In both libraries groups lie along the input channels."""
    if isinstance(mask_type, str) and (mask_type in _GRANULARITIES or re.fullmatch(r"\d+:\d+", mask_type)):
        return _GRANULARITIES.get(mask_type, mask_type)
    if isinstance(mask_type, list) and len(mask_type) == 2 and all(type(size) is int for size in mask_type):
        return (mask_type[0], mask_type[1])
    why = ': YAML reads 2:4 without quotes as a number of minutes, write "2:4"' if type(mask_type) is int else ""
    raise ValueError(
        f"{name} must be one of {', '.join(_GRANULARITIES)}, n:m such as '2:4', or a block such as [1, 4], got "
        f"{mask_type!r}{why}"
    )


def _initial(kind: str, value: Any, names: Sequence[str], model: nn.Module) -> float:
    if value != "__FROM_PARAM__":
        return _number(f"{kind}.init_sparsity", value)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sparse = next((name for name in names if not bool(parameters[name].all())), None)
    if sparse is None:
        return 0.0
    raise ValueError(
        f"{kind}.init_sparsity is __FROM_PARAM__, and {sparse} has zeros already; give a number, the sparsity at which "
        f"the schedule begins (cuts take existing zeros first)"
    )


def _check_keys(kind: str, keys: Mapping[str, Any]) -> None:
    needed, allowed = _KEYS[kind]
    unknown = sorted(keys.keys() - {*needed, *allowed})
    if unknown:
        raise ValueError(
            f"{kind} has {', '.join(unknown)}, which is not read; the keys are {', '.join(needed + allowed)}"
        )
    missing = sorted(set(needed) - keys.keys())
    if missing:
        raise ValueError(f"{kind} lacks {', '.join(missing)}")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def _names(kind: str, params: Any, model: nn.Module) -> list[str]:
    """The parameters that ``params`` matches, in the model's order; each of its entries must match at least one."""
    entries = [params] if isinstance(params, str) else params
    if not (isinstance(entries, list) and entries and all(isinstance(entry, str) for entry in entries)):
        raise ValueError(f"{kind}.params must be a list of names such as 're:.*weight', got {params!r}")
    first_of: dict[nn.Parameter, str] = {}
    known = {  # each name, tied ones too -> the first name of that parameter
        name: first_of.setdefault(parameter, name) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    found: set[str] = set()
    for entry in entries:
        names = _prunable(model) & known.keys() if entry == "__ALL_PRUNABLE__" else known.keys()
        matched = {known[name] for name in names if entry == "__ALL_PRUNABLE__" or _matches(entry, name)}
        if not matched:
            some = ", ".join([*known][:5])
            raise ValueError(
                f"{kind}.params has {entry!r}, which matches no parameter of {type(model).__name__}; it has "
                f"{some}{', ...' if len(known) > 5 else ''}"
            )
        found |= matched
    return [name for name in first_of.values() if name in found]


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{entry!r} in params is not a regular expression: {error}") from None
    return entry in ("__ALL__", name)


def _prunable(model: nn.Module) -> set[str]:
    """What SparseML considers prunable: the weights of linear layers and convolutions, including GPT-2's Conv1D."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    modules = model.named_modules(remove_duplicate=False)
    return {
        f"{path}.weight".removeprefix(".")
        for path, module in modules
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }


# The file


def _load(recipe: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ImportError("reading SparseML recipes needs PyYAML: pip install pyyaml") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads ``!Name {...}`` as ``{Name: {...}}``."""

    def construct(loader: Any, name: str, node: Any) -> dict[str, Any]:
        mapping = isinstance(node, yaml.MappingNode)
        return {name: loader.construct_mapping(node, deep=True) if mapping else loader.construct_scalar(node) or {}}

    Loader.add_multi_constructor("!", construct)
    text = recipe if isinstance(recipe, str) and "\n" in recipe else Path(recipe).read_text(encoding="utf-8")
    card = re.match(r"\s*---\n(.*?)\n---\s*(\n|$)", text, flags=re.DOTALL)
    try:
        loaded = yaml.load(card[1] if card else text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe is not YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"the recipe must be a mapping with a list such as 'modifiers', got {type(loaded).__name__}")
    return loaded


def _modifiers(recipe: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each modifier, with variables replaced by their values."""
    stages = [
        key for key, value in recipe.items() if isinstance(value, dict) and any("modifiers" in str(k) for k in value)
    ]
    if stages:
        raise ValueError(
            f"the recipe has the stages {', '.join(stages)}, which are trained one after the other; read the content "
            f"of each as a recipe of its own"
        )
    lists = {key: value for key, value in recipe.items() if "modifiers" in str(key)}
    variables = {key: value for key, value in recipe.items() if key not in lists}
    modifiers = []
    for key, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"{key} must be a list of modifiers such as '- !GMPruningModifier', got {value!r}")
        for one in value:
            kind, keys = next(iter(one.items())) if isinstance(one, dict) and len(one) == 1 else ("", None)
            if not isinstance(keys, dict):
                raise ValueError(f"{key} has {one!r}, which is not a modifier such as '!GMPruningModifier'")
            modifiers.append((kind, {k: _evaluated(v, variables) for k, v in keys.items()}))
    if not modifiers:
        raise ValueError(f"the recipe has no list of modifiers; its keys are {', '.join(map(str, recipe))}")
    return modifiers


def _leave_out(modifiers: list[tuple[str, dict[str, Any]]], ignore: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    kinds = {kind for kind, _ in modifiers}
    for kind in ignore:
        if kind not in kinds:
            raise ValueError(f"ignore has {kind!r}, but the recipe has {', '.join(sorted(kinds))}")
    unknown = sorted(kinds - _KEYS.keys() - set(ignore))
    if unknown:
        hints = "; ".join(f"{kind}: {_INSTEAD.get(kind, 'not known here')}" for kind in unknown)
        raise ValueError(
            f"the recipe has modifiers that are not read ({hints}). If your training does their work, leave them "
            f"out with `ignore={unknown}`. The modifiers that are read: {', '.join(_KEYS)}"
        )
    return [(kind, keys) for kind, keys in modifiers if kind not in ignore]


_OPERATORS: dict[type[ast.operator | ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def _evaluated(value: Any, variables: Mapping[str, Any], depth: int = 0) -> Any:
    """``value``, or the result of its ``eval(...)``."""
    if not (isinstance(value, str) and value.startswith("eval(") and value.endswith(")")):
        return value
    try:
        if depth > len(variables):
            raise ValueError("its variables refer to each other in a circle")
        return _work_out(ast.parse(value[5:-1].strip(), mode="eval").body, variables, depth)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{value} cannot be computed: {error}") from None


def _work_out(node: ast.expr, variables: Mapping[str, Any], depth: int) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in variables:
            raise ValueError(f"the recipe has no variable {node.id}")
        return _evaluated(variables[node.id], variables, depth + 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sides = (_work_out(side, variables, depth) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](*sides)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_work_out(node.operand, variables, depth))
    raise ValueError(f"{ast.unparse(node)} is more than numbers, variables and + - * /")
