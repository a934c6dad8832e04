"""The loss of one architecture on fixed examples, as a function of its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from pomona.studies.valley.curvature import Loss, Parameters
from pomona.train.evaluate import count_right, cross_entropy
from pomona.zoo.data import Dataset

_BATCH = 1000  # examples at a time, at most
_HESSIAN_BATCH = 200  # the same for second derivatives, which need several times the memory


@dataclass(frozen=True)
class Point:
    """Measurements at one point; accuracies in percent."""

    loss: float
    accuracy: float
    test_accuracy: float


class Landscape:
    """Cross-entropy of one architecture on fixed training examples, as a function of its parameters.

    At a point where nothing was trained BatchNorm has no running statistics, so they are computed there: in ``loss``
    over the current batch, and derivatives include them; in ``measure`` over all examples.

    Args:
        model: the architecture; its parameters are not used.
        data: training examples and test set.
        examples: indices of the training examples.
    """

    def __init__(self, model: nn.Module, data: Dataset, examples: Tensor) -> None:
        self.model = model.eval()
        self.data = data
        self.examples = examples
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for norm in self._norms:
            norm.momentum = None  # the mean over all batches

    def loss(self, parameters: Parameters, batch: Tensor) -> Tensor:
        """The mean loss over a batch of training examples."""
        return cross_entropy(self._logits_by_batch(parameters, self._fresh(), batch), self.data.train_labels[batch])

    def losses(self) -> list[Loss]:
        """Functions whose sum is the mean loss over the examples."""
        batches = self.examples.tensor_split(math.ceil(len(self.examples) / _HESSIAN_BATCH))
        return [partial(self._part, batch=batch) for batch in batches]

    def _part(self, parameters: Parameters, batch: Tensor) -> Tensor:
        return self.loss(parameters, batch) * (len(batch) / len(self.examples))

    @torch.no_grad()
    def measure(self, parameters: Parameters) -> Point:
        """Loss and accuracy on the examples, and accuracy on the test set."""
        buffers = self._fresh()
        batches = self.examples.tensor_split(math.ceil(len(self.examples) / _BATCH))
        for batch in batches if self._norms else ():
            self._logits_by_batch(parameters, buffers, batch)
        loss, right = 0.0, 0
        for batch in batches:
            labels = self.data.train_labels[batch]
            logits = self._logits(parameters, buffers, self.data.train_inputs[batch])
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            right += int(count_right(logits, labels))
        num = self.data.train_labels[self.examples].numel()
        test_right, num_test = 0, self.data.test_labels.numel()
        for start in range(0, len(self.data.test_labels), _BATCH):
            logits = self._logits(parameters, buffers, self.data.test_inputs[start : start + _BATCH])
            test_right += int(count_right(logits, self.data.test_labels[start : start + _BATCH]))
        return Point(loss / num, 100 * right / num, 100 * test_right / num_test)

    def _fresh(self) -> Parameters:
        """The buffers as they are before any batch."""
        for norm in self._norms:
            norm.reset_running_stats()
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _logits_by_batch(self, parameters: Parameters, buffers: Parameters, batch: Tensor) -> Tensor:
        for norm in self._norms:
            norm.train()
        try:
            return self._logits(parameters, buffers, self.data.train_inputs[batch])
        finally:
            for norm in self._norms:
                norm.eval()

    def _logits(self, parameters: Parameters, buffers: Parameters, inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            logits: Tensor = functional_call(self.model, {**parameters, **buffers}, (inputs,))
        return logits
