"""Multiply-adds by hand: of each kind of layer, of one sample, with and without zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pomona
from pomona.multiply_adds import MultiplyAdds, count_multiply_adds
from pomona.zoo.models import build_model


def count(model: nn.Module, example: Any) -> MultiplyAdds:
    """Of all weights of two dimensions or more."""
    return count_multiply_adds(model, {name: p for name, p in model.named_parameters() if p.ndim > 1}, example)


class Packed(nn.Module):
    """Attention from one sequence to another."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.attend(x, y, y)[0]
        return out


class Experts(nn.Module):
    """One tensor of several matrices, all used by each sample, and one that is picked."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.one = nn.Parameter(torch.ones(3, 5, 4)), nn.Parameter(torch.ones(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.all).sum(1) + F.linear(x, self.one[1])


class Tied(nn.Module):
    """The embedding is the head: looked up, which is no product, and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embed(x), self.embed.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x))
        return y


class Standardized(nn.Conv2d):
    """Convolves something else than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def transposed(num_in: int, num_out: int) -> nn.Module:
    """A matrix of (inputs, outputs), as GPT-2 has it."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(num_in, num_out))
    model.bias = nn.Parameter(torch.ones(num_out))
    model.forward = lambda x: torch.addmm(model.bias, x, model.weight)  # type: ignore[method-assign]
    return model


