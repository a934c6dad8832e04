"""What a selection can do, wherever it was made; and selections that are made of others, or of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Selection(Protocol):
    """Which scores are kept."""

    @property
    def counts(self) -> Sequence[int | Tensor]:
        """How many each tensor keeps; on other devices than a CPU an int64 tensor each."""

    @property
    def num_infinite(self) -> int:
        """Scores that are infinite; 0 on other devices than a CPU, where nobody looks."""

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
    def num_infinite(self) -> int:
        return sum(part.num_infinite for _, part in self.parts)

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
        counts: how many each tensor keeps on all ranks together.
        num_infinite: not looked at.
    """

    kept: list[Tensor]
    counts: list[int]
    num_infinite: int = 0

    def masks(self) -> list[Tensor]:
        return self.kept

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mask in zip(tensors, self.kept, strict=True):
            tensor.mul_(mask)
