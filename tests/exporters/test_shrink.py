"""What shrink takes out, what it must leave, and that outputs stay the same on inputs unlike the example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pomona
from pomona.exporters import channels
from tests.exporters.drawn import network
from tests.networks import Lambda

IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)


def unlike(example: Tensor) -> Iterator[Tensor]:
    """Inputs of other scale and offset."""
    generator = torch.Generator().manual_seed(7)
    for scale, shift in ((1, 0), (5, -3), (0.2, 4), (30, 10), (0, -1)):
        yield (torch.randn(example.shape, generator=generator) * scale + shift).to(example)


@torch.no_grad()
def assert_same(model: nn.Module, smaller: nn.Module, *inputs: Tensor) -> None:
    for x in inputs:
        wanted, found = model.eval()(x), smaller(x)
        eps = torch.finfo(wanted.dtype).eps
        # Sums in another order, through a dozen layers: some hundred roundings of the largest numbers in between.
        scale = float(wanted.abs().max()) + float(x.abs().max()) + 1
        assert torch.allclose(found, wanted, rtol=1e4 * eps, atol=1e3 * eps * scale, equal_nan=True)


def silence(layer: Any, channel: int, bias: float = 0.0) -> None:
    """As granularity="channel" leaves it."""
    with torch.no_grad():
        layer.weight[channel] = 0
        if layer.bias is not None:
            layer.bias[channel] = bias


def ignore(layer: Any, *channels: int) -> None:
    """Nothing is read of these inputs."""
    with torch.no_grad():
        layer.weight[:, list(channels)] = 0


# drawn at random


def check_network(seed: int, num_layers: int) -> tuple[bool, bool]:
    """Whether channels went, and whether the outputs depend on the input."""
    model = network(seed, num_layers)
    example = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    before = copy.deepcopy(model.state_dict())
    smaller, taken = pomona.shrink(model, example)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert_same(model, smaller, example, *unlike(example))
    with torch.no_grad():
        a, b = model(example)
    return bool(taken), not torch.allclose(a, b)


@pytest.mark.parametrize("start", range(0, 16, 4))
def test_networks_drawn_at_random_compute_the_same(start: int) -> None:
    found = [check_network(seed, num_layers=3) for seed in range(start, start + 4)]
    assert any(taken and varies for taken, varies in found)


@pytest.mark.check
@pytest.mark.parametrize("start", range(1000, 1120, 20))
def test_many_networks_drawn_at_random_compute_the_same(start: int) -> None:
    found = [check_network(seed, num_layers=3 + seed % 5) for seed in range(start, start + 20)]
    assert sum(taken for taken, _ in found) > 8


# what lies between a silent channel and its readers


def around(between: nn.Module, bias: float = -1.0) -> tuple[nn.Module, nn.Module, dict[str, int]]:
    """Channel 1 of four is silent, and channel 2 is not read, of what comes out of the layers between."""
    torch.manual_seed(0)
    reader = nn.Conv2d(4, 5, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), between, reader, nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    silence(model[0], 1, bias)
    ignore(reader, 2)
    return model, *pomona.shrink(model, IMAGES)


def batch_norm(num_channels: int = 4, **options: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(num_channels, **options)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


CHANNEL_BY_CHANNEL: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "batch norm": batch_norm,
    "batch norm without weights": lambda: batch_norm(affine=False),
    "functions": lambda: Lambda(lambda x: F.gelu(F.hardswish(x)) * 2 + torch.cos(x) / 3),
    "functions in place": lambda: nn.Sequential(nn.ReLU6(inplace=True), Lambda(lambda x: x.mul_(2).add_(1))),
    "a condition": lambda: Lambda(lambda x: torch.where(x > 0, x, x.exp() - 1)),
    "one slope": nn.PReLU,
    "slopes": lambda: nn.PReLU(4, 0.3),
    "pools": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(3)),
    "the mean of the places": lambda: Lambda(lambda x: x.mean((2, 3), keepdim=True)),
    "dropout": lambda: nn.Sequential(nn.Dropout(), nn.Dropout2d()),
    "larger": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Upsample(size=9, mode="bilinear")),
    "places that go round": lambda: Lambda(lambda x: F.pad(x, (1, 1, 2, 0), mode="circular")),
    "other places": lambda: Lambda(lambda x: x.flip(3).transpose(2, 3)[:, :, 1:]),
    "softmax over places": lambda: Lambda(lambda x: x + 0 * x.flatten(2).softmax(-1).view_as(x)),
    "the channels last": lambda: Lambda(lambda x: x.permute(0, 2, 3, 1).contiguous().relu().permute(0, 3, 1, 2)),
    "a view and back": lambda: Lambda(lambda x: x.view(*x.shape[:2], -1).tanh().view(x.shape)),
}


@pytest.mark.parametrize("name", CHANNEL_BY_CHANNEL)
def test_what_treats_each_channel_alone_lets_them_go(name: str) -> None:
    model, smaller, taken = around(CHANNEL_BY_CHANNEL[name]())
    gone = 1 if name == "softmax over places" else 2  # of a constant it is none
    assert taken == {"0": gone}
    assert smaller.get_submodule("0").weight.shape[0] == 4 - gone
    assert_same(model, smaller, *unlike(IMAGES))


def test_instance_norm_makes_a_constant_of_zero_alone() -> None:
    for bias, affine, goes in ((0.0, True, 2), (1.0, True, 1), (0.0, False, 2)):
        model, smaller, taken = around(nn.InstanceNorm2d(4, affine=affine), bias)
        assert taken == {"0": goes} and smaller.get_submodule("1").num_features == 4 - goes
        assert_same(model, smaller, *unlike(IMAGES))


MIXED: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, 4),
    "group norm, and what hides it": lambda: nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU()),
    "layer norm": lambda: Lambda(lambda x: F.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1)),
    "layer norm of all": lambda: nn.LayerNorm([4, 8, 8]),
    "softmax over channels": lambda: nn.Softmax(1),
    "a mean of channels": lambda: Lambda(lambda x: x - x.mean(1, keepdim=True)),
    "the largest of channels": lambda: Lambda(lambda x: x * x.amax(1, keepdim=True).sigmoid()),
    "a length of channels": lambda: Lambda(F.normalize),
    "sums of channels": lambda: Lambda(lambda x: x.cumsum(1)),
    "channels in order of size": lambda: Lambda(lambda x: x.sort(1).values),
    "local response": lambda: nn.LocalResponseNorm(2),
    "something by channel": lambda: Lambda(lambda x: x * torch.tensor([1.0, 2, 3, 4])[:, None, None]),
    "the number of channels": lambda: Lambda(lambda x: x / x.shape[1]),
    "attention": lambda: Lambda(
        lambda x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3).transpose(1, 2).view_as(x)
    ),
    "a view that knows their number": lambda: Lambda(lambda x: x.view(-1, 4, 64).view(-1, 4, 8, 8)),
    "a cut that knows their number": lambda: Lambda(lambda x: torch.cat([x[:, :2].relu(), x[:, 2:4]], 1)),
    "random numbers": lambda: Lambda(lambda x: F.dropout(x, 0.5, training=True)),
    "zeros in their place": lambda: Lambda(lambda x: F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.filterwarnings("ignore:.*lifted_tensor")
def test_what_mixes_channels_holds_them(name: str) -> None:
    model, smaller, taken = around(MIXED[name]())
    assert taken == {}
    torch.manual_seed(0)
    wanted = model(IMAGES)
    torch.manual_seed(0)
    assert torch.equal(smaller(IMAGES), wanted)


def test_a_constant_that_the_example_makes_is_none() -> None:
    """One place with zeros around it; on a larger picture the edge is not the middle."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    silence(model[0], 0, 1.0)
    with torch.no_grad():
        model[1].weight[2, 1:] = 0  # reads the constant alone
    smaller, taken = pomona.shrink(model, torch.zeros(1, 3, 1, 1))
    assert taken == {}
    assert_same(model, smaller, IMAGES)


