"""Weights that a layer computes from its parameters before each use: weight norm, spectral norm, standardisation.

A zero in such a parameter is a zero of the layer only if the computation maps zeros to zeros. Weight norm does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from pomona.distributed import is_sharded
from pomona.pages.text import few


@dataclass(frozen=True, slots=True)
class Computed:
    """A parameter from which a layer computes one of its tensors.

    Attributes:
        path: name of the layer.
        layer: which computes.
        leaf: the tensor's own name in it, such as "weight".
        how: by what, a noun phrase.
        remedy: a Python expression of ``model`` that makes the tensor a plain parameter.
        part: "direction" for the ``v`` of a weight norm, whose zeros are zeros of the tensor; "length" for its ``g``.
        dim: the dimension along which that weight norm has lengths of its own; None: one length for all.
    """

    path: str
    layer: nn.Module
    leaf: str
    how: str
    remedy: str
    part: Literal["", "direction", "length"] = ""
    dim: int | None = None

    @property
    def name(self) -> str:
        """Full name that the tensor would have as a parameter."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf


_PARTS: dict[str, Literal["", "direction", "length"]] = {
    "original0": "length",
    "original1": "direction",
    "_g": "length",
    "_v": "direction",
}


def find_computed(model: nn.Module) -> dict[str, Computed]:
    """Full parameter name -> what is computed from it, for every such parameter of the model."""
    found: dict[str, Computed] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if "parametrizations" in module._modules and parametrize.is_parametrized(module):
            found |= _by_parametrization(path, prefix, module)
        for hook in module._forward_pre_hooks.values():
            found |= _by_hook(path, prefix, module, hook)
    return found


def _by_parametrization(path: str, prefix: str, module: nn.Module) -> dict[str, Computed]:
    found = {}
    lists: Any = module.parametrizations
    for leaf, chain in lists.items():
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations({_get(path)}, {leaf!r})"
        steps = [type(step).__name__.strip("_") for step in chain]
        norm = chain[0] if len(steps) == 1 and isinstance(chain[0], _WeightNorm) else None
        for name, _ in chain.named_parameters(recurse=False):
            part = "" if norm is None else _PARTS[name]
            dim = None if norm is None or norm.dim == -1 else norm.dim
            full = f"{prefix}parametrizations.{leaf}.{name}"
            found[full] = Computed(path, module, leaf, ", ".join(steps), remedy, part, dim)
    return found


def _by_hook(path: str, prefix: str, module: nn.Module, hook: Any) -> dict[str, Computed]:
    if isinstance(hook, WeightNorm):
        remedy = f"torch.nn.utils.remove_weight_norm({_get(path)}, {hook.name!r})"
        dim = None if hook.dim == -1 else hook.dim
        return {
            f"{prefix}{hook.name}{end}": Computed(path, module, hook.name, "WeightNorm", remedy, _PARTS[end], dim)
            for end in ("_v", "_g")
        }
    if isinstance(hook, SpectralNorm):
        remedy = f"torch.nn.utils.remove_spectral_norm({_get(path)}, {hook.name!r})"
        return {f"{prefix}{hook.name}_orig": Computed(path, module, hook.name, "SpectralNorm", remedy)}
    if isinstance(hook, prune.BasePruningMethod):
        leaf = str(hook._tensor_name)
        how = "a mask of torch.nn.utils.prune"
        return {f"{prefix}{leaf}_orig": Computed(path, module, leaf, how, "pomona.from_torch_prune(model)")}
    return {}


def _get(path: str) -> str:
    return f"model.get_submodule({path!r})" if path else "model"


# Layers whose own forward computes

_OPERATIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def keeps_zeros(layer: nn.Module) -> bool:
    """Whether a linear or convolutional layer multiplies with zeros where its weight has zeros.

    A subclass may compute anything in its ``forward``, such as a standardised weight. So a copy of it runs once, on a
    small random input, with a weight half of which is zero, and what reaches the operation of torch is compared. True
    also if that cannot be found out.
    """
    kind = type(layer)
    if not isinstance(layer, (nn.Linear, _ConvNd)) or kind.__module__.startswith("torch.nn.modules."):
        return True
    if kind.forward is nn.Linear.forward:
        return True
    if is_sharded(layer.weight) or layer.weight.is_meta or layer.weight.numel() == 0:
        return True
    seen = _Seen(layer.weight.shape)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            other: Any = copy.deepcopy(layer).eval()
            zeros = torch.arange(layer.weight.numel(), device=layer.weight.device).view(layer.weight.shape) % 2 == 0
            other.weight.copy_(torch.randn(layer.weight.shape).to(layer.weight)).masked_fill_(zeros, 0.0)
            with seen:
                kind.forward(other, _input_of(other))
    except Exception:  # its forward may raise anything; then nothing is known
        return True
    return all(bool((used[zeros] == 0).all()) for used in seen.weights)


class _Seen(TorchFunctionMode):
    """Collects the weights of this shape that reach an operation."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATIONS:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if isinstance(weight, Tensor) and weight.shape == self._shape:
                self.weights.append(weight.detach())
        return func(*args, **(kwargs or {}))


def _input_of(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    if isinstance(layer, nn.Linear):
        return torch.randn(2, weight.shape[1]).to(weight)
    channels = weight.shape[0] if isinstance(layer, _ConvTransposeNd) else weight.shape[1] * layer.groups
    sizes = [d * (k - 1) + 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.randn(1, channels, *sizes).to(weight)


def check_lengths(values: Mapping[str, Tensor], directions: Mapping[str, int | None]) -> None:
    """RuntimeError, with the name, if a weight norm would divide by a length of zero, which makes NaN.

    Args:
        values: name -> a tensor that is zero where the direction is, or will be.
        directions: name -> dimension of the lengths, as ``ScopedParameters`` has it.
    """
    for name, dim in directions.items():
        value = values[name]
        rows = value.reshape(1, -1) if dim is None else value.movedim(dim, 0).flatten(1)
        num = int((rows.count_nonzero(1) == 0).sum())
        if num:
            raise RuntimeError(
                f"{num} of the {len(rows)} vectors that the weight norm of {name} divides by their lengths would be "
                f"all zero, and the layer would compute NaN. Take a lower sparsity or allocation='uniform', leave the "
                f"layer dense (Scope(exclude=[{name!r}])), or remove the weight norm before pruning"
            )


def refusal(refused: Iterable[tuple[str, str, str]], others: Iterable[str]) -> str:
    """One message for all of them.

    Args:
        refused: (parameter, how the layer computes with it, the remedy or "") each.
        others: names that a pattern for these must not match.
    """
    listed = list(refused)
    by_how: dict[str, list[str]] = {}
    for name, how, _ in listed:
        by_how.setdefault(how, []).append(name)
    shown = "; ".join(f"{few(names)} ({how})" for how, names in by_how.items())
    remedies = list(dict.fromkeys(remedy for _, _, remedy in listed if remedy))
    do = f"Make them plain parameters first: {'; '.join(remedies)}. Or leave" if remedies else "Leave"
    return (
        f"zeros in these parameters would not be zeros of their layers, which compute what they multiply with: "
        f"{shown}. {do} them dense: Scope(exclude={patterns_of([name for name, _, _ in listed], others)})"
    )


def patterns_of(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Wildcards that match these names and none of the others: one for names that differ in their numbers alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name), []).append(name)
    rest = list(others)
    patterns: list[str] = []
    for pattern, some in found.items():
        is_safe = len(some) > 1 and not any(fnmatchcase(other, pattern) for other in rest)
        patterns += [pattern] if is_safe else some
    return patterns
