"""One run in one folder: a sequence of phases that a killed run resumes bit for bit.

The data are in memory, the order of an epoch follows from (seed, phase, epoch) alone, and a checkpoint holds
everything that the next step depends on, even in the middle of an epoch. On a CPU with the same number of threads, a
run that was killed and resumed therefore ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pomona.diagnosis import Diagnosed, Diagnosis
from pomona.pruner import Pruner
from pomona.train.checkpoint import Checkpoints, write_atomically
from pomona.train.evaluate import Tested, count_right, cross_entropy, evaluate
from pomona.train.folder import claim, commit_of_source, identity_of, read_rows
from pomona.train.progress import Progress, duration
from pomona.train.recipe import Recipe
from pomona.train.stage import Stage
from pomona.zoo.data import Dataset
from pomona.zoo.models import build_model

_CHECKPOINT_SECONDS = 5.0  # a checkpoint is written at the end of an epoch if the last one is older than this
_HISTOGRAM = (-10.0, 1.0, 110)  # of log10 |w|: lowest edge, highest edge, number of bins

Memory = dict[str, Any]  # what one phase leaves to the next: tensors and plain values


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


@dataclass
class Learner:
    """A model in training, and its progress in the phase."""

    model: nn.Module
    optimizer: Optimizer
    pruner: Pruner | None
    forward: Callable[[Tensor], Tensor]  # the model, or its compiled form
    loss_sum: Tensor  # of the epoch so far
    num_right: Tensor
    step: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner else None,
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "num_right": self.num_right,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.pruner:
            self.pruner.load_state_dict(state["pruner"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.num_right.copy_(state["num_right"])


@dataclass(frozen=True)
class Phase:
    """One training by a stage of the recipe.

    Attributes:
        name: its name in metrics and messages.
        stage: learning rates and length.
        order: a number that gives the phase an order of the data of its own.
        start: makes the model that it starts with, from the recipe and the memory of earlier phases.
        attach: makes what prunes, or holds zeros, during the phase.
        finish: stores the results in memory.
    """

    name: str
    stage: Stage
    order: int
    start: Callable[[Recipe, Memory], nn.Module]
    attach: Callable[[Recipe, nn.Module, Optimizer, int], Pruner | None]  # the int: steps per epoch
    finish: Callable[[Run, Learner], None]


@dataclass
class Run:
    """The state of a run. ``go`` trains the remaining phases and returns the memory of the last one.

    Args:
        recipe: what to train.
        data: the data; training runs on the device that holds them.
        folder: holds ``metrics.jsonl`` and the checkpoints; created if missing.
        phases: the phases in order.
        progress: receives status messages.
        lock: keeps other processes out of the folder while it is open.
        compiled: whether forward and backward passes of training use ``torch.compile``.
    """

    recipe: Recipe
    data: Dataset
    folder: Path
    phases: Sequence[Phase]
    progress: Progress
    lock: TextIO
    compiled: bool = False
    memory: Memory = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    was_finished: bool = False  # before this process opened it
    _stop: bool = False

    def __post_init__(self) -> None:
        self._checkpoints = Checkpoints(self.folder)
        self._metrics = self.folder / "metrics.jsonl"
        self._saved_at = time.monotonic()

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(self.recipe, self.data)

    @property
    def device(self) -> torch.device:
        return self.data.train_labels.device

    def go(self) -> Memory:
        """Train the remaining phases."""
        with self.lock, self._stop_on_signal():
            resumed = self._load()
            first = resumed["phase"] if resumed else 0
            self.was_finished = first == len(self.phases)
            if not self.was_finished:
                self.memory.setdefault("commits", [])
                self.memory["commits"] = list(dict.fromkeys([*self.memory["commits"], commit_of_source()]))
            for index in range(first, len(self.phases)):
                inside = resumed["inside"] if resumed and index == first else None
                self._train(index, inside)
        return self.memory

    def _train(self, index: int, inside: Mapping[str, Any] | None) -> None:
        phase = self.phases[index]
        learner = self._begin(phase)
        if inside:
            learner.load_state_dict(inside)
        else:
            self._announce(phase)
        clock = time.monotonic() - learner.seconds
        num_steps = phase.stage.epochs * self.steps_per_epoch
        order = self._order(phase, learner.step // self.steps_per_epoch)
        learner.model.train()
        while learner.step < num_steps:
            epoch, position = divmod(learner.step, self.steps_per_epoch)
            if position == 0:
                order = self._order(phase, epoch)
            start = position * self.recipe.batch_size
            torch.manual_seed(self._seed(phase, learner.step))  # for dropout
            self._step(phase.stage, learner, order[start : start + self.recipe.batch_size])
            learner.seconds = time.monotonic() - clock
            if self.progress.is_due:
                self.progress.status(self._status(phase, learner, num_steps))
            if position == self.steps_per_epoch - 1:
                self._end_epoch(index, learner)
            if self._stop:
                self._save(index, learner)
                raise Stopped(f"stopped in {phase.name} at step {learner.step:,} of {num_steps:,}")
        phase.finish(self, learner)
        self.memory.setdefault("seconds", {})[phase.name] = time.monotonic() - clock
        self._save(index + 1, None)

    def _begin(self, phase: Phase) -> Learner:
        model = phase.start(self.recipe, self.memory).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = _make_optimizer(model, phase.stage)
        pruner = phase.attach(self.recipe, model, optimizer, self.steps_per_epoch)
        forward = torch.compile(model) if self.compiled else model
        loss_sum = torch.zeros((), device=self.device)
        return Learner(model, optimizer, pruner, forward, loss_sum, torch.zeros_like(loss_sum, dtype=torch.int64))

    def _announce(self, phase: Phase) -> None:
        stage = phase.stage
        self.progress.line(
            f"{phase.name}: {stage.epochs} epochs of {self.steps_per_epoch} steps, batch {self.recipe.batch_size}, "
            f"{stage.optimizer}, lr {stage.lr:g}, momentum {stage.momentum:g}, weight decay {stage.weight_decay:g}"
        )

    def _order(self, phase: Phase, epoch: int) -> Tensor:
        return self.data.order(torch.Generator().manual_seed(self._seed(phase, epoch))).to(self.device)

    def _seed(self, phase: Phase, number: int) -> int:
        """The seed for an epoch or a step of a phase."""
        return (self.recipe.seed * 1_000 + phase.order) * 1_000_000 + number

    def _step(self, stage: Stage, learner: Learner, batch: Tensor) -> None:
        lr = stage.learning_rate(learner.step, self.steps_per_epoch)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        inputs, labels = self.data.batch(batch)
        learner.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = learner.forward(inputs)
        loss = cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        learner.optimizer.step()
        learner.loss_sum += loss.detach()
        learner.num_right += count_right(logits.detach(), labels)
        learner.step += 1

    def evaluate(self, model: nn.Module) -> Tested:
        """Test a model on the test set, in float32."""
        return evaluate(model, self.data)

    # Metrics and checkpoints

    def _end_epoch(self, index: int, learner: Learner) -> None:
        phase = self.phases[index]
        epoch = learner.step // self.steps_per_epoch
        num_examples = self.steps_per_epoch * self.recipe.batch_size
        row: dict[str, Any] = {
            "stage": phase.name,
            "epoch": epoch,
            "step": learner.step,
            "lr": learner.optimizer.param_groups[0]["lr"],
            "loss": float(learner.loss_sum) / self.steps_per_epoch,
            "train_accuracy": 100.0 * int(learner.num_right) / (num_examples * self.data.train_labels[0].numel()),
        }
        # With a pruner the weights stay finite: it skips steps with gradients that are not.
        if not math.isfinite(row["loss"]) or not all(bool(p.isfinite().all()) for p in learner.model.parameters()):
            stage = phase.name if phase.name in ("prune", "retrain") else "base"
            raise ValueError(
                f"{phase.name} diverged: the loss or a weight is not finite in epoch {epoch}; lower {stage}.lr"
            )
        is_tested = epoch % self.recipe.eval_every == 0 or epoch == phase.stage.epochs
        if is_tested:
            row["test_accuracy"], row["test_loss"] = self.evaluate(learner.model)
        if learner.pruner and not learner.pruner.is_hardened:
            row |= learner.pruner.metrics() | {"density_if_cut": learner.pruner.density_if_cut()}
            if is_tested:
                row |= self._cut_now(learner.model, learner.pruner)
        row["seconds"] = round(learner.seconds, 3)
        self.rows.append(row)
        self._append(row)
        if is_tested:
            self.progress.line(describe(row, phase.stage.epochs))
        learner.loss_sum.zero_()
        learner.num_right.zero_()
        if time.monotonic() - self._saved_at > _CHECKPOINT_SECONDS:
            self._save(index, learner)

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            with self._metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that counts it
        except OSError as error:
            raise OSError(error.errno, f"could not write {self._metrics}: {error.strerror}") from error

    def _cut_now(self, model: nn.Module, pruner: Pruner) -> dict[str, Any]:
        histogram = _histogram([p.detach() for p in pruner.parameters().values()])
        with pruner.trial_cut() as cut:
            accuracy, loss = self.evaluate(model)
            return {
                "accuracy_if_cut": accuracy,
                "loss_if_cut": loss,
                "largest_cut": cut.largest_cut,
                "histogram": histogram,
            }

    def _status(self, phase: Phase, learner: Learner, num_steps: int) -> str:
        row = next(
            (row for row in reversed(self.rows) if row["stage"] == phase.name), {"stage": phase.name, "epoch": 0}
        )
        left = learner.seconds / learner.step * (num_steps - learner.step)
        return f"{learner.step / num_steps:.1%}  ETA {duration(left)}  {describe(row, phase.stage.epochs)}"

    def _save(self, index: int, learner: Learner | None) -> None:
        """Write a checkpoint inside phase ``index``; without a learner, before its first step."""
        done = sum(phase.stage.epochs * self.steps_per_epoch + 1 for phase in self.phases[:index])
        state = {
            "phase": index,
            "inside": learner.state_dict() if learner else None,
            "memory": self.memory,
            "num_rows": len(self.rows),
        }
        self._checkpoints.save(state, done + (learner.step if learner else 0))
        self._saved_at = time.monotonic()

    def _load(self) -> dict[str, Any] | None:
        found = self._checkpoints.load()
        for message in self._checkpoints.damaged:
            self.progress.line(f"WARNING: {message}")
        if found is None:
            self._metrics.unlink(missing_ok=True)
            return None
        state, _ = found
        self.memory = state["memory"]
        self.rows = read_rows(self._metrics)[: state["num_rows"]]
        if len(self.rows) < state["num_rows"]:
            self.progress.line(
                f"WARNING: {self._metrics} has only {len(self.rows)} of {state['num_rows']} rows; the pictures and "
                "the page will lack the others, but the weights are not affected"
            )
        write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        if state["phase"] < len(self.phases):
            step = state["inside"]["step"] if state["inside"] else 0
            self.progress.line(f"resuming {self.phases[state['phase']].name} after step {step:,}")
        else:
            self.progress.line(
                f"this run has finished; to train again, delete {self.folder} or name another with --out"
            )
        return state

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step, with a checkpoint; a second one ends it at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _make_optimizer(model: nn.Module, stage: Stage) -> Optimizer:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": stage.weight_decay, "lr_factor": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_factor": stage.bias_lr},
    ]
    if stage.optimizer == "sgd":
        return SGD(groups, lr=stage.lr, momentum=stage.momentum, nesterov=stage.nesterov, fused=True)
    return (Adam if stage.optimizer == "adam" else AdamW)(groups, lr=stage.lr, fused=True)


_COLUMNS = {  # key of a row of metrics -> its name in a line, and its format
    "lr": ("lr", ".2g"),
    "loss": ("loss", ".4f"),
    "train_accuracy": ("train", ".2f"),
    "test_accuracy": ("test", ".2f"),
    "test_loss": ("test loss", ".4f"),
    "accuracy_if_cut": ("if cut", ".2f"),
    "loss_if_cut": ("loss if cut", ".4f"),
    "largest_cut": ("largest cut", ".2g"),
    "active": ("active", ",.0f"),
    "decay_exponent": ("decay", ".2f"),
}

_NOT_IN_A_LINE = {"stage", "epoch", "step", "seconds", "density_if_cut", "histogram"}


def describe(row: Mapping[str, Any], epochs: int) -> str:
    """A row of metrics as one line."""
    known = [f"{label} {row[key]:{form}}" for key, (label, form) in _COLUMNS.items() if row.get(key) is not None]
    known += [f"{key.replace('_', ' ')} {row[key]:.4g}" for key in row if key not in {*_COLUMNS, *_NOT_IN_A_LINE}]
    return f"{row['stage']} {row['epoch']}/{epochs}  {'  '.join(known)}"


def _histogram(tensors: Sequence[Tensor]) -> dict[str, Any]:
    low, high, bins = _HISTOGRAM
    magnitudes = torch.cat([t.reshape(-1).abs() for t in tensors])
    logarithms = magnitudes[magnitudes > 0].log10_().clamp_(low, high)
    counts = torch.histc(logarithms, bins, low, high)
    return {
        "edges": [round(low + (high - low) * i / bins, 4) for i in range(bins + 1)],
        "counts": [int(c) for c in counts],
        "zeros": magnitudes.numel() - logarithms.numel(),
    }


def num_steps_per_epoch(recipe: Recipe, data: Dataset) -> int:
    """The number of full batches; an incomplete last batch is dropped, as in the papers."""
    steps = len(data.train_labels) // recipe.batch_size
    if steps == 0:
        raise ValueError(
            f"batch_size {recipe.batch_size} is more than the {len(data.train_labels)} training examples of {data.name}"
        )
    return steps


def diagnose(recipe: Recipe, steps_per_epoch: int) -> Diagnosis | None:
    """Forecast from the recipe alone whether its pruning stage can succeed; None if the method has no forecast."""
    stage = recipe.prune
    settings = {"momentum": stage.momentum, "weight_decay": stage.weight_decay, "dampening": 0.0}
    method = recipe.make_method(steps_per_epoch)
    if not isinstance(method, Diagnosed):
        return None
    return method.forecast([{**settings, "lr": lr} for lr in stage.learning_rates(steps_per_epoch)])


def check(recipe: Recipe, steps_per_epoch: int) -> None:
    """Before any training, raise ValueError if the method cannot prune this model with this scope and optimizer."""
    model = build_model(recipe.model, seed=recipe.seed)
    optimizer = _make_optimizer(model, recipe.prune)
    Pruner(model, optimizer, recipe.make_method(steps_per_epoch), scope=recipe.make_scope())


def open_run(
    command: str,
    recipe: Recipe,
    data: Dataset,
    folder: Path,
    phases: Sequence[Phase],
    *,
    threads: int,
    progress: Progress,
    base: Mapping[str, str] | None = None,
    device: str = "cpu",
    compiled: bool = False,
) -> Run:
    """Claim the folder for this run, unless it already belongs to it; ``base`` names a network to start from."""
    if recipe.validation:
        data = data.hold_out(recipe.validation)
    steps_per_epoch = num_steps_per_epoch(recipe, data)
    check(recipe, steps_per_epoch)
    torch.set_num_threads(threads)
    moved = data.to(usable(device))
    more: dict[str, Any] = {"base": dict(base)} if base else {}
    lock = claim(folder, identity_of(command, recipe, data, threads, device, compiled) | more)
    title = f"dense {recipe.model}" if command == "base" else f"{recipe.title} ({recipe.source})"
    progress.line(f"{title}, seed {recipe.seed}, {threads} thread{'s' * (threads > 1)}")
    progress.line(f"data: {data.description}")
    progress.line(f"folder: {folder}")
    diagnosis = diagnose(recipe, steps_per_epoch) if command != "base" else None
    if diagnosis is not None:
        progress.line(f"{'' if diagnosis.is_enough else 'WARNING: '}{diagnosis}")
    return Run(recipe, moved, folder, phases, progress, lock, compiled)


def usable(device: str) -> torch.device:
    """The device of this name, set up to give the same bits in every run.

    Raises:
        ValueError: torch has no such device here.
    """
    try:
        found = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device must be cpu, or another that torch can use here, got {device!r}: {reason}") from None
    if found.type == "cuda":
        torch.backends.cudnn.deterministic = True
    return found
