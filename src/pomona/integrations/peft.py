"""LoRA and similar adapters over a sparse model: keeping the zeros of the base when adapters are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pomona.distributed import is_sharded
from pomona.pruner.zeros import largest_among, zero_
from pomona.reporting import Report, report_layers
from pomona.scope import Scope

# Values of init_lora_weights with which PEFT takes what the adapter begins with out of the base, or quantizes the base.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@torch.no_grad()
def merge(
    model: PeftModel,
    *,
    masks: Mapping[str, Tensor] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> tuple[nn.Module, Report]:
    """Merge the adapters into a sparse base and keep its zeros: ``merge_and_unload()``, then exact zeros again.

    Adapters are dense, and ``merge_and_unload()`` alone makes the base dense: a layer with an adapter keeps no zeros.
    This function discards what an update adds to zeros of the base. The report says what that cost: the metric
    ``update_lost`` is the share of the updates' sum of squares that fell on zeros (each layer's share is in its
    reason), and ``evaluate`` gives the accuracy with the adapters and after merging. To lose nothing, leave the
    adapters unmerged.

    Some adapters rewrite the base when they are made, so that its zeros are gone before training begins
    (``init_lora_weights`` of "pissa", "olora", "corda", "loftq" or "lora_ga"; ``kasa_config``). These need ``masks``
    from before. What their update was is then unknown, and ``update_lost`` is missing.

    Needs a temporary copy of the base's weights. Afterwards all weights require gradients again, so that training with
    ``hold()`` can recover what was lost.

    Args:
        model: adapters over a base with zeros, on one process; unusable afterwards.
        masks: name of a weight in the merged model -> boolean tensor of its shape, True where a weight is kept; as the
            base was before the adapters were made, ``{name: p != 0 for name, p in base.named_parameters()}``. Weights
            that are not named keep the zeros that they have in the base now.
        evaluate: called with the model before and after, e.g. for the accuracy.

    Returns:
        The base model with the adapters merged into it, and a report on the weights that :func:`pomona.report` counts;
        all others of two or more dimensions keep their zeros too.

    Raises:
        ValueError: the base has no zeros, was rewritten by the adapters, or is sharded; the adapters are already merged
            or cannot be; or a mask does not fit.
    """
    _check_mergeable(model)
    before = {name: p.detach().clone() for name, p in _base(model).items() if p.ndim >= 2 and p.is_floating_point()}
    rewritten = _check_rewriting(model, masks)
    zeros = _zeros(before, masks or {}, set(_base(model)))
    if not any(bool(where.any()) for where in zeros.values()):
        raise ValueError(
            f"the base has no zeros to keep: none of its {len(before)} weights of two or more dimensions holds one. If "
            "it was sparse, it was changed before merge() saw it; merge(model, masks=...) takes the masks from before. "
            "model.merge_and_unload() merges a dense base without this function"
        )
    with_adapters = float(evaluate(model)) if evaluate else None

    merged: nn.Module = model.merge_and_unload(safe_merge=True)
    merged.requires_grad_(True)
    after = dict(merged.named_parameters(remove_duplicate=False))
    values, cuts, reasons = {}, {}, {}
    lost, total = 0.0, 0.0
    for name, old in before.items():
        value = after[name].detach()
        here = _squares(value - old)
        there = _squares(value[zeros[name]])
        lost, total = lost + there, total + here
        if name in (masks or {}):
            reasons[name] = "the zeros of the mask given"
        elif here and not bool(zeros[name].any()):
            reasons[name] = "the base has no zeros here"
        elif here:
            reasons[name] = f"the base's zeros; {there / here:.1%} of its update lost"
        values[name], cuts[name] = value, largest_among(value, zeros[name])
        zero_(value, zeros[name])
    accuracy = float(evaluate(merged)) if evaluate else None
    counted = Scope().select(merged, with_frozen=True, refuse=False)
    values = {name: value for name, value in values.items() if name in counted.inside}
    return merged, Report(
        layers=report_layers(values, cuts=cuts, reasons=reasons, layouts=counted.layouts),
        outside=counted.outside,
        accuracy_before=with_adapters,
        accuracy_after=accuracy,
        metrics={} if rewritten else {"update_lost": lost / total if total else 0.0},
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


def _check_mergeable(model: Any) -> None:
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


def _check_rewriting(model: PeftModel, masks: Mapping[str, Tensor] | None) -> bool:
    """Whether an adapter rewrote the base when it was made; then all layers with adapters need masks."""
    found = {name: how for name, config in model.peft_config.items() if (how := _rewriting(config))}
    if not found:
        return False
    name, how = next(iter(found.items()))
    prefix: Any = model.base_model.prefix
    adapted = {own.partition(f".{prefix}")[0] for own, _ in model.get_base_model().named_parameters() if prefix in own}
    missing = [f"{layer}.weight" for layer in sorted(adapted) if f"{layer}.weight" not in (masks or {})]
    if missing:
        given = f", and masks= does not name {missing[0]}" if masks else ""
        raise ValueError(
            f"the adapter {name!r} was made with {how}, which rewrote the weights of the base, so its zeros are gone"
            f"{given}. Make the adapter with init_lora_weights=True; or keep the masks of the base from before, "
            "{name: p != 0 for name, p in base.named_parameters()}, and call merge(model, masks=masks)"
        )
    return True


def _rewriting(config: Any) -> str:
    """The option with which an adapter rewrites the base; empty if it leaves it as it is."""
    how = getattr(config, "init_lora_weights", None)
    if isinstance(how, str) and how.lower().startswith(_REWRITING):
        return f"init_lora_weights={how!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) is not None else ""


def _zeros(before: Mapping[str, Tensor], masks: Mapping[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """Where each weight is to be zero."""
    zeros = {name: value == 0 for name, value in before.items()}
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(
                f"masks names {name!r}, but the base has no such parameter; names are those before PEFT, such as "
                f"{min(known)!r}"
            )
        if name not in before:
            continue  # a bias, a norm: nothing that is counted
        if mask.dtype != torch.bool or mask.shape != before[name].shape:
            raise ValueError(
                f"masks[{name!r}] must be a boolean tensor of shape {tuple(before[name].shape)}, True where a weight "
                f"is kept; got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        zeros[name] = ~mask.to(before[name].device)
    return zeros


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())
