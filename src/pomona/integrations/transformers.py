"""Pruning in the Trainer of Hugging Face Transformers."""

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
    """Prunes what a ``Trainer`` trains, or holds the zeros that its model has.

    Makes the Pruner when training begins, and asks it whether the run can succeed (``Pruner.diagnose``). Steps are
    those of the optimizer, however many batches each accumulates; ``harden()`` follows the last of them, after
    ``load_best_model_at_end``. Each checkpoint folder gets a file ``pruner.pt``, and
    ``train(resume_from_checkpoint=...)`` goes on from it: on a CPU bit for bit as if it had never stopped.

    The Trainer does not tell callbacks from which folder it resumes. It is ``checkpoint-STEP`` of ``output_dir``, or
    else what ``TrainingArguments(resume_from_checkpoint=...)`` says.

    Each training log gets ``pomona/sparsity``, ``pomona/num_skipped`` and the method's metrics. A reporter that the
    Trainer makes from ``report_to`` is called too early to see them; given as a callback after this one it does.

    Args:
        method: how weights are pruned; None: the zeros that are there when training begins are held.
        scope: which weights; default: every trainable weight of two or more dimensions.
        harden: write exact zeros at the end of training. Without a method they are exact all along.

    Attributes:
        pruner: the Pruner, from the begin of training on.
        report: what ``harden()`` reported, after the end of training.

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
            self.pruner.detach()  # of an earlier call of train()
        if args.report_to:
            warnings.warn(
                f"{args.report_to} of report_to will not show the numbers of Pomona, because the Trainer calls it "
                f"before this callback; take report_to='none' and give its callback behind this one, such as "
                f"callbacks=[PrunerCallback(...), TensorBoardCallback()]",
                stacklevel=2,
            )
        self.pruner = attach(kwargs["model"], kwargs["optimizer"], self.method, self.scope)
        if state.global_step:
            self._restore([args.resume_from_checkpoint, _folder(args, state)])
        elif isinstance(kwargs["lr_scheduler"], LambdaLR):  # as most of the Trainer's are; others may follow the loss
            self.pruner.diagnose(state.max_steps, kwargs["lr_scheduler"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        buffer = io.BytesIO()
        torch.save(whole_state(self.pruner), buffer)  # on all ranks, for tensors may be spread over them
        folder = _folder(args, state)
        if not args.should_save:
            return
        if not folder.is_dir():
            raise RuntimeError(
                f"the Trainer has saved a checkpoint, but not into {folder}, so the Pruner's state has no place beside "
                f"it. (hyperparameter_search() makes folders of its own: take save_strategy='no' there)"
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
                f"there is no state of a Pruner in {tried[-1].parent}: it was saved without PrunerCallback, or cut off "
                f"while it was written. Resume from a folder that has a {FILE}, or start anew. If it lies elsewhere, "
                f"say TrainingArguments(resume_from_checkpoint=FOLDER) as well as train(resume_from_checkpoint=FOLDER)"
            )
        load_whole_state(self.pruner, torch.load(path, map_location="cpu", weights_only=True), path)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
