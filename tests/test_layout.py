"""Which dimension is what: outputs, inputs and matrices, for torch's layers and other people's."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pomona
from pomona.layout import Layout, register, role_of
from pomona.scope import Scope
from pomona.weight import Weight

PLAIN = Layout(0, 1)


class Experts(nn.Module):
    """A mixture of experts: (experts, outputs, inputs), or the last two exchanged."""

    def __init__(self, num: int = 8, outputs: int = 16, inputs: int = 8, *, is_exchanged: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(num, outputs, inputs, generator=generator)
        self.w = nn.Parameter(w.transpose(1, 2).contiguous() if is_exchanged else w)
        self.is_exchanged = is_exchanged

    def forward(self, x: Tensor) -> Tensor:
        w = self.w.transpose(1, 2) if self.is_exchanged else self.w
        return torch.einsum("bi,eoi->beo", x, w)


register(Experts, w=lambda module: Layout(2, 1) if module.is_exchanged else Layout(1, 2))


class InputsFirst(nn.Module):
    """As transformers' Conv1D, of which the size is declared."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Stated(nn.Module):
    """A layer of another library that states its sizes."""

    def __init__(self, shape: tuple[int, ...], **sizes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        vars(self).update(sizes)


def prune(model: nn.Module, x: Tensor, method: pomona.Method, **how: Any) -> pomona.Pruner:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = pomona.Pruner(model, optimizer, method, **how)
    model(x).square().sum().backward()
    optimizer.step()
    pruner.harden()
    pruner.verify()
    return pruner


# what is known


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), {"weight": PLAIN}),
        (nn.Conv1d(4, 6, 3, groups=2), {"weight": PLAIN}),
        (nn.Conv3d(4, 6, 3), {"weight": PLAIN}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": Layout(1, 0)}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {"weight": Layout(1, 0, 2)}),
        (nn.Bilinear(3, 4, 2), {"weight": PLAIN}),
        (nn.LSTM(3, 4), {"weight_ih_l0": Layout(0, 1, 4), "weight_hh_l0": Layout(0, 1, 4)}),
        (
            nn.LSTM(3, 4, proj_size=2),
            {"weight_ih_l0": Layout(0, 1, 4), "weight_hh_l0": Layout(0, 1, 4), "weight_hr_l0": PLAIN},
        ),
        (nn.GRUCell(3, 4), {"weight_ih": Layout(0, 1, 3), "weight_hh": Layout(0, 1, 3)}),
        (nn.LSTMCell(3, 4), {"weight_ih": Layout(0, 1, 4), "weight_hh": Layout(0, 1, 4)}),
        (nn.RNN(3, 4), {"weight_ih_l0": PLAIN, "weight_hh_l0": PLAIN}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight": Layout(0, 1, 3), "out_proj.weight": PLAIN}),
        (
            nn.MultiheadAttention(4, 2, kdim=6, vdim=5, add_bias_kv=True),
            dict.fromkeys(["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"], PLAIN),
        ),
        (Experts(), {"w": Layout(1, 2)}),
        (InputsFirst(3, 5), {"weight": Layout(1, 0)}),
        (InputsFirst(4, 4), {"weight": None}),  # nobody can say which way round
        (Stated((6, 4, 3), in_channels=8, out_channels=6, groups=2), {"weight": PLAIN}),
        (Stated((4, 6, 5), num_experts=4, input_size=5, output_size=6), {"weight": Layout(1, 2)}),
        (Stated((4, 6, 5), num_experts=4, is_transposed=False), {"weight": Layout(1, 2)}),
        (Stated((4, 6, 5), num_experts=4, is_transposed=True), {"weight": Layout(2, 1)}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_layer_multiplies_with_these_and_they_lie_so(module: nn.Module, expected: dict[str, Layout | None]) -> None:
    selection = Scope().select(module)
    assert selection.layouts == expected
    assert not any(p.ndim >= 2 for name, p in module.named_parameters() if name not in expected and "bias" not in name)


@pytest.mark.parametrize(
    ("module", "leaf", "why"),
    [
        (nn.LayerNorm([8, 6, 6]), "bias", "of a norm, LayerNorm"),
        (nn.Embedding(5, 3), "weight", "an embedding (Embedding)"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "a vector"),
        (Stated((8, 1, 1)), "weight", "a vector"),  # a layer scale that broadcasts
        (Stated((1, 9, 8)), "weight", "of Stated, which is no layer that Pomona knows"),  # positions
        (
            Stated((4, 64), num_experts=4, is_transposed=True),
            "weight",
            "of Stated, which is no layer that Pomona knows",
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else v,
)
def test_what_no_layer_multiplies_with_is_said_to_be_what_it_is(module: nn.Module, leaf: str, why: str) -> None:
    role = role_of(module, leaf, getattr(module, leaf))
    assert not role.multiplies and role.why == why


# views


@pytest.mark.parametrize(
    ("layout", "shape", "view", "matrix", "num"),
    [
        (PLAIN, (6, 4), (1, 6, 4), (6, 4), 1),
        (PLAIN, (6, 4, 3, 2), (1, 6, 4, 3, 2), (6, 4, 3, 2), 1),
        (PLAIN, (6,), (1, 6, 1), (6,), 1),
        (PLAIN, (), (1, 1, 1), (), 1),
        (Layout(1, 0), (6, 4), (1, 4, 6), (4, 6), 1),
        (Layout(1, 0), (6, 4, 3, 2), (1, 4, 6, 3, 2), (4, 6, 3, 2), 1),
        (Layout(1, 0, 2), (6, 4, 3), (2, 4, 3, 3), (4, 3, 3), 2),
        (Layout(0, 1, 3), (6, 4), (1, 6, 4), (2, 4), 3),
        (Layout(1, 2), (8, 6, 4), (8, 6, 4), (6, 4), 8),
        (Layout(2, 1), (8, 6, 4), (8, 4, 6), (4, 6), 8),
    ],
)
def test_views_by_hand(
    layout: Layout, shape: tuple[int, ...], view: tuple[int, ...], matrix: tuple[int, ...], num: int
) -> None:
    t = torch.arange(torch.Size(shape).numel()).view(shape)
    assert layout.view(t).shape == layout.view_shape(shape) == view
    assert torch.equal(layout.back(layout.view(t), shape), t)
    assert layout.matrix_shape(shape) == matrix and layout.num_matrices(shape) == num


def test_the_matrices_of_a_weight_share_its_memory() -> None:
    value, mask = torch.arange(24.0).view(6, 4), torch.ones(6, 4, dtype=torch.bool)
    w = Weight("qkv", value, value * 2, {}, {"mask": mask, "n": torch.zeros(())}, layout=Layout(0, 1, 3))
    parts = w.matrices()
    assert [(p.name, p.shape) for p in parts] == [(f"qkv[{i}]", (2, 4)) for i in range(3)]
    parts[1].value.zero_()
    parts[1].state["mask"].fill_(False)
    assert not value[2:4].any() and value[4:].all() and not mask[2:4].any() and mask[:2].all()
    assert torch.equal(torch.cat([p.grad for p in parts]), w.grad)
    assert parts[0].matrices() == [parts[0]] and parts[0].state["n"] is w.state["n"]


@pytest.mark.parametrize("bad", [{"outputs": -1}, {"inputs": 1.0}, {"matrices": 0}, {"outputs": 1}, {"inputs": True}])
def test_a_bad_layout_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Layout\("):
        Layout(**bad)


# registering


def test_a_layer_is_registered_in_one_line_and_its_subclasses_with_it() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.table = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(1, 8))

    class Yours(Mine):
        pass

    register(Mine, kernel=Layout(outputs=1, inputs=0))
    assert Scope().select(Yours()).layouts == {"kernel": Layout(1, 0)}


@pytest.mark.parametrize(
    ("layer", "weights", "error"),
    [
        ("Linear", {"weight": PLAIN}, "register() takes a subclass of nn.Module, got 'Linear'"),
        (nn.Linear, {}, "register(Linear, ...) needs the parameters, e.g. weight=Layout(0, 1)"),
        (nn.Linear, {"weight": (0, 1)}, "register(Linear, weight=...) takes a Layout, got (0, 1)"),
    ],
)
def test_what_is_no_layer_is_not_registered(layer: Any, weights: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(error)}$"):
        register(layer, **weights)


def test_a_layout_that_does_not_fit_is_refused_by_name() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 8))

    register(Wrong, w=Layout(1, 2))
    with pytest.raises(
        ValueError, match=re.escape("w of Wrong: Layout(outputs=1, inputs=2, matrices=1) needs dimension 2")
    ):
        Scope().select(Wrong())


# what asks the layout


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_2_4_lies_along_the_inputs_of_each_expert(is_exchanged: bool) -> None:
    model = Experts(is_exchanged=is_exchanged)
    prune(model, torch.randn(4, 8), pomona.Magnitude(0.5, granularity="2:4"))
    kept = Layout(2, 1).view(model.w != 0) if is_exchanged else model.w != 0
    assert bool((kept.reshape(8, 16, 2, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_a_channel_is_an_output_of_one_expert(is_exchanged: bool) -> None:
    model = Experts(is_exchanged=is_exchanged)
    pruner = prune(model, torch.randn(4, 8), pomona.Magnitude(0.5, granularity="channel"))
    kept = (Layout(2, 1).view(model.w) if is_exchanged else model.w) != 0
    assert int(kept.any(-1).sum()) == int(kept.all(-1).sum()) == 64
    assert bool(kept.any(-1).any(-1).all())  # no expert is gone
    (layer,) = pruner.report().layers
    assert (layer.channels, layer.dead_channels) == (128, 64)


def test_a_channel_of_a_transposed_convolution_is_an_output() -> None:
    model = nn.ConvTranspose2d(6, 10, 3)
    prune(model, torch.randn(1, 6, 4, 4), pomona.Magnitude(0.5, granularity="channel"))
    dead = (model.weight == 0).transpose(0, 1).flatten(1).all(1)
    assert int(dead.sum()) == 5 and int((model.weight == 0).sum()) == 5 * 54
    assert pomona.report(model).dead_channels == 5


def test_a_channel_of_a_grouped_transposed_convolution_is_an_output_of_its_group() -> None:
    model = nn.ConvTranspose2d(4, 6, 3, groups=2)
    prune(model, torch.randn(1, 4, 4, 4), pomona.Magnitude(0.5, granularity="channel"))
    dead = (model.weight == 0).view(2, 2, 3, 9).transpose(1, 2).flatten(2).all(2)
    assert int(dead.sum()) == 3 and int((model.weight == 0).sum()) == 3 * 18
    x = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        model.bias.zero_()
        silent = (model(x) == 0).flatten(2).all(2)[0]
    assert silent.tolist() == dead.view(-1).tolist()


def test_2_4_of_inputs_first_lies_along_the_inputs() -> None:
    model = InputsFirst(32, 128)
    prune(model, torch.randn(4, 32), pomona.Magnitude(0.5, granularity="2:4"))
    assert bool(((model.weight != 0).t().reshape(-1, 4).sum(1) <= 2).all())
    model = InputsFirst(32, 128)
    prune(model, torch.randn(4, 32), pomona.Magnitude(0.5, granularity="4x2"))
    groups = (model.weight != 0).t().reshape(32, 4, 16, 2).permute(0, 2, 1, 3).flatten(2)
    assert bool((groups.any(-1) == groups.all(-1)).all())


@pytest.mark.parametrize("granularity", ["2:4", "1x4", "channel", "input channel"])
def test_a_weight_whose_layout_is_unknown_is_refused_by_name(granularity: str) -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    method = pomona.Magnitude(0.5, granularity=granularity)
    model, x = Raw(), torch.randn(4, 8)
    with pytest.raises(ValueError, match=re.escape("nobody has said so for w; say it: pomona.layout.register(")):
        prune(model, x, method, scope=Scope(also=["w"]))
    prune(model, x, pomona.Magnitude(0.5), scope=Scope(also=["w"]))
    assert pomona.report(model, Scope(also=["w"])).layers[0].channels == 0
    register(Raw, w=Layout(1, 0))
    prune(Raw(), x, method)


# each matrix is a layer


def separate(w: Tensor) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(w.shape[2], w.shape[1], bias=False) for _ in w)
    for layer, one in zip(layers, w, strict=True):
        layer.weight.data = one.clone()
    return layers


class Apart(nn.Module):
    """The experts as linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = separate(Experts().w.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers], 1)


@pytest.mark.parametrize(
    "method",
    [
        pomona.Magnitude(0.75),
        pomona.Magnitude(0.9, min_density=0.08),
        pomona.Magnitude(0.75, allocation="uniform"),
        pomona.Magnitude(0.75, allocation="erk"),
        pomona.Magnitude(0.75, granularity="1x4"),
        pomona.Magnitude(0.5, granularity="channel", allocation="uniform"),
        pomona.Feather(0.75, allocation="erk"),
        pomona.Feather(0.75, min_density=0.2),
        pomona.GSM(0.75, min_density=0.2),
        pomona.RigL(0.75, every=2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.* starves layers")  # experts of unlike scale, on purpose
def test_experts_in_one_tensor_are_pruned_as_layers_of_their_own(method: pomona.Method) -> None:
    masks, kept = [], []
    for model in (Experts(), Apart()):
        with torch.no_grad():
            experts = [one for p in model.parameters() for one in p.view(-1, 16, 8)]
            for i, one in enumerate(experts):  # of different sizes, which one ranking does not treat alike
                one.mul_(2.0**-i)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)
        pruner = pomona.Pruner(model, optimizer, method)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            model(torch.randn(4, 8, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.warns() if isinstance(method, pomona.GSM) else torch.no_grad():
            report = pruner.harden()
        pruner.verify()
        kept.append(report.nonzero)
        masks.append(torch.cat([(p != 0).view(-1, 16, 8) for p in model.parameters()]))
    assert kept[0] == kept[1]
    counts = [mask.flatten(1).sum(1).tolist() for mask in masks]
    assert counts[0] == counts[1]
    if not isinstance(method, pomona.RigL):  # which draws its masks by tensor
        assert torch.equal(*masks)


def test_erk_gives_packed_attention_what_its_projections_would_get() -> None:
    packed, apart = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=8, vdim=8)
    apart.in_proj_weight = None
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        apart.register_parameter(name, nn.Parameter(torch.randn(8, 8)))
    counts = []
    for model in (packed, apart):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = pomona.Pruner(model, optimizer, pomona.RigL(0.75))
        weights = pruner._weights()
        found = dict(zip([w.name for w in weights], pruner.method.budget.counts(weights, 1) or (), strict=True))
        counts.append(sum(n for name, n in found.items() if "out" not in name))
    assert counts[0] == counts[1] == 48


def test_weight_norm_is_pruned_through_its_direction_and_stays_finite() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))
    pruner = prune(model, torch.randn(4, 8), pomona.Magnitude(0.5, allocation="uniform"))
    assert pruner.report().sparsity == 0.5
    assert int((model[0].weight == 0).sum()) == 24
    assert bool(model(torch.randn(2, 8)).isfinite().all())


@pytest.mark.parametrize("is_gradual", [False, True], ids=["harden", "step"])
def test_a_weight_norm_is_never_left_to_divide_by_zero(is_gradual: bool) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[2] *= 0.1
    with pytest.raises(
        RuntimeError, match=r"1 of the 6 vectors that the weight norm of 0\..*Scope\(exclude=\['0\.para"
    ):
        prune(model, torch.randn(4, 8), pomona.Magnitude(0.5, begin=1 if is_gradual else 99))


@pytest.mark.parametrize(
    "model", [Experts(), Experts(is_exchanged=True), InputsFirst(32, 24)], ids=["eoi", "eio", "io"]
)
def test_2_4_is_exported_along_the_inputs_and_comes_back(model: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(model)
    x = torch.randn(4, 32 if isinstance(model, InputsFirst) else 8)
    prune(model, x, pomona.Magnitude(0.5, granularity="2:4"))
    pomona.export(model, tmp_path / "x.2of4.safetensors")
    loaded = pomona.load(tmp_path / "x.2of4.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