def test_values_changed_behind_a_view_are_not_known() -> None:
    def write(x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, 1] += x[:, 0]
        return y

    model, smaller, taken = around(Lambda(write))
    assert taken == {}
    assert_same(model, smaller, *unlike(IMAGES))


def test_a_buffer_that_changes_from_call_to_call_is_not_known() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model, smaller, taken = around(Counting())
    assert taken == {}
    assert int(model[1].calls[0]) == int(smaller[1].calls[0]) == 0  # type: ignore[index]
    for _ in range(3):
        assert_same(model, smaller, IMAGES)


# gated units and splits


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.gate = gate
        self.a, self.b, self.c = nn.Linear(12, width), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.gate(self.a(x))).relu())
        return y


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


def split_by_shape(x: Tensor) -> Tensor:
    a, b = x.split(x.shape[1] // 2, 1)
    return a.relu() * b


def split_by_number(x: Tensor) -> Tensor:
    a, b = x.split(16, 1)
    return a * b


def cut_by_number(x: Tensor) -> Tensor:
    return x[:, :16] * x[:, 16:]


def cut_by_shape(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[:, :half] * x[:, half:]


def halves_that_never_meet(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([a[:, :8].relu(), b[:, 8:]], 1)


@pytest.mark.parametrize(
    ("gate", "goes"),
    [
        (halves, True),
        (F.glu, True),
        (split_by_shape, True),
        (cut_by_shape, True),
        (split_by_number, False),
        (cut_by_number, False),
    ],
)
def test_halves_of_a_gated_unit_go_together_or_stay(gate: Callable[[Tensor], Tensor], goes: bool) -> None:
    torch.manual_seed(1)
    model = Gated(gate)
    ignore(model.b, *range(2, 16))
    with torch.no_grad():
        model.b.weight[2:] = 0
    x = torch.randn(2, 12)
    smaller, taken = pomona.shrink(model, x)
    assert taken == ({"a": 28, "b": 6} if goes else {"b": 6})
    assert_same(model, smaller, *unlike(x))


def test_halves_that_never_meet_stay_as_long_as_each_other() -> None:
    torch.manual_seed(1)
    model = Gated(halves_that_never_meet)
    ignore(model.b, *range(2, 16))
    x = torch.randn(2, 12)
    smaller, _ = pomona.shrink(model, x)
    assert len(smaller.a.weight) % 2 == 0
    assert_same(model, smaller, *unlike(x))


def test_gates_of_two_layers_lose_the_same_units() -> None:
    """As in Llama."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((6, 10), (6, 10), (10, 6)))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
            return y

    model = Net()
    ignore(model.down, 0, 4)
    silence(model.up, 7)  # zero times anything
    x = torch.randn(2, 5, 6)
    smaller, taken = pomona.shrink(model, x)
    assert taken == {"gate": 3, "up": 3}
    assert_same(model, smaller, *unlike(x))


# depthwise, grouped and transposed convolutions


def test_depthwise_channels_go_with_the_layer_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), batch_norm(8), nn.ReLU6(),
        nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), batch_norm(16), nn.ReLU6(), nn.Conv2d(16, 4, 1),
    ).eval()  # fmt: skip
    ignore(model[6], 0, 1, 2, 8)  # both of channel 0, but one each of 1 and 4
    with torch.no_grad():
        model[3].weight[[10, 11, 12]] = 0  # both of channel 5, one of channel 6: constants by their norm
    smaller, taken = pomona.shrink(model, IMAGES)
    assert taken == {"0": 2}
    assert (smaller[3].groups, smaller[3].in_channels, smaller[3].out_channels) == (6, 6, 12)
    assert smaller[4].num_features == 12 and smaller[3].weight.shape == (12, 1, 3, 3)
    assert_same(model, smaller, *unlike(IMAGES), torch.randn(1, 3, 11, 5))


def test_a_silent_channel_passes_a_depthwise_layer_where_no_edge_shows_it() -> None:
    for padding, bias, goes in ((0, 1.0, True), (1, 1.0, False), (1, -1.0, True)):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=padding, groups=4), nn.Conv2d(4, 2, 1)
        ).eval()
        silence(model[0], 3, bias)
        smaller, taken = pomona.shrink(model, IMAGES)
        assert taken == ({"0": 1} if goes else {})
        assert_same(model, smaller, *unlike(IMAGES))


def test_a_group_of_a_grouped_convolution_goes_as_a_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)).eval()
    ignore(model[3], 3, 4, 5, 6)  # all three of group 1, one of group 2
    smaller, taken = pomona.shrink(model, IMAGES)
    assert taken == {"0": 2}
    assert smaller[2].weight.shape == (9, 2, 3, 3) and smaller[2].groups == 3
    assert_same(model, smaller, *unlike(IMAGES))


def test_transposed_convolutions_lose_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 5, 2, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        model[1].weight[4] = 0
    ignore(model[3], 0, 3)
    smaller, taken = pomona.shrink(model, IMAGES)
    assert taken == {"0": 1, "1": 2}
    assert (smaller[1].in_channels, smaller[1].out_channels) == (5, 3)
    assert_same(model, smaller, *unlike(IMAGES))


def test_pixel_shuffle_takes_the_channels_of_a_place_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 3)).eval()
    ignore(model[2], 1)
    smaller, taken = pomona.shrink(model, IMAGES)
    assert taken == {"0": 4}
    assert_same(model, smaller, *unlike(IMAGES))


def test_an_embedding_loses_dimensions_that_nothing_reads() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3))
    ignore(model[1], 2, 5)
    smaller, taken = pomona.shrink(model, torch.tensor([[1, 2, 3]]))
    assert smaller[0].weight.shape == (10, 4) and smaller[0].embedding_dim == 4 and taken == {}
    assert torch.equal(smaller(torch.arange(10)), model(torch.arange(10)))


def test_a_weight_that_is_computed_stays_whole() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    ignore(model[2], 1)
    smaller, taken = pomona.shrink(model, torch.randn(1, 4))
    assert taken == {}
    assert_same(model, smaller, torch.randn(5, 4))


def test_a_layer_that_is_called_twice_loses_what_neither_call_needs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.layer(self.layer(self.first(x)).relu()).relu())
            return y

    torch.manual_seed(0)
    model = Twice()
    ignore(model.layer, 1, 2)
    ignore(model.last, 1)
    silence(model.layer, 4, 2.0)  # not a constant in the first call, and in the second no bias of its own
    smaller, taken = pomona.shrink(model, torch.randn(1, 4))
    assert taken == {"first": 1, "layer": 1}
    assert_same(model, smaller, torch.randn(5, 4))


# the model and its example


def test_inputs_by_name_are_taken() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {"y": self.b(self.a(x).relu() * scale)}

    model = Net()
    ignore(model.b, 0)
    smaller, taken = pomona.shrink(model, {"x": torch.zeros(1, 4), "scale": torch.ones(1, 1)})
    assert taken == {"a": 1}
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = model(x, scale=torch.tensor(2.0))["y"]
        assert torch.allclose(smaller(x, scale=torch.tensor(2.0))["y"], wanted, atol=1e-6)


def test_a_model_that_returns_a_dataclass_shrinks() -> None:
    @dataclass
    class Found:
        logits: Tensor
        cache: str = "no tensor"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Found:
            return Found(self.b(self.a(x).relu()))

    model, x = Net(), torch.randn(3, 4)
    ignore(model.b, 0)
    smaller, taken = pomona.shrink(model, torch.zeros(1, 4))
    assert taken == {"a": 1}
    with torch.no_grad():
        assert torch.allclose(smaller(x).logits, model(x).logits, atol=1e-6)


def test_of_a_compiled_model_the_plain_one_shrinks() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ignore(model[2], 1)
    smaller, taken = pomona.shrink(torch.compile(model, backend="eager"), torch.zeros(1, 4))
    assert taken == {"0": 1} and list(smaller.state_dict()) == list(model.state_dict())


def test_a_model_that_cannot_be_read_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Lambda(lambda x: x if x.sum() > 0 else -x))
    with pytest.raises(ValueError, match=r"torch.export could not read it for this example \(.*such as its backbone"):
        pomona.shrink(model, torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_any_precision_shrink(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), batch_norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    silence(model[0], 2)
    ignore(model[3], 4)
    smaller, taken = pomona.shrink(model, IMAGES.to(dtype))
    assert taken == {"0": 2} and smaller[0].weight.dtype is dtype
    assert smaller[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(model, smaller, IMAGES.to(dtype))


def test_the_model_and_random_numbers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ignore(model[2], 1)
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pomona.shrink(model, torch.ones(1, 4))
    assert torch.equal(torch.get_rng_state(), drawn) and model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_roundings_that_a_norm_enlarges_are_no_difference() -> None:
    """A picture that is flat but for its last bits: in single precision the order of a sum decides what they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3), Lambda(lambda x: x * 1e-6 + 1), nn.InstanceNorm2d(4, eps=0.0)
    ).eval()
    ignore(model[1], *range(0, 64, 3))
    smaller, taken = pomona.shrink(model, IMAGES)
    assert taken == {"0": 22}
    assert_same(model.double(), smaller.double(), IMAGES.double())


def test_a_fault_of_ours_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ignore(model[2], 1)
    monkeypatch.setattr(
        channels, "_tell_sizes", lambda layer: nn.init.ones_(layer.weight) if hasattr(layer, "weight") else 0
    )
    with pytest.raises(ValueError, match=r"computes something else \(largest difference .*; please report this model"):
        pomona.shrink(model, torch.ones(1, 4))


# an optimizer carried over


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3),
    ).double()  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()


