"""``fused=True``: the same weights and momentum, bit for bit, as dropping gradients and then ``torch.optim.SGD``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import pomona
from pomona.native import core

needs_core = pytest.mark.skipif(not core.is_available(), reason=f"no compiled core: {core.why_not()}")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 36, 33),
        nn.ReLU(),
        nn.Linear(33, 5),
    )


Run = tuple[nn.Module, torch.optim.SGD, pomona.Pruner]


def run(is_fused: bool, steps: int, method: pomona.GSM, settings: dict[str, Any]) -> Run:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "weight_decay": 2e-3, "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **settings})
    pruner = pomona.Pruner(model, optimizer, method, fused=is_fused)
    train(model, optimizer, steps)
    return model, optimizer, pruner


def train(model: nn.Module, optimizer: torch.optim.SGD, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(6, 1, 8, 8, generator=generator)).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one: torch.optim.SGD, other: torch.optim.SGD) -> None:
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p, q)
            assert (one.state[p].keys()) == (other.state[q].keys())
            z, y = one.state[p].get("momentum_buffer"), other.state[q].get("momentum_buffer")
            assert (z is None and y is None) or torch.equal(z, y)


@needs_core
@pytest.mark.parametrize("min_density", [0.0, 0.05])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fused": True},
        {"foreach": True},
        {"nesterov": True},
        {"nesterov": True, "fused": True},
        {"dampening": 0.3},
        {"dampening": 0.3, "fused": True},
        {"lr": torch.tensor(0.05)},
    ],
    ids=str,
)
def test_the_numbers_are_those_of_the_optimizer(settings: dict[str, Any], min_density: float) -> None:
    method = pomona.GSM(pomona.Linear(0.0, 0.9, steps=6), min_density=min_density)
    model, optimizer, pruner = run(True, 8, method, settings)
    other, reference, plain = run(False, 8, method, settings)
    same(optimizer, reference)
    for name, state in pruner.state_dict()["state"].items():
        assert all(torch.equal(t, plain.state_dict()["state"][name][key]) for key, t in state.items())
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    # And on, from what the one saved into what the other is; then hardened.
    method_state = copy.deepcopy(pruner.state_dict())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    pruner.load_state_dict(method_state)
    train(model, optimizer, 3)
    train(other, reference, 3)
    same(optimizer, reference)
    with pytest.warns(UserWarning, match="not decayed"):
        assert pruner.harden().nonzero == plain.harden().nonzero
    train(model, optimizer, 3)
    train(other, reference, 3)
    same(optimizer, reference)
    pruner.verify()


@needs_core
def test_gradients_in_another_order_of_memory_are_not_mixed_up() -> None:
    def conv() -> tuple[nn.Conv2d, torch.optim.SGD]:
        torch.manual_seed(0)
        model = nn.Conv2d(5, 6, 3)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    (model, optimizer), (other, reference) = conv(), conv()
    pomona.Pruner(other, reference, pomona.GSM(0.7))
    for step in range(4):
        if step == 1:  # goes on from momentum that torch laid out like the gradient
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
            model.load_state_dict(other.state_dict())
            pomona.Pruner(model, optimizer, pomona.GSM(0.7), fused=True)
        torch.manual_seed(step)
        grad = torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)
        for one, its in ((model, optimizer), (other, reference)) if step else ((other, reference),):
            one.weight.grad, one.bias.grad = grad.clone(), torch.ones(6)
            its.step()
    same(optimizer, reference)


@needs_core
def test_sparsity_zero_is_the_optimizer_itself() -> None:
    _, optimizer, _ = run(True, 5, pomona.GSM(0.0), {})
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "weight_decay": 2e-3, "lr": 0.02}]
    bare = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3)
    train(model, bare, 5)
    same(optimizer, bare)


@needs_core
def test_a_weight_without_a_gradient_is_passed_over() -> None:
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 5))]
    model = nn.ParameterList(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pomona.Pruner(model, optimizer, pomona.GSM(0.5, min_density=0.0), fused=True)
    weights[0].grad = torch.ones(4, 3)
    optimizer.step()
    assert torch.equal(weights[1], torch.ones(3, 5))
    assert weights[1] not in optimizer.state
    assert not torch.equal(weights[0], torch.ones(4, 3))


@needs_core
def test_gradients_stay_as_they_were_and_steps_that_are_not_finite_are_skipped() -> None:
    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.GSM(0.9), fused=True)
    model(torch.randn(4, 30)).square().mean().backward()
    grad = model.weight.grad.clone()
    optimizer.step()
    assert torch.equal(model.weight.grad, grad)
    before = model.weight.detach().clone()
    model.weight.grad[3, 4] = torch.inf
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert (pruner.num_steps, pruner.num_skipped) == (1, 1)
    assert torch.equal(model.weight, before)


def refusal(optimizer: torch.optim.Optimizer, model: nn.Module) -> str:
    with pytest.raises(ValueError) as error:
        pomona.Pruner(model, optimizer, pomona.GSM(0.5), fused=True)
    return str(error.value)


@needs_core
def test_what_cannot_be_fused_is_told_with_the_way_out() -> None:
    model = net()
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    assert "maximize=True" in refusal(torch.optim.SGD(model.parameters(), **settings, maximize=True), model)

    class Own(torch.optim.SGD):
        """Whose step may be another."""

    told = refusal(Own(model.parameters(), **settings), model)
    assert "torch.optim.SGD, not of Own" in told
    assert "leave it out" in told
    double = net().double()
    assert "float32" in refusal(torch.optim.SGD(double.parameters(), **settings), double)


def test_without_the_core_the_reason_is_told() -> None:
    model = net()
    with core.switched(False):
        assert "needs the compiled core" in refusal(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model
        )
