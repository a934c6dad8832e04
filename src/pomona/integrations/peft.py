"""LoRA and similar adapters over a sparse model: keeping the zeros of the base when adapters are merged."""

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

    Adapters are dense, and ``merge_and_unload()`` alone makes the base dense: a layer with an adapter keeps no zeros.
    This function discards what an update adds to zeros of the base. The report says what that cost: the metric
    ``update_lost`` is the share of the updates' sum of squares that fell on zeros (each layer's share is in its
    reason), and ``evaluate`` gives the accuracy with the adapters and after merging. To lose nothing, leave the
    adapters unmerged.

    Needs a temporary copy of the base's weights. Afterwards all weights require gradients again, so that training with
    ``hold()`` can recover what was lost.

    Args:
        model: adapters over a base with zeros, on one process; unusable afterwards.
        evaluate: called with the model before and after, e.g. for the accuracy.

    Returns:
        The base model with the adapters merged into it, and a report on all weights of two or more dimensions.

    Raises:
        ValueError: the base has no zeros or is sharded, or the adapters are already merged or cannot be.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a peft.PeftModel, got {type(model).__name__}")
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"{model.peft_type} adds nothing to the weights, so there is nothing to merge; the zeros of the base are "
            f"unchanged"
        )
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError("merge() works on one process; gather the model first (its full state dict)")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "adapters are already merged into this model, so the zeros of its base are no longer visible; call "
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
    """The base's own parameters, by the names they have after the adapters are removed."""
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
