"""LoRA and its kin over a sparse model: the zeros of the base, and what becomes of them when adapters are merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pomona.distributed import is_sharded
from pomona.pruner.zeros import largest_among, zero_
from pomona.reporting import Report, report_layers


@torch.no_grad()
def merge(model: PeftModel, *, evaluate: Callable[[nn.Module], float] | None = None) -> tuple[nn.Module, Report]:
    """Merge the adapters into a sparse base and keep its zeros: ``merge_and_unload()``, then exact zeros again.

    Adapters are dense, and ``merge_and_unload()`` alone makes the base dense: no zero is left in a layer that has one.
    Here what an update adds to zeros of the base is thrown away. That has a price, which the report tells: the metric
    ``update_lost`` is the share of the updates' sum of squares that fell on zeros (each layer's is in its reason), and
    ``evaluate`` gives the accuracy with the adapters and after. To lose nothing, leave the adapters unmerged.

    Takes one copy of the base's weights while it lasts. The weights train again afterwards, so that ``hold()`` can win
    back what was lost.

    Args:
        model: adapters over a base with zeros, on one process; unusable afterwards.
        evaluate: called with the model before and after, e.g. for the accuracy.

    Returns:
        The base model with the adapters merged into it, and its report: all weights of two or more dimensions.

    Raises:
        ValueError: the base has no zeros, or adapters are merged into it already, or cannot be; or it is sharded.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a peft.PeftModel, got {type(model).__name__}")
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"{model.peft_type} adds nothing to the weights that could be merged; the zeros of the base are where they "
            f"were"
        )
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("merge() works on one process; gather the model first (its full state dict)")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "adapters are merged into this model already, so the zeros of its base cannot be seen any more; call "
            "unmerge_adapter() first"
        )
    before = {name: p.detach().clone() for name, p in _base(model).items() if p.ndim >= 2 and p.is_floating_point()}
    if all(bool(value.all()) for value in before.values()):
        raise ValueError("the base has no zeros to keep; model.merge_and_unload() merges without this function")
    with_adapters = float(evaluate(model)) if evaluate else None

    merged: nn.Module = model.merge_and_unload(safe_merge=True)
    merged.requires_grad_(True)
    after = dict(merged.named_parameters(remove_duplicate=False))
    values, cuts, reasons = {}, {}, {}
    lost, total = 0.0, 0.0
    for name, old in before.items():
        value, zeros = after[name].detach(), old == 0
        here = _squares(value - old)
        there = _squares(value[zeros])
        lost, total = lost + there, total + here
        if here:
            reasons[name] = f"the base's zeros; {there / here:.1%} of its update lost"
        values[name], cuts[name] = value, largest_among(value, zeros)
        zero_(value, zeros)
    accuracy = float(evaluate(merged)) if evaluate else None
    return merged, Report(
        layers=report_layers(values, cuts=cuts, reasons=reasons),
        accuracy_before=with_adapters,
        accuracy_after=accuracy,
        metrics={"update_lost": lost / total if total else 0.0},
    )


def _base(model: PeftModel) -> dict[str, nn.Parameter]:
    """The base's own parameters, by the names that they have once the adapters are gone."""
    prefix: Any = model.base_model.prefix  # such as lora_
    found = {}
    for name, parameter in model.get_base_model().named_parameters():
        parts = name.split(".")
        if "modules_to_save" in parts or any(part.startswith(prefix) for part in parts):
            continue
        found[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = parameter
    return found


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())
