"""From ``torch.nn.utils.prune`` to plain parameters with exact zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pomona.pruner.zeros import zero_


@torch.no_grad()
def from_torch_prune(pruned: nn.Module | MutableMapping[str, Any]) -> list[str]:
    """Turn a model or state dict pruned by ``torch.nn.utils.prune`` into a plain one with exact zeros, in place.

    Each pair of ``weight_orig`` and ``weight_mask`` becomes ``weight`` again (whatever the parameter is called and
    whichever method made the mask). It gets the value that the forward pass used, ``weight_orig * weight_mask``, with
    +0.0 wherever the mask is 0. From then on only :func:`hold` or a Pruner keeps the zeros.

    In a model the ``Parameter`` stays the same object with the same storage, so an optimizer keeps it together with
    its momentum. (``weight_orig`` was that object all along.) The parameters stay in the order of the pruned model, in
    which torch puts pruned parameters last in their module; so does an optimizer's saved state.

    Args:
        pruned: a model, or the state dict of one, which a plain model can load afterwards.

    Returns:
        The names of the parameters that were pruned, e.g. ``["0.weight", "0.bias"]``. Biases are outside the
        default scope: ``hold(model, optimizer, scope=Scope(include=names, also=names))`` holds their zeros too.

    Memory: one mask at a time for a model; one tensor at a time is copied for a state dict.

    Raises:
        ValueError: ``torch.nn.utils.prune`` has pruned nothing in it; or a shared tensor is masked in one place and
            not, or differently, in another, which a plain model cannot express. Nothing is changed then.

    Example:
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> _ = prune.l1_unstructured(model[0], "weight", amount=0.75)
        >>> from_torch_prune(model)
        ['0.weight']
        >>> pruner = pomona.hold(model, optimizer)
        >>> pruner.verify().layers[0].nonzero
        8
    """
    if isinstance(pruned, nn.Module):
        return _make_plain(pruned)
    if isinstance(pruned, MutableMapping):
        return _make_plain_state(pruned)
    raise TypeError(f"from_torch_prune() takes a torch.nn.Module or a state dict, got {type(pruned).__name__}")


def _make_plain(model: nn.Module) -> list[str]:
    found: dict[tuple[nn.Module, str], str] = {}
    masks: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf in _pruned_in(module):
            name = f"{path}.{leaf}".removeprefix(".")
            found.setdefault((module, leaf), name)
            masks[f"{name}_orig"] = getattr(module, f"{leaf}_mask")
    if not found:
        raise ValueError(
            f"no parameter of {type(model).__name__} is pruned by torch.nn.utils.prune. (If prune.remove() was "
            f"called, the zeros are already in the weights, and `pomona.hold(model, optimizer)` keeps them.)"
        )
    _check_shared(model.named_parameters(remove_duplicate=False), masks, key=id)

    mask_of = {getattr(module, f"{leaf}_orig"): masks[f"{name}_orig"] for (module, leaf), name in found.items()}
    for parameter, mask in mask_of.items():
        _apply_(parameter, mask)
    for module, leaf in found:
        _put_back(module, leaf)
    return list(found.values())


def _pruned_in(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that one of torch's hooks masks."""
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def _put_back(module: nn.Module, leaf: str) -> None:
    """Make ``leaf`` a parameter again, in the place of ``leaf_orig``, and remove the hook and the mask."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == leaf:
            del module._forward_pre_hooks[key]
    names = [leaf if name == f"{leaf}_orig" else name for name in module._parameters]
    parameter = module._parameters.pop(f"{leaf}_orig")
    delattr(module, leaf)
    delattr(module, f"{leaf}_mask")
    setattr(module, leaf, parameter)  # not register_parameter: LSTM and GRU also keep a list of their own
    for name in names:
        module._parameters[name] = module._parameters.pop(name)


def _make_plain_state(state: MutableMapping[str, Any]) -> list[str]:
    names = [
        key.removesuffix("_mask")
        for key, mask in state.items()
        if isinstance(mask, Tensor) and key.endswith("_mask") and isinstance(_orig(state, key), Tensor)
    ]
    names = [name for name in names if name not in state]  # a layer with all three names is the user's own
    if not names:
        inside = [key for key, value in state.items() if isinstance(value, Mapping)]
        hint = f" Is it in one of {', '.join(map(repr, inside))}?" if inside else ""
        raise ValueError(
            f"the state dict has no pair such as 'layer.weight_orig' and 'layer.weight_mask' among its {len(state)} "
            f"entries, so it does not come from a model pruned with torch.nn.utils.prune.{hint}"
        )
    masks = {f"{name}_orig": state[f"{name}_mask"] for name in names}
    for key, mask in masks.items():
        if state[key].shape != mask.shape:
            raise ValueError(
                f"the state dict is damaged: {key} has shape {tuple(state[key].shape)}, its mask {tuple(mask.shape)}"
            )
    tensors = ((key, value) for key, value in state.items() if isinstance(value, Tensor) and value.numel())
    _check_shared(tensors, masks, key=lambda t: (t.data_ptr(), t.shape, t.stride()))
    for name in names:
        mask = state.pop(f"{name}_mask")
        state[name] = _apply_(state.pop(f"{name}_orig").clone(), mask)
    return names


def _orig(state: Mapping[str, Any], mask_key: str) -> Any:
    return state.get(f"{mask_key.removesuffix('_mask')}_orig")


def _apply_(value: Tensor, mask: Tensor) -> Tensor:
    """Multiply by the mask in place; where the mask is 0 the result is +0.0, not -0.0 or NaN."""
    value.mul_(mask)
    return zero_(value, mask == 0)


def _check_shared(
    tensors: Iterable[tuple[str, Tensor]], masks: Mapping[str, Tensor], *, key: Callable[[Tensor], object]
) -> None:
    """Check that a tied tensor has the same mask under all of its names."""
    names_of: dict[object, list[str]] = {}
    for name, tensor in tensors:
        names_of.setdefault(key(tensor), []).append(name)
    for names in names_of.values():
        first = next((name for name in names if name in masks), None)
        for name in names:
            if first is None or name == first:
                continue
            if name in masks and torch.equal(masks[name].to(masks[first]), masks[first]):
                continue
            if name not in masks and bool(masks[first].all()):
                continue
            here, there = first.removesuffix("_orig"), name.removesuffix("_orig")
            raise ValueError(
                f"{here} and {there} share one tensor, but {there} is {'' if name in masks else 'not '}pruned"
                f"{' by another mask' if name in masks else ''}, and a plain model cannot have zeros in only one of "
                f"them. Prune both with the same mask (`prune.custom_from_mask(model.get_submodule("
                f"{there.rpartition('.')[0]!r}), {there.rpartition('.')[2]!r}, mask)`), or give one its own copy"
            )
