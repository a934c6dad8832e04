"""The Pruner in users' hands: what it hooks into, what it refuses, and what must leave no trace."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

import pomona
from pomona import GSM, Pruner, Scope
from tests.problems import (
    NUM_WEIGHTS,
    Batch,
    batches,
    bits,
    loss_of,
    net,
    regression,
    sparse_net,
    teacher,
    train,
    wiring,
)

KEPT = 18  # of the 72 weights, at sparsity 0.75
NUM_STEPS = 20

# These runs are far too short for passive weights to vanish, which is not what they are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed"),
    pytest.mark.filterwarnings("ignore:decay exponent"),
]


def sgd(model: nn.Module, **options: Any) -> SGD:
    """Settings with a decay exponent of 0.05 a step."""
    return SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, **options})


def pruned(
    seed: int = 0, *, sparsity: pomona.schedule.Value = 0.75, **options: Any
) -> tuple[nn.Sequential, SGD, Pruner]:
    model = net(seed)
    optimizer = sgd(model, **options)
    return model, optimizer, Pruner(model, optimizer, GSM(sparsity=sparsity))


class Tied(nn.Module):
    """A language model in miniature: the embedding is the head, with a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.mid = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 8, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in (self.embed.weight, self.mid.weight):
                p.copy_(torch.randn(p.shape, generator=generator))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mid(self.embed(tokens)))
        return logits

    def train_on(self, optimizer: Optimizer, steps: int) -> None:
        tokens = torch.arange(8)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(tokens), tokens.roll(1)).backward()
            optimizer.step()


# Outcome: problems with a known sparse answer


@pytest.mark.parametrize("seed", range(4))
def test_gsm_finds_the_inputs_that_matter_where_cutting_least_squares_does_not(seed: int) -> None:
    problem = regression(seed)
    layer = nn.Linear(40, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(problem.start)
    cut_at_once = layer.weight.detach()[0].abs().topk(6).indices
    assert set(cut_at_once.tolist()) != problem.support
    optimizer = sgd(layer, lr=0.04, weight_decay=0.05)
    pruner = Pruner(layer, optimizer, GSM(sparsity=1 - 6 / 40))
    train(layer, optimizer, [(problem.inputs, problem.targets)] * 400)
    pruner.harden()
    assert wiring(layer) == [sorted(problem.support)]


@pytest.mark.parametrize("seed", range(3))
def test_gsm_finds_the_wiring_of_a_sparse_teacher_in_a_student_twice_as_wide(seed: int) -> None:
    problem = teacher(seed)
    student, data = problem.student, [(problem.inputs, problem.targets)]
    train(student, Adam(student.parameters(), lr=0.01), data * 600)
    total = sum(p.numel() for p in student.parameters())
    optimizer = sgd(student, lr=0.05, weight_decay=0.02)
    pruner = Pruner(student, optimizer, GSM(sparsity=1 - problem.num_weights / total))
    train(student, optimizer, data * 800)
    before = loss_of(student, data[0]).item()
    assert pruner.harden().nonzero == problem.num_weights
    assert wiring(student[0]) == problem.wiring
    # the cut removes nothing that the student used, and nine tenths of a per cent of the variance is left
    assert loss_of(student, data[0]).item() == pytest.approx(before, rel=0.01)
    assert before < 0.009 * problem.targets.var().item()


# The arithmetic is torch.optim's own

KINDS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["loop", "foreach", "fused"])


@kinds
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_sparsity_zero_is_sgd_bit_for_bit_also_at_zero_weights(kind: dict[str, bool], nesterov: bool) -> None:
    ends = []
    for prune in (False, True):
        model = sparse_net()
        optimizer = sgd(model, nesterov=nesterov, **kind)
        if prune:
            Pruner(model, optimizer, GSM(sparsity=0.0))
        train(model, optimizer, batches(15))
        ends.append(bits([model.state_dict(), optimizer.state_dict()]))
    assert ends[0] == ends[1]
    assert all(bool((p != 0).all()) for p in model.parameters())


@kinds
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_sgd_with_gradients_masked_by_hand_is_gsm_bit_for_bit(kind: dict[str, bool], nesterov: bool) -> None:
    data = batches(15)
    model, optimizer, _ = pruned(nesterov=nesterov, **kind)
    train(model, optimizer, data)

    by_hand = net()
    plain = sgd(by_hand, nesterov=nesterov, **kind)
    weights = [by_hand[0].weight, by_hand[2].weight]
    for batch in data:
        plain.zero_grad()
        loss_of(by_hand, batch).backward()
        scores = torch.cat([(w.detach() * w.grad).abs().view(-1) for w in weights])
        mask = torch.zeros(NUM_WEIGHTS)
        mask[torch.topk(scores, KEPT).indices] = 1.0
        for w, b in zip(weights, mask.split([48, 24]), strict=True):
            w.grad *= b.view_as(w)
        plain.step()
    assert bits([model.state_dict(), optimizer.state_dict()]) == bits([by_hand.state_dict(), plain.state_dict()])


def test_momentum_goes_on_when_a_weight_turns_passive() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = SGD(layer.parameters(), lr=0.5, momentum=0.5, weight_decay=0.25)
    Pruner(layer, optimizer, GSM(sparsity=0.5))
    for grad in ([2.0, 1.0], [1.0, 4.0]):  # first the one weight is active, then the other
        layer.weight.grad = torch.tensor([grad])
        optimizer.step()
    # z: 2 + 0.25 = 2.25, then 0.5 * 2.25 + 0.25 * (1 - 0.5 * 2.25); exact in binary
    assert optimizer.state[layer.weight]["momentum_buffer"][0, 0].item() == 1.09375
    assert layer.weight[0, 0].item() == 1.0 - 0.5 * 2.25 - 0.5 * 1.09375


