"""Small networks drawn at random, of all that stands between layers, with dead and silent channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks import Lambda

Draw = Callable[[int], int]
"""A number below the given one."""


class Residual(nn.Module):
    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        inner = (width, 5)[draw(2)]
        norm = (nn.BatchNorm2d(inner), nn.Identity(), nn.GroupNorm(1, inner))[draw(3)]
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 3, padding=1, bias=bool(draw(2))), norm, nn.ReLU(), nn.Conv2d(inner, width, 1)
        )
        self.is_in_place = bool(draw(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.is_in_place:
            y += x
            return F.relu_(y)
        return (y + x).relu()


class Joined(nn.Module):
    """Concatenation, of layers or with the input."""

    def __init__(self, width: int, out: int, draw: Draw) -> None:
        super().__init__()
        self.with_input = bool(draw(2))
        self.a, self.b = nn.Conv2d(width, out - 3, 1), nn.Conv2d(width, 3, 3, padding=1)
        self.mix = nn.Conv2d(out + (width if self.with_input else 0), out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(torch.cat([self.a(x), self.b(x), *([x] if self.with_input else [])], 1))
        return y


class Gated(nn.Module):
    """Halves of a layer that meet again, or do not."""

    def __init__(self, width: int, out: int, draw: Draw) -> None:
        super().__init__()
        self.kind, self.size = draw(6), out
        self.make, self.last = nn.Conv2d(width, 2 * out, 1), nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x)
        half = y.shape[1] // 2
        if self.kind == 0:
            return F.glu(y, 1)
        if self.kind == 1:
            a, b = y.chunk(2, 1)
            return a * b.sigmoid()
        if self.kind == 2:
            a, b = y.split(self.size, 1)  # a size that the code holds on to
            return a * b.tanh()
        if self.kind == 3:
            return y[:, :half] * y[:, half:].relu()
        if self.kind == 4:
            a, b = y[:, : self.size], y[:, self.size :]
            return self.last(a) + self.last(b)
        a, b = y.chunk(2, 1)
        return self.last(a) + b


class Squeezed(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)
        self.with_view = bool(draw(2))

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.view(x.shape[0], x.shape[1], -1).mean(2)[..., None, None] if self.with_view else x.mean((2, 3), True)
        return x * self.up(self.down(pooled).relu()).sigmoid()


class Scaled(nn.Module):
    """A parameter for each channel, or for each channel and place of a batch of one."""

    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        shape = ((width, 1, 1), (1, width, 1, 1), (1,))[draw(3)]
        self.scale, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class LastNorm(nn.Module):
    """Layer norm over channels, or over each channel's places, or a linear layer between channels placed last."""

    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        self.kind = draw(3)
        self.norm = nn.LayerNorm(width) if self.kind == 0 else nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 1:
            return F.layer_norm(x, x.shape[2:])
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), (1, 2)[draw(2)]

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        q, k, v = (y.view(b, h * w, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        if self.heads == 1:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(b, h * w, -1))
        return y.transpose(1, 2).reshape(b, c, h, w)


class Written(nn.Module):
    """Changes its input in place, by a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x[:, :2] = 0.5
        x[:, 1:].mul_(2.0)
        return x


class Same(nn.Module):
    """One layer, called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x).relu())
        return y


FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, F.hardswish, F.leaky_relu, F.softplus, torch.cos, torch.abs,
    lambda x: F.relu(x, inplace=True), lambda x: x.clamp(-1, 1), lambda x: F.elu(x) + 1, lambda x: 2 - x * 3,
    lambda x: torch.where(x > 0.3, x, 0.2), lambda x: x.softmax(1), lambda x: x.softmax(-1), lambda x: F.normalize(x),
    lambda x: x - x.mean(1, keepdim=True), lambda x: x * x.amax(1, keepdim=True).sigmoid(),
    lambda x: x - x.mean((2, 3), keepdim=True), lambda x: x / (1 + x.abs().sum(1, keepdim=True)), lambda x: x.flip(1),
    lambda x: x.flip(3), lambda x: x.roll(1, 1), lambda x: x[:, torch.arange(x.shape[1]).flip(0)],
    lambda x: x / x.shape[1], lambda x: x.repeat(1, 2, 1, 1)[:, ::2], lambda x: x.cumsum(1),
    lambda x: F.channel_shuffle(x, 2) if x.shape[1] % 2 == 0 else x, lambda x: x.transpose(2, 3),
    lambda x: F.dropout(x, 0.5, training=False).relu_(), lambda x: x.sort(1).values, lambda x: torch.max(x, x.tanh()),
    lambda x: x * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None, None],
    lambda x: torch.stack([x, x.tanh()], 2).flatten(1, 2)[:, : x.shape[1]], lambda x: x * (x.shape[1] ** -0.5),
)  # fmt: skip

