"""Pruning in a loop of Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from pomona.integrations import attach, check_arguments, load_whole_state, whole_state
from pomona.method import Method
from pomona.pruner import Pruner
from pomona.scope import Scope


def prune(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    method: Method | None = None,
    *,
    scope: Scope | None = None,
) -> Pruner:
    """A Pruner for a prepared model and optimizer, saved and restored by ``save_state()`` and ``load_state()``.

    Call it after ``accelerator.prepare()`` and before ``load_state()``, on every rank. Names and patterns of the scope
    are those of your own model, whatever it was wrapped in. Steps are those of the optimizer: a batch that only adds
    to the gradients inside ``accelerator.accumulate()`` is none.

    A checkpoint may go on with another number of processes. Its file (``custom_checkpoint_0.pkl``) is written by one
    process, which holds the whole state then, with FSDP2 too.

    Args:
        accelerator: the one that prepared the model.
        model: what ``prepare()`` returned: plain, in DistributedDataParallel, compiled, or sharded by FSDP2.
        optimizer: what ``prepare()`` returned.
        method: how weights are pruned; None: the zeros that are there now are held.
        scope: which weights; default: every trainable weight of two or more dimensions.

    Raises:
        ValueError: the model is of FSDP1 or DeepSpeed, or what else ``Pruner`` raises.
    """
    check_arguments(method, scope)
    plain: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    pruner = attach(plain, optimizer, method, scope)
    accelerator.register_for_checkpointing(_Saved(pruner))
    return pruner


class _Saved:
    """A Pruner as ``save_state()`` needs it: what one process writes is the whole state."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def state_dict(self) -> dict[str, Any]:
        return whole_state(self.pruner)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_whole_state(self.pruner, state, "the checkpoint")