def test_groups_with_different_learning_rates_share_one_budget() -> None:
    data = batches(15)

    def grouped(model: nn.Sequential) -> SGD:
        groups = [
            {"params": model[0].parameters(), "lr": 0.01},
            {"params": [model[2].weight], "lr": 0.2},
            {"params": [model[2].bias], "weight_decay": 0.0},
        ]
        return SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5)

    model, by_hand = net(), net()
    optimizer, plain = grouped(model), grouped(by_hand)
    Pruner(model, optimizer, GSM(sparsity=0.75))
    train(model, optimizer, data)
    for batch in data:
        plain.zero_grad()
        loss_of(by_hand, batch).backward()
        w, v = by_hand[0].weight, by_hand[2].weight
        scores = torch.cat([(w.detach() * w.grad).abs().view(-1), (v.detach() * v.grad).abs().view(-1)])
        kept = scores >= scores.topk(KEPT).values[-1]
        w.grad *= kept[:48].view_as(w)
        v.grad *= kept[48:].view_as(v)
        plain.step()
    assert bits([model.state_dict(), optimizer.state_dict()]) == bits([by_hand.state_dict(), plain.state_dict()])


def test_channels_last_ends_where_the_default_layout_does() -> None:
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(3, 4, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in conv.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        conv = conv.to(memory_format=layout)
        optimizer = sgd(conv)
        Pruner(conv, optimizer, GSM(sparsity=0.5))
        for _ in range(10):
            conv.weight.grad = torch.randn(conv.weight.shape, generator=generator).to(memory_format=layout)
            optimizer.step()
        ends.append(bits(conv.weight))
    assert ends[0] == ends[1]


# Schedules and floors


def test_the_number_of_active_weights_follows_the_schedule() -> None:
    schedule = pomona.Cubic(0.0, 0.75, steps=8, begin=2)
    model, optimizer, pruner = pruned(sparsity=schedule)
    for step, batch in enumerate(batches(12), start=1):
        train(model, optimizer, [batch])
        if step > 2:
            share = 0.25 + 0.75 * (1 - min((step - 2) / 8, 1.0)) ** 3
            assert pruner.metrics()["active"] == math.floor(72 * share + 1e-6)
    assert pruner.num_steps == 12


@pytest.mark.filterwarnings("ignore:.* starves layers")
@pytest.mark.parametrize(("min_density", "left"), [(1e-4, 1), (0.0, 0), (0.25, 6)])
def test_a_floor_keeps_a_layer_alive_that_the_global_cut_would_empty(min_density: float, left: int) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.75, min_density=min_density))
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_STEPS):
        for p in model.parameters():
            p.grad = 1e-6 * torch.randn(p.shape, generator=generator)
        optimizer.step()
    layers = {layer.name: layer.nonzero for layer in pruner.harden().layers}
    assert layers == {"0.weight": KEPT - left, "2.weight": left}


def test_a_budget_below_the_floors_is_refused_at_once() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="lower min_density or the sparsity"):
        Pruner(model, optimizer, GSM(sparsity=pomona.Linear(0.0, 0.9, steps=1000)))


# Steps that are none


@pytest.mark.parametrize("place", ["0.weight", "2.bias"], ids=["in scope", "in a bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: sgd(model),
        lambda model: sgd(model, fused=True),
        lambda model: Adam(model.parameters()),
        lambda model: Adam(model.parameters(), fused=True, amsgrad=True),
        lambda model: AdamW(model.parameters(), weight_decay=0.1),
    ],
    ids=["sgd", "sgd fused", "adam", "adam fused", "adamw"],
)
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(
    place: str, value: float, with_closure: bool, make: Callable[[nn.Module], Optimizer]
) -> None:
    model = sparse_net()
    optimizer = make(model)
    pruner = (
        Pruner(model, optimizer, GSM(sparsity=0.75)) if isinstance(optimizer, SGD) else pomona.hold(model, optimizer)
    )
    train(model, optimizer, batches(3))

    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batches(1, seed=5)[0])
        loss.backward()
        grad = model.get_parameter(place).grad
        assert grad is not None
        grad.view(-1)[1] = value
        return loss

    def poisoned_step() -> None:
        if with_closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()

    before = bits([model.state_dict(), optimizer.state_dict(), pruner.state_dict()["state"]])
    with pytest.warns(UserWarning, match="a gradient is not finite at step 4; skipping this step"):
        poisoned_step()
    poisoned_step()  # without a word
    assert bits([model.state_dict(), optimizer.state_dict(), pruner.state_dict()["state"]]) == before
    assert (pruner.num_steps, pruner.num_skipped) == (3, 2)
    grads = [p.grad for p in model.parameters()]
    backward()
    assert bits(grads) == bits([p.grad for p in model.parameters()])  # handed back, not masked
    train(model, optimizer, batches(1))
    assert pruner.num_steps == 4
    assert bits(model.state_dict()) != before[0]


def test_an_overflow_that_only_another_rank_saw_is_skipped_too() -> None:
    # A sharded GradScaler tells all ranks; here the gradients are finite.
    model, optimizer, pruner = pruned(fused=True)
    train(model, optimizer, batches(3))
    loss_of(model, batches(1)[0]).backward()
    before = bits([model.state_dict(), optimizer.state_dict(), pruner.state_dict()["state"]])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="skipping this step"):
        optimizer.step()
    assert bits([model.state_dict(), optimizer.state_dict(), pruner.state_dict()["state"]]) == before
    assert (pruner.num_steps, pruner.num_skipped) == (3, 1)


def test_skipped_steps_are_remembered_by_a_resumed_run() -> None:
    model, optimizer, pruner = pruned()
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="skipping this step"):
        train(model, optimizer, [(x, y * math.nan)])
    again, other, resumed = pruned(1)
    resumed.load_state_dict(pruner.state_dict())
    train(again, other, [(x, y * math.nan)])  # has been warned of
    assert resumed.num_skipped == 2
    assert "2 steps were skipped because a gradient was not finite" in str(resumed.report())


@pytest.mark.filterwarnings("ignore:.* is torch.float32, and a passive weight would lose a share")  # lr 1e-38
def test_finite_gradients_whose_sum_overflows_are_used() -> None:
    model, optimizer, pruner = pruned(lr=1e-38)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    assert (pruner.num_steps, pruner.num_skipped) == (1, 0)


def test_a_complex_parameter_outside_the_scope_is_no_trouble() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2))
            self.c = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    model = Filter()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.5), scope=Scope(also=["w"]))
    model.w.grad = torch.ones(2, 2)
    model.c.grad = torch.ones(3, dtype=torch.complex64)
    optimizer.step()
    assert pruner.num_steps == 1
    model.c.grad = torch.full((3,), complex(0.0, math.nan))
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        optimizer.step()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_no_learning_rate_and_no_gradient_make_no_step_but_a_gradient_does(lr: float | Tensor) -> None:
    model, optimizer, pruner = pruned()
    for group in optimizer.param_groups:
        group["lr"] = lr
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (pruner.num_steps, pruner.num_skipped) == (0, 0)
    train(model, optimizer, batches(1))  # the first step of a warm-up from zero
    assert (pruner.num_steps, pruner.num_skipped) == (1, 0)


