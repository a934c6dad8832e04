"""Feather where the paper says nothing: edits from outside, other dtypes, schedules of the user's own."""

from __future__ import annotations

import math

import pytest
import torch

import pomona
from pomona.schedule import Schedule
from tests.problems import Kernels, batches, loss_of, net, train


def pruner_of(*layers: list[float], method: pomona.Feather, dtype: torch.dtype = torch.float32) -> pomona.Pruner:
    """Of one row of weights for each layer, after one step without gradients."""
    model = Kernels([torch.nn.Parameter(torch.tensor([layer], dtype=dtype)) for layer in layers])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = pomona.Pruner(model, optimizer, method)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return pruner


def test_weights_loaded_from_elsewhere_are_cut_to_the_budget() -> None:
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.Feather(0.75))
    train(model, optimizer, batches(5))
    model.load_state_dict(net(1).state_dict())
    assert pruner.harden().nonzero == 18


def test_the_model_is_sparse_again_after_a_step_that_failed() -> None:
    model = net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, pomona.Feather(0.75))
    train(model, optimizer, batches(3))
    loss_of(model, batches(1)[0]).backward()
    group = optimizer.param_groups[0]
    del group["momentum"]
    with pytest.raises(KeyError):
        optimizer.step()
    group["momentum"] = 0.0
    optimizer.step()
    assert pruner.metrics()["sparsity"] == 0.75


@pytest.mark.parametrize("power", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_of_equal_weights_the_budget_stays_in_any_precision(dtype: torch.dtype, power: float) -> None:
    pruner = pruner_of([0.5] * 8, method=pomona.Feather(0.5, power=power), dtype=dtype)
    (value,) = pruner.parameters().values()
    assert value.count_nonzero() == 4
    assert float(value.detach().abs().max()) == torch.finfo(dtype).tiny


def test_what_only_float64_tells_apart_shares_one_threshold() -> None:
    """Weights are ranked in float32, where 1 - 1e-12 is 1; no floor holds either layer."""
    method = pomona.Feather(5 / 8)
    pruner = pruner_of([2.0, 1 - 1e-12, 0.1, 0.05], [1.0, 3.0, 0.2, 0.3], method=method, dtype=torch.float64)
    assert {float(state["threshold"]) for state in pruner.state_dict()["state"].values()} == {1.0}
    assert sum(int(p.count_nonzero()) for p in pruner.parameters().values()) == 3


class Stairs(Schedule):
    def __call__(self, step: int) -> float:
        return 0.98 if step > 3 else 0.0


@pytest.mark.parametrize(("sparsity", "theta"), [(Stairs(), 0.5), (pomona.Linear(0.98, 0.5, steps=9), 1.0)])
def test_where_a_schedule_ends_decides_on_the_gradients_of_zeros(sparsity: Schedule, theta: float) -> None:
    model = torch.nn.Linear(20, 20, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = pomona.Pruner(model, optimizer, pomona.Feather(sparsity, min_density=0.0))
    for _ in range(4):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    before = pruner.state_dict()["state"]["weight"]["v"].clone()
    zeros = model.weight == 0
    model.weight.grad = torch.full_like(model.weight, 2.0**-10)
    optimizer.step()
    moved = (before - pruner.state_dict()["state"]["weight"]["v"])[zeros] * 2.0**10
    assert moved.numel() > 100
    torch.testing.assert_close(moved, torch.full_like(moved, theta), atol=1e-3, rtol=0)


def test_a_score_of_ones_own_has_no_threshold() -> None:
    with pytest.raises(
        ValueError, match=r"Feather's threshold is one on \|v\|, .* take score='magnitude' or 'lamp', or"
    ):
        pomona.Feather(0.5, score=lambda w: w.value.abs())


@pytest.mark.parametrize("power", [1.0, math.inf])
def test_by_a_fair_score_each_layer_has_a_threshold_of_its_own(power: float) -> None:
    pruner = pruner_of(
        [4.0, 3.0, 2.0, 1.0], [0.04, 0.03, 0.02, 0.01], method=pomona.Feather(0.5, power=power, score="lamp")
    )
    first, second = (w.flatten().tolist() for w in pruner.parameters().values())
    shrunk = (lambda v, t: v - t) if power == 1.0 else (lambda v, t: v)
    assert first == pytest.approx([shrunk(4.0, 2.0), shrunk(3.0, 2.0), 0.0, 0.0])
    assert second == pytest.approx([shrunk(0.04, 0.02), shrunk(0.03, 0.02), 0.0, 0.0])
