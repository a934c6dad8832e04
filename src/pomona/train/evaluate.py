"""What a network is worth: accuracy and loss on a test set."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.zoo.data import Dataset

_EVAL_BATCH = 1000  # labels at a time, or fewer where their inputs are
_EVAL_VALUES = 800_000  # of inputs at a time: what is computed from more leaves the cache


class Tested(NamedTuple):
    """Of all labels of the test set: accuracy in percent, and mean cross-entropy in nats."""

    accuracy: float
    loss: float


def evaluate(model: nn.Module, data: Dataset) -> Tested:
    """On the test set, in float32; leaves the model in training mode."""
    model.eval()
    right, loss = 0, 0.0
    most = _EVAL_BATCH // data.test_labels[0].numel(), _EVAL_VALUES // data.test_inputs[0].numel()
    examples = max(1, min(most))
    with torch.no_grad():
        for start in range(0, len(data.test_labels), examples):
            labels = data.test_labels[start : start + examples]
            logits = model(data.test_inputs[start : start + examples])
            right += int(count_right(logits, labels))
            loss += float(cross_entropy(logits, labels, reduction="sum"))
    model.train()
    return Tested(100.0 * right / data.test_labels.numel(), loss / data.test_labels.numel())


def cross_entropy(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """In nats; ``logits`` have a further, last dimension."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels have the largest logit."""
    return (logits.argmax(-1) == labels).sum()
