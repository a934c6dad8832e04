"""Why a cut may not be what its user wants: one sentence each, for ``harden()`` to warn with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pomona.diagnosis import Diagnosed
from pomona.distributed import working_on
from pomona.method import Method, starved_by
from pomona.pages.text import few
from pomona.pruner.placement import Placement
from pomona.pruner.zeros import largest_among
from pomona.schedule import FAR_AWAY, Schedule
from pomona.weight import Weights


def cautions_of_cut(
    method: Method, weights: Weights, masks: Sequence[Tensor], step: int, placement: Placement
) -> Iterator[str]:
    """What the method, its schedules and the masks say about a cut at ``step``; call it on all ranks."""
    with working_on(placement.shards):
        why = method.unfinished(weights, step)
    if why:
        yield f"harden() at step {step:,} comes early: {why}"
    yield from _of_schedules(method, step)
    if isinstance(method, Diagnosed):
        with working_on(placement.shards):
            diagnosis = method.diagnose(weights, step)
        cut = zip(weights, masks, strict=True)
        if not diagnosis.is_enough and placement.on_any_rank(
            any(largest_among(w.value, ~mask) != 0.0 for w, mask in cut)
        ):
            yield f"harden() cuts weights that have not decayed: {diagnosis}"
    with working_on(placement.shards):
        why = starved_by(method, weights, masks)
    if why:
        yield f"harden() starves layers: {why}"


def _of_schedules(method: Method, step: int) -> Iterator[str]:
    hyper_parameters: Any = method
    for field in dataclasses.fields(hyper_parameters) if dataclasses.is_dataclass(hyper_parameters) else ():
        value = getattr(method, field.name)
        if isinstance(value, Schedule) and value(step) != value(FAR_AWAY):
            yield (
                f"harden() in the middle of a schedule: {field.name} is {value(step):g} at step {step:,} and goes to "
                f"{value(FAR_AWAY):g} with {value}"
            )


def caution_of_unfrozen(names: Sequence[str]) -> str:
    """What was frozen when the Pruner was made, and trains now."""
    return (
        f"{few(names)} {'were' if len(names) > 1 else 'was'} frozen when the Pruner was made and "
        f"{'train' if len(names) > 1 else 'trains'} now: not pruned, not counted; make a new Pruner to prune "
        f"them (detach() this one first), after requires_grad_(True)"
    )


def caution_of_frozen(left: Mapping[str, int], sparsity: float) -> str:
    """What is frozen at the cut: name -> how many weights stay that the budget would have cut."""
    return (
        f"harden() leaves {few(left)} as before, because frozen weights keep their values: "
        f"{sum(left.values()):,} weights stay that the budget would have cut, and the sparsity is "
        f"{sparsity:.4g}. To cut them too, unfreeze them before harden(): requires_grad_(True)"
    )