def test_a_learning_rate_with_no_gradient_to_follow_is_a_step_of_decay() -> None:
    model, optimizer, pruner = pruned()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = net()[0].weight.detach()
    optimizer.step()
    assert pruner.num_steps == 1
    assert torch.equal(model[0].weight, before - 0.1 * (0.05 * before))


def test_distributed_checkpointing_makes_no_step() -> None:
    model, optimizer, pruner = pruned()
    weights = bits(model.state_dict())
    fresh = get_optimizer_state_dict(model, optimizer)  # steps once to create the buffers
    assert all("momentum_buffer" in state for state in fresh["state"].values())
    assert (pruner.num_steps, pruner.num_skipped, pruner.metrics()["decay_exponent"]) == (0, 0, 0.0)
    assert bits(model.state_dict()) == weights

    train(model, optimizer, batches(5))
    saved = get_optimizer_state_dict(model, optimizer)
    again, other, other_pruner = pruned(1)
    set_optimizer_state_dict(again, other, saved)  # steps once, too
    assert other_pruner.num_steps == 0
    assert bits(other.state_dict()["state"]) == bits(optimizer.state_dict()["state"])


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # which torch 2.6 uses itself
def test_a_distributed_checkpoint_takes_the_pruner_as_it_is(tmp_path: Path) -> None:
    model, optimizer, pruner = pruned()
    assert isinstance(pruner, Stateful)
    train(model, optimizer, batches(7))
    dcp.save({"pruner": pruner}, checkpoint_id=tmp_path)
    _, _, fresh = pruned(1)
    dcp.load({"pruner": fresh}, checkpoint_id=tmp_path)
    assert bits(fresh.state_dict()) == bits(pruner.state_dict())
    assert fresh.num_steps == 7


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # which torch 2.6 uses itself
def test_a_distributed_checkpoint_restores_the_zeros(tmp_path: Path) -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(NUM_STEPS))
    pruner.harden()
    dcp.save({"model": model.state_dict(), "pruner": pruner}, checkpoint_id=tmp_path)
    again, other, fresh = pruned(1)
    dcp.load({"model": again.state_dict(), "pruner": fresh}, checkpoint_id=tmp_path)
    assert fresh.is_hardened
    train(again, other, batches(3))
    assert fresh.verify().nonzero == KEPT


def test_a_step_without_any_gradient_is_none() -> None:
    _, optimizer, pruner = pruned()
    optimizer.step()
    assert (pruner.num_steps, pruner.metrics()["decay_exponent"]) == (0, 0.0)


def test_weights_without_a_gradient_stay_as_they_are_and_are_not_active() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    model[0](batches(1)[0][0]).square().sum().backward()  # the second layer takes no part
    before = bits(model[2].state_dict())
    optimizer.step()
    assert bits(model[2].state_dict()) == before
    assert [p.grad for p in model[2].parameters()] == [None, None]
    assert pruner.metrics()["active"] == KEPT


def test_a_weight_that_never_has_a_gradient_is_diagnosed_as_not_decayed() -> None:
    model, optimizer, pruner = pruned()
    for x, _ in batches(NUM_STEPS):
        optimizer.zero_grad()
        model[0](x).square().sum().backward()
        optimizer.step()
    assert pruner.metrics()["decay_exponent"] == 0.0
    with pytest.warns(UserWarning, match="have not decayed"):
        pruner.harden()


# What is refused, and how


