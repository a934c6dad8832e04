"""Models with sparse layers among torch's own."""

from __future__ import annotations

import copy
import gc
import io
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pomona
from pomona.native import library
from pomona.runtime import compile as module
from pomona.runtime import layers
from pomona.runtime.compile import Choice, Compilation
from pomona.runtime.layers import sparse_conv2d, sparse_linear
from pomona.runtime.passed_over import PassedOver
from tests.networks import NETWORKS, randomised, sparsified

needs_core = pytest.mark.skipif(not library.is_available(), reason="no compiled core")


@pytest.fixture
def all_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer with zeros is replaced, however long it takes; outcomes of races are no business of most tests."""
    monkeypatch.setattr(module, "_GAIN", float("inf"))
    monkeypatch.setattr(module, "_MOST_ROUNDS", 1)


class Net(nn.Module):
    """Convolutions and dense layers, and operations that the runtime has not: they stay in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(F.relu(self.conv(x))))
        return F.softmax(self.linear(x.flatten(2).transpose(1, 2)), -1)


def net() -> nn.Module:
    return sparsified(Net(), 0.8).eval()


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


X = torch.randn(2, 3, 9, 8)
close = torch.testing.assert_close  # of float32 with sums in another order


@needs_core
def test_replaced_layers_compute_the_same(all_gain: None) -> None:
    model = net()
    compiled = pomona.compile(model, X)
    assert kinds(compiled) == ["SparseConv2d", "SparseConv2d", "SparseLinear"]
    assert kinds(model) == ["Conv2d", "Conv2d", "Linear"]
    with torch.no_grad():
        close(compiled(X), model(X))
        other = torch.randn(5, 3, 12, 12)  # another batch and size
        close(compiled(other), model(other))
        close(compiled(other[:0]), model(other[:0]))
        last = other.contiguous(memory_format=torch.channels_last)
        close(compiled(last), model(other))


@needs_core
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, all_gain: None) -> None:
    build, shape = NETWORKS[name]
    model = sparsified(randomised(build()), 0.7)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        close(pomona.compile(model, x)(x), model(x))


@needs_core
def test_the_state_dict_is_the_models_own(all_gain: None) -> None:
    model = net()
    compiled = pomona.compile(model, X)
    assert list(compiled.state_dict()) == list(model.state_dict())
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        assert a is b


@needs_core
def test_changed_weights_are_used(all_gain: None) -> None:
    model = net()
    compiled = pomona.compile(model, X)

    def check() -> None:
        with torch.no_grad():
            close(compiled(X), model(X))

    check()
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    compiled.load_state_dict(other)
    check()
    model.load_state_dict({name: value / 2 for name, value in other.items()}, assign=False)
    check()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    compiled(X).square().sum().backward()
    optimizer.step()
    check()
    with torch.no_grad():
        compiled.conv.bias.add_(1)
        check()
        compiled.conv.weight[0] = 0
        check()
    for name in ("conv", "grouped", "linear"):
        weight = nn.Parameter(torch.randn_like(getattr(model, name).weight))
        getattr(model, name).weight = getattr(compiled, name).weight = weight
    check()
    compiled.linear.weight.data = model.linear.weight.data = torch.randn(6, 8)
    check()
    compiled.load_state_dict({name: torch.randn_like(v) for name, v in other.items()}, assign=True)
    model.load_state_dict(compiled.state_dict(), assign=True)
    check()


@needs_core
def test_memory_used_again_for_another_weight_is_not_taken_for_the_old_one() -> None:
    x = torch.randn(3, 64)
    for _ in range(30):  # an allocator gives the same address again
        weight = torch.randn(64, 64)
        close(sparse_linear(x, weight, None, 1), x @ weight.T)
        del weight


