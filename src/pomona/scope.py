"""WHAT is pruned: the parameters of a model that count and may become zero."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pomona.computed import Computed, find_computed, keeps_zeros, patterns_of, refusal
from pomona.layout import Layout, Role, role_of
from pomona.pages.text import few
from pomona.torch_compile import plain_name

FROZEN = "frozen (requires_grad is False)"
"""The reason in ``ScopedParameters.outside`` of what only waits to be trained."""
_TIED = "tied to an embedding"
_MATTERS = 0.05  # share of the weights above which what was left out for an unknown layer is warned of


@dataclass(frozen=True, slots=True)
class ScopedParameters:
    """What a scope selects from a model, and why it leaves out the rest.

    Attributes:
        inside: name -> parameter, in the order of ``model.named_parameters()``; a tied parameter appears once,
            under its first name.
        outside: name -> reason, for every other parameter (and for the other names of tied ones).
        layouts: name -> which dimension is what, for those inside; None if that is unknown.
        directions: name -> dimension of the lengths, for the directions of weight norms; None: one length for all.
    """

    inside: dict[str, nn.Parameter]
    outside: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, Layout | None] = field(default_factory=dict)
    directions: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scope:
    """Which parameters are pruned. The default is every trainable weight that a layer multiplies its input with.

    Which layers multiply, and with what, is in :mod:`pomona.layout`: linear, bilinear, convolutional and recurrent
    layers, attention, mixtures of experts, and layers of other libraries that state their sizes alike. Everything else
    stays dense, and no printed number counts it, whatever its shape: biases, norms, scales, embeddings, positions,
    tables and parameters of modules that Pomona does not know. ``also`` takes them in.

    A parameter that is tied to an embedding is an embedding. It is pruned if ``types`` names the embedding's class, or
    by ``also``.

    Args:
        types: only parameters of modules of these classes, e.g. ``(nn.Conv2d, nn.Linear)``; empty: all. If it names
            a class that Pomona does not know, that one's parameters of two or more dimensions are pruned.
        include: a parameter must match at least one of these patterns; empty: all.
        exclude: a parameter must match none of these patterns.
        exclude_types: no parameters of modules of these classes.
        also: parameters that match one of these patterns are pruned too, whatever they are; ``"*"``: all of them.

    A pattern is a shell wildcard (``*``, ``?``, ``[ab]``, case matters) over the full parameter name, such as
    ``"encoder.*.weight"``, or over the name of the module that owns it, such as ``"head"`` or ``"layer1.*"``.
    A pattern or a type that matches nothing is an error, never ignored.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(Scope(exclude=["3"]).select(model).inside)
        ['1.weight']
        >>> list(Scope(also=["0"]).select(model).inside)
        ['0.weight', '1.weight', '3.weight']
    """

    types: Iterable[type[nn.Module]] = ()
    include: Iterable[str] | str = ()
    exclude: Iterable[str] | str = ()
    exclude_types: Iterable[type[nn.Module]] = ()
    also: Iterable[str] | str = ()

    def __post_init__(self) -> None:
        for name in ("types", "include", "exclude", "exclude_types", "also"):
            value = getattr(self, name)
            if isinstance(value, (str, type)) or not isinstance(value, Iterable):
                value = (value,)
            object.__setattr__(self, name, tuple(value))
        for name in ("types", "exclude_types"):
            for kind in getattr(self, name):
                if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                    raise TypeError(f"Scope({name}=...) takes subclasses of nn.Module, got {kind!r}")
        for pattern in (*self.include, *self.exclude, *self.also):
            if not isinstance(pattern, str):
                raise TypeError(f"Scope patterns are strings such as 'head.*', got {pattern!r}")

    def select(self, model: nn.Module, *, with_frozen: bool = False, refuse: bool = True) -> ScopedParameters:
        """Find the parameters of ``model`` that are pruned, each tensor once.

        Warns if a large part of the weights is left out because Pomona does not know their modules.

        Args:
            model: any module.
            with_frozen: whether parameters that do not train are inside as well.
            refuse: whether a parameter that cannot be pruned is an error; otherwise it is outside.

        Raises:
            ValueError: a pattern or type matches nothing, there is nothing to prune, or parameters in scope cannot
                be pruned (lazy, complex or integer, or a layer computes its weight from them); names all of these.
        """
        owned = _owned_by(model)
        self._check_patterns(owned)
        self._check_types(model)
        inside: dict[str, nn.Parameter] = {}
        layouts: dict[str, Layout | None] = {}
        outside: dict[str, str] = {}
        unknown: dict[nn.Parameter, Owned] = {}
        refused: list[tuple[str, str, str]] = []
        probed: dict[object, bool] = {}
        for parameter, owners in owned.items():
            first, *further = (owner.name for owner in owners)
            reason, layout = self._judge(parameter, owners, with_frozen)
            if not reason:
                trouble = _why_not_prunable(parameter, owners, probed)
                if trouble is None:
                    inside[first], layouts[first] = parameter, layout
                    outside.update(dict.fromkeys(further, f"tied to {first}"))
                    continue
                refused.append((first, *trouble))
                reason = f"cannot be pruned: {trouble[0]}"
            elif not any(owner.role.is_known for owner in owners) and reason == owners[0].role.why:
                unknown[parameter] = owners[0]
            for owner in owners:
                outside[owner.name] = owner.role.why if reason.startswith(_TIED) and owner.role.is_table else reason
        if refused and refuse:
            raise ValueError(refusal(refused, [*inside, *outside.keys() - {name for name, _, _ in refused}]))
        self._check_include(owned)
        if not inside and (refuse or not refused):
            raise ValueError(
                f"nothing to prune: none of the {len(outside)} parameters of {type(model).__name__} is in {self}. "
                + _why_outside(outside)
            )
        if refuse:
            _warn_of_unknown(unknown, inside, outside)
        directions = {
            owner.name: owner.computed.dim
            for parameter, owners in owned.items()
            for owner in owners[:1]
            if owner.computed is not None and owner.name in inside
        }
        return ScopedParameters(inside, outside, layouts, directions)

    def _judge(self, parameter: nn.Parameter, owners: Sequence[Owned], with_frozen: bool) -> tuple[str, Layout | None]:
        """Why a parameter with these owners is not pruned, "" if it is; and its layout."""
        for pattern in self.exclude:
            if any(owner.matches(pattern) for owner in owners):
                return f"excluded by {pattern!r}", None
        for owner in owners if self.exclude_types else ():
            if isinstance(owner.module, tuple(self.exclude_types)):
                return f"of {type(owner.module).__name__}, which is in exclude_types", None
        is_asked = any(owner.matches(pattern) for owner in owners for pattern in self.also)
        reason, layout = ("", _layout_of(owners)) if is_asked else self._judge_role(parameter, owners)
        if reason:
            return reason, None
        if is_lazy(parameter):
            raise ValueError(f"{owners[0].name} has no shape yet; run one forward pass before pruning")
        if parameter.numel() == 0:
            return "empty", None
        if not parameter.requires_grad and not (with_frozen and parameter.is_floating_point()):
            return FROZEN, None
        return "", layout

    def _judge_role(self, parameter: nn.Parameter, owners: Sequence[Owned]) -> tuple[str, Layout | None]:
        of_types = [owner for owner in owners if isinstance(owner.module, tuple(self.types))]
        if self.types and not of_types:
            return f"belongs to {type(owners[0].module).__name__}, which is not in types", None
        if self.include and not any(owner.matches(pattern) for owner in owners for pattern in self.include):
            return "not in include", None
        table = next((owner for owner in owners if owner.role.is_table), None)
        if table is not None and table not in of_types:
            name = type(table.module).__name__
            if len(owners) > 1:
                return f"{_TIED} ({table.name}), which types=[{name}, ...] or also takes in", None
            return table.role.why, None
        if table is not None or any(owner.role.multiplies for owner in owners):
            return "", _layout_of(owners)
        if any(not owner.role.is_known for owner in of_types) and parameter.ndim >= 2:
            return "", None
        return owners[0].role.why, None

    def _check_patterns(self, owned: Mapping[nn.Parameter, Sequence[Owned]]) -> None:
        owners = [owner for some in owned.values() for owner in some]
        for which in ("include", "exclude", "also"):
            for pattern in getattr(self, which):
                if any(owner.matches(pattern) for owner in owners):
                    continue
                names = [name for owner in owners for name in owner.names]
                known = sorted({*names, *(name.rpartition(".")[0] for name in names)} - {""})
                if not known:
                    raise ValueError(f"Scope({which}=[{pattern!r}]) matches nothing: the model has no parameters")
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:5]
                raise ValueError(
                    f"Scope({which}=[{pattern!r}]) matches no parameter of the model. Closest names: {', '.join(close)}"
                )

    def _check_include(self, owned: Mapping[nn.Parameter, Sequence[Owned]]) -> None:
        """A pattern that finds only what no layer multiplies with would be ignored otherwise."""
        for pattern in self.include:
            found = [some for some in owned.values() if any(owner.matches(pattern) for owner in some)]
            reasons = {some[0].name: self._judge_role(p, some)[0] for p, some in owned.items() if some in found}
            is_asked = all(any(o.matches(one) for o in some for one in self.also) for some in found)
            if all(reasons.values()) and not self.types and not is_asked:
                shown = "; ".join(f"{name} is {reason}" for name, reason in list(reasons.items())[:3])
                raise ValueError(
                    f"Scope(include=[{pattern!r}]) finds nothing that a layer multiplies with: {shown}. To prune it "
                    f"all the same, pass Scope(also=[{pattern!r}])"
                )

    def _check_types(self, model: nn.Module) -> None:
        for which in ("types", "exclude_types"):
            for kind in getattr(self, which):
                if not any(isinstance(module, kind) for module in model.modules()):
                    have = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(False))})
                    raise ValueError(
                        f"Scope({which}=[{kind.__name__}]) matches no module of the model; its modules with parameters "
                        f"are: {', '.join(have)}"
                    )


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Full name -> layout, of every parameter of which it is known, tied ones under each of their names."""
    owned = _owned_by(model).values()
    known = [(owner.name, layout) for owners in owned if (layout := _layout_of(owners)) for owner in owners]
    return dict(known)


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern fits the parameter of this full name, or the module that owns it."""
    owner = name.rpartition(".")[0]
    return fnmatchcase(name, pattern) or fnmatchcase(owner, pattern)


@dataclass(frozen=True, slots=True)
class Owned:
    """A parameter under one of its names.

    Attributes:
        name: full.
        module: that multiplies with it, or with what is computed from it.
        role: what the module does with it.
        computed: how the module computes a tensor from it, if it does.
    """

    name: str
    module: nn.Module
    role: Role
    computed: Computed | None = None

    @property
    def names(self) -> list[str]:
        """Under which patterns find it: its own name, and that of what is computed from it."""
        return [self.name] if self.computed is None else [self.name, self.computed.name]

    def matches(self, pattern: str) -> bool:
        return any(matches(name, pattern) for name in self.names)


def _owned_by(model: nn.Module) -> dict[nn.Parameter, list[Owned]]:
    """Every parameter with its names; a tied one has several."""
    computed = find_computed(model)
    owned: dict[nn.Parameter, list[Owned]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{leaf}" if path else leaf
            how = computed.get(name)
            owner, tensor = (module, leaf) if how is None else (how.layer, how.leaf)
            if is_lazy(parameter):
                role = _LAZY.get(leaf, _NO_WEIGHT)
            elif how is not None and how.part == "length":
                role = Role(False, why="the lengths of a weight norm")
            else:
                role = role_of(owner, tensor, parameter)
            owned.setdefault(parameter, []).append(Owned(plain_name(name), owner, role, how))
    return owned


_NO_WEIGHT = Role(False, why="no weight")
_LAZY = {"weight": Role(True)}


def _layout_of(owners: Sequence[Owned]) -> Layout | None:
    """That of the first owner that multiplies; a table that is tied to a head lies as the head's weight does."""
    known = [owner for owner in owners if owner.role.layout is not None]
    return next((o.role.layout for o in known if o.role.multiplies), known[0].role.layout if known else None)