class TwoCalls(SGD):
    """As SAM does it: the closure once here and once there."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            return closure()


def test_an_optimizer_that_calls_its_closure_twice_is_refused() -> None:
    model = net()
    optimizer = TwoCalls(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    Pruner(model, optimizer, GSM(sparsity=0.75))
    with pytest.raises(RuntimeError, match="TwoCalls called its closure twice in one step"):
        optimizer.step(lambda: loss_of(model, batches(1)[0]).backward())


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
def test_an_optimizer_that_calls_super_step_makes_one_step(with_closure: bool) -> None:
    class Renamed(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = net()
    sgd(model)  # torch adds the hooks to a class when it is first used
    optimizer = Renamed(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.75))

    def backward() -> Tensor:
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        return loss

    if with_closure:
        optimizer.step(backward)
    else:
        backward()
        optimizer.step()
    assert pruner.num_steps == 1
    assert pruner.metrics()["decay_exponent"] == pytest.approx(0.05)


def test_a_step_that_raises_does_not_disturb_the_next() -> None:
    model, optimizer, pruner = pruned()

    def out_of_memory() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(out_of_memory)
    train(model, optimizer, batches(3))
    same, plain, unhurt = pruned()
    train(same, plain, batches(3))
    assert bits([model.state_dict(), pruner.state_dict()]) == bits([same.state_dict(), unhurt.state_dict()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: torch.optim.LBFGS(ps), "LBFGS evaluates its closure several times a step"),
        (lambda ps: AdamW(ps), "AdamW: its weight decay is decoupled from the gradient"),
        pytest.param(
            lambda ps: Adam(ps, decoupled_weight_decay=True),
            "Adam: its weight decay is decoupled from the gradient",
            marks=pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="Adam of torch 2.6 cannot do it"),
        ),
        (lambda ps: Adam(ps, weight_decay=0.1), "cannot prune with Adam: it needs momentum SGD"),
        (lambda ps: torch.optim.RMSprop(ps, momentum=0.9), "cannot prune with RMSprop: it needs momentum SGD"),
        (lambda ps: SGD(ps, lr=0.1, weight_decay=0.1), r"momentum > 0, got SGD\(momentum=0\)"),
        (lambda ps: SGD(ps, lr=0.1, momentum=0.9), r"weight_decay > 0 .* got SGD\(weight_decay=0\)"),
    ],
    ids=["LBFGS", "AdamW", "decoupled Adam", "Adam", "RMSprop", "no momentum", "no decay"],
)
def test_gsm_refuses_an_optimizer_that_cannot_drive_it(
    make: Callable[[list[nn.Parameter]], Optimizer], message: str
) -> None:
    model = net()
    optimizer = make(list(model.parameters()))
    with pytest.raises(ValueError, match=message):
        Pruner(model, optimizer, GSM(sparsity=0.75))
    assert not optimizer._optimizer_step_pre_hooks


def test_only_groups_with_weights_in_scope_need_decay() -> None:
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": wd} for n, wd in ((1, 0.0), (2, 0.5))
    ]
    pruner = Pruner(model, SGD(groups, lr=0.1, momentum=0.9), GSM(sparsity=0.75))
    assert pruner.is_attached


def test_a_weight_that_the_optimizer_does_not_hold_is_named() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"SGD, or leave them out: Scope\(exclude=\['0.weight'\]\)"):
        Pruner(model, sgd(model[2]), GSM(sparsity=0.75))
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0\.weight, 2\.weight"):
        Pruner(copy.deepcopy(model), sgd(model), GSM(sparsity=0.75))


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ({"optimizer": "SGD"}, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"optimizer": net()}, "optimizer must be a torch.optim.Optimizer, got Sequential"),
        ({"method": 0.9}, r"method must be a pomona.Method such as GSM\(sparsity=0.9\), got 0.9"),
        ({"method": GSM}, "method must be a pomona.Method"),
        pytest.param({"model": "net"}, "model must be a torch.nn.Module"),
        pytest.param({"scope": "0"}, "scope must be a pomona.Scope"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(swap: dict[str, Any], message: str) -> None:
    model = net()
    arguments: dict[str, Any] = {"model": model, "optimizer": sgd(model), "method": GSM(sparsity=0.75), "scope": None}
    arguments |= swap
    with pytest.raises(TypeError, match=message):
        Pruner(arguments["model"], arguments["optimizer"], arguments["method"], scope=arguments["scope"])


def test_a_sparse_gradient_in_scope_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = sgd(model)
    Pruner(model, optimizer, GSM(sparsity=0.5), scope=Scope(types=(nn.Embedding,)))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight has a sparse gradient; make its module with sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_sparse_gradient_outside_the_scope_is_no_trouble(lr: float) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 4))
    groups = [{"params": model[1].parameters(), "weight_decay": 0.5}, {"params": model[0].parameters()}]
    optimizer = SGD(groups, lr=lr, momentum=0.9)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.5), scope=Scope(exclude=["0"]))
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert pruner.metrics()["active"] == 6


# Two Pruners


def test_two_pruners_of_one_weight_are_refused_and_the_first_goes_on() -> None:
    model, optimizer, first = pruned()
    with pytest.raises(ValueError, match=r"0.weight is already pruned by another Pruner on this optimizer"):
        Pruner(model, optimizer, GSM(sparsity=0.5), scope=Scope(include=["0"]))
    train(model, optimizer, batches(2))
    assert first.num_steps == 2
    assert first.metrics()["active"] == KEPT


def test_after_detach_another_pruner_may_follow() -> None:
    model, optimizer, first = pruned()
    first.detach()
    assert not first.is_attached
    second = Pruner(model, optimizer, GSM(sparsity=0.5))
    train(model, optimizer, batches(2))
    assert (first.num_steps, second.num_steps) == (0, 2)
    with pytest.raises(RuntimeError, match="not attached"):
        first.harden()


def test_the_state_of_a_detached_pruner_goes_on_with_another_optimizer() -> None:
    model, optimizer, first = pruned()
    train(model, optimizer, batches(NUM_STEPS))
    kept = first.harden().nonzero
    first.detach()
    assert first.report().nonzero == sum(int(mask.sum()) for mask in first.masks().values()) == kept
    other = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)
    second = Pruner(model, other, GSM(sparsity=0.75))
    second.load_state_dict(first.state_dict())
    train(model, other, batches(3))
    assert (second.verify().nonzero, second.num_steps) == (kept, NUM_STEPS + 3)


def test_after_detach_training_is_plain_sgd() -> None:
    model, optimizer, pruner = pruned()
    pruner.detach()
    train(model, optimizer, batches(5))
    plain = net()
    train(plain, sgd(plain), batches(5))
    assert bits(model.state_dict()) == bits(plain.state_dict())


@pytest.mark.parametrize("overlap", ["wrapped", "tied"])
def test_two_pruners_of_one_weight_are_refused_also_under_another_name(overlap: str) -> None:
    if overlap == "wrapped":
        model, optimizer, _ = pruned()
        second: tuple[nn.Module, Scope] = (nn.Sequential(model), Scope())
    else:
        tied = Tied()
        optimizer = sgd(tied)
        Pruner(tied, optimizer, GSM(sparsity=0.5), scope=Scope(types=(nn.Embedding,)))
        second = (tied, Scope(include=["head"], also=["head"]))
    with pytest.raises(ValueError, match="already pruned by another Pruner"):
        Pruner(second[0], optimizer, GSM(sparsity=0.5), scope=second[1])


def two_scopes() -> tuple[nn.Module, SGD, Pruner, Pruner]:
    model = net()
    optimizer = sgd(model)
    first = Pruner(model, optimizer, GSM(sparsity=0.75), scope=Scope(include=["0"]))
    return model, optimizer, first, Pruner(model, optimizer, GSM(sparsity=0.5), scope=Scope(include=["2"]))


def test_two_pruners_with_scopes_apart_work_together() -> None:
    model, optimizer, first, second = two_scopes()
    train(model, optimizer, batches(NUM_STEPS))
    assert first.harden().nonzero == 12
    train(model, optimizer, batches(3))
    assert second.harden().nonzero == 12
    assert first.verify().num_steps == second.verify().num_steps == NUM_STEPS + 3


def test_two_pruners_skip_the_same_steps() -> None:
    model, optimizer, first, second = two_scopes()
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        train(model, optimizer, [(x, y * math.nan)])
    assert (first.num_steps, second.num_steps) == (0, 0)


# Copies of the optimizer lose their hooks


def lost_by(way: str, optimizer: SGD, model: nn.Module) -> Optimizer:
    if way == "deepcopy":
        return copy.deepcopy(optimizer, {id(p): p for p in model.parameters()})
    if way == "copy":
        return copy.copy(optimizer)
    again = sgd(model)
    again.load_state_dict(optimizer.state_dict())
    return again


@pytest.mark.parametrize("way", ["deepcopy", "copy", "remade"])
@pytest.mark.parametrize(
    "kind",
    [
        KINDS[0],
        KINDS[1],
        pytest.param(KINDS[2]),
    ],
    ids=["loop", "foreach", "fused"],
)
def test_training_with_another_optimizer_is_noticed(way: str, kind: dict[str, bool]) -> None:
    model, optimizer, pruner = pruned(**kind)
    train(model, optimizer, batches(NUM_STEPS))
    other = lost_by(way, optimizer, model)
    for group in other.param_groups:
        group.update({"foreach": False, "fused": False, **kind})
    train(model, other, batches(3))
    assert pruner.num_steps == NUM_STEPS
    with pytest.warns(UserWarning, match="since the last optimizer step that this Pruner saw"):
        state = pruner.state_dict()
    with pytest.warns(UserWarning, match="make a new Pruner with that one and load this one's state_dict"):
        pruner.harden()
    again = Pruner(model, other, GSM(sparsity=0.75))  # as the message advises
    again.load_state_dict(state)
    train(model, other, batches(3))
    assert again.harden().nonzero == KEPT and again.num_steps == NUM_STEPS + 3


def test_a_trial_cut_does_not_hide_training_with_another_optimizer() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(NUM_STEPS))
    train(model, copy.copy(optimizer), batches(3))
    with pytest.warns(UserWarning, match="make a new Pruner with that one"):
        with pruner.trial_cut():
            pass
        pruner.state_dict()


def test_training_a_copied_pair_is_noticed_at_harden_of_the_original() -> None:
    model, optimizer, pruner = pruned()
    other, copied = copy.deepcopy((model, optimizer))
    train(other, copied, batches(NUM_STEPS))
    assert pruner.num_steps == 0
    with pytest.raises(RuntimeError, match="this Pruner has seen no step of its SGD"):
        pruner.harden()


def test_swapping_weights_in_and_out_is_no_training() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    mine = copy.deepcopy(model.state_dict())
    model.load_state_dict(net(1).state_dict())
    pruner.state_dict()
    train(model, optimizer, batches(1))
    model.load_state_dict(mine)
    assert pruner.report().num_steps == 4
    pruner.state_dict()


def test_evaluating_other_weights_between_two_steps_is_no_training() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    mine = copy.deepcopy(model.state_dict())
    model.load_state_dict(net(1).state_dict())
    model.load_state_dict(mine)
    pruner.state_dict()


def test_a_pickled_triple_is_a_working_independent_one() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(7))
    before = bits([model.state_dict(), optimizer.state_dict(), pruner.state_dict()])
    other, copied, twin = pickle.loads(pickle.dumps((model, optimizer, pruner)))
    assert twin.model is other and twin.optimizer is copied and twin.is_attached
    train(other, copied, batches(20)[7:])
    assert bits([model.state_dict(), optimizer.state_dict(), pruner.state_dict()]) == before
    whole, plain, straight = pruned()
    train(whole, plain, batches(20))
    assert bits([other.state_dict(), twin.state_dict()]) == bits([whole.state_dict(), straight.state_dict()])


def test_a_pickled_optimizer_works_with_a_new_pruner() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(7))
    other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    again = Pruner(other, copied, GSM(sparsity=0.75))
    again.load_state_dict(pruner.state_dict())
    train(other, copied, batches(20)[7:])
    train(model, optimizer, batches(20)[7:])
    assert bits([other.state_dict(), again.state_dict()]) == bits([model.state_dict(), pruner.state_dict()])


def test_a_copy_of_a_detached_pruner_stays_detached() -> None:
    model, optimizer, pruner = pruned()
    pruner.detach()
    other, copied, twin = copy.deepcopy((model, optimizer, pruner))
    train(other, copied, batches(1))
    assert not twin.is_attached
    assert twin.num_steps == 0


# Things that happen to a model and an optimizer while they train


def test_loading_the_optimizers_state_keeps_the_pruner_at_work() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # replaces the param_groups
    optimizer.param_groups[0]["lr"] = 0.05  # and the Pruner sees the new ones
    train(model, optimizer, batches(4)[3:])
    assert pruner.num_steps == 4
    assert pruner.metrics() == {"decay_exponent": pytest.approx(3 * 0.05 + 0.025), "active": KEPT}


def test_the_pruners_state_keeps_its_dtypes_whatever_the_optimizer_loads() -> None:
    # Optimizer.load_state_dict casts per-parameter tensors to the parameter's dtype: ours are elsewhere.
    model = sparse_net().to(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    pruner = pomona.hold(model, optimizer)
    train(model, optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in batches(2)])
    plain = sparse_net().to(torch.bfloat16)
    without = AdamW(plain.parameters())
    train(plain, without, [(x.bfloat16(), y.bfloat16()) for x, y in batches(2)])
    assert {k: v.keys() for k, v in optimizer.state_dict()["state"].items()} == {
        k: v.keys() for k, v in without.state_dict()["state"].items()
    }
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {mask.dtype for mask in pruner.state_dict()["pruned"].values()} == {torch.bool}


def test_a_group_added_later_trains_and_is_not_pruned() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(2))
    late = nn.Linear(3, 3)
    optimizer.add_param_group({"params": late.parameters(), "weight_decay": 0.0})
    whole = nn.Sequential(model, late)
    before = copy.deepcopy(late.weight)
    train(whole, optimizer, batches(3)[2:])
    assert (pruner.num_steps, pruner.metrics()["active"], pruner.report().total) == (3, KEPT, NUM_WEIGHTS)
    assert bool((late.weight != before).all())


def test_a_parameter_object_replaced_in_model_and_optimizer_is_pruned_in_its_place() -> None:
    # fully_shard does this
    model, optimizer, _ = pruned()
    train(model, optimizer, batches(2))
    with torch.no_grad():
        model[0].weight = nn.Parameter(model[0].weight.clone())
    optimizer.param_groups[0]["params"][0] = model[0].weight
    train(model, optimizer, batches(2))
    assert int((model[0].weight.grad != 0).sum()) + int((model[2].weight.grad != 0).sum()) == KEPT


def test_a_layer_replaced_behind_the_optimizers_back_is_noticed() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(NUM_STEPS))
    model[2] = nn.Linear(8, 3)  # a new head, as for transfer learning
    with pytest.raises((ValueError, RuntimeError), match=r"2\.weight"):
        pruner.harden()


@pytest.mark.parametrize("way", ["assign", "parameter", "another shape", "module"])
def test_a_weight_replaced_under_the_optimizer_is_named_at_the_next_step(way: str) -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    if way == "assign":
        model.load_state_dict(net(1).state_dict(), assign=True)
    elif way == "parameter":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    elif way == "module":
        model[0] = nn.Linear(6, 8)
    else:  # as a tool that takes out channels
        model[0].weight = nn.Parameter(model[0].weight.detach()[:5])
        model[0].bias = nn.Parameter(model[0].bias.detach()[:5])
        model[2].weight = nn.Parameter(model[2].weight.detach()[:, :5])
    before = bits([model.state_dict(), optimizer.state_dict(), pruner.masks() if way == "module" else None])
    with pytest.raises(RuntimeError, match=r"^0.weight (was replaced in the model after|has the shape \(5, 6\) now)"):
        train(model, optimizer, batches(1))
    assert bits([model.state_dict(), optimizer.state_dict(), pruner.masks() if way == "module" else None]) == before
    with pytest.raises(RuntimeError, match=r"^0.weight .*make (the )?optimizer and (the )?Pruner anew"):
        pruner.harden()
    anew = sgd(model)  # as the message advises
    again = Pruner(model, anew, GSM(sparsity=0.75))
    train(model, anew, batches(3))
    assert again.harden().nonzero == again.method.budget.num_kept(again.report().total, 3)


def test_a_module_that_was_moved_inside_the_model_is_not_replaced() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    model[0] = nn.Sequential(model[0], nn.Identity())  # as fusing and adapters do
    train(model, optimizer, batches(3))
    assert pruner.num_steps == 6
    assert pruner.harden().nonzero == KEPT


def test_loading_weights_into_the_model_is_followed() -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    model.load_state_dict(net(1).state_dict())
    train(model, optimizer, batches(NUM_STEPS))
    assert pruner.harden().nonzero == KEPT
    assert pruner.num_steps == NUM_STEPS + 3


def test_tied_weights_count_once_and_are_pruned_together() -> None:
    model = Tied()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.75), scope=Scope(also=["head"]))
    assert list(pruner.parameters()) == ["embed.weight", "mid.weight"]
    model.train_on(optimizer, NUM_STEPS)
    report = pruner.harden()
    assert (report.total, report.nonzero) == (48, 12)
    assert report.outside == {"head.weight": "tied to embed.weight"}
    model.train_on(optimizer, 5)
    assert model.head.weight is model.embed.weight
    assert pruner.verify().nonzero == 12


@pytest.mark.parametrize(
    "scope", [Scope(types=(nn.Linear, nn.Embedding)), Scope(include=["mid"], also=["head"])], ids=["types", "also"]
)
def test_tied_weights_in_scope_under_their_second_name_are_verified(scope: Scope) -> None:
    model = Tied()
    optimizer = sgd(model)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.75), scope=scope)
    model.train_on(optimizer, NUM_STEPS)
    average = torch.optim.swa_utils.AveragedModel(model)
    assert pruner.harden().nonzero == 12
    assert pruner.verify().nonzero == 12
    pruner.harden(average)


def test_the_optimizer_inside_a_wrapper_is_found() -> None:
    class Accelerated(Optimizer):  # accelerate's does not call super().__init__ either
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

    model = net()
    inner = sgd(model)
    wrapper = Accelerated(inner)
    pruner = Pruner(model, wrapper, GSM(sparsity=0.75))
    train(model, wrapper, batches(4))
    assert pruner.optimizer is inner
    assert (pruner.num_steps, pruner.metrics()["active"]) == (4, KEPT)


@pytest.mark.check
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_needs_no_more_graphs_than_without_a_pruner() -> None:
    from torch._dynamo.testing import CompileCounter

    counts = []
    for prune in (False, True):
        torch._dynamo.reset()
        model = net()
        optimizer = sgd(model)
        if prune:
            Pruner(model, optimizer, GSM(sparsity=0.75))
        counter = CompileCounter()
        step = torch.compile(optimizer.step, backend=counter)
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            step()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1] == counts[0] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("what", ["step before the Pruner", "whole iteration"])
def test_whatever_is_compiled_the_hooks_run(what: str) -> None:
    ends = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model = net()
        optimizer = sgd(model)

        def iteration(batch: Batch, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

        run = iteration
        if is_compiled and what == "whole iteration":
            run = torch.compile(iteration, backend="eager")
        elif is_compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        for batch in batches(2):
            run(batch)  # what is compiled has run already when the Pruner comes
        pruner = Pruner(model, optimizer, GSM(sparsity=0.75))
        for batch in batches(4):
            run(batch)
        assert pruner.num_steps == 4
        ends.append(bits(dict(model.state_dict())))
    torch._dynamo.reset()
    assert ends[0] == ends[1]


def test_a_compiled_model_is_pruned_under_its_own_names() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    pruner = Pruner(compiled, optimizer, GSM(sparsity=0.75))
    train(model, optimizer, batches(NUM_STEPS))
    assert pruner.harden().nonzero == KEPT
    assert pruner.verify(compiled).nonzero == pomona.report(model).nonzero == KEPT


# State


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"format": 99}, "format 99, expected 2"),
        (lambda state: {}, "this is not the state of a Pruner"),
        (lambda state: state | {"shapes": {**state["shapes"], "0.weight": [6, 8]}}, r"0.weight has shape \[6, 8\]"),
        (lambda state: state | {"shapes": {"0.weight": [8, 6]}}, r"2.weight has shape None there"),
        (lambda state: state | {"shapes": {**state["shapes"], "4.weight": [3, 3]}}, r"4.weight has shape \[3, 3\]"),
        (
            lambda state: state | {"state": {**state["state"], "2.weight": {"z": torch.zeros(3, 8)}}},
            r"the state of 2.weight has \['z'\]",
        ),
    ],
    ids=["format", "empty", "shape", "fewer", "more", "keys"],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    model, optimizer, pruner = pruned()
    train(model, optimizer, batches(3))
    other, another, source = pruned(1)
    train(other, another, batches(9))
    before = bits(pruner.state_dict())
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(change(source.state_dict()))
    assert bits(pruner.state_dict()) == before


def half_of(w: pomona.Weight, share: float = 0.5) -> Tensor:
    """A score of the user's own."""
    return share * w.value.abs()


