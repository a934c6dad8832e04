"""Progressive pruning by a recipe: every candidate of every round is a run in its own folder.

The search visits its candidates in the same order each time, and a finished one takes no time, so that a search that
was killed resumes in the middle of its current candidate.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pomona.methods.rounds import Candidate, progressive
from pomona.train.checkpoint import write_atomically
from pomona.train.evaluate import Tested, evaluate
from pomona.train.finished import read_run
from pomona.train.folder import claim, identity_of
from pomona.train.progress import Progress
from pomona.train.recipe import Recipe
from pomona.train.stages import Base, make_base, train, train_base
from pomona.zoo.data import Dataset
from pomona.zoo.models import build_model


@dataclass(frozen=True)
class _Model:
    """A network of the search."""

    base: Base
    accuracy: float
    compression: float
    name: str
    result: dict[str, Any]


def train_progressive(
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    *,
    threads: int,
    progress: Progress,
    base: Path | None = None,
    device: str = "cpu",
    compiled: bool = False,
) -> dict[str, Any]:
    """Train a recipe with ``[progressive]``; arguments, files and errors as in ``train``.

    Args:
        base: folder of the dense network; default: in ``folder``.

    Returns:
        The content of ``result.json``: that of the last round's best candidate, and in ``rounds`` all candidates. If
        held out examples chose between them, ``rounds`` and the table have accuracies on these, and ``accuracy``
        has those of the dense and the last network on the test set.
    """
    plan = recipe.progressive
    assert plan is not None
    with claim(folder, identity_of("progressive", recipe, data, threads, device, compiled)):
        single = replace(recipe, progressive=None, expected=None, validation=plan.validation)
        how: dict[str, Any] = {"threads": threads, "progress": progress, "device": device, "compiled": compiled}
        start = train_base(single, data, base or folder / "dense", **how)
        assert start.accuracy is not None
        dense = _Model(start, start.accuracy, 1.0, "dense", {})

        def prune(parent: _Model, compression: float) -> _Model:
            name = f"{compression:g}x-from-{parent.name}"
            method = {**recipe.method, "compression": compression, "hold_zeros": parent is not dense}
            child = replace(single, title=f"{recipe.title}: {compression:g}x from {parent.name}", method=method)
            result = train(child, data, folder / name, base=parent.base, pictures=False, **how)
            weights = torch.load(folder / name / "model.pt", weights_only=True)
            accuracy: float = result["accuracy"]["final"]
            node = make_base(weights, accuracy, name, loss=result["loss"]["final"])
            return _Model(node, accuracy, compression, f"{compression:g}x", result)

        tried = progressive(dense, [*plan.compressions, recipe.method["compression"]], prune, width=plan.width)
        best = [candidate for candidate in tried if candidate.kept][-1]
        result = _conclude(recipe, data, folder, dense, tried, best)
        if plan.width > 1:  # otherwise the last table shown is this one
            progress.line(result["table"])
        return result


def _conclude(
    recipe: Recipe, data: Dataset, folder: Path, dense: _Model, tried: list[Candidate[_Model]], best: Candidate[_Model]
) -> dict[str, Any]:
    assert recipe.progressive is not None
    plain, result = recipe.to_dict(), best.node.result
    held_out = recipe.progressive.validation
    if held_out:
        base, final = (_test(recipe, data, node.base) for node in (dense, best.node))
        last = "retrained" if recipe.retrain else "after_cut"
        cut: dict[str, Tested | None] = {**dict.fromkeys(("before_cut", "after_cut")), last: final}
        stages = {"base": base, **cut, "final": final}
        worth = {
            key: {stage: getattr(one, key) if one else None for stage, one in stages.items()}
            for key in ("accuracy", "loss")
        }
        table = f"{result['table']}\naccuracies in this table: on {held_out:,} held out training examples"
    else:
        worth = {key: result[key] | {"base": getattr(dense.base, key)} for key in ("accuracy", "loss")}
        table = result["table"]
    overall = {
        "title": recipe.title,
        "recipe": plain,
        "data": data.description,
        "expected": plain.get("expected"),
        **worth,
        "table": table,
        "rounds": [
            {
                "round": candidate.round,
                "path": list(candidate.path),
                "accuracy": candidate.node.accuracy,
                "before_cut": candidate.node.result["accuracy"]["before_cut"],
                "after_cut": candidate.node.result["accuracy"]["after_cut"],
                "kept": candidate.kept,
            }
            for candidate in tried
        ],
        "seconds": sum(candidate.node.result["seconds"] for candidate in tried),
    }
    write_atomically(folder / "result.json", json.dumps(result | overall, indent=2).encode())
    weights = io.BytesIO()
    torch.save(dict(best.node.base.model), weights)
    write_atomically(folder / "model.pt", weights.getvalue())
    return read_run(folder)


def _test(recipe: Recipe, data: Dataset, base: Base) -> Tested:
    model = build_model(recipe.model, seed=recipe.seed)
    model.load_state_dict(dict(base.model))
    return evaluate(model, data)
