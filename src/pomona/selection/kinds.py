"""What all selections can do, and those that consist of other selections or of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pomona.distributed import Shard, sum_counts

T = TypeVar("T")


class Selection(Protocol):
    """Which scores are kept."""

    @property
    def counts(self) -> Sequence[int | Tensor]:
        """How many scores of each tensor are kept; on other devices than a CPU as int64 tensors."""

    @property
    def num_infinite(self) -> int | None:
        """Number of infinite scores; 0 on other devices than a CPU, None where nobody has counted them."""

    def masks(self) -> list[Tensor]:
        """A boolean mask for each tensor, of its shape; True = kept."""

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        """Multiply each tensor by its mask in place, as ``mul_`` does: a dropped NaN or infinity becomes NaN."""


@dataclass(frozen=True, slots=True)
class JoinedSelection:
    """Several selections in one.

    Attributes:
        parts: the selections, each with the places of its tensors among all tensors.
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
class StackedSelection:
    """A selection of matrices, seen as one of the tensors in which they lie along dimension 0.

    Attributes:
        matrices: the selection.
        rows: for each tensor how many rows of it, on this rank, each of its matrices has.
    """

    matrices: Selection
    rows: list[list[int]]

    @property
    def counts(self) -> list[int | Tensor]:
        return [sum(some) for some in self._by_tensor(self.matrices.counts)]

    @property
    def num_infinite(self) -> int | None:
        return self.matrices.num_infinite

    def masks(self) -> list[Tensor]:
        return [some[0] if len(some) == 1 else torch.cat(list(some)) for some in self._by_tensor(self.matrices.masks())]

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        parts = zip(tensors, self.rows, strict=True)
        self.matrices.multiply_([one for t, rows in parts for one in (split_rows(t, rows))])

    def _by_tensor(self, answers: Sequence[T]) -> list[Sequence[T]]:
        ends = list(accumulate(map(len, self.rows)))
        return [answers[end - len(rows) : end] for end, rows in zip(ends, self.rows, strict=True)]


def split_rows(tensor: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """The parts of dimension 0 that have these numbers of rows; the tensor itself if it is one part."""
    return [tensor] if len(rows) == 1 else torch.split(tensor, list(rows))


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