def in_another_process(function: Any) -> Any:
    """The same function, at another address."""
    return FunctionType(function.__code__, globals(), function.__name__, function.__defaults__)


class OwnScore:
    """Scores that a user's object computes."""

    def __call__(self, w: pomona.Weight) -> Tensor:
        return w.value.abs()

    def of(self, w: pomona.Weight) -> Tensor:
        return w.value.abs()


@pytest.mark.parametrize(
    "method",
    [
        GSM(sparsity=0.5),
        GSM(sparsity=0.75, min_density=0.1),
        GSM(sparsity=pomona.Cubic(0.0, 0.75, steps=9)),
        GSM(sparsity=0.75, score="lamp"),
        GSM(sparsity=0.75, score=half_of),
        GSM(sparsity=0.75, zeros="paper"),
    ],
    ids=["sparsity", "min_density", "schedule", "score", "own score", "zeros"],
)
def test_a_state_of_other_hyper_parameters_is_refused(method: GSM) -> None:
    _, _, pruner = pruned()
    before = bits(pruner.state_dict())
    other = net()
    source = Pruner(other, sgd(other), method)
    with pytest.raises(ValueError, match=r"the state is of GSM\(.*make it with the same method"):
        pruner.load_state_dict(source.state_dict())
    assert bits(pruner.state_dict()) == before
    held = sparse_net()
    with pytest.raises(ValueError, match="make it with the same method"):
        pruner.load_state_dict(pomona.hold(held, sgd(held)).state_dict())
    assert bits(pruner.state_dict()) == before


