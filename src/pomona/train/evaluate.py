"""Accuracy and loss of a network on a test set."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.zoo.data import Dataset

_EVAL_BATCH = 1000  # labels at a time, at most
_EVAL_VALUES = 800_000  # input values at a time, at most: the activations of more do not fit in the cache


class Tested(NamedTuple):
    """Accuracy in percent and mean cross-entropy in nats, over all labels of the test set."""

    accuracy: float
    loss: float


def evaluate(model: nn.Module, data: Dataset) -> Tested:
    """Test a model on the test set, in float32; leaves it in training mode."""
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
    """Cross-entropy in nats; ``logits`` have one more dimension than ``labels``, the last."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def count_right(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of examples whose label has the largest logit."""
    return (logits.argmax(-1) == labels).sum()