Make = Callable[[Any], torch.optim.Optimizer]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
)
def test_the_next_step_of_what_stays_is_the_one_of_the_whole_model(make: Make) -> None:
    model = conv_net()
    optimizer = make([{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": [
        p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(5, 9, 3, 8, 8, generator=generator).double()
    for x in xs[:3]:
        step(model, optimizer, x)
    ignore(model[3], 1, 4)
    ignore(model[7], *range(2 * 16, 3 * 16))
    smaller, taken, carried = pomona.shrink(model, xs[0], optimizer=optimizer)
    assert taken == {"0": 2, "3": 1} and type(carried) is type(optimizer)
    assert [len(group["params"]) for group in carried.param_groups] == [3, 6]
    assert carried.param_groups[1]["weight_decay"] == 0.0
    before = copy.deepcopy(optimizer.state_dict())
    step(smaller.train(), carried, xs[3])
    after = optimizer.state_dict()
    assert str(before) == str(after)  # the old one has its own memory
    step(model, optimizer, xs[3])
    first, second = [0, 2, 3, 5], [0, 1, 3, 4, 5, 6, 7]
    columns = torch.arange(128).view(8, 16)[second].flatten()
    wanted = [
        model[0].weight[first],
        model[3].weight[second][:, first],
        model[7].weight[:, columns],
        model[1].bias[first],
    ]
    found = [smaller[0].weight, smaller[3].weight, smaller[7].weight, smaller[1].bias]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_training_goes_on_with_the_carried_optimizer() -> None:
    model = conv_net()
    optimizer, scope = torch.optim.AdamW(model.parameters(), lr=1e-2), pomona.Scope(exclude=["7"])
    pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(0.5, granularity="channel"), scope=scope)
    x = torch.randn(9, 3, 8, 8).double()
    for _ in range(3):
        step(model, optimizer, x)
    pruner.harden()
    smaller, taken, carried = pomona.shrink(model, x, optimizer=optimizer)
    assert taken
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(carried, 10)
    for _ in range(3):
        step(smaller.train(), carried, x)
        scheduler.step()
    assert pruner.num_steps == 3  # what watches the old optimizer does not watch the new one
    assert all(int(carried.state[p]["step"]) == 6 for p in smaller.parameters())


def test_an_optimizer_that_has_not_stepped_is_carried_too() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ignore(model[2], 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), nesterov=True, momentum=0.9)
    smaller, _, carried = pomona.shrink(model, torch.zeros(1, 4), optimizer=optimizer)
    assert carried.param_groups[0]["params"] == list(smaller.parameters()) and not carried.state
    assert carried.param_groups[0]["nesterov"] and carried.param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]
    carried.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(optimizer.param_groups) == 1


