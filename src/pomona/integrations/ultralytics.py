"""Pruning in the Trainer of Ultralytics: YOLO and what else it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pomona.integrations import attach, check_arguments
from pomona.method import Method
from pomona.pruner import Pruner
from pomona.reporting import Report
from pomona.scope import Scope

KEY = "pomona_pruner"
"""Attribute of the averaged model in each checkpoint, under which the Pruner's state is; not in the final files."""


class PrunerCallback:
    """Prunes the model that Ultralytics trains, or holds its zeros, so that ``best.pt`` and ``last.pt`` have them.

    It makes the Pruner when training begins and cuts before the last ``sparse_epochs`` epochs: from then on the model
    and its moving average, which is what Ultralytics validates and saves, have exact zeros. ``best.pt`` is chosen
    anew from there, among the epochs after the cut: its fitness was measured with the zeros that it has. If training
    stops earlier (``patience``, ``time``), the model is cut, validated and saved then.

    Steps are optimizer steps, of which there are fewer than batches: Ultralytics accumulates gradients up to a nominal
    batch of 64 (``nbs``). A function as ``method`` receives their number up to the cut; :func:`num_steps` computes it.

    The Pruner's state rides in every checkpoint, and ``train(resume=True)`` goes on from it. Ultralytics resumes from
    the average in half precision, so the run does not go on bit for bit; masks, counts and zeros do. One device only.

    Args:
        method: how weights are pruned, or a function that makes it from the number of optimizer steps up to the cut,
            such as ``lambda steps: pomona.Magnitude(pomona.Cubic(0.0, 0.8, steps=steps), every=10)``; None: hold the
            zeros that the model has when training begins.
        scope: which weights, by their names in the model of Ultralytics (``model.22.cv2.*``); default: that of
            :class:`pomona.Scope`.
        sparse_epochs: how many of the last epochs train with exact zeros, >= 0; 0: the cut follows the last step.

    Attributes:
        pruner: the Pruner, set when training begins.
        report: the report of the final model, set when training ends.

    Example:
        >>> callback = PrunerCallback(lambda steps: pomona.Magnitude(pomona.Cubic(0.0, 0.8, steps=steps)))
        >>> # model = YOLO("yolov8n.pt")
        >>> # callback.add_to(model)
        >>> # model.train(data="coco8.yaml", epochs=100)
        >>> # print(callback.report)
    """

    pruner: Pruner
    report: Report

    def __init__(
        self,
        method: Method | Callable[[int], Method] | None = None,
        *,
        scope: Scope | None = None,
        sparse_epochs: int = 1,
    ) -> None:
        check_arguments(None if callable(method) else method, scope)
        if isinstance(sparse_epochs, bool) or not isinstance(sparse_epochs, int) or sparse_epochs < 0:
            raise ValueError(f"sparse_epochs must be a number of epochs, >= 0, got {sparse_epochs!r}")
        self.method = method
        self.scope = scope
        self.sparse_epochs = sparse_epochs

    def add_to(self, model: Any) -> None:
        """Register with a ``YOLO`` or another model of Ultralytics, or with a trainer of your own, before training."""
        for event in (
            "on_pretrain_routine_end",
            "on_train_epoch_start",
            "on_train_epoch_end",
            "on_fit_epoch_end",
            "on_train_end",
        ):
            model.add_callback(event, getattr(self, event))

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        """Make the Pruner; model, optimizer and average have been resumed by now."""
        if trainer.world_size > 1:
            raise ValueError(
                f"PrunerCallback prunes on one device, and this run has {trainer.world_size}: train with device=0, or "
                f"with torchrun and a loop of your own, where a Pruner shares one budget among all ranks"
            )
        if self.sparse_epochs >= trainer.epochs and not trainer.args.time:
            raise ValueError(
                f"sparse_epochs={self.sparse_epochs} of {trainer.epochs} epochs leaves none to prune in; set "
                f"sparse_epochs below epochs"
            )
        if hasattr(self, "pruner"):
            self.pruner.detach()  # left by an earlier call of train()
        self.pruner = attach(_plain(trainer.model), trainer.optimizer, self._method(trainer), self.scope)
        if trainer.resume:
            self._restore(Path(trainer.args.resume))
        else:
            self._diagnose(trainer)

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Cut, if this is the first of the sparse epochs."""
        if getattr(trainer, "nan_recovery_attempts", 0):
            self._restore(trainer.last)  # the trainer has gone back to it and does the epoch again
        if self.sparse_epochs and trainer.epoch >= trainer.epochs - self.sparse_epochs:
            self._cut(trainer)

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Before the epoch is validated and saved: cut after the last step, and let the state ride with the average."""
        if trainer.epoch + 1 >= trainer.epochs:
            self._cut(trainer)
        average = trainer.ema.ema
        if self.pruner.is_hardened:
            self.pruner.harden(average)  # one that was made since, of a checkpoint from before the cut, has no zeros
        setattr(average, KEY, self.pruner.state_dict())

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """After the epoch was saved: if training stops here and nothing was cut, cut, validate and save once more."""
        if trainer.stop and not self.pruner.is_hardened:
            self._cut(trainer)
            trainer.metrics, trainer.fitness = trainer.validate()
            if trainer.args.save:
                trainer.save_model()
        vars(trainer.ema.ema).pop(KEY, None)

    def on_train_end(self, trainer: Any) -> None:
        """Check the zeros of model and average, and take the state out of the final files."""
        self.report = self.pruner.verify(trainer.ema.ema)
        for file in {trainer.last, trainer.best}:
            if file.exists():
                checkpoint = _load(file)
                if vars(checkpoint["model"]).pop(KEY, None):
                    torch.save(checkpoint, file)

    def _method(self, trainer: Any) -> Method | None:
        if not callable(self.method):
            return self.method
        if trainer.args.time:
            raise ValueError(
                "method is a function of the number of steps, which time= leaves open: train with epochs=, or give a "
                "method with steps of your own"
            )
        method = self.method(_steps_of(trainer, trainer.epochs - self.sparse_epochs))
        if not isinstance(method, Method):
            raise TypeError(f"the function given as method must return a pomona.Method, got {method!r}")
        return method

    def _diagnose(self, trainer: Any) -> None:
        """Warn now if the run cannot succeed; the forecast leaves out the warm-up of the learning rate."""
        if trainer.args.time or self.pruner.is_hardened:
            return
        steps = _steps_of(trainer, trainer.epochs - self.sparse_epochs)
        epochs = trainer.epochs - self.sparse_epochs
        self.pruner.diagnose(steps, trainer.scheduler, steps_per_update=max(1, round(steps / epochs)))

    def _cut(self, trainer: Any) -> None:
        if self.pruner.is_hardened:
            return
        self.pruner.harden(trainer.ema.ema)
        # What was best before had no zeros: best.pt is written anew by the next epoch that is validated.
        trainer.best_fitness = None
        trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch

    def _restore(self, file: Path) -> None:
        state = vars(_load(file)["ema"]).get(KEY)
        if state is None:
            raise ValueError(
                f"there is no Pruner state in {file}: it was saved without PrunerCallback; resume without the "
                f"callback, or start again with it"
            )
        try:
            self.pruner.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


