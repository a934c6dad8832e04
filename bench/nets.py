"""The networks of the table in bench/inference.py: plain modules with weights from a seed, and masks on them.

Weights are random, since speed does not depend on them, and scaled so that activations neither fade nor grow; a state
dict that Pomona trained can take their place (`make`). Batch norms are folded into the convolution before them, which
every runtime would do by itself, so that all runtimes get the same network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pomona.selection.allocation import allocate
from pomona.zoo.models import MODELS

Kernel = nn.Conv2d | nn.Linear
Allocation = Literal["uniform", "erk"]
FIRST_AT_MOST = 0.5  # sparsity of a convnet's first layer under a uniform mask


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 (with the stride) and 1x1, beside a shortcut (arXiv 1512.03385)."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        sizes = [(width, planes, 1, 1), (planes, planes, 3, stride), (planes, 4 * planes, 1, 1)]
        layers: list[nn.Module] = []
        for num_in, num_out, size, step in sizes:
            layers += [
                nn.Conv2d(num_in, num_out, size, step, size // 2, bias=False),
                nn.BatchNorm2d(num_out),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride != 1 or width != 4 * planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50: 25.5 million weights, for images of 224 x 224."""
    blocks: list[nn.Module] = []
    width = 64
    for planes, num, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(num):
            blocks.append(Bottleneck(width, planes, stride if i == 0 else 1))
            width = 4 * planes
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def mobilenet() -> nn.Module:
    """MobileNetV1 at full width (arXiv 1704.04861): 4.2 million weights, for images of 224 x 224."""

    def block(num_in: int, num_out: int, size: int, stride: int, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(num_in, num_out, size, stride, size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(num_out), nn.ReLU()]

    widths = [32, 64, 128, 128, 256, 256, *(6 * [512]), 1024, 1024]
    layers = block(3, 32, 3, 2)
    for num_in, num_out in itertools.pairwise(widths):
        stride = 2 if num_out > num_in > 32 else 1
        layers += [*block(num_in, num_in, 3, stride, groups=num_in), *block(num_in, num_out, 1, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


class MLP(nn.Module):
    """The dense half of a block of BERT: two layers with a GELU between, added to the input."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [n, positions, width] -> the same
        return x + self.down(F.gelu(self.up(x)))


@dataclass(frozen=True)
class Net:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample


NETS = {
    "resnet-50": Net(resnet50, (3, 224, 224)),
    "resnet-56": Net(MODELS["resnet-56"], (3, 32, 32)),
    "mobilenet-v1": Net(mobilenet, (3, 224, 224)),
    "bert-mlp": Net(MLP, (128, 768)),
    "lenet-5": Net(MODELS["lenet-5"], (1, 28, 28)),
    "lenet-300-100": Net(MODELS["lenet-300-100"], (1, 28, 28)),
}


def make(name: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Make the network as it will run: in eval mode, batch norms folded, weights from a seed or a trained state."""
    model = NETS[name].build().eval().requires_grad_(False)
    if state is None:
        _draw(model, torch.Generator().manual_seed(0))
    else:
        model.load_state_dict(state)
    _fold(model)
    return model


def _draw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw kernels with variance 2 / fan_in, and norms with statistics like those after training."""
    for module in model.modules():
        if isinstance(module, Kernel):
            module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(std=0.1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            for scale in (module.weight, module.running_var):
                scale.uniform_(0.5, 1.5, generator=generator)
            for offset in (module.bias, module.running_mean):
                offset.normal_(std=0.1, generator=generator)


def _fold(model: nn.Module) -> None:
    """Fold each batch norm into the convolution registered just before it; all of `NETS` are written in this order."""
    for parent in list(model.modules()):
        for (first, conv), (second, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
                setattr(parent, second, nn.Identity())


def mask_(model: nn.Module, allocation: Allocation, sparsity: float) -> None:
    """Set random weights to zero, and scale the others up so that a layer's output keeps its variance.

    Depthwise kernels stay dense, as usual (they are 1 % of MobileNet's weights). The others together get `sparsity`:
    by "erk" as `pomona.selection.allocation` says; by "uniform" each gets the same, except that the first layer of a
    convnet loses half of its weights at most.
    """
    layers = [layer for layer in kernels(model) if not _is_depthwise(layer)]
    shapes = [layer.weight.shape for layer in layers]
    if allocation == "erk":
        counts = allocate("erk", shapes, round((1 - sparsity) * sum(shape.numel() for shape in shapes)))
    else:
        counts = [round((1 - sparsity) * shape.numel()) for shape in shapes]
        if isinstance(layers[0], nn.Conv2d):
            counts[0] = max(counts[0], round((1 - FIRST_AT_MOST) * shapes[0].numel()))
    generator = torch.Generator().manual_seed(1)
    for layer, count in zip(layers, counts, strict=True):
        weight = layer.weight.view(-1)
        dropped = torch.randperm(weight.numel(), generator=generator)[count:]
        weight[dropped] = 0
        weight *= (weight.numel() / max(count, 1)) ** 0.5


def _is_depthwise(layer: Kernel) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


def kernels(model: nn.Module) -> list[Kernel]:
    return [module for module in model.modules() if isinstance(module, Kernel)]


@dataclass(frozen=True)
class Count:
    """Weights and multiplications for one sample."""

    weights: int  # of kernels
    kept: int
    macs: int
    kept_macs: int


def count(model: nn.Module, shape: tuple[int, ...]) -> Count:
    """Count weights and multiplications, with zeros and without."""
    macs = kept_macs = 0

    def add(layer: Kernel, _: object, output: Tensor) -> None:
        nonlocal macs, kept_macs
        places = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else output[0, ..., 0].numel()
        macs += places * layer.weight.numel()
        kept_macs += places * int(layer.weight.count_nonzero())

    layers = kernels(model)
    handles = [layer.register_forward_hook(add) for layer in layers]
    model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    weights, kept = (sum(f(layer.weight) for layer in layers) for f in (Tensor.numel, Tensor.count_nonzero))
    return Count(weights, int(kept), macs, kept_macs)


# For `pomona bench nets:resnet_50`, run in this folder.
resnet_50, resnet_56, mobilenet_v1, bert_mlp, lenet_5, lenet_300_100 = (partial(make, name) for name in NETS)
