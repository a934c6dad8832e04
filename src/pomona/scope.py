"""WHAT is pruned: the parameters of a model that count and may become zero."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True, slots=True)
class ScopedParameters:
    """What a scope selects from a model, and why it leaves out the rest.

    Attributes:
        inside: name -> parameter, in the order of ``model.named_parameters()``; a tied parameter appears once,
            under its first name.
        outside: name -> reason, for every other parameter (and for the other names of tied ones).
    """

    inside: dict[str, nn.Parameter]
    outside: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scope:
    """Which parameters are pruned. The default is every trainable weight of two or more dimensions.

    Biases, normalisation scales and other vectors stay dense, and no printed number counts them.

    Args:
        types: only parameters owned by modules of these classes, e.g. ``(nn.Conv2d, nn.Linear)``; empty: all.
        include: a parameter must match at least one of these patterns; empty: all.
        exclude: a parameter must match none of these patterns.
        min_ndim: minimum number of dimensions of a pruned parameter, >= 0. The default of 2 leaves out biases and
            norms by shape, which is safer than by name (GSM's own code looks for "bias" and "bn").

    A pattern is a shell wildcard (``*``, ``?``, ``[ab]``, case matters) over the full parameter name, such as
    ``"encoder.*.weight"``, or over the name of the module that owns it, such as ``"head"`` or ``"layer1.*"``.
    A pattern or a type that matches nothing is an error, never ignored.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(Scope(exclude=["2"]).select(model).inside)
        ['0.weight']
    """

    types: Iterable[type[nn.Module]] = ()
    include: Iterable[str] | str = ()
    exclude: Iterable[str] | str = ()
    min_ndim: int = 2

    def __post_init__(self) -> None:
        for name in ("types", "include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, (str, type)) or not isinstance(value, Iterable):
                value = (value,)
            object.__setattr__(self, name, tuple(value))
        for kind in self.types:
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise TypeError(f"Scope(types=...) takes subclasses of nn.Module, got {kind!r}")
        for pattern in (*self.include, *self.exclude):
            if not isinstance(pattern, str):
                raise TypeError(f"Scope patterns are strings such as 'head.*', got {pattern!r}")
        if isinstance(self.min_ndim, bool) or not isinstance(self.min_ndim, int) or self.min_ndim < 0:
            raise ValueError(f"Scope(min_ndim=...) must be an integer >= 0, got {self.min_ndim!r}")

    def select(self, model: nn.Module) -> ScopedParameters:
        """Find the parameters of ``model`` that are pruned, each tensor once.

        Raises:
            ValueError: a pattern or type matches nothing, there is nothing to prune, or a parameter in scope
                cannot be pruned (it is lazy, complex or integer, or recomputed by a parametrization).
        """
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._check_patterns(names)
        self._check_types(model)

        owners: dict[nn.Parameter, dict[str, nn.Module]] = {}  # a tied parameter has several names
        for module_name, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module.named_parameters(module_name, recurse=False, remove_duplicate=False):
                owners.setdefault(parameter, {})[name] = module

        inside: dict[str, nn.Parameter] = {}
        outside: dict[str, str] = {}
        for parameter, modules in owners.items():
            first, *further = modules
            reason = self._reason_outside(parameter, modules)
            if reason:
                outside.update(dict.fromkeys(modules, reason))
                continue
            _check_prunable(first, parameter, modules[first])
            inside[first] = parameter
            outside.update(dict.fromkeys(further, f"tied to {first}"))
        if not inside:
            raise ValueError(
                f"nothing to prune: none of the {len(names)} parameters of {type(model).__name__} is in {self}. "
                + _why_outside(outside)
            )
        return ScopedParameters(inside, outside)

    def _reason_outside(self, parameter: nn.Parameter, modules: Mapping[str, nn.Module]) -> str:
        """Why a parameter with these names and owning modules is not pruned; "" if it is."""
        if self.types and not any(isinstance(module, tuple(self.types)) for module in modules.values()):
            return f"belongs to {type(next(iter(modules.values()))).__name__}, which is not in types"
        if self.include and not any(matches(name, pattern) for name in modules for pattern in self.include):
            return "not in include"
        for pattern in self.exclude:
            if any(matches(name, pattern) for name in modules):
                return f"excluded by {pattern!r}"
        if is_lazy(parameter):
            raise ValueError(f"{next(iter(modules))} has no shape yet; run one forward pass before pruning")
        if parameter.ndim < self.min_ndim:
            return f"{parameter.ndim} dimension{'s' if parameter.ndim != 1 else ''}, min_ndim is {self.min_ndim}"
        if parameter.numel() == 0:
            return "empty"
        if not parameter.requires_grad:
            return "frozen (requires_grad is False)"
        return ""

    def _check_patterns(self, names: list[str]) -> None:
        for which in ("include", "exclude"):
            for pattern in getattr(self, which):
                if any(matches(name, pattern) for name in names):
                    continue
                known = sorted({*names, *(name.rpartition(".")[0] for name in names)} - {""})
                if not known:
                    raise ValueError(f"Scope({which}=[{pattern!r}]) matches nothing: the model has no parameters")
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:5]
                raise ValueError(
                    f"Scope({which}=[{pattern!r}]) matches no parameter of the model. Closest names: {', '.join(close)}"
                )

    def _check_types(self, model: nn.Module) -> None:
        for kind in self.types:
            if not any(isinstance(module, kind) for module in model.modules()):
                have = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(False))})
                raise ValueError(
                    f"Scope(types=[{kind.__name__}]) matches no module of the model; its modules with parameters "
                    f"are: {', '.join(have)}"
                )


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern fits the parameter of this full name, or the module that owns it."""
    owner = name.rpartition(".")[0]
    return fnmatchcase(name, pattern) or fnmatchcase(owner, pattern)


def _check_prunable(name: str, parameter: nn.Parameter, module: nn.Module) -> None:
    if not parameter.is_floating_point():
        raise ValueError(f"{name} is {parameter.dtype}; only real floating-point weights can be pruned")
    if parameter.layout is not torch.strided:
        raise ValueError(f"{name} has layout {parameter.layout}; only dense (strided) weights can be pruned")
    leaf = name.rpartition(".")[2]
    plain = re.sub("_(orig|g|v)$", "", leaf)  # suffixes of prune and spectral_norm (orig), of weight_norm (g, v)
    if ".parametrizations." in f".{name}" or (plain != leaf and plain in vars(module)):
        raise ValueError(
            f"{name} is recomputed by a parametrization (torch.nn.utils.parametrize or torch.nn.utils.prune), so "
            f"zeros in it are not zeros of the layer. Make it permanent first (remove_parametrizations or "
            f"pomona.from_torch_prune), or exclude it: Scope(exclude=[{name!r}])"
        )


def _why_outside(outside: dict[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(outside.items())[:5]]
    return "; ".join(shown) if shown else "The model has no parameters."