class Halfway(pomona.Schedule):
    """A schedule as a user writes it: no dataclass, no repr."""

    def __call__(self, step: int) -> float:
        return 0.75 if step > 10 else 0.0


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (lambda: GSM(sparsity=0.75, min_density=0), lambda: GSM(sparsity=0.75, min_density=0.0)),
        (lambda: GSM(sparsity=float(np.float64(0.75))), lambda: GSM(sparsity=np.float64(0.75))),
        (lambda: GSM(sparsity=Halfway()), lambda: GSM(sparsity=Halfway())),
        (lambda: GSM(0.75, score=half_of), lambda: GSM(0.75, score=in_another_process(half_of))),
        (lambda: GSM(0.75, score=OwnScore()), lambda: GSM(0.75, score=OwnScore())),
        (lambda: GSM(0.75, score=OwnScore().of), lambda: GSM(0.75, score=OwnScore().of)),
        (lambda: GSM(0.75, score=partial(half_of, share=1)), lambda: GSM(0.75, score=partial(half_of, share=1.0))),
    ],
    ids=["0 and 0.0", "numpy", "own schedule", "own score", "own object", "a method of it", "partial"],
)
def test_a_state_of_the_same_method_written_otherwise_is_taken(
    saved: Callable[[], GSM], now: Callable[[], GSM]
) -> None:
    model, again = net(), net()
    source = Pruner(model, sgd(model), saved())
    Pruner(again, sgd(again), now()).load_state_dict(source.state_dict())


