"""What `pomona train` does: train a dense network, prune it by the recipe's method, and write the results."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pomona._version import __version__
from pomona.pages.pictures import draw_all
from pomona.pages.run import write_page
from pomona.pruner import Pruner, hold
from pomona.train.checkpoint import write_atomically
from pomona.train.evaluate import Tested, evaluate
from pomona.train.finished import read_run, title_of
from pomona.train.folder import read_rows
from pomona.train.progress import Progress
from pomona.train.recipe import Recipe
from pomona.train.run import Learner, Memory, Phase, Run, diagnose, open_run, usable
from pomona.zoo.data import Dataset
from pomona.zoo.models import build_model


@dataclass(frozen=True)
class Base:
    """A trained network to start from.

    Attributes:
        model: its state dict.
        accuracy: its accuracy on the test set, in percent.
        loss: its loss on the test set, in nats.
        identity: its name and checksum, for the manifest of runs that start from it.
    """

    model: Mapping[str, Tensor]
    accuracy: float | None
    loss: float | None
    identity: Mapping[str, str]


def fresh(recipe: Recipe, memory: Memory) -> nn.Module:
    """The model with its initial weights."""
    return build_model(recipe.model, seed=recipe.seed)


def trained(recipe: Recipe, memory: Memory) -> nn.Module:
    """The model as earlier phases left it."""
    model = build_model(recipe.model, seed=recipe.seed)
    model.load_state_dict(memory["model"])
    return model


def attach_nothing(recipe: Recipe, model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> None:
    """Attach nothing: dense training."""
    return None


def attach_method(recipe: Recipe, model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Pruner:
    """Attach the recipe's method."""
    return Pruner(model, optimizer, recipe.make_method(steps_per_epoch), scope=recipe.make_scope())


def hold_zeros(recipe: Recipe, model: nn.Module, optimizer: Optimizer, steps_per_epoch: int) -> Pruner:
    """Attach a pruner that keeps the zeros of the model."""
    return hold(model, optimizer, scope=recipe.make_scope())


def weights_of(learner: Learner) -> dict[str, Tensor]:
    """The state dict, on the CPU."""
    return {name: tensor.cpu() for name, tensor in learner.model.state_dict().items()}


def finish_base(run: Run, learner: Learner) -> None:
    """Keep the dense network."""
    run.memory["model"] = weights_of(learner)
    _remember(run.memory, base=run.evaluate(learner.model))


def _finish_prune(run: Run, learner: Learner) -> None:
    assert learner.pruner is not None
    tested: list[Tested] = []

    def evaluate() -> float:
        tested.append(run.evaluate(learner.model))
        return tested[-1].accuracy

    report = learner.pruner.harden(evaluate=evaluate)
    learner.pruner.verify()
    run.memory["model"] = weights_of(learner)
    _remember(run.memory, before_cut=tested[0], after_cut=tested[1])
    run.memory["report"] = report.to_dict()
    run.memory["table"] = str(report)
    run.memory["method"] = str(learner.pruner.method)


def _finish_retrain(run: Run, learner: Learner) -> None:
    assert learner.pruner is not None
    learner.pruner.verify()
    run.memory["model"] = weights_of(learner)
    _remember(run.memory, retrained=run.evaluate(learner.model))


def _remember(memory: Memory, **tested: Tested) -> None:
    """Store accuracy and loss of the network after a stage."""
    for key in ("accuracy", "loss"):
        known = memory.setdefault(key, {"base": None})
        known |= {stage: getattr(result, key) for stage, result in tested.items()}


def train_phases(recipe: Recipe, base: Base | None = None) -> list[Phase]:
    """The phases of the recipe: dense training (unless ``base`` is given), pruning, retraining."""
    start = _from(base) if base else trained if recipe.base else fresh
    phases = [Phase("prune", recipe.prune, 1, start, attach_method, _finish_prune)]
    if recipe.base and not base:
        phases.insert(0, Phase("base", recipe.base, 0, fresh, attach_nothing, finish_base))
    if recipe.retrain:
        phases.append(Phase("retrain", recipe.retrain, 4, trained, hold_zeros, _finish_retrain))
    return phases


def _from(base: Base) -> Callable[[Recipe, Memory], nn.Module]:
    def start(recipe: Recipe, memory: Memory) -> nn.Module:
        memory["accuracy"], memory["loss"] = {"base": base.accuracy}, {"base": base.loss}
        return trained(recipe, {"model": base.model})

    return start


def train_base(
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    *,
    threads: int,
    progress: Progress,
    device: str = "cpu",
    compiled: bool = False,
) -> Base:
    """Train only the dense network of a recipe, for several runs to start from; arguments and errors as in ``train``.

    A run that starts from it ends with the same bits as one that trains its own.
    """
    if recipe.base is None:
        raise ValueError(f"{recipe.title!r} has no [base] stage, it prunes from the initial weights")
    phases = train_phases(recipe)[:1]
    how: dict[str, Any] = {"threads": threads, "progress": progress, "device": device, "compiled": compiled}
    run = open_run("base", recipe, data, folder, phases, **how)
    memory = run.go()
    return make_base(memory["model"], memory["accuracy"]["base"], folder.name, loss=memory["loss"]["base"])


