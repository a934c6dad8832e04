"""One rule for all methods: what is frozen keeps its values, and what trains later is pruned from then on or named."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import SGD, AdamW

import pomona
from pomona import Pruner, Scope
from tests.problems import NUM_WEIGHTS, batches, bits, loss_of, net, sparse_net, train

KEPT = 18  # of the 72 weights, at sparsity 0.75

METHODS: dict[str, Callable[[], pomona.Method]] = {
    "gsm": lambda: pomona.GSM(0.75),
    "magnitude": lambda: pomona.Magnitude(pomona.Linear(0.0, 0.75, steps=10), every=2),
    "feather": lambda: pomona.Feather(0.75),
    "admm": lambda: pomona.ADMM(0.75, every=2),
    "weightmom": lambda: pomona.WeightMom(0.75, every=1, window=2, patience=2),
    "grda": lambda: pomona.GRDA(sparsity=0.75, steps=12),
    "rigl": lambda: pomona.RigL(0.75, every=3),
    "set": lambda: pomona.SET(0.75, every=3),
}
each_method = pytest.mark.parametrize("name", METHODS)

# These runs are far too short for passive weights to vanish, which is not what they are about.
pytestmark = [pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed")]


def start(name: str) -> tuple[nn.Sequential, SGD, Pruner]:
    model = net()
    momentum = {} if name == "grda" else {"momentum": 0.9, "weight_decay": 0.05}
    optimizer = SGD(model.parameters(), lr=0.05, **momentum)
    return model, optimizer, Pruner(model, optimizer, METHODS[name]())


@each_method
def test_a_weight_that_is_frozen_keeps_its_values_through_steps_and_the_cut(name: str) -> None:
    model, optimizer, pruner = start(name)
    train(model, optimizer, batches(5))
    model[0].requires_grad_(False)
    before = bits(model[0].weight)
    train(model, optimizer, batches(20)[5:])
    assert bits(model[0].weight) == before
    assert pruner.report().layers[0].reason == "frozen since step 5: keeps its values"
    nonzero = int(model[0].weight.count_nonzero())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = pruner.harden()
    assert bits(model[0].weight) == before
    first, second = report.layers
    assert (first.nonzero, first.reason) == (nonzero, "frozen since step 5: keeps its values")
    assert not second.reason.startswith("frozen")
    told = [str(w.message) for w in caught if "harden() leaves 0.weight as before" in str(w.message)]
    surplus = report.nonzero - KEPT
    if surplus > 0:
        assert len(told) == 1 and f"{report.sparsity:.4g}" in told[0]
        assert int(re.search(r"values: (\d+) weights stay", told[0])[1]) >= surplus  # type: ignore[index]
    else:
        assert not told
    assert pruner.verify().nonzero == report.nonzero
    train(model, optimizer, batches(5, seed=1))
    assert bits(model[0].weight) == before
    assert pruner.verify().nonzero == report.nonzero


@each_method
def test_a_weight_that_is_unfrozen_again_is_pruned_from_the_next_step_on(name: str) -> None:
    model, optimizer, pruner = start(name)
    train(model, optimizer, batches(5))
    model[0].requires_grad_(False)
    train(model, optimizer, batches(10)[5:])
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    train(model, optimizer, batches(11)[10:])
    assert not torch.equal(model[0].weight, before)
    if name in ("magnitude", "feather", "rigl", "set"):
        assert pomona.report(model).sparsity >= 0.6  # the masks of the method, all at once
    train(model, optimizer, batches(20)[11:])
    report = pruner.harden()
    assert report.nonzero <= KEPT and not report.layers[0].reason.startswith("frozen")
    assert pruner.verify().nonzero == report.nonzero


def test_a_frozen_weight_stays_in_the_ranking() -> None:
    # The budget of the whole network, dense as the frozen part is: the others do not have to pay for it.
    model, optimizer, pruner = start("magnitude")
    train(model, optimizer, batches(4))
    model[0].requires_grad_(False)
    train(model, optimizer, batches(12)[4:])
    masks = {name: int(state["mask"].sum()) for name, state in pruner.state_dict()["state"].items()}
    assert sum(masks.values()) == KEPT and min(masks.values()) > 0
    assert pomona.report(model).layers[1].nonzero == masks["2.weight"]
    model[0].requires_grad_(True)
    train(model, optimizer, batches(13)[12:])
    assert pomona.report(model).nonzero == KEPT


def test_feather_goes_on_from_the_dense_weights_behind_a_frozen_one() -> None:
    model, optimizer, pruner = start("feather")
    train(model, optimizer, batches(5))
    behind = bits(pruner.state_dict()["state"]["0.weight"]["v"])
    model[0].requires_grad_(False)
    train(model, optimizer, batches(10)[5:])
    assert bits(pruner.state_dict()["state"]["0.weight"]["v"]) == behind


def test_a_frozen_weight_with_a_gradient_trains_as_torch_has_it() -> None:
    # Two networks that take turns: backward, freeze, the other's backward, and both steps at the end.
    model, optimizer, pruner = start("magnitude")
    for batch in batches(12):
        optimizer.zero_grad()
        model[0].requires_grad_(True)
        loss_of(model, batch).backward()
        model[0].requires_grad_(False)
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    assert pruner.harden().nonzero == KEPT


def test_a_gradient_of_zeros_does_not_move_what_is_frozen() -> None:
    # zero_grad(set_to_none=False) leaves one, and by it an optimizer would go on with momentum and decay.
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.75))
    train(model, optimizer, batches(3))
    model[0].requires_grad_(False)
    before = bits(model[0].weight)
    for batch in batches(6)[3:]:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.step()
        assert model[0].weight.grad is not None  # still there
    assert bits(model[0].weight) == before
    assert pruner.num_steps == 6


def test_a_step_with_something_frozen_counts_once_in_a_subclass_that_calls_super() -> None:
    class Sub(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    model = net()
    optimizer = Sub(model.parameters(), lr=0.05)
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.75))
    model[0].requires_grad_(False)
    for batch in batches(3):
        optimizer.zero_grad(set_to_none=False)
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        loss_of(model, batch).backward()
        optimizer.step()
    assert pruner.num_steps == 3


def test_two_networks_that_take_turns_are_both_pruned() -> None:
    # As generator and critic: one is frozen while the other trains, and in the end one is left frozen.
    nets = [net(0), net(1)]
    optimizers = [AdamW(model.parameters(), lr=0.01) for model in nets]
    pruners = [Pruner(m, o, pomona.Magnitude(0.75)) for m, o in zip(nets, optimizers, strict=True)]
    for batch in batches(6):
        for model, other, optimizer in zip(nets, reversed(nets), optimizers, strict=True):
            model.requires_grad_(True)
            other.requires_grad_(False)
            optimizer.zero_grad()
            (loss_of(model, batch) + loss_of(other, batch)).backward()
            optimizer.step()
            assert int(model[0].weight.count_nonzero() + model[2].weight.count_nonzero()) == KEPT
    assert [pruner.num_steps for pruner in pruners] == [6, 6]
    assert pruners[1].harden().nonzero == KEPT
    assert pruners[0].harden().nonzero == KEPT  # frozen now, and its zeros are there
    assert [pruner.verify().nonzero for pruner in pruners] == [KEPT, KEPT]


def test_freezing_after_the_cut_changes_nothing() -> None:
    model, optimizer, pruner = start("magnitude")
    train(model, optimizer, batches(12))
    pruner.harden()
    model[0].requires_grad_(False)
    before = bits(model[0].weight)
    train(model, optimizer, batches(3))
    model[0].requires_grad_(True)
    assert bits(model[0].weight) == before
    train(model, optimizer, batches(3))
    assert pruner.verify().nonzero == KEPT


# Frozen when the Pruner is made


def frozen_first() -> tuple[nn.Sequential, AdamW, Pruner]:
    model = net()
    model[0].requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=0.05)
    return model, optimizer, Pruner(model, optimizer, pomona.Magnitude(0.75))


def test_a_weight_that_was_frozen_at_first_and_trains_later_is_named() -> None:
    model, optimizer, pruner = frozen_first()
    train(model, optimizer, batches(2))
    assert pruner.report().outside["0.weight"] == "frozen (requires_grad is False)"
    model[0].requires_grad_(True)
    train(model, optimizer, batches(3))
    with pytest.warns(UserWarning, match=r"^0.weight was frozen when the Pruner was made and trains now: not pruned"):
        report = pruner.harden()
    assert report.outside["0.weight"] == (
        "was frozen when the Pruner was made and trains now: make a new Pruner to prune it"
    )
    assert (report.total, bool(model[0].weight.all())) == (24, True)
    pruner.detach()  # as the message advises
    again = Pruner(model, optimizer, pomona.Magnitude(0.75))
    train(model, optimizer, batches(2))
    assert again.harden().nonzero == KEPT


def test_a_weight_that_stays_frozen_is_not_warned_of() -> None:
    model, optimizer, pruner = frozen_first()
    train(model, optimizer, batches(2))
    assert pruner.harden().total == 24


# The state


def half_frozen() -> tuple[nn.Sequential, SGD, Pruner]:
    model, optimizer, pruner = start("magnitude")
    train(model, optimizer, batches(5))
    model[0].requires_grad_(False)
    train(model, optimizer, batches(12)[5:])
    return model, optimizer, pruner


def resumed(model: nn.Module, optimizer: SGD, state: Any) -> tuple[nn.Sequential, SGD, Pruner]:
    again, other, pruner = start("magnitude")
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pruner.load_state_dict(state)
    again[0].requires_grad_(False)
    return again, other, pruner


def test_a_resumed_run_knows_since_when_and_what_was_left() -> None:
    model, optimizer, pruner = half_frozen()
    _, _, early = resumed(model, optimizer, pruner.state_dict())
    assert early.report().layers[0].reason == "frozen since step 5: keeps its values"
    with pytest.warns(UserWarning, match="harden.. leaves 0.weight as before"):
        report = pruner.harden()
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    again, other, late = resumed(model, optimizer, torch.load(file, weights_only=True))
    assert late.verify().layers == report.layers
    assert bits(late.state_dict()) == bits(pruner.state_dict())
    train(again, other, batches(3))
    assert late.verify().nonzero == report.nonzero
    twin = copy.deepcopy((model, optimizer, pruner))[2]
    assert twin.verify().layers == report.layers


def test_exactly_what_was_left_is_accepted() -> None:
    _, _, pruner = half_frozen()
    with pytest.warns(UserWarning, match="harden.. leaves"):
        pruner.harden()
    state = copy.deepcopy(pruner.state_dict())
    since, surplus = state["cuts"]["0.weight"]
    state["cuts"]["0.weight"] = [since, surplus - 1]
    pruner.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"\d+ weights survived, more than the budget of \d+"):
        pruner.verify()


def test_a_state_from_before_there_was_freezing_loads() -> None:
    model, optimizer, pruner = start("magnitude")
    train(model, optimizer, batches(12))
    pruner.harden()
    state = pruner.state_dict()
    assert all(isinstance(cut, float) for cut in state["cuts"].values())  # nothing is new in it
    pruner.load_state_dict(state)
    assert pruner.verify().nonzero == KEPT


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # which torch 2.6 uses itself
def test_a_distributed_checkpoint_carries_what_was_left(tmp_path: Path) -> None:
    model, _, pruner = half_frozen()
    with pytest.warns(UserWarning, match="harden.. leaves"):
        report = pruner.harden()
    dcp.save({"model": model.state_dict(), "pruner": pruner}, checkpoint_id=tmp_path)
    again, _, fresh = start("magnitude")
    dcp.load({"model": again.state_dict(), "pruner": fresh}, checkpoint_id=tmp_path)
    fresh.mark()
    assert fresh.verify().layers == report.layers


def test_groups_are_not_asked_of_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.5, granularity="2:4"))
    model[0].requires_grad_(False)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"32 weights stay that the budget would have cut, and the sparsity is 0.1667"):
        pruner.harden()
    assert pruner.verify().nonzero == 80


def test_a_trial_leaves_what_is_frozen_as_it_is() -> None:
    model, _, pruner = half_frozen()
    before = bits(model[0].weight)
    with pruner.trial_cut() as report:
        assert bits(model[0].weight) == before
        assert report.layers[0].nonzero == int(model[0].weight.count_nonzero())
    assert pruner.density_if_cut()["0.weight"] == report.layers[0].density


# Counting does not ask whether anything trains


def test_a_frozen_model_is_counted_like_one_that_trains() -> None:
    model = sparse_net()
    report = pomona.report(model)
    model.requires_grad_(False)
    assert pomona.report(model).to_dict() == report.to_dict()
    assert list(Scope().select(sparse_net().requires_grad_(True)).inside) == ["0.weight", "2.weight"]
    assert list(Scope().select(model, with_frozen=True).inside) == ["0.weight", "2.weight"]
    with pytest.raises(ValueError, match=r"nothing to prune.*frozen"):
        Scope().select(model)


def test_the_zeros_of_a_frozen_model_are_held_when_it_trains_later() -> None:
    model = sparse_net().requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=0.05)
    pruner = pomona.hold(model, optimizer)
    assert pruner.report().total == NUM_WEIGHTS
    model[2].requires_grad_(True)
    train(model, optimizer, batches(2))
    model[0].requires_grad_(True)
    train(model, optimizer, batches(2))
    assert pruner.verify().nonzero == NUM_WEIGHTS // 2
    assert pruner.report().sparsity == 0.5


def test_what_no_optimizer_moves_need_not_be_held() -> None:
    model = sparse_net()
    model[0].requires_grad_(False)
    optimizer = AdamW(model[2].parameters(), lr=0.05)
    pruner = pomona.hold(model, optimizer)
    assert pruner.report().outside["0.weight"] == "frozen (requires_grad is False)"
    train(model, optimizer, batches(2))
    assert pruner.verify().nonzero == 12
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to hold: all weights in scope are frozen .0.weight, 2.weight"):
        pomona.hold(model, SGD(nn.Linear(2, 2).parameters(), lr=0.1))