# Diagnosis before the run

SCHEDULERS: dict[str, Callable[[SGD], lr_scheduler.LRScheduler]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 4),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 15)], [5]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
    "one cycle, momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.6 steps so itself
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_the_forecast_is_what_the_run_then_reaches(name: str) -> None:
    model, optimizer, pruner = pruned()
    scheduler = SCHEDULERS[name](optimizer)
    groups, state = repr(optimizer.param_groups), repr(scheduler.state_dict())
    forecast = pruner.diagnose(20, scheduler)
    assert (repr(optimizer.param_groups), repr(scheduler.state_dict())) == (groups, state)
    assert forecast is not None and forecast.exponent > 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    assert pruner.metrics()["decay_exponent"] == pytest.approx(forecast.exponent, rel=1e-9)


def test_a_diagnosis_leaves_a_learning_rate_that_is_a_tensor_alone() -> None:
    _, optimizer, pruner = pruned(lr=torch.tensor(0.1))
    forecast = pruner.diagnose(20, lr_scheduler.StepLR(optimizer, 4))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1)
    assert forecast is not None and forecast.exponent == pytest.approx(4 * 0.05 * 1.1111, rel=1e-3)


def test_a_run_that_cannot_succeed_is_warned_of_and_one_that_can_is_not() -> None:
    _, optimizer, pruner = pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = pruner.diagnose(150)
    assert enough is not None and enough.exponent == pytest.approx(7.5)
    with pytest.warns(UserWarning, match=r"decay exponent 6.00 over 120 steps: .* NOT enough \(want 7\)"):
        pruner.diagnose(120)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    by_epoch = pruner.diagnose(200, scheduler, steps_per_update=200)
    assert by_epoch is not None and by_epoch.exponent == pytest.approx(10.0)
    with pytest.warns(UserWarning, match="passive weights shrink to"):
        pruner.diagnose(20, scheduler)


def test_the_worst_group_is_the_diagnosis() -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    pruner = Pruner(model, SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05), GSM(sparsity=0.75))
    with pytest.warns(UserWarning, match="decay exponent 1.00 over 200 steps"):
        pruner.diagnose(200)


def test_a_method_that_cannot_tell_gives_no_diagnosis() -> None:
    model = sparse_net()
    assert pomona.hold(model, AdamW(model.parameters())).diagnose(20) is None


# What a method sees of the optimizer's memory