def read_base(path: Path, recipe: Recipe, data: Dataset, *, device: str = "cpu") -> Base:
    """Read a network to start from out of a file that ``torch.save`` wrote, and test it.

    Args:
        path: a state dict, or a dict with one under ``state_dict``; names may begin with ``module.``. Only weights
            are read: no code in the file is run.
        recipe: the recipe whose model it must fit.
        data: the data to test it on; ``recipe.validation`` is applied.
        device: the device to test on.

    Raises:
        ValueError: the file cannot be read, or does not fit.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no closed list
        raise ValueError(f"{path} holds no weights that can be read safely: {type(error).__name__}: {error}") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} must hold a state dict (names and tensors), by itself or under 'state_dict'")
    model = build_model(recipe.model, seed=recipe.seed)
    try:
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model {recipe.model}: {error}") from None
    data = data.hold_out(recipe.validation) if recipe.validation else data
    model = model.to(usable(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    accuracy, loss = evaluate(model, data.to(usable(device)))
    return make_base(model.cpu().state_dict(), accuracy, path.name, loss=loss)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make_base(model: Mapping[str, Tensor], accuracy: float | None, name: str, *, loss: float | None = None) -> Base:
    """A network to start from, identified by its name and the checksum of its weights."""
    digest = hashlib.sha256()
    for tensor in model.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return Base(model, accuracy, loss, {"name": name, "checksum": digest.hexdigest()[:16]})


def train(
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    *,
    threads: int,
    progress: Progress,
    base: Base | None = None,
    pictures: bool = True,
    device: str = "cpu",
    compiled: bool = False,
) -> dict[str, Any]:
    """Train and prune by a recipe; an unfinished run of it in the folder is resumed.

    Args:
        recipe: what to train.
        data: the data of the recipe.
        folder: receives ``run.json``, ``metrics.jsonl``, checkpoints, and at the end ``result.json``, ``model.pt`` (a
            plain state dict), pictures and ``report.html``.
        threads: number of torch's threads; a run repeats bit for bit only with the same number.
        progress: receives status messages.
        base: a network to start from, instead of the recipe's ``base`` stage.
        pictures: whether to draw the pictures and write the page.
        device: the device to train on, as torch names it; the data are moved there.
        compiled: whether forward and backward passes of training use ``torch.compile``.

    Returns:
        The content of ``result.json``.

    Raises:
        FolderError: the folder cannot be written, or belongs to another run.
        Stopped: SIGINT or SIGTERM stopped the run, after a checkpoint.
    """
    phases = train_phases(recipe, base)
    identity = base.identity if base else None
    how: dict[str, Any] = {"threads": threads, "progress": progress, "device": device, "compiled": compiled}
    run = open_run("train", recipe, data, folder, phases, base=identity, **how)
    run.go()
    return conclude(run, threads, {"base": dict(base.identity)} if base else {}, pictures=pictures)


def conclude(run: Run, threads: int, more: Mapping[str, Any], *, pictures: bool = True) -> dict[str, Any]:
    """Write the results of a finished run: ``result.json``, ``model.pt``, pictures and page."""
    if run.was_finished and (run.folder / "result.json").exists():
        result = read_run(run.folder)  # it names the commit that trained it
    else:
        result = _result(run, threads) | dict(more)
        write_atomically(run.folder / "result.json", json.dumps(result, indent=2).encode())
    weights = io.BytesIO()
    torch.save({name: t.contiguous() for name, t in run.memory["model"].items()}, weights)
    write_atomically(run.folder / "model.pt", weights.getvalue())
    run.progress.line(run.memory["table"])
    if pictures:
        page, *drawn = write_report(run.folder)
        run.progress.line(f"pictures: {', '.join(str(path) for path in drawn)}")
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
        **title_of(plain, run.data.description),
        "pomona": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "threads": threads,
        "device": device_name(run.device),
        "commit": ", ".join(filter(None, memory["commits"])) or None,
        "seconds": sum(memory["seconds"].values()),
        "method": memory["method"],
        **{key: _with_final(memory[key]) for key in ("accuracy", "loss")},
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


def _with_final(stages: Mapping[str, float | None]) -> dict[str, float | None]:
    return {**stages, "final": stages.get("retrained", stages.get("after_cut"))}


def write_report(folder: Path) -> list[Path]:
    """Draw the pictures and write ``report.html`` for the run in ``folder``, finished or not."""
    result = read_run(folder)
    rows = read_rows(folder / "metrics.jsonl")
    pictures = draw_all(rows, result, folder)
    return [write_page(rows, result, pictures, folder / "report.html"), *pictures]