def test_factored_moments_are_cut_where_they_have_entries() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    ignore(model[2], 1)
    smaller, _, carried = pomona.shrink(model, torch.zeros(1, 4), optimizer=optimizer)
    state = carried.state[smaller[0].weight]
    assert (state["row_var"].shape, state["col_var"].shape) == ((5, 1), (1, 4))


class Odd(torch.optim.SGD):
    """Remembers what has no entry for each weight."""

    def __init__(self, params: Any, *, shape: tuple[int, ...] = (3, 3), keeps: Any = None) -> None:
        super().__init__(params, lr=0.1)
        self.keeps = keeps
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = torch.zeros(shape)


def test_what_cannot_be_carried_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    ignore(model[2], 1)
    refused: list[tuple[Any, type[Exception], str]] = [
        (Odd(model.parameters()), ValueError, r"Odd's 'odd' of 0.weight, shape \(3, 3\), does not have an entry"),
        (Odd(model.parameters(), keeps=torch.ones(2)), ValueError, "Odd keeps tensors in its attribute 'keeps'"),
        (torch.optim.LBFGS(model.parameters()), ValueError, "LBFGS remembers all parameters as one vector"),
        (
            torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1),
            ValueError,
            r"group 0 has one of shape \(2,\) that is not",
        ),
        ("SGD", TypeError, "must be a torch.optim.Optimizer, got str"),
    ]
    for optimizer, kind, reason in refused:
        with pytest.raises(kind, match=reason):
            pomona.shrink(model, torch.zeros(1, 4), optimizer=optimizer)
    smaller, _, carried = pomona.shrink(model, torch.zeros(1, 4), optimizer=Odd(model.parameters(), shape=(), keeps=5))
    assert carried.keeps == 5 and carried.state[smaller[0].weight]["odd"].shape == ()
