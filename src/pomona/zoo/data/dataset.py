"""A data set in memory: its order in an epoch, its batches, its augmentation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SHIFT = 4  # pixels, at most, in each direction


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels, whole in memory.

    Images, normalised, have a label each. A text is cut into windows of ``context`` characters, which follow one
    another without a gap; the label of a character is the next one. ``border`` is there if training images are
    augmented: shifted by up to four pixels in each direction, what comes in having this colour, and mirrored or not.
    """

    name: str
    description: str  # one line, to be shown wherever a number is shown
    train_inputs: Tensor  # float32, [n, channels, height, width]; of a text int64, [n, context]
    train_labels: Tensor  # int64, [n]; of a text [n, context]
    test_inputs: Tensor
    test_labels: Tensor
    border: tuple[float, ...] = ()  # of each channel, normalised

    def to(self, device: torch.device) -> Dataset:
        """The same on a device."""
        if device == self.train_labels.device:
            return self
        names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def order(self, generator: torch.Generator) -> Tensor:
        """Which training examples an epoch visits, in random order: int64, a row each, for ``batch``.

        Of images the index, [n]; with augmentation [n, 4]: index, shift down and to the right in 0..8, of which 4 is
        none, and 1 if it is mirrored.

        Of a text places in it, [n, context]: the windows of an epoch begin at an offset of its own, so that no
        character always is the first that its window shows. One window runs from the end of the text into its
        beginning.
        """
        examples = torch.randperm(len(self.train_labels), generator=generator)
        if self.border:
            shifts = torch.randint(2 * _SHIFT + 1, (len(examples), 2), generator=generator)
            mirrored = torch.randint(2, (len(examples), 1), generator=generator)
            return torch.cat([examples[:, None], shifts, mirrored], dim=1)
        if self.train_labels.ndim == 1:
            return examples
        context = self.train_labels.shape[1]
        offset = torch.randint(context, (1,), generator=generator)
        return (examples[:, None] * context + torch.arange(context) + offset) % self.train_labels.numel()

    def batch(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a part of what ``order`` returned, on the device of the data."""
        if self.border:
            return self._augmented(order), self.train_labels[order[:, 0]]
        if order.ndim == 1:
            return self.train_inputs[order], self.train_labels[order]
        return self.train_inputs.flatten()[order], self.train_labels.flatten()[order]

    def _augmented(self, order: Tensor) -> Tensor:
        """Images in the layout of channels_last."""
        images = self.train_inputs[order[:, 0]]
        n, channels, height, width = images.shape
        padded = images.new_tensor(self.border).view(1, channels, 1, 1)
        padded = padded.repeat(n, 1, height + 2 * _SHIFT, width + 2 * _SHIFT)
        padded[:, :, _SHIFT:-_SHIFT, _SHIFT:-_SHIFT] = images
        along = torch.arange(width, device=order.device)
        columns = torch.where(order[:, 3:] == 1, along.flip(0), along) + 2 * _SHIFT - order[:, 2:3]
        rows = torch.arange(height, device=order.device) + 2 * _SHIFT - order[:, 1:2]
        every = torch.arange(n, device=order.device)[:, None, None]
        return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def hold_out(self, count: int) -> Dataset:
        """The same without the test set: the last ``count`` training examples are tested on in its place."""
        left = len(self.train_labels) - count
        if not 0 < count <= left:
            raise ValueError(
                f"validation must be in [1, {len(self.train_labels) // 2}], half of the training examples, got {count}"
            )
        return replace(
            self,
            description=f"{self.description}, of which the last {count:,} training examples serve as the test",
            train_inputs=self.train_inputs[:left],
            train_labels=self.train_labels[:left],
            test_inputs=self.train_inputs[left:],
            test_labels=self.train_labels[left:],
        )

    @property
    def checksum(self) -> str:
        """Of the content, wherever it came from."""
        digest = hashlib.sha256()
        for tensor in (self.train_inputs, self.train_labels, self.test_inputs, self.test_labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
