"""Callbacks and functions around a Pruner for the frameworks that people already train with, one file per framework.

Only its own file imports a framework. This module has what they share: how a Pruner is made, what is logged, and what
goes into a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pomona.distributed import checksum, is_sharded, local, shards_of, sum_counts
from pomona.method import Method
from pomona.pruner import Pruner, hold
from pomona.scope import Scope


def check_arguments(method: Method | None, scope: Scope | None) -> None:
    """Raise TypeError now for arguments that a Pruner would refuse only once training begins."""
    if not isinstance(method, Method | None):
        raise TypeError(
            f"method must be a pomona.Method such as GSM(sparsity=0.9), or None to hold the model's existing zeros, "
            f"got {method!r}"
        )
    if not isinstance(scope, Scope | None):
        raise TypeError(f"scope must be a pomona.Scope such as Scope(exclude=['head']), got {scope!r}")


def attach(model: nn.Module, optimizer: Optimizer, method: Method | None, scope: Scope | None) -> Pruner:
    """Make a Pruner with the method, or without one a Pruner that holds the model's current zeros.

    Raises:
        ValueError: PEFT wraps the model and there is no scope: only the adapters train, and nothing moves the zeros of
            the frozen base.
    """
    if hasattr(model, "peft_config") and scope is None:
        raise ValueError(
            "only the adapters of a PEFT model train: the zeros of its frozen base stay without a Pruner, and "
            "pomona.integrations.peft.merge() keeps them when the adapters are merged. Leave the Pruner out; or, to "
            "prune the adapters themselves, pass scope=Scope(include=['*.lora_*'])"
        )
    return hold(model, optimizer, scope=scope) if method is None else Pruner(model, optimizer, method, scope=scope)


def numbers(pruner: Pruner) -> dict[str, float]:
    """Return the numbers that the callbacks log, under the same names, for a loop of your own.

    ``pomona/sparsity`` is the fraction of the weights in scope that are zero now, ``pomona/num_skipped`` the number of
    skipped steps, ``pomona/density_if_cut/LAYER`` the share of a layer's weights that ``harden()`` would keep now, or
    has kept; the method's own metrics follow. Costs a count and a selection, about as much as one pruning step. If the
    model is sharded, call this on every rank.

    Example:
        >>> import torch, pomona
        >>> model = torch.nn.Linear(20, 10)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> numbers(pomona.Pruner(model, optimizer, pomona.Magnitude(sparsity=0.9)))["pomona/density_if_cut/weight"]
        0.1
    """
    report = pruner.report()
    found = {"sparsity": report.sparsity, "num_skipped": float(report.num_skipped), **report.metrics}
    found |= {f"density_if_cut/{name}": density for name, density in pruner.density_if_cut().items()}
    return {f"pomona/{name}": value for name, value in found.items()}


def whole_state(pruner: Pruner) -> dict[str, Any]:
    """``pruner.state_dict()`` for one file: sharded tensors gathered, with checksums of the weights they belong to.

    If the model is sharded, call this on every rank. Each rank holds one whole tensor at a time while gathering, and
    in the end the whole state (on the CPU).
    """
    return {"pruner": _gathered(pruner.state_dict()), "weights": _checksums(pruner)}


def load_whole_state(pruner: Pruner, state: Mapping[str, Any], origin: object) -> None:
    """Resume from ``whole_state()``; the model's own weights must have been loaded already.

    Raises:
        ValueError: ``state`` is something else, or belongs to another method, scope or weights; names ``origin``.
    """
    if not isinstance(state, Mapping) or state.keys() != {"pruner", "weights"}:
        raise ValueError(f"{origin} does not hold the state of a Pruner")
    held = _checksums(pruner)
    wrong = [name for name, value in held.items() if state["weights"].get(name) != value]
    if wrong and held.keys() == state["weights"].keys():
        raise ValueError(
            f"the state of the Pruner in {origin} belongs to other weights than the model has now: {wrong[0]} differs; "
            f"load the model's weights from that checkpoint first"
        )
    try:
        pruner.load_state_dict(state["pruner"])
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _gathered(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _gathered(value) for key, value in tree.items()}
    return tree.full_tensor().cpu() if hasattr(tree, "placements") and is_sharded(tree) else tree


def _checksums(pruner: Pruner) -> dict[str, int]:
    """Name -> checksum of the whole weight, independent of how it is sharded."""
    parameters = pruner.parameters()
    shards = shards_of(parameters)
    sums = sum_counts([checksum(local(p)) for p in parameters.values()], [shards.get(name) for name in parameters])
    return dict(zip(parameters, sums, strict=True))