@needs_core
def test_what_was_made_of_a_weight_goes_with_it() -> None:
    sparse_linear(torch.randn(1, 3), torch.randn(2, 3), None, 1)
    gc.collect()
    kept = torch.randn(2, 3)
    sparse_linear(torch.randn(1, 3), kept, None, 1)  # making one looks after the others
    assert all(made.is_alive() for made in layers._made.values())
    for _ in range(20):
        kept.add_(1)
        sparse_linear(torch.randn(1, 3), kept, None, 1)
    for size in range(20):
        sparse_conv2d(torch.randn(1, 2, 4 + size, 4), kept[:, :2, None, None], None, [1, 1], [0, 0], [1, 1], 1, 1)
    made = layers._made[layers.place_of(kept)]
    assert len(made.layers) <= layers._ENGINES_PER_WEIGHT


@needs_core
def test_gradients_are_those_of_the_dense_layer(all_gain: None) -> None:
    model = net().double().float()
    compiled = copy.deepcopy(pomona.compile(model, X))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).square().sum().backward()
    compiled(y).square().sum().backward()
    close(y.grad, x.grad)
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        close(a.grad, b.grad)


@needs_core
def test_in_training_mode_layers_are_torchs_own(all_gain: None) -> None:
    model = net()
    compiled = pomona.compile(model, X)
    compiled.train()
    model.train()
    assert torch.equal(compiled(X), model(X))


@pytest.mark.check
@needs_core
def test_the_operations_pass_torchs_own_checks() -> None:
    weight = torch.randn(4, 2, 3, 3).mul_(torch.rand(4, 2, 3, 3) > 0.5)
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    torch.library.opcheck(sparse_conv2d, (x, weight.requires_grad_(), bias, [2, 1], [1, 0], [1, 2], 2, 1))
    torch.library.opcheck(sparse_conv2d, (x.detach(), weight, None, [1, 1], [0, 2], [1, 1], 2, 1))
    x, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(sparse_linear, (x, weight, bias, 2))
    torch.library.opcheck(sparse_linear, (x[0, 0].detach(), weight.detach(), None, 1))


@needs_core
def test_torch_compile_takes_the_whole_graph(all_gain: None) -> None:
    model = net()
    compiled = pomona.compile(model, X)
    faster = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(faster(X), model(X))
        model.linear.weight.mul_(2)
        close(faster(X), model(X))


@needs_core
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch itself
def test_inductor(all_gain: None) -> None:
    model = net()
    faster = torch.compile(pomona.compile(model, X), fullgraph=True)
    with torch.no_grad():
        close(faster(X), model(X))


@needs_core
def test_torch_export(all_gain: None, tmp_path: Path) -> None:
    model = net()
    compiled = pomona.compile(model, X)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(compiled, (X,), dynamic_shapes=({0: batch},), strict=False)
    assert any("pomona.sparse_conv2d" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    x = torch.randn(7, *X.shape[1:])
    with torch.no_grad():
        close(again(x), model(x))


@needs_core
def test_a_copy_and_a_saved_model_run(all_gain: None) -> None:
    model = net()
    compiled = pomona.compile(model, X)
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(compiled), torch.load(file, weights_only=False)):
            assert kinds(other) == kinds(compiled)
            close(other(X), model(X))


