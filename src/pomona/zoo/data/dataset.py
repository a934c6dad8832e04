"""A data set in memory: its order in an epoch, its batches, its augmentation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SHIFT = 4  # pixels, at most, in each direction


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and labels, all of them in memory.

    Images are normalised, and each has one label. A text is cut into windows of ``context`` characters without gaps
    between them; the label of a character is the next one. With a ``border``, training images are augmented: shifted
    by up to four pixels in each direction, with this colour at the border, and mirrored at random.
    """

    name: str
    description: str  # one line, shown next to every number
    train_inputs: Tensor  # images: float32, [n, channels, height, width]; text: int64, [n, context]
    train_labels: Tensor  # int64, images: [n]; text: [n, context]
    test_inputs: Tensor
    test_labels: Tensor
    border: tuple[float, ...] = ()  # one normalised value per channel

    def to(self, device: torch.device) -> Dataset:
        """The same data on a device."""
        if device == self.train_labels.device:
            return self
        names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def order(self, generator: torch.Generator) -> Tensor:
        """The training examples of an epoch in random order: int64, one row per example, to be passed to ``batch``.

        Images: their indices, [n]; with augmentation [n, 4]: index, shift down and to the right in 0..8, where 4 means
        no shift, and 1 if the image is mirrored.

        Text: positions in it, [n, context]. The windows of each epoch begin at another offset, so that no character is
        always the first of its window. One window runs from the end of the text into its beginning.
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
        """Inputs and labels for some rows of what ``order`` returned, on the device of the data."""
        if self.border:
            return self._augmented(order), self.train_labels[order[:, 0]]
        if order.ndim == 1:
            return self.train_inputs[order], self.train_labels[order]
        return self.train_inputs.flatten()[order], self.train_labels.flatten()[order]

    def _augmented(self, order: Tensor) -> Tensor:
        """The images, augmented, in channels_last layout."""
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
        """The same data with the last ``count`` training examples as the test set."""
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
        """A checksum of the content, independent of its source."""
        digest = hashlib.sha256()
        for tensor in (self.train_inputs, self.train_labels, self.test_inputs, self.test_labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