LAYERS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int], int]] = {
    "linear": (lambda: nn.Linear(4, 3), torch.zeros(2, 4), {"weight": 12}, 0),
    "linear at each place": (lambda: nn.Linear(4, 3), torch.zeros(2, 5, 4), {"weight": 60}, 0),
    "matrix of inputs by outputs": (lambda: transposed(4, 3), torch.zeros(2, 4), {"weight": 12}, 0),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), torch.zeros(5, 2, 4, 6), {"weight": 24 * 54}, 0),
    "stride": (lambda: nn.Conv2d(2, 3, 2, stride=2), torch.zeros(1, 2, 4, 6), {"weight": 6 * 24}, 0),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=4), torch.zeros(1, 4, 5, 5), {"weight": 9 * 72}, 0),
    "one dimension": (lambda: nn.Conv1d(2, 3, 3, dilation=2), torch.zeros(2, 2, 9), {"weight": 5 * 18}, 0),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 2), torch.zeros(1, 2, 4, 4, 4), {"weight": 27 * 48}, 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), torch.zeros(2, 4, 5, 5), {"weight": 25 * 216}, 0),
    "LSTM": (
        lambda: nn.LSTM(6, 5, batch_first=True), torch.zeros(2, 7, 6), {"weight_ih_l0": 7 * 120, "weight_hh_l0": 700}, 0
    ),
    "GRU": (
        lambda: nn.GRU(6, 5, batch_first=True), torch.zeros(2, 7, 6), {"weight_ih_l0": 7 * 90, "weight_hh_l0": 525}, 0
    ),
    "bilinear": (lambda: nn.Bilinear(4, 3, 2), (torch.zeros(2, 4), torch.zeros(2, 3)), {"weight": 24}, 0),
    "attention": (
        # Keys and values are of three places, queries of five; then five by three, twice, of eight numbers.
        Packed, (torch.zeros(2, 5, 8), torch.zeros(2, 3, 8)),
        {"attend.in_proj_weight": 5 * 64 + 3 * 128, "attend.out_proj.weight": 5 * 64}, 2 * 5 * 3 * 8
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(2, 5, 8),
        {f"self_attn.{n}": c for n, c in (("in_proj_weight", 960), ("out_proj.weight", 320))}
        | {"linear1.weight": 640, "linear2.weight": 640},
        2 * 5 * 5 * 8
    ),
    "experts": (Experts, torch.zeros(2, 4), {"all": 60, "one": 20}, 0),
    "tied": (Tied, torch.tensor([[1, 2, 3]]), {"embed.weight": 120}, 0),
    "called twice": (Twice, torch.zeros(3, 4), {"layer.weight": 32}, 0),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.zeros(2, 4),
        {"parametrizations.weight.original0": 0, "parametrizations.weight.original1": 12}, 0
    ),
    "standardized": (lambda: Standardized(2, 3, 3), torch.zeros(1, 2, 4, 4), {"weight": 4 * 54}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer_by_hand(name: str) -> None:
    make, example, wanted, others = LAYERS[name]
    found = count(make(), example)
    assert found.dense == wanted and found.others == others


def test_zeros_are_not_multiplied() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        for weight, num_left in ((model[0].weight, 5), (model[2].weight, 7)):
            weight.fill_(1).view(-1)[num_left:] = 0
    found = count(model, torch.zeros(2, 2, 4, 4))
    assert found.dense == {"0.weight": 4 * 54, "2.weight": 48} and found.kept == {"0.weight": 4 * 5, "2.weight": 7}


def test_of_an_expert_that_is_picked_its_own_zeros_count() -> None:
    model = Experts()
    with torch.no_grad():
        model.one[0] = 0
        model.one[1, :, 0] = 0
    assert count(model, torch.zeros(2, 4)).kept["one"] == 15


def test_what_is_convolved_counts_not_what_it_is_made_of() -> None:
    model = Standardized(2, 3, 3)
    with torch.no_grad():
        model.weight[:, 0] = 0  # not zero once the mean is taken off
    assert count(model, torch.zeros(1, 2, 4, 4)).kept == {"weight": 4 * 54}


def test_known_networks() -> None:
    """Caffe's LeNet-5 by hand; ResNet-56 as the pruning papers count it, 125.49 million."""
    lenet = pomona.report(build_model("lenet-5", seed=0), example=torch.zeros(1, 1, 28, 28))
    assert [layer.multiply_adds for layer in lenet.layers] == [576 * 20 * 25, 64 * 50 * 500, 400_000, 5_000]
    assert (lenet.multiply_adds, lenet.other_multiply_adds) == (2_293_000, 0)
    resnet = pomona.report(build_model("resnet-56", seed=0), example=torch.zeros(2, 3, 32, 32))
    assert resnet.multiply_adds == 125_485_696


def test_a_weight_in_an_unknown_operator_is_not_counted() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers, self.head = nn.Parameter(torch.ones(3, 4)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head((x[:, None] - self.centers).abs().sum(-1))
            return y

    assert count(Distances(), torch.zeros(2, 4)).dense == {"centers": None, "head.weight": 6}


def test_the_model_and_random_numbers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[2].eval()
    drawn, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    count(model, torch.ones(3, 4))
    assert torch.equal(torch.get_rng_state(), drawn) and torch.backends.mha.get_fastpath_enabled() == fast
    assert int(model[1].num_batches_tracked) == 0
    assert [part.training for part in model.modules()] == [True, True, True, False]


# the report


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    with torch.no_grad():
        model[0].weight[:4] = 0
    return model


def test_the_report_has_them_with_an_example() -> None:
    found = pomona.report(small(), pomona.Scope(include=["0"]), example=torch.zeros(2, 3, 4, 4))
    assert (found.multiply_adds, found.kept_multiply_adds, found.other_multiply_adds) == (4 * 216, 4 * 108, 160)
    assert found.layers[0].multiply_adds == 864 and found.to_dict()["layers"][0]["kept_multiply_adds"] == 432
    header, _, layer, _, total, *notes = str(found).splitlines()
    assert header.split()[-3:] == ["multiply-adds", "kept", "why"]
    assert layer.split()[-2:] == ["864", "432"] and total.split()[-4:] == ["864", "432", "2.0x", "compression"]
    assert "multiply-adds of one sample; 160 more are not by weights in scope" in notes


def test_without_an_example_there_are_none() -> None:
    found = pomona.report(small())
    assert found.multiply_adds is found.kept_multiply_adds is found.other_multiply_adds is None
    assert found.layers[0].multiply_adds is None and "multiply" not in str(found)


def test_a_pruner_reports_them() -> None:
    model = small()
    pruner = pomona.Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), pomona.Magnitude(0.5))
    assert pruner.report().multiply_adds is None
    found = pruner.report(example=torch.zeros(1, 3, 4, 4))
    assert (found.multiply_adds, found.kept_multiply_adds) == (864 + 160, 432 + 160)
    assert pruner.num_steps == 0


def test_inputs_by_name_and_in_tuples_are_taken() -> None:
    model = nn.Bilinear(4, 3, 2)
    x, y = torch.zeros(2, 4), torch.zeros(2, 3)
    for example in ((x, y), {"input1": x, "input2": y}):
        assert pomona.report(model, example=example).multiply_adds == 24


def test_a_compiled_model_counts_like_a_plain_one() -> None:
    model = small()
    compiled = torch.compile(model, backend="eager")
    x = torch.zeros(1, 3, 4, 4)
    assert pomona.report(compiled, example=x) == pomona.report(model, example=x)
    model.compile(backend="eager")
    assert pomona.report(model, example=x).multiply_adds == 864 + 160


@pytest.mark.parametrize("example", [(), {}, torch.tensor(1.0), torch.zeros(0, 4)])
def test_an_example_without_a_sample_is_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="example must hold a tensor with at least one sample, batch first, got"):
        pomona.report(nn.Linear(4, 2), example=example)
