"""Selection on other devices than a CPU, by histograms.

Nothing here makes the host wait, nor depends on values, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.score import Score
from pomona.selection.keys import LAST, LEVELS

_DEVICE_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class DeviceSelection:
    """As ``CPUSelection``, with the numbers on the device.

    Attributes:
        scores: what was chosen from.
        key: int32, the threshold of all.
        quota: int64, how many of the scores equal to it stay, the first of all.
        num_infinite: not looked at.
    """

    scores: list[Score]
    key: Tensor
    quota: Tensor
    num_infinite: int = 0

    @property
    def counts(self) -> list[Tensor]:
        return [mask.sum() for mask in self._each()]

    def masks(self) -> list[Tensor]:
        return list(self._each())

    def multiply_(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mask in zip(tensors, self._each(), strict=True):
            tensor.mul_(mask)

    def _each(self) -> Iterator[Tensor]:
        num_before = torch.zeros((), dtype=torch.int64, device=self.key.device)
        for score in self.scores:
            keys = score.tensor().reshape(-1).view(torch.int32)
            rank = (keys == self.key).cumsum(0) + num_before
            yield ((keys > self.key) | ((keys == self.key) & (rank <= self.quota))).view(score.shape)
            num_before = rank[-1] if len(rank) else num_before


def select_on_device(scores: Sequence[Score], k: int) -> DeviceSelection:
    """As ``select_largest``, without a word from the device to the host; a NaN ranks above all."""
    device = scores[0].device
    key = torch.zeros((), dtype=torch.int32, device=device)
    left = torch.full((), k, dtype=torch.int64, device=device)
    for shift, bits in LEVELS:
        bins = torch.zeros(1 << bits, dtype=torch.int64, device=device)
        for score in scores:
            for _, keys in device_pieces(score):
                is_mine = (keys >> (shift + bits)) == key
                bins.scatter_add_(0, ((keys >> shift) & ((1 << bits) - 1)).long(), is_mine.long())
        from_above = bins.flip(0).cumsum(0)
        place = (from_above < left).sum().clamp(max=len(bins) - 1)
        above = from_above.gather(0, place.view(1)) - bins.flip(0).gather(0, place.view(1))
        left = left - above.view(())
        key = (key << bits) | (len(bins) - 1 - place).int()
    # A threshold of zero: fewer than k are not zero, and all of them stay, those equal to the smallest number too.
    everything = key == 0
    if k == 0:
        return DeviceSelection(list(scores), torch.full_like(key, LAST), torch.zeros_like(left))
    return DeviceSelection(list(scores), key.clamp(min=1), torch.where(everything, torch.iinfo(torch.int64).max, left))


def device_pieces(score: Score) -> Iterator[tuple[int, Tensor]]:
    """Position and keys, piece by piece."""
    flat = score.flat()
    for start in range(0, flat.numel(), _DEVICE_CHUNK):
        yield start, flat.piece(start, start + _DEVICE_CHUNK).tensor().view(torch.int32)
