"""What stands in for torchvision's compiled library does what the library does."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.check


def test_overlapping_boxes_are_dropped_best_first() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="build/foreign is not there: make build/foreign/.installed")
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 5, 10, 15]])
    scores = torch.tensor([0.8, 0.9, 0.5, 0.7])
    # 1 is the best and overlaps 0 by 90 / 100, and 3 by 40 / 150.
    assert ops.nms(boxes, scores, 0.5).tolist() == [1, 3, 2]
    assert ops.nms(boxes, scores, 0.2).tolist() == [1, 2]
    assert ops.nms(boxes, scores, 0.95).tolist() == [1, 0, 3, 2]
    assert ops.nms(boxes[:0], scores[:0], 0.5).tolist() == []
    kinds = torch.tensor([0, 1, 0, 0])
    assert ops.batched_nms(boxes, scores, kinds, 0.5).tolist() == [1, 0, 3, 2]
