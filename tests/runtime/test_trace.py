"""Traced graphs compute what torch does."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pomona.runtime import Network, reference
from pomona.runtime.readers.trace import UnsupportedError, trace
from pomona.zoo.models import build_model
from tests.networks import NETWORKS, Lambda, conv_norm, randomised, sparsified


def check(model: nn.Module, shape: tuple[int, ...], *, folded: bool = True) -> Counter[str]:
    """Compare the graph with torch on two samples, both in float64; return how often each operation occurs."""
    graph, tensors = trace(model, torch.zeros(1, *shape), folded=folded)
    x = torch.randn(2, *shape)
    found = reference.run(graph, tensors, x.numpy(), dtype=np.float64)
    with torch.no_grad():
        expected = model.double()(x.double())
    model.float()
    for y, z in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert y.shape == tuple(z.shape)
        # Folding rounds weights to float32, nothing else is rounded.
        assert np.abs(y - z.numpy()).max() <= 1e-6 * np.abs(z.numpy()).max()
    return Counter(node.op for node in graph.nodes)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    build, shape = NETWORKS[name]
    model = randomised(build())
    ops = check(model, shape)
    assert ops["scale"] == (5 if name == "densenet-like" else 0)
    check(model, shape, folded=False)


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5"])
def test_lenets(name: str) -> None:
    ops = check(build_model(name, seed=0).eval(), (1, 28, 28))
    assert ops["linear"] + ops["conv"] == (3 if name == "lenet-300-100" else 4)


def test_resnet20_has_its_shortcuts_as_sparse_convolutions() -> None:
    model = randomised(build_model("resnet-20", seed=0))
    ops = check(model, (3, 32, 32))
    assert ops == {"conv": 19 + 2, "relu": 19, "add": 9, "mean": 1, "flatten": 1, "linear": 1}
    graph, tensors = trace(model, torch.zeros(1, 3, 32, 32))
    shortcuts = [node for node in graph.nodes if node.op == "conv" and "@pick" in node.weight]
    for node in shortcuts:
        weight = tensors[node.weight]
        assert node.stride == (2, 2) and weight.shape[2:] == (1, 1)
        quarter = weight.shape[0] // 4
        assert np.array_equal(weight[quarter:-quarter, :, 0, 0], np.eye(2 * quarter))
        assert weight.sum() == 2 * quarter


def pretrained(depth: int) -> Path:
    folder = os.environ.get("POMONA_CIFAR_MODELS")
    found = sorted(Path(folder).glob(f"resnet{depth}-*.th")) if folder else []
    if not found:
        pytest.skip("no pretrained models: POMONA_CIFAR_MODELS is not set, or has none of this depth")
    return found[0]


def test_pretrained_resnet56() -> None:
    state = torch.load(pretrained(56), map_location="cpu", weights_only=True)["state_dict"]
    model = build_model("resnet-56", seed=0).eval()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    check(model, (3, 32, 32))


def test_unfolded_weights_are_those_of_the_state_dict() -> None:
    model = randomised(build_model("resnet-20", seed=0))
    _, tensors = trace(model, torch.zeros(1, 3, 32, 32), folded=False)
    state = model.state_dict()
    for name in state:
        if "conv" in name or "linear" in name:
            assert np.array_equal(tensors.pop(name), state[name].numpy())
    assert all("@" in name for name in tensors)


def test_zeros_stay_zeros_under_folding() -> None:
    model = sparsified(randomised(conv_norm(3, 8, 3)), 0.7)
    model[1].weight.data[2] = -1.0
    _, tensors = trace(model, torch.zeros(1, 3, 8, 8))
    weight = next(w for name, w in tensors.items() if w.ndim == 4)
    zeros = model[0].weight.detach().numpy() == 0
    assert np.array_equal(weight == 0, zeros)
    assert not np.signbit(weight[zeros]).any()


def test_padding_goes_into_the_kernel() -> None:
    ops = check(randomised(NETWORKS["efficientnet-lite-like"][0]()), (3, 16, 16))
    assert ops["conv"] == 3


def test_tensors_are_copies() -> None:
    model = nn.Linear(3, 2)
    _, tensors = trace(model, torch.zeros(1, 3))
    model.weight.data.zero_()
    assert tensors["weight"].all()


IMAGE = (4, 6, 8)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "arithmetic": (lambda x: (2 * x - 1) / 4 - (3 - x) + -x, IMAGE),
    "subtract": (lambda x: x - x.relu(), IMAGE),
    "alpha": (lambda x: torch.add(x, x.tanh(), alpha=3), IMAGE),
    "normalise": (lambda x: (x - torch.arange(4.0)[:, None, None]) / torch.tensor(3.0), IMAGE),
    "swish": (lambda x: x * torch.sigmoid(x), IMAGE),
    "hardswish by hand": (lambda x: x * F.relu6(x + 3) / 6, IMAGE),
    "clamps": (lambda x: x.clamp(-1, 0.5) + x.clamp(min=0) + x.clamp_max(0.3) + x.clamp_min(-0.2), IMAGE),
    "activations": (lambda x: F.silu(x) + F.hardsigmoid(x) + F.gelu(x) + F.hardswish(x), (9,)),
    "pools": (lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), (3, 2), 2, (1, 0)), IMAGE),
    "ceil": (lambda x: F.max_pool2d(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), 2, 3, ceil_mode=True), (2, 8, 7)),
    "uncounted": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 8, 8)),
    "global": (lambda x: F.avg_pool2d(x, x.shape[2:]).squeeze(), IMAGE),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)) + F.adaptive_max_pool2d(x, (3, 4)), IMAGE),
    "mean": (lambda x: x.mean([-1, -2]), IMAGE),
    "upsample": (lambda x: F.interpolate(x, scale_factor=(2, 3)).relu() + F.interpolate(x, (12, 24)), IMAGE),
    "slices": (lambda x: x[:, 1:3, ::2, 1:7], IMAGE),
    "every third": (lambda x: x[:, :, 1::3, 2:7:3], (2, 9, 9)),
    "chunks": (lambda x: torch.cat([*x.chunk(2, 1)[::-1], x], dim=-3), IMAGE),
    "features": (lambda x: torch.cat([x[:, 2:5], x.split([4, 5], 1)[1]], 1), (9,)),
    "pad": (lambda x: F.pad(F.pad(x, (1, 0, 2, 3)), (0, 0, 0, 1, 2, 0)), IMAGE),
    "in place": (lambda x: x.relu().mul_(2).add_(x).clamp_(max=3), IMAGE),
    "dropout in place": (lambda x: F.dropout(x.relu(), 0.2, training=False, inplace=True), IMAGE),
    "copies": (lambda x: x.contiguous(memory_format=torch.channels_last).clone().float().flatten(1), IMAGE),
    "gate": (lambda x: x * x.mean((2, 3)).sigmoid()[:, :, None, None], IMAGE),
    "two outputs": (lambda x: (x.relu(), x.flatten(1)), IMAGE),
    "unused": (lambda x: (x.tanh(), x)[1], IMAGE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, shape = FUNCTIONS[name]
    ops = check(Lambda(function), shape)
    if name == "unused":
        assert not ops


def test_a_mutation_is_seen_by_later_readers_only() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.tanh()
        before = y * 3
        y.relu_()
        return before + y

    check(Lambda(function), IMAGE)


def test_parametrized_weights() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (weight > 0)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 3))
    parametrize.register_parametrization(model[0], "weight", Half())
    check(model, (3, 4, 4))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch copies then, the graph does not
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_convolutions_of_any_setting(data: st.DataObject) -> None:
    small = st.integers(1, 3)
    pair = st.tuples(small, small)
    groups = data.draw(small)
    kernel, dilation, stride = data.draw(pair), data.draw(pair), data.draw(pair)
    padding = data.draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("same")))
    conv = nn.Conv2d(
        groups * data.draw(small),
        groups * data.draw(small),
        kernel,
        (1, 1) if padding == "same" else stride,
        padding,
        dilation,
        groups,
        bias=data.draw(st.booleans()),
    )
    size = [d * (k - 1) + data.draw(st.integers(1, 5)) for k, d in zip(kernel, dilation, strict=True)]
    check(nn.Sequential(conv, randomised(nn.BatchNorm2d(conv.out_channels))).eval(), (conv.in_channels, *size))


@settings(max_examples=15, deadline=None)
@given(features=st.integers(1, 6), outputs=st.integers(1, 6), positions=st.integers(0, 3), bias=st.booleans())
def test_linear_of_any_setting(features: int, outputs: int, positions: int, bias: bool) -> None:
    check(nn.Linear(features, outputs, bias=bias), (positions, features) if positions else (features,))


def test_half_precision_is_read_as_float32() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    _, tensors = trace(model, torch.zeros(1, 3, dtype=torch.bfloat16))
    assert tensors["weight"].dtype == np.float32
    assert np.array_equal(tensors["weight"], model.weight.detach().float().numpy())


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_an_unsupported_operation_is_named_with_its_place_and_the_way_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Inner()))
    with pytest.raises(UnsupportedError, match=re.escape("aten.layer_norm.default in 1.0.norm")) as caught:
        trace(model, torch.zeros(1, 4))
    assert "pomona.compile(model, example)" in str(caught.value)
    assert "test_trace.py" in str(caught.value)


def mutated_view(x: Tensor) -> Tensor:
    y = x.tanh()
    view = y.flatten(1)
    y.relu_()
    return view


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "train": (nn.Sequential(nn.BatchNorm1d(4)), (4,), r"model\.eval\(\)"),
    "dropout": (nn.Dropout(0.5), (4,), r"model\.eval\(\)"),
    "batch": (Lambda(lambda x: x.view(-1)), (4,), "aten.view.default from"),
    "batch mean": (Lambda(lambda x: x.mean(0, keepdim=True)), (4,), "a mean over"),
    "dims": (Lambda(lambda x: x.mean(1)), IMAGE, "a mean over"),
    "stack": (Lambda(lambda x: torch.cat([x, x], 0)), (4,), "along dimension 0"),
    "matmul": (Lambda(lambda x: x.T @ x), (4,), "numpy_T"),
    "weight": (Lambda(lambda x: F.linear(x, x)), (4,), "computed from the input"),
    "softmax": (nn.Softmax(1), (4,), "softmax"),
    "reflect": (nn.ReflectionPad2d(1), IMAGE, r"by \[1, 1, 1, 1\] \(reflect"),
    "value": (Lambda(lambda x: F.pad(x, (1, 1), value=2.0)), IMAGE, "aten.pad.default by"),
    "dilation": (nn.MaxPool2d(2, dilation=2), IMAGE, "dilation"),
    "unequal": (nn.AdaptiveAvgPool2d(5), IMAGE, "unequal"),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), IMAGE, "divisor"),
    "position": (Lambda(lambda x: x + torch.arange(3.0)[:, None]), (3, 4), "neither a number nor"),
    "expanded": (Lambda(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 8)), IMAGE, "an output"),
    "expanded relu": (Lambda(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 8).relu()), IMAGE, "expanded"),
    "integer": (Lambda(lambda x: x.long()), (4,), "int64"),
    "rows": (Lambda(lambda x: x[:, 1:]), (3, 4), "slice"),
    "random": (Lambda(lambda x: x + torch.rand(4)), (4,), "random"),
    "constant": (Lambda(lambda x: torch.ones(3)), (4,), "an output"),
    "branch": (Lambda(lambda x: x if x.sum() > 0 else -x), (4,), "torch.export could not trace"),
    "misfit": (nn.Linear(20, 3), (21,), r"an example of shape \(1, 21\)"),
    "view": (Lambda(mutated_view), IMAGE, "a view is read later"),
    "pixel": (Lambda(lambda x: x[:, :, None, None]), (4,), "one pixel"),
    "transposed": (nn.ConvTranspose2d(4, 4, 2), IMAGE, "transpose"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_graph_cannot_say_is_refused(name: str) -> None:
    model, shape, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        trace(model, torch.zeros(1, *shape))


BAD_EXAMPLES = [torch.zeros(3), torch.zeros(1, 3, dtype=torch.int16), torch.zeros(*[1] * 6), [np.zeros((1, 3))]]


@pytest.mark.parametrize("example", BAD_EXAMPLES)
def test_examples_are_tensors_with_a_batch(example: object) -> None:
    with pytest.raises(ValueError, match="example 0 must be a tensor of floats, int32 or int64 with 2 to 5 dimensions"):
        trace(nn.ReLU(), example)  # type: ignore[arg-type]


def test_integers_are_inputs_that_operations_of_floats_refuse() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            return x.relu()

    tokens = torch.zeros(1, 3, dtype=torch.long)
    graph, _ = trace(First(), [torch.zeros(1, 4), tokens])
    assert graph.inputs == ((4,), (3,)) and graph.dtypes == ("float32", "int64")
    with pytest.raises(UnsupportedError, match=r"aten\.relu\.default: relu takes float32, but value 0 is of int64"):
        trace(nn.ReLU(), tokens)
    with pytest.raises(UnsupportedError, match=r"aten\.embedding\.default"):
        trace(nn.Embedding(5, 4), tokens)


def test_values_of_four_dimensions() -> None:
    check(Lambda(lambda x: F.silu(x + x.tanh()).flatten(1)), (2, 3, 4, 5))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, gate: None = None, *, y: Tensor, cache: bool = False) -> dict[str, Any]:
        return {"sum": self.a(x) + self.b(y), "cache": {1} if cache else None}


@pytest.mark.parametrize("wrap", [False, True])
def test_keyword_arguments_are_inputs_in_the_order_of_forward(wrap: bool) -> None:
    model = Two().eval()
    given = torch.compile(model, backend="eager") if wrap else model
    x, y = torch.randn(2, 4), torch.randn(2, 5)
    for example in ({"y": y, "x": x}, (x, None, {"y": y})):
        graph, tensors = trace(given, example)
        assert graph.inputs == ((4,), (5,)) and set(tensors) == {"a.weight", "a.bias", "b.weight", "b.bias"}
        network = Network.from_model(given, example)
        assert np.allclose(network.run(x.numpy(), y.numpy()), model(x, y=y)["sum"].detach(), atol=1e-6)
    model.forward = lambda x: {"x": x.relu(), "cache": {1}}  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match=r"the model returns cache \(set\), which is no value of a graph"):
        trace(given, x)


def test_what_is_no_tensor_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"got True. The runtime takes no other inputs; pomona.compile\(model"):
        trace(Two(), {"x": torch.zeros(1, 4), "y": torch.zeros(1, 5), "cache": True})