class Watching(pomona.Method):
    """Notes how many buffers each weight has before and after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, list[int]]] = []
        self.weights: list[pomona.Weight] = []

    def before_step(self, weights: Sequence[pomona.Weight], step: int) -> None:
        self.weights = list(weights)
        self.seen.append(("before", step, [len(w.buffers) for w in weights]))

    def support(self, weights: Sequence[pomona.Weight], step: int) -> list[Tensor]:
        self.weights = list(weights)
        return [torch.ones_like(w.value, dtype=torch.bool) for w in weights]


BUFFERS: dict[str, tuple[Callable[..., Optimizer], list[str]]] = {
    "sgd": (partial(SGD, lr=0.1), []),
    "momentum": (partial(SGD, lr=0.1, momentum=0.9), ["momentum_buffer"]),
    "adam": (partial(Adam, lr=0.1), ["exp_avg", "exp_avg_sq"]),
    "amsgrad": (partial(AdamW, lr=0.1, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    "fused": (partial(AdamW, lr=0.1, fused=True), ["exp_avg", "exp_avg_sq"]),
    "rmsprop": (partial(torch.optim.RMSprop, lr=0.1, momentum=0.9), ["square_avg", "momentum_buffer"]),
    "adagrad": (partial(torch.optim.Adagrad, lr=0.1), ["sum"]),
    "adafactor": (partial(torch.optim.Adafactor, lr=0.1), []),  # its moments are of rows and columns
}


@pytest.mark.parametrize(("make", "names"), BUFFERS.values(), ids=BUFFERS)
def test_a_method_sees_the_live_buffers_of_each_single_weight(make: Callable[..., Optimizer], names: list[str]) -> None:
    model, method = net(), Watching()
    optimizer = make(model.parameters())
    pruner = Pruner(model, optimizer, method)
    train(model, optimizer, batches(3))
    num_first = len(names) if "sum" in names else 0  # Adagrad makes its sums at construction
    num = len(names)
    assert method.seen == [("before", 1, [num_first] * 2), ("before", 2, [num] * 2), ("before", 3, [num] * 2)]
    for w, p in zip(pruner._placement.weights(), pruner.parameters().values(), strict=True):
        state = optimizer.state[p]
        assert [b.data_ptr() for b in w.buffers] == [state[name].data_ptr() for name in state if name in names]
        for buffer in w.buffers:
            buffer.fill_(7.0)
        assert [state[name].unique().tolist() for name in names] == [[7.0]] * num


def test_buffers_are_seen_after_a_resume_and_at_harden() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, batches(2))
    other, method = net(), Watching()
    again = SGD(other.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(other, again, method)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, again, batches(1))
    assert method.seen == [("before", 1, [1, 1])]
    pruner.harden()
    for w, p in zip(method.weights, pruner.parameters().values(), strict=True):
        assert [b.data_ptr() for b in w.buffers] == [again.state[p]["momentum_buffer"].data_ptr()]


@pytest.mark.parametrize("part", ["state", "pruned"])
def test_a_state_without_one_of_its_weights_is_refused(part: str) -> None:
    _, _, pruner = pruned()
    state = pruner.state_dict()
    state[part] = {name: tensors for name, tensors in state[part].items() if name != "0.weight"}
    with pytest.raises(ValueError, match=f"the state is damaged: '{part}' lacks, .* 0.weight"):
        pruner.load_state_dict(state)


def test_what_is_no_state_is_refused() -> None:
    _, _, pruner = pruned()
    with pytest.raises(TypeError, match=r"the state of a Pruner is what state_dict\(\) returned, got NoneType"):
        pruner.load_state_dict(None)  # type: ignore[arg-type]


def test_no_gradient_and_no_old_weight_is_kept_alive_between_steps() -> None:
    for method in (GSM(0.5), pomona.Magnitude(0.5), pomona.RigL(0.5)):
        model = net()
        optimizer = sgd(model)
        pruner = Pruner(model, optimizer, method)
        loss_of(model, batches(1)[0]).backward()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert [grad() for grad in grads] == [None] * len(grads)
        storage = weakref.ref(model[0].weight.untyped_storage())
        model.to(torch.bfloat16)
        assert storage() is None
        assert pruner.is_attached


def test_masks_that_a_method_remembers_are_not_inverted() -> None:
    @dataclass(frozen=True, slots=True)
    class Remembering(pomona.Method):
        where: str

        def init(self, w: pomona.Weight) -> dict[str, Tensor]:
            return {"masks": torch.rand(2, *w.value.shape) > 0.5} if self.where == "a slice" else {}

        def init_shared(self, weights: pomona.Weights) -> dict[str, Tensor]:
            return {w.name: torch.rand_like(w.value) > 0.5 for w in weights}

        def support(self, weights: pomona.Weights, step: int) -> list[Tensor]:
            if self.where == "a slice":
                return [w.state["masks"][1] for w in weights]
            return [weights.shared[w.name] for w in weights]

    for where in ("shared", "a slice"):
        model = net()
        pruner = Pruner(model, sgd(model), Remembering(where))
        before = bits(pruner.state_dict())
        with pruner.trial_cut():
            pass
        assert bits(pruner.state_dict()) == before


def test_a_shallow_copy_of_a_pruner_is_refused() -> None:
    _, _, pruner = pruned()
    with pytest.raises(ValueError, match=re.escape("copy.deepcopy((model, optimizer, pruner))")):
        copy.copy(pruner)


def test_a_method_of_an_older_interface_is_refused_by_name() -> None:
    for name in ("budget", "checks_gradients"):
        with pytest.raises(TypeError, match=r"Old: budget is a property .* checks_gradients an attribute"):
            type("Old", (pomona.Method,), {name: lambda self, total, step: 1})

    class Selecting(GSM):
        def before_step(self, weights: pomona.Weights, step: int) -> Any:
            return weights

    model = net()
    optimizer = sgd(model)
    Pruner(model, optimizer, Selecting(0.5))
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(TypeError, match=r"before_step must return nothing; drop gradients with pomona\.ops"):
        optimizer.step()


def test_exponents_belong_to_names_however_a_model_declares_them() -> None:
    class Pair(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(4, 4, bias=False))

    def run(names: str) -> Pruner:
        model = Pair(names)
        groups = [{"params": [model.a.weight], "lr": 0.5}, {"params": [model.b.weight], "lr": 0.001}]
        optimizer = SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05)
        pruner = Pruner(model, optimizer, GSM(0.5))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return pruner

    one, other = run("ab"), run("ba")
    saved = one.state_dict()["shared"]["exponent"].clone()
    assert torch.equal(saved, other.state_dict()["shared"]["exponent"]) and saved[0] > saved[1]
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.state_dict()["shared"]["exponent"], saved)


def test_a_sparse_gradient_of_a_step_that_is_not_taken_is_no_error() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.5), scope=Scope(types=(nn.Embedding,)))
    (model(torch.tensor([1, 2])).sum() * 0).backward()
    optimizer.step()
    assert pruner.num_steps == 0
