"""Pruning in the Hugging Face Transformers Trainer."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pomona.files import safetensors
from pomona.integrations import attach, check_arguments, load_whole_state, numbers, whole_state
from pomona.method import Method
from pomona.pruner import Pruner
from pomona.reporting import Report
from pomona.scope import Scope

FILE = "pruner.pt"
"""The Pruner's state in each checkpoint folder; ``torch.load(path, weights_only=True)`` opens it."""


class PrunerCallback(TrainerCallback):
    """Prunes the model that a ``Trainer`` trains, or holds its existing zeros.

    It makes the Pruner when training begins and checks whether the run can succeed (``Pruner.diagnose``). Steps are
    optimizer steps, independent of gradient accumulation; ``harden()`` follows the last one, after
    ``load_best_model_at_end``. Each checkpoint folder gets a file ``pruner.pt``, and
    ``train(resume_from_checkpoint=...)`` resumes from it: on a CPU bit for bit as if it had never stopped.

    The Trainer does not tell callbacks which folder it resumes from. The callback looks in ``checkpoint-STEP`` of
    ``output_dir`` and in the folder named by ``TrainingArguments(resume_from_checkpoint=...)``.

    Each training log gets ``pomona/sparsity``, ``pomona/num_skipped`` and the method's metrics. A reporter that the
    Trainer makes from ``report_to`` runs too early to see them; pass it as a callback after this one instead.

    Args:
        method: how weights are pruned; None: hold the zeros that the model has when training begins.
        scope: which weights; default: every trainable weight that a layer multiplies with.
        harden: write exact zeros at the end of training. Without a method they are exact throughout.

    Attributes:
        pruner: the Pruner, set when training begins.
        report: the report of ``harden()``, set when training ends.

    Example:
        >>> callback = PrunerCallback(pomona.Magnitude(0.8))
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        >>> # print(callback.report)
    """

    pruner: Pruner
    report: Report

    def __init__(self, method: Method | None = None, *, scope: Scope | None = None, harden: bool = True) -> None:
        check_arguments(method, scope)
        self.method = method
        self.scope = scope
        self.harden = harden

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if hasattr(self, "pruner"):
            self.pruner.detach()  # left by an earlier call of train()
        if args.report_to:
            warnings.warn(
                f"report_to={args.report_to} will not show Pomona's numbers, because the Trainer calls these reporters "
                f"before this callback; set report_to='none' and pass their callbacks after this one, such as "
                f"callbacks=[PrunerCallback(...), TensorBoardCallback()]",
                stacklevel=2,
            )
        self.pruner = attach(kwargs["model"], kwargs["optimizer"], self.method, self.scope)
        if state.global_step:
            self._restore([args.resume_from_checkpoint, _folder(args, state)])
        elif isinstance(kwargs["lr_scheduler"], LambdaLR):  # most of the Trainer's are; others may follow the loss
            self.pruner.diagnose(state.max_steps, kwargs["lr_scheduler"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        buffer = io.BytesIO()
        torch.save(whole_state(self.pruner), buffer)  # on all ranks, because tensors may be sharded
        folder = _folder(args, state)
        if not args.should_save:
            return
        if not folder.is_dir():
            raise RuntimeError(
                f"the Trainer saved a checkpoint, but not in {folder}, so the Pruner's state cannot be stored with "
                f"it. (hyperparameter_search() makes its own folders: use save_strategy='no' there)"
            )
        safetensors.write(folder / FILE, buffer.getvalue())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            found = numbers(self.pruner)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore([state.best_model_checkpoint])
        self.report = self.pruner.harden() if self.harden else self.pruner.report()

    def _restore(self, folders: list[str | Path | None]) -> None:
        tried = [Path(folder) / FILE for folder in folders if folder]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"there is no Pruner state in {tried[-1].parent}: the checkpoint was saved without PrunerCallback, or "
                f"writing it was interrupted. Resume from a folder that has a {FILE}, or start again. If it is "
                f"elsewhere, set TrainingArguments(resume_from_checkpoint=FOLDER) as well as "
                f"train(resume_from_checkpoint=FOLDER)"
            )
        load_whole_state(self.pruner, torch.load(path, map_location="cpu", weights_only=True), path)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