def _why_not_prunable(
    parameter: nn.Parameter, owners: Sequence[Owned], probed: dict[object, bool]
) -> tuple[str, str] | None:
    """What is wrong, and the remedy or ""; None if nothing is."""
    if not parameter.is_floating_point():
        return f"it is {parameter.dtype}; only real floating-point weights can be pruned", ""
    if parameter.layout is not torch.strided:
        return f"its memory layout is {parameter.layout}; only dense (strided) weights can be pruned", ""
    for owner in owners:
        how = owner.computed
        if how is not None:
            if how.part != "direction":
                return f"by {how.how}", how.remedy
            continue
        kind = type(owner.module)
        if kind.__module__.startswith("torch.nn.modules."):
            continue
        flags = frozenset(
            (k, v) for k, v in vars(owner.module).items() if isinstance(v, (bool, str)) and k != "training"
        )
        if (kind, flags) not in probed:
            probed[kind, flags] = keeps_zeros(owner.module)
        if not probed[kind, flags]:
            return f"by its {kind.__name__}, whose forward does not multiply with it as it is", ""
    return None


def _warn_of_unknown(
    unknown: Mapping[nn.Parameter, Owned], inside: Mapping[str, nn.Parameter], outside: Mapping[str, str]
) -> None:
    total = sum(parameter.numel() for parameter in unknown)
    if total <= _MATTERS * (total + sum(p.numel() for p in inside.values())):
        return
    owners = [unknown[p] for p in sorted(unknown, key=lambda p: -p.numel())]
    shown = few([f"{owner.name} of {type(owner.module).__name__}" for owner in owners])
    names = [owner.name for owner in owners]
    patterns = patterns_of(names, [*inside, *outside.keys() - names])
    kinds = ", ".join(dict.fromkeys(type(owner.module).__name__ for owner in owners))
    warnings.warn(
        f"{total:,} weights stay dense, because Pomona does not know the modules that they belong to: {shown}. "
        f"To prune them, pass Scope(also={patterns}) or register the layer with pomona.layout.register; to leave them "
        f"dense knowingly, pass Scope(exclude_types=[{kinds}])",
        stacklevel=4,
    )


def _why_outside(outside: dict[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(outside.items())[:5]]
    return "; ".join(shown) if shown else "The model has no parameters."
