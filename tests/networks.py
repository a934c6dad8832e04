"""Small networks in the manner of well-known ones, for the tests of the runtime and of shrinking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def randomised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics of batch norms that are none of their initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(std=0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, std=0.2, generator=generator)
    return model.eval()


def sparsified(model: nn.Module, sparsity: float) -> nn.Module:
    """With the smallest kernel weights of each layer zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                num = int(parameter.numel() * sparsity)
                threshold = parameter.abs().flatten().kthvalue(max(num, 1)).values
                parameter.mul_(parameter.abs() > threshold)
    return model


def conv_norm(
    width: int, planes: int, kernel: int, act: type[nn.Module] | None = nn.ReLU, **settings: int
) -> nn.Module:
    layers = [
        nn.Conv2d(width, planes, kernel, padding=kernel // 2, bias=False, **settings),
        nn.BatchNorm2d(planes),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a projection, added in place: a block of ResNet-50."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(width, planes, 1),
            conv_norm(planes, planes, 3, stride=stride),
            conv_norm(planes, 4 * planes, 1, None),
        )
        self.downsample = conv_norm(width, 4 * planes, 1, None, stride=stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.downsample(x)
        return self.relu(out)


def resnet50_like() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        Bottleneck(8, 4, 1),
        Bottleneck(16, 8, 2),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def mobilenet_like() -> nn.Module:
    """MobileNetV1: depthwise and pointwise."""

    def block(width: int, planes: int, stride: int) -> nn.Module:
        depthwise = conv_norm(width, width, 3, nn.ReLU6, stride=stride, groups=width)
        return nn.Sequential(depthwise, conv_norm(width, planes, 1, nn.ReLU6))

    body = [conv_norm(3, 8, 3, nn.ReLU6, stride=2), block(8, 16, 1), block(16, 32, 2)]
    return nn.Sequential(*body, nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 10))


class SqueezeExcite(nn.Module):
    """By linear layers, as SENet has it, or by convolutions, as MobileNetV3 has it."""

    def __init__(self, width: int, *, by_linear: bool) -> None:
        super().__init__()
        if by_linear:
            self.layers = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())
        else:
            self.layers = nn.Sequential(nn.Conv2d(width, 4, 1), nn.SiLU(), nn.Conv2d(4, width, 1), nn.Hardsigmoid())
        self.by_linear = by_linear

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        if self.by_linear:
            return x * self.layers(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1).expand_as(x)
        return self.layers(x.mean((2, 3), keepdim=True)) * x


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project, add: a block of MobileNetV3 and of EfficientNet."""

    def __init__(self, width: int, *, by_linear: bool) -> None:
        super().__init__()
        self.expand = conv_norm(width, 3 * width, 1, nn.Hardswish)
        self.depthwise = conv_norm(3 * width, 3 * width, 5, nn.SiLU, groups=3 * width)
        self.excite = SqueezeExcite(3 * width, by_linear=by_linear)
        self.project = conv_norm(3 * width, width, 1, None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.excite(self.depthwise(self.expand(x))))


def mobilenet_v3_like() -> nn.Module:
    blocks = [InvertedResidual(8, by_linear=True), InvertedResidual(8, by_linear=False)]
    return nn.Sequential(conv_norm(3, 8, 3, nn.Hardswish, stride=2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class SamePadded(nn.Module):
    """A convolution of EfficientNet-Lite: padded as TensorFlow does it, more on the right."""

    def __init__(self, width: int, planes: int, kernel: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d(((kernel - stride) // 2, kernel - stride - (kernel - stride) // 2) * 2)
        self.conv = nn.Conv2d(width, planes, kernel, stride=stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(planes, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.norm(self.conv(self.pad(x))))


def efficientnet_lite_like() -> nn.Module:
    stem = SamePadded(3, 8, 3, stride=2, groups=1)
    return nn.Sequential(
        stem, SamePadded(8, 8, 5, stride=2, groups=8), nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
    )


class DenseLayer(nn.Module):
    """Norm and ReLU first; what it makes is put behind what it takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 16, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.norm2(out), inplace=True))], 1)


def densenet_like() -> nn.Module:
    transition = [nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2, 2)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), DenseLayer(8), DenseLayer(12), *transition, DenseLayer(8), nn.BatchNorm2d(12)
    )


class BertMLP(nn.Module):
    """Two dense layers on tokens, and the residual."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Transposed(nn.Module):
    """Weights (inputs, outputs), tokens flattened into the batch: the dense layers of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.second = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 8)
        return F.gelu(y, approximate="tanh") @ self.second.t()


NETWORKS = {
    "resnet50-like": (resnet50_like, (3, 33, 35)),
    "mobilenet-like": (mobilenet_like, (3, 16, 16)),
    "mobilenet-v3-like": (mobilenet_v3_like, (3, 15, 16)),
    "efficientnet-lite-like": (efficientnet_lite_like, (3, 16, 16)),
    "densenet-like": (densenet_like, (3, 10, 10)),
    "bert-mlp": (BertMLP, (7, 16)),
    "transposed": (Transposed, (7, 6)),
}
