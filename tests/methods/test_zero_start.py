"""Layers that begin as zeros, as LoRA's B, zero convolutions and the ends of residual branches do: they learn."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import pomona
from tests.oracles import top_k_mask
from tests.problems import Tensors, batches, bits, distance, loss_of, net, train


def problem() -> tuple[Tensor, Tensor]:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    nn.init.zeros_(model[2].weight)
    return model


def accuracy_of(model: nn.Module) -> float:
    x, y = problem()
    return 100 * float((model(x).argmax(1) == y).float().mean())


def descend(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = problem()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


GSM_SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.98, "weight_decay": 1e-3}
SPARSITIES = [0.001, 0.5, 0.9, pomona.Linear(0.0, 0.5, steps=200), pomona.Cubic(0.0, 0.9, steps=200)]


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
@pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed")
def test_gsm_trains_a_layer_that_begins_as_zeros(sparsity: pomona.schedule.Value) -> None:
    model = network()
    optimizer = SGD(model.parameters(), **GSM_SGD)
    method = pomona.GSM(sparsity)
    pruner = pomona.Pruner(model, optimizer, method)
    for step in range(1, 401):
        descend(model, optimizer)
        assert pruner.metrics()["active"] <= method.budget.num_kept(1152, step)
    assert accuracy_of(model) == 100
    report = pruner.harden()
    assert report.layers[1].nonzero > 40 and report.nonzero == method.budget.num_kept(1152, 400)
    assert accuracy_of(model) > 97


@pytest.mark.parametrize("sparsity", [0.001, 0.5])
def test_by_the_papers_rule_it_stays_zero_and_is_named(sparsity: float) -> None:
    model = network()
    optimizer = SGD(model.parameters(), **GSM_SGD)
    named = (
        "2.weight is zero throughout, and with zeros='paper' will stay so, .*take zeros='learn', .*exclude=.'2.weight'"
    )
    with pytest.warns(UserWarning, match=named):
        pomona.Pruner(model, optimizer, pomona.GSM(sparsity, zeros="paper"))
    for _ in range(50):
        descend(model, optimizer)
    assert not model[2].weight.any()


def test_nobody_is_warned_of_zeros_that_learn_or_that_are_out_of_scope() -> None:
    model = network()
    optimizer = SGD(model.parameters(), **GSM_SGD)
    pomona.Pruner(model, optimizer, pomona.GSM(0.5)).detach()
    pomona.Pruner(model, optimizer, pomona.GSM(0.5, zeros="paper"), scope=pomona.Scope(exclude=["2"]))


@pytest.mark.parametrize("wrong", ["no", "Learn", None])
def test_another_rule_for_zeros_is_told(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"zeros must be one of 'learn', 'paper', got {wrong!r}"):
        pomona.GSM(0.5, zeros=wrong)


def test_ten_steps_of_a_tensor_that_began_as_zeros_equal_the_rule() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(6, 4)), np.zeros((3, 12))]
    model = Tensors([w.astype(np.float32) for w in weights])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    pomona.Pruner(model, optimizer, pomona.GSM(0.5, min_density=0.0), scope=pomona.Scope(also="*"))
    buffers = [np.zeros_like(w) for w in weights]
    for step in range(10):
        grads = [rng.normal(size=w.shape) for w in weights]
        passive = np.exp(-step * 0.1 * 0.05 / 0.1) / np.sqrt(3 * 12)
        sizes = [np.abs(weights[0]), np.maximum(np.abs(weights[1]), passive)]
        masks = top_k_mask([size * np.abs(g) for size, g in zip(sizes, grads, strict=True)], 30)
        for w, z, g, mask in zip(weights, buffers, grads, masks, strict=True):
            z *= 0.9
            z += 0.05 * w + mask * g
            w -= 0.1 * z
        model.give([g.astype(np.float32) for g in grads])
        optimizer.step()
    # float32 against float64: ten steps of values around 5, each rounded to 2^-24 relative
    assert distance(model.numpy(), weights) < 1e-5


def test_weights_without_a_gradient_at_first_are_not_lost() -> None:
    """Half of the inputs come later; with a score of |w g| their weights would be zero for ever."""
    model = nn.Linear(8, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    pomona.Pruner(model, optimizer, pomona.GSM(0.25))
    for seen in (slice(0, 4), slice(4, 8)):
        for _ in range(5):
            model.weight.grad = torch.zeros(1, 8)
            model.weight.grad[:, seen] = 1.0
            optimizer.step()
    assert bool(model.weight.all())


def test_single_zeros_in_a_tensor_stay_by_the_papers_rule() -> None:
    model = nn.Linear(8, 1, bias=False)
    model.weight.data[:, :4] = 0.0
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    pomona.Pruner(model, optimizer, pomona.GSM(0.25))
    for _ in range(3):
        model.weight.grad = torch.ones(1, 8)
        optimizer.step()
    assert (model.weight != 0).tolist() == [[False] * 4 + [True] * 4]


def test_without_a_tensor_of_zeros_both_rules_are_one_bit_for_bit() -> None:
    ends = []
    for zeros in ("learn", "paper"):
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        pomona.Pruner(model, optimizer, pomona.GSM(0.5, zeros=zeros))  # type: ignore[arg-type]
        train(model, optimizer, batches(20))
        ends.append(bits(model.state_dict()))
    assert ends[0] == ends[1]


def test_zeros_that_are_loaded_after_construction_learn_and_zeros_that_are_replaced_do_not_count() -> None:
    zeros = copy.deepcopy(net())
    with torch.no_grad():
        zeros[2].weight.zero_()
    for at_first, loaded in ((net(), zeros), (zeros, net())):
        model = copy.deepcopy(at_first)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        pruner = pomona.Pruner(model, optimizer, pomona.GSM(0.5))
        model.load_state_dict(loaded.state_dict())
        pruner.mark()
        train(model, optimizer, batches(3))
        assert pruner.state_dict()["shared"]["began_zero"].tolist() == [False, loaded is zeros]
        assert bool(model[2].weight.any())


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("granularity", ["weight", "1x2"])
def test_a_resumed_run_goes_on_bit_for_bit(at: int, granularity: str) -> None:
    def start(seed: int) -> tuple[nn.Sequential, SGD, pomona.Pruner]:
        model = net(seed)
        nn.init.zeros_(model[2].weight)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
        return model, optimizer, pomona.Pruner(model, optimizer, pomona.GSM(0.75, granularity=granularity))

    data = batches(15)
    whole, first, resumed = start(0), start(0), start(1)
    train(whole[0], whole[1], data)
    train(first[0], first[1], data[:at])
    for mine, theirs in zip(resumed, first, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(resumed[0], resumed[1], data[at:])
    assert bits([part.state_dict() for part in whole]) == bits([part.state_dict() for part in resumed])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_zeros_of_other_precisions_learn(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    nn.init.zeros_(model[2].weight)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.GSM(0.5))
    for x, y in batches(5):
        optimizer.zero_grad()
        loss_of(model, (x.to(dtype), y.to(dtype))).backward()
        optimizer.step()
        assert pruner.metrics()["active"] <= 36
    assert bool(model[2].weight.all()) and model[2].weight.dtype is dtype


RAMP = pomona.Cubic(0.0, 0.5, steps=200)


@pytest.mark.parametrize(
    "method",
    [
        pomona.Magnitude(RAMP, every=10),
        pomona.Magnitude(RAMP, every=10, score="lamp"),
        pomona.Feather(0.5),
        pomona.ADMM(0.5, every=50),
        pomona.WeightMom(0.5, every=5),
        pomona.RigL(0.5, every=20),
        pomona.SET(0.5, every=20),
        pomona.GRDA(sparsity=0.5, steps=300),
    ],
    ids=lambda method: type(method).__name__,
)
def test_with_every_other_method_such_a_layer_learns_as_well(method: pomona.Method) -> None:
    model = network()
    is_plain = isinstance(method, pomona.GRDA)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.0 if is_plain else 0.9)
    pruner = pomona.Pruner(model, optimizer, method)
    for _ in range(400):
        descend(model, optimizer)
    report = pruner.harden()
    assert report.nonzero <= 576 and report.layers[1].nonzero > 20 and accuracy_of(model) > 97


def test_a_cut_before_it_could_learn_is_warned_of() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    pomona.Pruner(model, optimizer, pomona.Magnitude(0.5))
    with pytest.warns(UserWarning, match="this cut starves layers: 1 of 2 layers keeps no more .* 2.weight 1 of 128"):
        descend(model, optimizer)


def test_admm_that_holds_zeros_names_a_layer_that_it_will_never_train() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.05)
    pomona.Pruner(model, optimizer, pomona.ADMM(0.5, hold_zeros=True))
    with pytest.warns(UserWarning, match="2.weight is zero throughout and will stay so with hold_zeros=True; Scope"):
        descend(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        descend(model, optimizer)
