"""What a selection can do, wherever it was made; and selections that are made of others, or of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pomona.distributed import Shard, sum_counts

T = TypeVar("T")


class Selection(Protocol):
    """Which scores are kept."""

    @property
    def counts(self) -> Sequence[int | Tensor]:
        """How many each tensor keeps; on other devices than a CPU an int64 tensor each."""

    @property
    def num_infinite(self) -> int | None:
        """Number of infinite scores; 0 on other devices than a CPU, None where nobody has counted them."""

    def masks(self) -> list[Tensor]:
        """Boolean, of the shapes of the scores, True = kept."""

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        """Multiply each tensor by its mask in place, as ``mul_`` does: a dropped NaN or infinity becomes NaN."""


@dataclass(frozen=True, slots=True)
class JoinedSelection:
    """Several selections as one.

    Attributes:
        parts: each with the places of its tensors among all.
    """

    parts: list[tuple[list[int], Selection]]

    @property
    def counts(self) -> list[int | Tensor]:
        return self._in_order([(places, part.counts) for places, part in self.parts])

    @property
    def num_infinite(self) -> int | None:
        known = [number for _, part in self.parts if (number := part.num_infinite) is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def masks(self) -> list[Tensor]:
        return self._in_order([(places, part.masks()) for places, part in self.parts])

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for places, part in self.parts:
            part.multiply_([tensors[place] for place in places])

    @staticmethod
    def _in_order(answers: Sequence[tuple[list[int], Sequence[T]]]) -> list[T]:
        found = {place: one for places, many in answers for place, one in zip(places, many, strict=True)}
        return [found[place] for place in range(len(found))]


@dataclass(frozen=True, slots=True)
class MaskSelection:
    """A selection by its masks, of groups of scores.

    Attributes:
        kept: the masks, or this rank's part of them.
        shards: the shard of each tensor, None where this rank holds all of it.
    """

    kept: list[Tensor]
    shards: Sequence[Shard | None]

    @property
    def counts(self) -> list[int]:
        """How many each tensor keeps, on all ranks together."""
        return sum_counts([mask.count_nonzero() for mask in self.kept], self.shards)

    @property
    def num_infinite(self) -> int | None:
        return None

    def masks(self) -> list[Tensor]:
        return self.kept

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mask in zip(tensors, self.kept, strict=True):
            tensor.mul_(mask)


@dataclass(frozen=True, slots=True)
class Everything:
    """All stay, zero scores too.

    Attributes:
        tensors: any of the shapes and on the devices of the scores.
        counts: how many weights each tensor has, on all ranks together.
    """

    tensors: list[Tensor]
    counts: list[int]

    @property
    def num_infinite(self) -> int | None:
        return None

    def masks(self) -> list[Tensor]:
        return [torch.ones_like(t, dtype=torch.bool) for t in self.tensors]

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        pass