PLACES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    lambda x: F.adaptive_max_pool2d(x, 3), lambda x: F.adaptive_avg_pool2d(x, 3), lambda x: F.pad(x, (1, 1, 0, 1)),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), lambda x: F.pad(x, (1, 0, 0, 0), value=0.5),
    lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
    lambda x: x[:, :, 1:], lambda x: x[..., ::2],
)  # fmt: skip


def layer(width: int, draw: Draw) -> tuple[nn.Module, int]:
    """Something that takes pictures of so many channels, and the number of channels of what it makes."""
    out = 4 + 2 * draw(4)
    padding = draw(2)
    mode = ("zeros", "zeros", "circular", "replicate")[draw(4)]
    kinds: tuple[Callable[[], tuple[nn.Module, int]], ...] = (
        lambda: (nn.Conv2d(width, out, 3, padding=padding, padding_mode=mode, bias=bool(draw(3))), out),
        lambda: (nn.Conv2d(width, out, 1), out),
        lambda: (nn.Conv2d(width, width, 3, padding=padding, groups=width, bias=bool(draw(2))), width),
        lambda: (nn.Conv2d(width, 2 * width, 1, groups=width), 2 * width),
        lambda: (nn.Conv2d(width, out, 3, padding="same", groups=2), out) if width % 2 == 0 else (nn.Identity(), width),
        lambda: (nn.ConvTranspose2d(width, out, 2, 2), out),
        lambda: (nn.ConvTranspose2d(width, width, 3, padding=1, groups=width), width),
        lambda: (nn.BatchNorm2d(width, affine=bool(draw(3))), width),
        lambda: (nn.BatchNorm2d(width), width),
        lambda: (nn.BatchNorm2d(width, track_running_stats=False), width),
        lambda: (nn.InstanceNorm2d(width, affine=bool(draw(2))), width),
        lambda: (nn.GroupNorm((1, 2, width)[draw(3)] if width % 2 == 0 else 1, width), width),
        lambda: (LastNorm(width, draw), width),
        lambda: (nn.PReLU((1, width)[draw(2)]), width),
        lambda: (Scaled(width, draw), width),
        lambda: (Residual(width, draw), width),
        lambda: (Joined(width, out, draw), out),
        lambda: (Gated(width, out, draw), out),
        lambda: (Squeezed(width, draw), width),
        lambda: (Attention(width, draw), width) if width % 2 == 0 else (nn.Identity(), width),
        lambda: (nn.Sequential(nn.Conv2d(width, 16, 1), nn.PixelShuffle(2)), 4),
        lambda: (Same(width), width),
        lambda: (Written(), width),
        lambda: (Lambda(PLACES[draw(len(PLACES))]), width),
        *[lambda: (Lambda(FUNCTIONS[draw(len(FUNCTIONS))]), width)] * 8,
    )
    return kinds[draw(len(kinds))]()


def head(width: int, size: int, draw: Draw) -> nn.Module:
    """From pictures to three numbers."""
    kind = draw(5)
    if kind == 0:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    if kind == 1:
        return nn.Sequential(nn.Flatten(), nn.Linear(width * size, 7), nn.ReLU(), nn.Linear(7, 3))
    if kind == 2:
        norm = nn.BatchNorm1d(6) if draw(2) else nn.LayerNorm(6)
        return nn.Sequential(Lambda(lambda x: x.mean((2, 3))), nn.Linear(width, 6), norm, nn.GELU(), nn.Linear(6, 3))
    if kind == 3:
        return nn.Sequential(Lambda(lambda x: x.amax((2, 3))), nn.Linear(width, 12), nn.GLU(), nn.Linear(6, 3))
    rows = nn.LSTM(width, 5, batch_first=True)
    return nn.Sequential(Lambda(lambda x: x.flatten(2).transpose(1, 2)), rows, Lambda(lambda x: x[0][:, -1]))


def network(seed: int, num_layers: int = 6) -> nn.Module:
    """In float64 and evaluation mode, for pictures of (3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    width = 6
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)]
    for _ in range(num_layers):
        some, width = layer(width, draw)
        layers.append(some)
        if draw(2):
            layers.append(nn.Conv2d(width, width := 6, 1))
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        found = model(torch.zeros(1, 3, 8, 8).double())
    model.append(head(width, found[0, 0].numel(), draw).double().eval())
    _fill(model, generator)
    return model


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights, a quarter of all rows and of all columns without any."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
        if tensor.ndim > 1 and tensor.shape[0] > 1:
            tensor /= tensor[0].numel() ** 0.5
            tensor[torch.rand(len(tensor), generator=generator) < 0.25] = 0
            tensor[:, torch.rand(tensor.shape[1], generator=generator) < 0.25] = 0
