"""Pruning in a Hugging Face Accelerate loop."""

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
    """Make a Pruner for a prepared model and optimizer that ``save_state()`` and ``load_state()`` save and restore.

    Call it after ``accelerator.prepare()`` and before ``load_state()``, on every rank. Names and scope patterns are
    those of your own model, without its wrappers. Steps are optimizer steps: a batch that only accumulates gradients
    inside ``accelerator.accumulate()`` does not count.

    A checkpoint can be resumed with another number of processes. One process writes its file
    (``custom_checkpoint_0.pkl``) and then holds the whole state, with FSDP2 too.

    Args:
        accelerator: the one that prepared the model.
        model: returned by ``prepare()``: plain, in DistributedDataParallel, compiled, or sharded by FSDP2.
        optimizer: returned by ``prepare()``.
        method: how weights are pruned; None: hold the model's current zeros.
        scope: which weights; default: every trainable weight that a layer multiplies with.

    Raises:
        ValueError: the model uses FSDP1 or DeepSpeed, or ``Pruner`` refuses it for another reason.
    """
    check_arguments(method, scope)
    plain: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    pruner = attach(plain, optimizer, method, scope)
    accelerator.register_for_checkpointing(_Saved(pruner))
    return pruner


class _Saved:
    """Adapts a Pruner to ``save_state()``, where one process writes the whole state."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def state_dict(self) -> dict[str, Any]:
        return whole_state(self.pruner)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_whole_state(self.pruner, state, "the checkpoint")
