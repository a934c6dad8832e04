"""Where the packages of requirements.txt are, and what PyPI's torchvision needs beside a torch for CPUs."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "build" / "foreign"
_libraries: list[torch.library.Library] = []  # a definition lasts as long as its library


def prepare() -> None:
    """Make the packages importable in this process; nothing is fetched from the network when they are."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("YOLO_OFFLINE", "True")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / "pomona-foreign"))
    os.environ.setdefault("YOLO_AUTOINSTALL", "False")
    if find_spec("torchvision") and not _libraries and not _loads():
        _define()


def _loads() -> bool:
    """Whether torchvision's compiled operations fit this torch; those of PyPI on Linux are for CUDA."""
    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C.*"))))
    except (OSError, StopIteration):
        return False
    return True


def _define() -> None:
    """Define the operations that torchvision's Python looks for when it is imported; ``nms`` also gets its rule.

    All of torchvision's models, transforms and ``ops.nms`` then work; what else is compiled there is absent.
    """
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _libraries.append(library)
    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None  # it asks for the compiled library, not for nms


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep the best box, drop what overlaps it by more than the threshold, and so on."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left, kept = scores.argsort(descending=True, stable=True), []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        corners = torch.maximum(boxes[best, :2], boxes[left, :2]), torch.minimum(boxes[best, 2:], boxes[left, 2:])
        overlap = (corners[1] - corners[0]).clamp(min=0).prod(1)
        left = left[overlap <= iou_threshold * (areas[best] + areas[left] - overlap)]
    return torch.stack(kept) if kept else left