def num_steps(images: int, *, epochs: int = 100, batch: int = 16, nbs: int = 64, warmup_epochs: float = 3.0) -> int:
    """How many optimizer steps Ultralytics makes: it accumulates batches up to a nominal one of ``nbs`` images.

    The arguments after the first are those of ``model.train()``, with its defaults. During the first ``warmup_epochs``
    it accumulates from one batch to all of them, so the first steps come faster.

    Args:
        images: number of training images, >= 1.

    Raises:
        ValueError: a number is too small.

    Example:
        >>> num_steps(128, epochs=100, batch=16)  # eight batches an epoch, four batches a step
        205
    """
    for name, value in (("images", images), ("epochs", epochs), ("batch", batch), ("nbs", nbs)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    batches = -(-images // batch)
    accumulate = min(max(round(nbs / batch), 1), batches * epochs)
    return _count(batches, epochs, accumulate, _warmup(warmup_epochs, epochs, batches))


def _steps_of(trainer: Any, epochs: int) -> int:
    """Optimizer steps in the first ``epochs`` of the run that begins."""
    batches = len(trainer.train_loader)
    warmup = _warmup(trainer.args.warmup_epochs, trainer.epochs, batches)
    return _count(batches, epochs, trainer.accumulate, warmup)


def _warmup(warmup_epochs: float, epochs: int, batches: int) -> int:
    """Number of batches in the warm-up, which leaves at least one epoch."""
    return max(round(min(warmup_epochs, max(epochs - 1, 0)) * batches), 0)


def _count(batches: int, epochs: int, accumulate: int, warmup: int) -> int:
    """Walk through the trainer's batches as it does: a step once enough have come since the last one."""
    last, steps = -1, 0
    for i in range(batches * epochs):
        wanted = accumulate
        if warmup and i <= warmup:
            wanted = max(1, int(np.interp(i, [0, warmup], [1, accumulate]).round()))
        if i - last >= wanted:
            last, steps = i, steps + 1
    return steps


def _plain(model: nn.Module) -> nn.Module:
    """Without the wrapper of torch.compile, which the average does not have either."""
    return getattr(model, "_orig_mod", model)


def _load(file: Path) -> dict[str, Any]:
    """A checkpoint as Ultralytics opens it: it holds a whole module, and was written by this run or opened by it."""
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return loaded