@needs_core
def test_several_threads_call_one_model(all_gain: None) -> None:
    compiled = pomona.compile(net(), X, threads=1)
    inputs = [torch.randn(2, 3, 9, 8) for _ in range(4)]
    with torch.no_grad():
        expected = [compiled(x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(compiled(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_core
def test_inference_tensors_are_computed_densely() -> None:
    with torch.inference_mode():
        x, weight = torch.randn(2, 3), torch.randn(4, 3)
        assert torch.equal(sparse_linear(x, weight, None, 1), F.linear(x, weight))
        weight.zero_()
        assert not sparse_linear(x, weight, None, 1).any()
        weight = torch.randn(4, 3, 1, 1)
        image = torch.randn(1, 3, 2, 2)
        assert torch.equal(sparse_conv2d(image, weight, None, [1, 1], [0, 0], [1, 1], 1, 1), F.conv2d(image, weight))


@needs_core
def test_layers_are_replaced_only_where_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, full = nn.Linear(64, 64), nn.Linear(64, 64)
    full.weight.data[0, 0] = 0
    empty.weight.data.mul_(torch.rand(64, 64) > 0.95)
    model = nn.Sequential(empty, full, nn.Linear(64, 8)).eval()
    before = dict(vars(model[1]))
    whole = (100.0, 50.0)

    def race(layers: Sequence[Any], call: Callable[[], Any]) -> tuple[float, float]:
        call()  # what is timed can be called
        if isinstance(call.func, nn.Sequential):  # type: ignore[attr-defined]
            return whole
        return (10.0, 1.0) if int(torch.count_nonzero(layers[0][0].weight)) < 64 * 32 else (10.0, 9.9)

    monkeypatch.setattr(module, "_race", race)
    compiled = pomona.compile(model, torch.randn(16, 64))
    first, second, third = compiled.compilation.layers
    assert first.is_sparse and (first.dense_us, first.sparse_us) == (10.0, 1.0)
    assert first.calls == {(16, 64): 1} and first.sparsity > 0.9
    assert not second.is_sparse and second.reason == "1.01 times as fast"
    assert not third.is_sparse and third.dense_us is None and third.reason == "no zeros"
    assert kinds(compiled) == ["SparseLinear", "Linear", "Linear"]
    assert vars(compiled[1]).keys() == before.keys()
    assert compiled.compilation.whole_us == whole

    whole = (100.0, 101.0)  # alone it gains, among the others not
    compiled = pomona.compile(model, torch.randn(16, 64))
    assert kinds(compiled) == ["Linear", "Linear", "Linear"]
    assert vars(compiled[0]).keys() == before.keys()
    reason = "alone it gains, but the whole model takes 101 us instead of 100"
    assert compiled.compilation.layers[0].reason == reason and compiled.compilation.num_sparse == 0


@needs_core
def test_a_race_takes_turns_and_leaves_medians() -> None:
    layer = nn.Linear(64, 64).eval()
    layer.threads = 1
    seen = []
    times = module._race([(layer, nn.Linear, layers.SparseLinear)], lambda: seen.append(type(layer)))
    assert seen[:4] == [nn.Linear, layers.SparseLinear] * 2 and len(seen) % 2 == 0 and all(t > 0 for t in times)


@needs_core
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says it once in a process
def test_reasons(all_gain: None) -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.abs())

    class Demanding(nn.Linear):
        def forward(self, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
            return factor * super().forward(x)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine, self.unused, self.twice = Mine(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.demanding = Demanding(4, 4)
            self.reflect = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
            self.uneven = nn.Conv2d(1, 1, 2, padding="same")
            self.flat = nn.Conv2d(1, 1, 1)
            self.precise = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.uneven(self.reflect(x))
            x = self.flat(x[0])[None]
            x = self.demanding(self.mine(x), 2.0)
            return self.precise(self.twice(self.twice(x)).double())

    model = sparsified(Odd(), 0.5).eval()
    compiled = pomona.compile(model, torch.randn(1, 1, 4, 4))
    reasons = {choice.name: choice.reason for choice in compiled.compilation.layers}
    assert reasons.pop("twice").endswith("times as fast")
    assert reasons == {
        "mine": "a Mine, which computes something else with its weight",
        "demanding": "a Demanding, which cannot be called by itself: TypeError",
        "unused": "not called with the example",
        "reflect": "padding (1, 1) of reflect",
        "uneven": "padding 'same' of zeros",
        "flat": "an input without a batch",
        "precise": "torch.float64 on cpu, not float32 on the CPU",
    }
    assert next(c for c in compiled.compilation.layers if c.name == "twice").calls == {(1, 1, 4, 4): 2}


class SamePadding(nn.Conv2d):
    """As TensorFlow pads: one more behind than in front."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, groups=self.groups)


class Sum(nn.Linear):
    """Two products, one of them with the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(input=x, weight=self.weight.abs())


@needs_core
@pytest.mark.parametrize("strides", [(2, 2), 2, (2,)])
def test_subclasses_keep_their_forward(all_gain: None, strides: int | tuple[int, ...]) -> None:
    conv = SamePadding(3, 6, 3, stride=2, groups=3)
    conv.stride = strides  # type: ignore[assignment]  # F.conv2d takes all of these
    model = sparsified(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), Sum(6 * 4 * 4, 5)), 0.7).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = pomona.compile(model, x)
    assert kinds(compiled) == ["SparseSamePadding", "SparseSum"]
    assert [type(part) for part in model][::3] == [SamePadding, Sum]
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    faster = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    program = torch.export.export(compiled, (x,), strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("pomona.sparse_" in target for target in targets) == 2
    with torch.no_grad():
        for run in (compiled, copy.deepcopy(compiled), torch.load(file, weights_only=False), faster, program.module()):
            close(run(x), model(x))
        model[0].weight.mul_(2)
        close(compiled(x), model(x))
    assert not any("sparse" in str(node) for node in _graph_of(compiled.train()(x)))
    assert any("sparse" in str(node) for node in _graph_of(compiled.eval()(x)))


def _graph_of(y: Tensor) -> list[str]:
    """The names of the backward operations that lead to a result."""
    names, left = [], [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            names.append(type(node).__name__)
            left += [before for before, _ in node.next_functions]
    return names


class Operations(TorchDispatchMode):
    """The operations that run while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return sparsified(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.9).eval()


def reasons(model: nn.Module) -> dict[str, str]:
    return {choice.name: choice.reason for choice in model.compilation.layers}


@needs_core
def test_a_layer_that_torchs_fast_path_reads_is_not_said_to_run(all_gain: None) -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    for _ in range(3):
        compiled = pomona.compile(model, x)
        assert set(kinds(compiled)) == {"Linear", "NonDynamicallyQuantizableLinear"}
        assert set(reasons(compiled).values()) == {
            "not called: TransformerEncoderLayer computes with its weight itself"
        }
        assert str(compiled.compilation).splitlines()[-1] == "0 of 6 layers run sparsely"
        with torch.no_grad(), Operations() as ran:
            compiled(x)
        assert ran.names == {"aten._transformer_encoder_layer_fwd.default"}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compiled = pomona.compile(model, x)
        with torch.no_grad(), Operations() as ran:
            close(compiled(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert compiled.compilation.num_sparse == 4 and "pomona.sparse_linear.default" in ran.names
    assert reasons(compiled)["layers.0.self_attn.out_proj"].startswith("not called: MultiheadAttention computes")


@needs_core
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fast_path_of_padded_batches_too(all_gain: None) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = sparsified(nn.TransformerEncoder(layer, 2), 0.9).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    compiled = pomona.compile(model, (torch.randn(2, 5, 16), {"src_key_padding_mask": padding}))
    assert set(reasons(compiled).values()) == {"not called: TransformerEncoderLayer computes with its weight itself"}


@needs_core
def test_nested_tensors_are_left_to_torch() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    linear = sparsified(nn.Linear(4, 3), 0.5).eval()
    assert not layers._takes(x) and layers._takes(torch.zeros(1))
    sparse = copy.deepcopy(linear)
    sparse.__class__, sparse.threads = layers.SparseLinear, 1
    for a, b in zip(sparse(x).unbind(), linear(x).unbind(), strict=True):
        assert torch.equal(a, b)


@needs_core
def test_a_layer_whose_sparse_operation_never_runs_goes_back_to_torch(all_gain: None) -> None:
    """As the hooks of accelerate do it: what is called is the forward of the class that the layer had."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hooked, self.free = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.free(self.hooked(x))

    model = sparsified(Hooked(), 0.5).eval()
    model.hooked.forward = lambda input: nn.Linear.forward(model.hooked, input)
    compiled = pomona.compile(model, torch.randn(2, 4))
    assert kinds(compiled) == ["Linear", "SparseLinear"] and "threads" not in vars(compiled.hooked)
    assert "forward" in vars(compiled.hooked) and "forward" not in vars(compiled.free)
    choice = compiled.compilation.layers[0]
    assert choice.reason.startswith("never run sparsely by the model, though alone ") and not choice.is_sparse
    assert choice.dense_us is not None and compiled.compilation.num_sparse == 1


class Random(nn.Linear):
    """Draws from all three global sources in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()
        return super().forward(x)


def test_global_random_states_are_left_as_they_are(all_gain: None) -> None:
    model = sparsified(nn.Sequential(nn.Linear(4, 4), Random(4, 4)), 0.5).eval()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    compiled = pomona.compile(model, torch.zeros(1, 4))
    assert compiled.compilation.num_sparse == (2 if library.is_available() else 0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


class Named(nn.Module):
    """Takes what models of transformers take: names, some of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, parts: Any = ()) -> dict[str, Tensor]:
        out = {}
        if x is not None:
            out["a"] = self.a(input=x)
        for part in ([] if y is None else [y]) + list(parts):
            out["b"] = self.b(part)
        return out


@needs_core
@pytest.mark.parametrize(
    ("example", "called"),
    [
        (torch.zeros(1, 4), ["a"]),
        ((torch.zeros(1, 4), torch.zeros(2, 4)), ["a", "b"]),
        ((None, torch.zeros(2, 4)), ["b"]),
        ({"y": torch.zeros(2, 4)}, ["b"]),
        ({"y": torch.zeros(2, 4), "x": torch.zeros(1, 4)}, ["a", "b"]),
        ((torch.zeros(1, 4), {"parts": [torch.zeros(2, 4)]}), ["a", "b"]),
    ],
)
def test_examples_of_all_forms(all_gain: None, example: Any, called: list[str]) -> None:
    model = sparsified(Named(), 0.5).eval()
    compiled = pomona.compile(model, example)
    assert [choice.name for choice in compiled.compilation.layers if choice.is_sparse] == called
    x = torch.randn(3, 4)
    with torch.no_grad():
        close(compiled(x=x, y=x), model(x=x, y=x))


@needs_core
def test_of_a_wrapped_model_the_plain_one_is_taken(all_gain: None) -> None:
    model = net()
    wrapped = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        wrapped(X)  # its code is compiled by now
        compiled = pomona.compile(wrapped, X)
        assert compiled.compilation.num_sparse == 3 and list(compiled.state_dict()) == list(model.state_dict())
        close(torch.compile(compiled, backend="aot_eager")(X), model(X))
        parts = nn.Sequential(torch.compile(model, backend="aot_eager"), nn.Linear(6, 2)).eval()
        expected = parts(X)
        compiled = pomona.compile(parts, X)
        assert compiled.compilation.num_sparse == 3 and "_orig_mod" not in str(list(compiled.state_dict()))
        assert "_orig_mod" in str(list(parts.state_dict()))
        close(compiled(X), expected)


class Mixed(nn.Module):
    """Layers of many kinds, none of which is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 4, 1)
        self.back = nn.ConvTranspose1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.memory = nn.LSTM(4, 4, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.dense = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.memory(self.back(self.conv(self.embed(x).mT)).mT)[0]
        return self.head(self.attention(x, x, x)[0] @ self.experts.sum(0) @ self.dense)


def test_weights_with_zeros_that_are_passed_over_are_listed() -> None:
    model = sparsified(Mixed(), 0.5).eval()
    with torch.no_grad():
        model.dense.fill_(1)  # no zeros: no loss
        model.experts.fill_(1)[0, 0, :2] = 0
    compiled = pomona.compile(model, torch.tensor([[1, 2, 3]]))
    found = {one.name: (one.kind, one.reason) for one in compiled.compilation.passed_over}
    assert found == {
        "conv.weight": ("Conv1d", "there is no sparse operation for a Conv1d"),
        "back.weight": ("ConvTranspose1d", "there is no sparse operation for a ConvTranspose1d"),
        "attention.in_proj_weight": ("MultiheadAttention", "MultiheadAttention multiplies with it itself"),
        "memory.weight_ih_l0": ("LSTM", "torch's own LSTM multiplies with it"),
        "memory.weight_hh_l0": ("LSTM", "torch's own LSTM multiplies with it"),
        "experts": ("Mixed", "only a Mixed knows what it computes with it"),
    }
    (experts,) = (one for one in compiled.compilation.passed_over if one.name == "experts")
    assert (experts.num_zeros, experts.num_weights) == (2, 32)
    lines = str(compiled.compilation).splitlines()
    assert lines[3].split() == ["not", "looked", "at", "zeros", "of", "a", "why"] and len(lines) == 11
    assert [choice.name for choice in compiled.compilation.layers] == ["attention.out_proj", "head"]
    model.head.weight = nn.Parameter(torch.ones(9, 4))  # no longer tied, and the embedding is nobody else's
    assert pomona.compile(model, torch.tensor([[1]])).compilation.passed_over[1] == PassedOver(
        "embed.weight", "Embedding", 36, int((model.embed.weight == 0).sum()), "its rows are looked up, not multiplied"
    )


def test_many_of_a_kind_are_one_line() -> None:
    model = nn.Sequential(*(nn.Conv1d(2, 2, 1) for _ in range(6))).eval()
    for part in model:
        part.weight.data[0] = 0
    text = str(pomona.compile(model, torch.zeros(1, 2, 1)).compilation).splitlines()
    assert text == [
        "layer  zeros  dense us  sparse us  choice",
        "not looked at        zeros  of a    why",
        "0.weight and 5 more  50.0%  Conv1d  there is no sparse operation for a Conv1d",
        "0 of 0 layers run sparsely",
    ]


def test_without_the_core_nothing_is_replaced() -> None:
    model = net()
    with library.switched(False):
        compiled = pomona.compile(model, X)
        assert compiled.compilation.num_sparse == 0
        assert all("no compiled core" in choice.reason for choice in compiled.compilation.layers)
        x, weight = torch.randn(2, 3), torch.randn(4, 3)
        assert torch.equal(sparse_linear(x, weight, None, 1), F.linear(x, weight))
    with torch.no_grad():
        assert torch.equal(compiled(X), model(X))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"eval mode: call model.eval\(\) first"):
        pomona.compile(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        pomona.compile(nn.Linear(2, 2).eval(), torch.zeros(1, 2), threads=0)


def test_the_table_says_what_was_chosen_and_why() -> None:
    layers = (
        Choice("features.conv", 0.95, {(1, 3, 8, 8): 1}, 30.0, 10.0, True, "3.00 times as fast"),
        Choice("fc", 0.1, {(1, 8): 1}, 10.0, 20.0, False, "0.50 times as fast"),
        Choice("head", 0.0, {}, None, None, False, "not called with the example"),
    )
    assert str(Compilation(layers, (50.0, 30.0))).splitlines() == [
        "layer          zeros  dense us  sparse us  choice",
        "features.conv  95.0%      30.0       10.0  sparse: 3.00 times as fast",
        "fc             10.0%      10.0       20.0  torch: 0.50 times as fast",
        "head            0.0%         -          -  torch: not called with the example",
        "1 of 3 layers run sparsely; the whole model takes 30.0 us with sparse layers, 50.0 without",
    ]
