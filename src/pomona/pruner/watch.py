"""Whether training goes on without the Pruner: hooks removed, or steps made by a copy of the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pomona.distributed import local
from pomona.pruner.placement import Placement


class Watch:
    """Remembers one weight as the last step that the Pruner saw left it."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self.mark()

    def mark(self) -> None:
        """The weights are as they should be now."""
        watched = self._placement.first()
        self._version, self._seen = watched._version, _sample(watched)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Changes inside the block do not count."""
        before = self._placement.first()._version
        try:
            yield
        finally:
            self._version += self._placement.first()._version - before

    @property
    def is_touched(self) -> bool:
        """Whether something has written the weight since; it may have the same values."""
        return self._placement.first()._version != self._version

    def warn_if_changed(self, num_steps: int, *, stacklevel: int) -> None:
        """Warn if the weight has changed otherwise than by steps that the Pruner saw."""
        watched = self._placement.first()
        num_changes = watched._version - self._version
        # One change is a load_state_dict or an edit by hand; fused optimizers show as none.
        if num_changes != 1 and not torch.equal(_sample(watched).to(self._seen.device), self._seen):
            times = f"{num_changes} times " if num_changes else ""
            warnings.warn(
                f"the weights were changed {times}since the last optimizer step that this Pruner saw "
                f"(step {num_steps}). If the training loop steps another optimizer, or a copy of this one (deepcopy "
                f"and pickle lose hooks), make a new Pruner with that one and load this one's state_dict() into it. If "
                f"it edits the weights after each step, ignore this.",
                stacklevel=stacklevel + 1,
            )


@torch.no_grad()
def _sample(watched: Tensor) -> Tensor:
    """A few values of the weight; fused optimizers move them without a new version."""
    block = local(watched)
    return block[(0,) * (block.ndim - 1)][:8].clone() if block.ndim and block.numel() else block.clone()
