"""Lightning: a callback that prunes while ``Trainer.fit`` trains, for ``lightning`` and ``pytorch_lightning`` alike."""

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
    """``Callback`` of the packages that are there: a Trainer wants that of its own, and they are two classes."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not found:
        raise ImportError(
            "pomona.integrations.lightning is for Lightning, which is not installed: pip install lightning"
        )
    return tuple(found)


class PrunerCallback(*_bases()):  # type: ignore[misc]
    """Prunes the LightningModule while it trains, and makes the zeros exact at the end of training.

    It makes the ``Pruner`` when training starts, asks it whether the run can succeed (``Pruner.diagnose``; with manual
    optimization ask yourself), saves its state in every checkpoint, restores it with
    ``fit(ckpt_path=...)``, logs ``pomona.integrations.numbers`` as often as the Trainer logs, and hardens when
    training ends; then it is verified that no later callback has revived a zero. A further ``fit`` of the same module
    goes on where the last one ended. Automatic and manual optimization, accumulation, clipping, mixed precision.
    The time and memory are those of the ``Pruner``.

    Args:
        method: how weights are pruned, e.g. ``pomona.GSM(sparsity=0.9)``; None: hold the zeros that the module has.
        scope: which weights, by their names in the LightningModule; default: all of two or more dimensions.
        optimizer: which one of ``configure_optimizers``, counted from 0; needed only if there are several. Then
            ``scope`` has to leave out what the others hold. For each a callback of its own may be given.
        harden: whether to write the zeros when training ends. With False call ``callback.pruner.harden()`` yourself.

    Attributes:
        pruner: the ``Pruner`` of the last ``fit``; None before.
        report: the ``Report`` at the end of the last ``fit``; None before.

    Raises:
        ValueError: when training starts: there is no optimizer of this number, or several and none is named, a
            checkpoint holds the state of another callback, or what the ``Pruner`` itself refuses.

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
            raise ValueError(f"optimizer must be a number >= 0, its place in configure_optimizers, got {optimizer!r}")
        self.method = method
        self.scope = scope
        self.optimizer = optimizer
        self.harden = harden
        self.pruner: Pruner | None = None
        self.report: Report | None = None
        self._restored: Mapping[str, Any] | None = None  # from the checkpoint of the fit that is starting
        self._is_started = False
        self._logged_at = 0  # step

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint; callbacks of other optimizers or scopes have others."""
        return f"PrunerCallback(optimizer={self.optimizer}, scope={self.scope})"

    def state_dict(self) -> dict[str, Any]:
        return whole_state(self.pruner) if self.pruner else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        others = [key for key in checkpoint["callbacks"] if str(key).startswith("PrunerCallback(")]
        if others and self.state_key not in others:
            raise ValueError(f"the checkpoint has the state of {' and of '.join(others)}, but this is {self.state_key}")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restored, self._is_started = None, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer.optimizers, pl_module)
        if pl_module.automatic_optimization and not trainer.global_step:
            self._diagnose(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        assert self.pruner is not None
        # Lightning's own LearningRateMonitor asks in this way too; there is no public one.
        if trainer._logger_connector.should_update_logs and self.pruner.num_steps != self._logged_at:
            self._logged_at = self.pruner.num_steps
            pl_module.log_dict(numbers(self.pruner))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish()
        assert self.pruner is not None
        last = numbers(self.pruner)
        for logger in trainer.loggers:  # self.log() is over by now
            logger.log_metrics(last, step=trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._is_started and self._restored:  # a checkpoint of the last step: there was nothing left to train
            self._start(trainer.optimizers, pl_module)
            self._finish()
        if self._is_started and self.pruner is not None and self.pruner.is_hardened:
            try:
                self.pruner.verify()
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}. A callback that writes weights when training ends, such as an average of them, has to "
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
        """Whether the run can succeed; of endless runs, and of learning rates that follow the loss, nobody knows."""
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
                f"configure_optimizers gave {count} optimizers; say which: PrunerCallback(..., optimizer=0), with a "
                f"scope that leaves out what the others hold"
            )
        if self.optimizer is not None and self.optimizer >= count:
            raise ValueError(f"optimizer must be below {count}, as many as there are, got {self.optimizer}")
        return self.optimizer or 0

    def _finish(self) -> None:
        assert self.pruner is not None
        self.pruner.mark()  # an average that an earlier callback has put in place of the weights is no cause to warn
        self.report = self.pruner.harden() if self.harden else self.pruner.report()
