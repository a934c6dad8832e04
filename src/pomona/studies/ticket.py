"""Winning tickets: is a mask good enough to train from the initial weights? (arXiv 1803.03635; GSM's section 4.4)

The dense network is trained. One mask keeps its largest weights, the other keeps the weights that the recipe's method
keeps. Each mask is applied to the *initial* weights, which are then trained like the dense network, with zeros held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pomona.pruner import apply_masks
from pomona.scope import Scope
from pomona.score import magnitude
from pomona.selection.top_k import global_top_k
from pomona.train.progress import Progress
from pomona.train.recipe import Recipe
from pomona.train.run import Learner, Memory, Phase, Run, num_steps_per_epoch, open_run
from pomona.train.stages import conclude, hold_zeros, train_phases
from pomona.zoo.data import Dataset
from pomona.zoo.models import build_model

_MASKS = ("method", "magnitude")  # in the order in which their tickets are trained


def ticket_phases(recipe: Recipe) -> list[Phase]:
    """Dense training, pruning, and a training of the initial weights under each mask."""
    if recipe.base is None or recipe.retrain or recipe.progressive or recipe.scope:
        raise ValueError("tickets need a recipe with a [base] stage, no [retrain], [progressive] or [scope]")
    base, prune = train_phases(recipe)
    tickets = [
        Phase(f"ticket by {mask}", recipe.base, order, _initial(mask), hold_zeros, _finish_ticket(mask))
        for order, mask in enumerate(_MASKS, start=2)
    ]
    return [base, replace(prune, finish=_finish_prune(prune)), *tickets]


def _finish_prune(prune: Phase) -> Callable[[Run, Learner], None]:
    def finish(run: Run, learner: Learner) -> None:
        """Keep two masks of the same size: the pruned network's, and that of the base's largest weights."""
        base = build_model(run.recipe.model, seed=run.recipe.seed)
        base.load_state_dict(run.memory["model"])
        prune.finish(run, learner)
        found = {name: p.detach() != 0 for name, p in _weights(learner.model).items()}
        scores = [magnitude(p) for p in _weights(base).values()]
        largest = global_top_k(scores, sum(int(mask.sum()) for mask in found.values()))
        run.memory["masks"] = {"method": found, "magnitude": dict(zip(found, largest, strict=True))}
        run.memory["tickets"] = {}

    return finish


def _initial(mask: str) -> Callable[[Recipe, Memory], nn.Module]:
    def start(recipe: Recipe, memory: Memory) -> nn.Module:
        model = build_model(recipe.model, seed=recipe.seed)
        masks: dict[str, Tensor] = memory["masks"][mask]
        apply_masks(model, masks)
        return model

    return start


def _finish_ticket(mask: str) -> Callable[[Run, Learner], None]:
    def finish(run: Run, learner: Learner) -> None:
        assert learner.pruner is not None
        report = learner.pruner.verify()
        run.memory["tickets"][mask] = {
            **run.evaluate(learner.model)._asdict(),
            "nonzero": report.nonzero,
            "compression": report.compression,
            "kept": {layer.name: layer.nonzero for layer in report.layers},
        }

    return finish


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return Scope().select(model).inside


def train_tickets(
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    *,
    threads: int,
    progress: Progress,
    device: str = "cpu",
    compiled: bool = False,
) -> dict[str, Any]:
    """Compare the tickets of the recipe's method and of magnitude; arguments, files and errors as of ``train``.

    Returns:
        The content of ``result.json``; ``tickets`` in it has accuracy, count and per-layer counts for each mask.
    """
    total = sum(p.numel() for p in _weights(build_model(recipe.model, seed=recipe.seed)).values())
    if recipe.make_method(num_steps_per_epoch(recipe, data)).budget.num_kept(total, 0) == total:
        raise ValueError("method.compression must leave out at least one weight, or there is no ticket to train")
    how: dict[str, Any] = {"threads": threads, "progress": progress, "device": device, "compiled": compiled}
    run = open_run("ticket", recipe, data, folder, ticket_phases(recipe), **how)
    memory = run.go()
    both = sum(int((a & memory["masks"]["magnitude"][name]).sum()) for name, a in memory["masks"]["method"].items())
    return conclude(run, threads, {"tickets": memory["tickets"], "shared_by_both_masks": both})
