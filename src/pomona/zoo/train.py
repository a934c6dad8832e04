"""What `pomona train` does: a dense network, then the method of the recipe, then what is left of the run to look at."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

import pomona
from pomona.harden import hold
from pomona.pruner import Pruner
from pomona.zoo.checkpoint import write_atomically
from pomona.zoo.data import Dataset
from pomona.zoo.models import build_model
from pomona.zoo.page import write_page
from pomona.zoo.pictures import draw_all
from pomona.zoo.progress import Progress
from pomona.zoo.recipe import Recipe
from pomona.zoo.run import FolderError, Learner, Memory, Phase, Run, diagnose, open_run, read_rows


def _fresh(recipe: Recipe, memory: Memory) -> nn.Module:
    return build_model(recipe.model, seed=recipe.seed)


def _trained(recipe: Recipe, memory: Memory) -> nn.Module:
    model = build_model(recipe.model, seed=recipe.seed)
    model.load_state_dict(memory["model"])
    return model


def _nothing(recipe: Recipe, model: nn.Module, optimizer: SGD) -> None:
    return None


def _method(recipe: Recipe, model: nn.Module, optimizer: SGD) -> Pruner:
    return Pruner(model, optimizer, recipe.method)


def hold_zeros(recipe: Recipe, model: nn.Module, optimizer: SGD) -> Pruner:
    """Keep what is zero in the model."""
    return hold(model, optimizer)


def _finish_base(run: Run, learner: Learner) -> None:
    run.memory["model"] = learner.model.state_dict()
    run.memory["accuracy"] = {"base": run.evaluate(learner.model)}


def _finish_prune(run: Run, learner: Learner) -> None:
    assert learner.pruner is not None
    report = learner.pruner.harden(evaluate=lambda: run.evaluate(learner.model))
    learner.pruner.verify()
    run.memory["model"] = learner.model.state_dict()
    run.memory["accuracy"] |= {"before_cut": report.accuracy_before, "after_cut": report.accuracy_after}
    run.memory["report"] = report.to_dict()
    run.memory["table"] = str(report)


def train_phases(recipe: Recipe) -> list[Phase]:
    """Dense training, then pruning."""
    return [
        Phase("base", recipe.base, _fresh, _nothing, _finish_base),
        Phase("prune", recipe.prune, _trained, _method, _finish_prune),
    ]


def train(recipe: Recipe, data: Dataset, folder: Path, *, threads: int, progress: Progress) -> dict[str, Any]:
    """Train and prune by a recipe; a folder with an unfinished run of it is resumed.

    Args:
        recipe: what to do.
        data: with what.
        folder: gets ``run.json``, ``metrics.jsonl``, checkpoints, and at the end ``result.json``, ``model.pt`` (a plain
            state dict), pictures and ``report.html``.
        threads: of torch; part of what makes a run repeatable bit for bit.
        progress: where to tell of it.

    Returns:
        The content of ``result.json``.

    Raises:
        FolderError: the folder cannot be written, or belongs to another run.
        Stopped: by SIGINT or SIGTERM, after a checkpoint.
    """
    run = open_run("train", recipe, data, folder, train_phases(recipe), threads=threads, progress=progress)
    run.go()
    return conclude(run, threads, {})


def conclude(run: Run, threads: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a finished run leaves: ``result.json``, ``model.pt``, pictures and page."""
    if run.was_finished and (run.folder / "result.json").exists():
        result = read_run(run.folder)  # by the commit that trained it
    else:
        result = _result(run, threads) | dict(more)
        write_atomically(run.folder / "result.json", json.dumps(result, indent=2).encode())
    weights = io.BytesIO()
    torch.save({name: t.contiguous() for name, t in run.memory["model"].items()}, weights)
    write_atomically(run.folder / "model.pt", weights.getvalue())
    run.progress.line(run.memory["table"])
    page, *pictures = write_report(run.folder)
    run.progress.line(f"pictures: {', '.join(str(path) for path in pictures)}")
    run.progress.line(f"page: {page}")
    return result


def _result(run: Run, threads: int) -> dict[str, Any]:
    recipe, memory = run.recipe, run.memory
    diagnosis = diagnose(recipe, run.steps_per_epoch)
    sizes = {name: p.numel() for name, p in build_model(recipe.model, seed=recipe.seed).named_parameters()}
    report = memory["report"]
    outside = [{"name": n, "total": sizes.get(n, 0), "reason": why} for n, why in report["outside"].items()]
    plain = recipe.to_dict()
    return {
        **_title(plain, run.data.description),
        "pomona": pomona.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": threads,
        "commit": ", ".join(filter(None, memory["commits"])) or None,
        "seconds": sum(memory["seconds"].values()),
        "accuracy": memory["accuracy"],
        "expected": plain.get("expected"),
        "diagnosis": diagnosis
        and {
            "exponent": diagnosis.exponent,
            "shrinkage": diagnosis.shrinkage,
            "message": str(diagnosis),
        },
        "report": report | {"outside": outside},
        "table": memory["table"],
    }


def _title(recipe: Mapping[str, Any], data: str) -> dict[str, Any]:
    """What is known of a run before it has finished."""
    known = {key: recipe[key] for key in ("title", "source", "seed")}
    return {**known, "recipe": dict(recipe), "data": data}


def read_run(folder: Path) -> dict[str, Any]:
    """The result of the run in ``folder``; of one that has not finished, what it was told to do."""
    try:
        finished = folder / "result.json"
        if finished.exists():
            result: dict[str, Any] = json.loads(finished.read_text())
            return result | _title(result["recipe"], result["data"])
        manifest = json.loads((folder / "run.json").read_text())
        return _title(manifest["recipe"], manifest["data"])
    except FileNotFoundError:
        raise FolderError(f"{folder} holds no run of pomona (there is no run.json in it)") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FolderError(f"the run in {folder} cannot be read: {error!r}") from None


def write_report(folder: Path) -> list[Path]:
    """Draw the pictures and write ``report.html`` of the run in ``folder``, finished or not."""
    result = read_run(folder)
    rows = read_rows(folder / "metrics.jsonl")
    pictures = draw_all(rows, result, folder)
    return [write_page(rows, result, pictures, folder / "report.html"), *pictures]
