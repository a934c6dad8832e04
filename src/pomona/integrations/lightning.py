"""Lightning: a callback that prunes during ``Trainer.fit``, for both ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from pomona.integrations import attach, check_arguments, load_whole_state, numbers, whole_state
from pomona.method import Method
from pomona.pruner import Pruner
from pomona.reporting import Report
from pomona.scope import Scope


def _bases() -> tuple[Any, ...]:
    """``Callback`` of each installed package: each Trainer accepts only its own, and they are two classes."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "pomona.integrations.lightning needs Lightning, which is not installed: pip install lightning"
        )
    return tuple(found)


class PrunerCallback(*_bases()):  # type: ignore[misc]
    """Prunes the LightningModule while it trains, and makes the zeros exact at the end of training.

    It makes the ``Pruner`` when training starts, checks whether the run can succeed (``Pruner.diagnose``; with manual
    optimization call it yourself), saves its state in every checkpoint, restores it with ``fit(ckpt_path=...)``, logs
    ``pomona.integrations.numbers`` as often as the Trainer logs, and hardens when training ends. It then verifies that
    no later callback has revived a zero. Another ``fit`` of the same module continues where the last one ended.
    Automatic and manual optimization, accumulation, clipping and mixed precision are supported. It adds no cost of its
    own to that of the ``Pruner``.

    Args:
        method: how weights are pruned, e.g. ``pomona.GSM(sparsity=0.9)``; None: hold the module's existing zeros.
        scope: which weights, by their names in the LightningModule; default: all that a layer multiplies with.
        optimizer: index in ``configure_optimizers``, counted from 0; needed only if there are several. Then ``scope``
            must leave out the weights of the others. Each optimizer may have its own callback.
        harden: whether to write the zeros when training ends. With False call ``callback.pruner.harden()`` yourself.

    Attributes:
        pruner: the ``Pruner`` of the last ``fit``; None before the first.
        report: the ``Report`` at the end of the last ``fit``; None before the first.

    Raises:
        ValueError: when training starts: there is no optimizer with this index, there are several and none is chosen,
            a checkpoint holds the state of another callback, or the ``Pruner`` refuses something.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = PrunerCallback(pomona.GSM(sparsity=0.9))
        >>> trainer = Trainer(callbacks=[callback], max_epochs=10)  # trainer.fit(module); print(callback.report)
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        scope: Scope | None = None,
        optimizer: int | None = None,
        harden: bool = True,
    ) -> None:
        check_arguments(method, scope)
        if optimizer is not None and (isinstance(optimizer, bool) or not isinstance(optimizer, int) or optimizer < 0):
            raise ValueError(f"optimizer must be an index in configure_optimizers, >= 0, got {optimizer!r}")
        self.method = method
        self.scope = scope
        self.optimizer = optimizer
        self.harden = harden
        self.pruner: Pruner | None = None
        self.report: Report | None = None
        self._restored: Mapping[str, Any] | None = None  # from the checkpoint that the starting fit resumes
        self._is_started = False
        self._logged_at = 0  # step

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; it differs between optimizers and scopes."""
        return f"PrunerCallback(optimizer={self.optimizer}, scope={self.scope})"

    def state_dict(self) -> dict[str, Any]:
        return whole_state(self.pruner) if self.pruner else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        others = [key for key in checkpoint["callbacks"] if str(key).startswith("PrunerCallback(")]
        if others and self.state_key not in others:
            raise ValueError(
                f"the checkpoint has the state of {' and '.join(others)}, but this callback is {self.state_key}"
            )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restored, self._is_started = None, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer.optimizers, pl_module)
        if pl_module.automatic_optimization and not trainer.global_step:
            self._diagnose(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        assert self.pruner is not None
        # There is no public way to ask; Lightning's own LearningRateMonitor does the same.
        if trainer._logger_connector.should_update_logs and self.pruner.num_steps != self._logged_at:
            self._logged_at = self.pruner.num_steps
            pl_module.log_dict(numbers(self.pruner))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish()
        assert self.pruner is not None
        last = numbers(self.pruner)
        for logger in trainer.loggers:  # self.log() no longer works here
            logger.log_metrics(last, step=trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._is_started and self._restored:  # resumed at the last step: there was nothing left to train
            self._start(trainer.optimizers, pl_module)
            self._finish()
        if self._is_started and self.pruner is not None and self.pruner.is_hardened:
            try:
                self.pruner.verify()
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}. A callback that writes weights when training ends, such as one that averages them, must "
                    f"come before PrunerCallback in callbacks=[...]"
                ) from None

    def _start(self, optimizers: list[Optimizer], module: Any) -> None:
        before = self.pruner.state_dict() if self.pruner and self.pruner.model is module else None
        if self.pruner:
            self.pruner.detach()
        self.pruner = attach(module, optimizers[self._place(len(optimizers))], self.method, self.scope)
        if self._restored:
            load_whole_state(self.pruner, self._restored, "the checkpoint")
        elif before:
            self.pruner.load_state_dict(before)
        self._is_started, self._logged_at = True, self.pruner.num_steps

    def _diagnose(self, trainer: Any) -> None:
        """Warn if the run cannot succeed; unknown for unbounded runs and for ReduceLROnPlateau."""
        assert self.pruner is not None
        num_steps, config = trainer.estimated_stepping_batches, next(iter(trainer.lr_scheduler_configs), None)
        if not math.isfinite(num_steps) or num_steps < 1 or (config and config.reduce_on_plateau):
            return
        if config is None:
            self.pruner.diagnose(num_steps)
            return
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        update = config.frequency * (1 if config.interval == "step" else per_epoch)
        self.pruner.diagnose(num_steps, config.scheduler, steps_per_update=update)

    def _place(self, count: int) -> int:
        if self.optimizer is None and count != 1:
            raise ValueError(
                f"configure_optimizers returned {count} optimizers; choose one: PrunerCallback(..., optimizer=0), with "
                f"a scope that leaves out the weights of the others"
            )
        if self.optimizer is not None and self.optimizer >= count:
            raise ValueError(f"optimizer must be below {count}, the number of optimizers, got {self.optimizer}")
        return self.optimizer or 0

    def _finish(self) -> None:
        assert self.pruner is not None
        self.pruner.mark()  # an earlier callback may have replaced the weights by their average: no reason to warn
        self.report = self.pruner.harden() if self.harden else self.pruner.report()
