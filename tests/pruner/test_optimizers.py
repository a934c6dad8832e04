"""Optimizers around optimizers, optimizers with a second copy of the weights, and optimizers that are exchanged."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import pomona
from pomona import GRDA, Feather, Magnitude, Pruner
from tests.problems import Batch, batches, bits, loss_of, net, train

KEPT = 18  # of the 72 weights, at sparsity 0.75


# Optimizers around another one, as people write them


class Lookahead(Optimizer):
    """Every k-th step goes back half of the way; the slow weights are in a list, which no other code knows."""

    def __init__(self, optimizer: Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.t = optimizer, k, alpha, 0
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        self.go_back()

    @torch.no_grad()
    def go_back(self) -> None:
        self.t += 1
        if self.t % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    self.write(p, s.lerp_(p, self.alpha))

    def write(self, p: Tensor, slow: Tensor) -> None:
        p.copy_(slow)


class LookaheadOfNewTensors(Lookahead):
    """Gives each parameter another tensor instead of writing into the one that it has."""

    def write(self, p: Tensor, slow: Tensor) -> None:
        p.data = slow.clone()


class LookaheadWithoutInit(Lookahead):
    """Calls no __init__ of Optimizer, but has a place for hooks, which its step does not call by itself."""

    def __init__(self, optimizer: Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self.optimizer, self.k, self.alpha, self.t = optimizer, k, alpha, 0
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        self.go_back()


LOOKAHEADS: list[Callable[[Optimizer], Lookahead]] = [Lookahead, LookaheadOfNewTensors, LookaheadWithoutInit]


class SAM(Optimizer):
    """Takes the gradient where it is worst nearby: away, gradient, back, and the step of the optimizer inside."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        ps = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        for p in ps:
            self.state[p]["old_p"] = p.clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def train_sam(model: nn.Module, optimizer: SAM, data: list[Batch], *, with_closure: bool) -> None:
    for batch in data:

        def closure(batch: Batch = batch) -> Tensor:
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        closure()
        if with_closure:
            optimizer.step(closure)
            continue
        optimizer.first_step()
        closure()
        optimizer.second_step()


METHODS: list[Callable[[], pomona.Method]] = [
    lambda: Magnitude(0.75),
    lambda: Feather(0.75),
    lambda: pomona.ADMM(0.75, every=2),
    lambda: pomona.WeightMom(0.75, every=1, window=2, patience=2),
    lambda: pomona.RigL(0.75, every=3),
    lambda: pomona.SET(0.75, every=3),
]
each_method = pytest.mark.parametrize("make", METHODS, ids=["magnitude", "feather", "admm", "weightmom", "rigl", "set"])


@pytest.mark.parametrize("around", LOOKAHEADS)
@each_method
def test_no_step_of_lookahead_revives_a_zero(
    make: Callable[[], pomona.Method], around: Callable[[Optimizer], Lookahead]
) -> None:
    model = net()
    optimizer = around(SGD(model.parameters(), lr=0.05, momentum=0.9))
    pruner = Pruner(model, optimizer, make())
    train(model, optimizer, batches(10))
    assert pruner.num_steps == 10
    pruner.harden()
    for batch in batches(7, seed=1):
        train(model, optimizer, [batch])
        assert pomona.report(model).nonzero == KEPT
    assert (pruner.verify().nonzero, pruner.num_steps) == (KEPT, 17)


def test_lookahead_still_looks_ahead() -> None:
    # At sparsity 0 nothing differs from the same optimizer without a Pruner.
    ends = []
    for has_pruner in (True, False):
        model = net()
        optimizer = Lookahead(SGD(model.parameters(), lr=0.05, momentum=0.9))
        pruner = Pruner(model, optimizer, Magnitude(0.0)) if has_pruner else None
        train(model, optimizer, batches(10))
        ends.append(bits(model.state_dict()))
        assert pruner is None or pruner.num_steps == 10
    assert ends[0] == ends[1]


def test_feather_follows_where_lookahead_goes_back_to() -> None:
    model = net()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.05), k=1, alpha=0.0)  # always back to the first weights
    pruner = Pruner(model, optimizer, Feather(0.75))
    before = model[0].weight.detach().clone()
    train(model, optimizer, batches(3))
    assert torch.equal(pruner.state_dict()["state"]["0.weight"]["v"], before)


def test_a_closure_goes_through_lookahead() -> None:
    model = net()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.05))
    pruner = Pruner(model, optimizer, Magnitude(0.75))
    for batch in batches(6):
        optimizer.zero_grad()

        def closure(batch: Batch = batch) -> Tensor:
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert pomona.report(model).nonzero == KEPT
    assert pruner.num_steps == 6


def test_a_skipped_step_of_lookahead_revives_nothing() -> None:
    model = net()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.05), k=1)
    pruner = Pruner(model, optimizer, Magnitude(0.75))
    train(model, optimizer, batches(3))
    pruner.harden()
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        train(model, optimizer, [(x, y * torch.nan)])
    assert (pruner.num_skipped, pruner.verify().nonzero) == (1, KEPT)


@pytest.mark.parametrize("with_closure", [True, False], ids=["step(closure)", "first_step and second_step"])
@each_method
def test_sam_is_pruned_by_the_step_inside(make: Callable[[], pomona.Method], with_closure: bool) -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, lr=0.05, momentum=0.9)
    pruner = Pruner(model, optimizer, make())
    train_sam(model, optimizer, batches(10), with_closure=with_closure)
    assert pruner.num_steps == 10
    pruner.harden()
    for batch in batches(5, seed=1):
        train_sam(model, optimizer, [batch], with_closure=with_closure)
        assert pomona.report(model).nonzero == KEPT
    assert pruner.verify().nonzero == KEPT


def test_the_two_ways_to_step_sam_are_the_same() -> None:
    ends = []
    for with_closure in (True, False):
        model = net()
        optimizer = SAM(model.parameters(), SGD, lr=0.05, momentum=0.9)
        pruner = Pruner(model, optimizer, pomona.RigL(0.75, every=3))
        train_sam(model, optimizer, batches(10), with_closure=with_closure)
        ends.append(bits([model.state_dict(), pruner.state_dict()]))
    assert ends[0] == ends[1]


def test_an_optimizer_that_moves_the_weights_before_its_closure_is_refused() -> None:
    class Sharp(SGD):
        """SAM in one piece."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=0.01)
            with torch.enable_grad():
                closure()

    model = net()
    optimizer = Sharp(model.parameters(), lr=0.1)
    Pruner(model, optimizer, Magnitude(0.75))
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"Sharp moves the weights before it calls its closure.*optimizer inside"):
        optimizer.step(lambda: loss_of(model, batches(1)[0]))


def test_an_optimizer_that_moves_the_weights_before_the_step_inside_is_refused() -> None:
    class Shifted(Lookahead):
        """As a wrapper that makes any optimizer schedule-free, which lets it step another copy of the weights."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)
            self.optimizer.step()

    model = net()
    optimizer = Shifted(SGD(model.parameters(), lr=0.1))
    pruner = Pruner(model, optimizer, Magnitude(0.75))
    with pytest.raises(
        RuntimeError, match=r"Shifted moves the weights before the step of the SGD inside.*schedulefree"
    ):
        train(model, optimizer, batches(1))
    assert pruner.num_steps == 0


def test_what_would_discard_the_outer_optimizers_work_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="GRDA cannot prune with Lookahead"):
        Pruner(model, Lookahead(SGD(model.parameters(), lr=0.1)), GRDA(c=1e-3))
    with pytest.raises(ValueError, match=r"GSM needs momentum > 0, got SGD\(momentum=0\)"):
        Pruner(model, Lookahead(SGD(model.parameters(), lr=0.1)), pomona.GSM(0.75))


def test_a_wrapper_that_is_no_optimizer_is_named() -> None:
    class Wrapper:
        def __init__(self, base: Optimizer) -> None:
            self.base = base

    model = net()
    with pytest.raises(TypeError, match=r"got Wrapper.*must subclass it and call its __init__"):
        Pruner(model, Wrapper(SGD(model.parameters(), lr=0.1)), Magnitude(0.75))  # type: ignore[arg-type]


def test_an_optimizer_without_hooks_is_named() -> None:
    class Bare(SGD):
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params), "lr": 0.1}]

    model = net()
    with pytest.raises(TypeError, match=r"Bare has no step hooks, because its __init__ does not call"):
        Pruner(model, Bare(model.parameters()), Magnitude(0.75))


def test_a_step_that_was_replaced_before_its_hooks_were_seen_to_is_named() -> None:
    class Unhooked(LookaheadWithoutInit):
        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    model = net()
    optimizer = Unhooked(SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"step\(\) of this Unhooked has been replaced.*the Pruner first, then the"):
        Pruner(model, optimizer, Magnitude(0.75))
    del scheduler

    class Another(LookaheadWithoutInit):
        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    model = net()
    optimizer = Another(SGD(model.parameters(), lr=0.1))
    pruner = Pruner(model, optimizer, Magnitude(0.75))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, batches(2))
    assert pruner.num_steps == 2


# Optimizers with a second copy of the weights


class ScheduleFree(Optimizer):
    """SGD whose gradients are taken at y, between the moving z and its average x; eval() puts x into the model."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "is_training": True})

    @property
    def is_training(self) -> bool:
        return bool(self.param_groups[0]["is_training"])

    def turn(self, is_training: bool) -> None:
        for group in self.param_groups:
            group["is_training"] = is_training

    def pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        groups = [(p, group["beta"]) for group in self.param_groups for p in group["params"]]
        return [(p, self.state[p]["z"], beta) for p, beta in groups if "z" in self.state[p]]

    @torch.no_grad()
    def eval(self) -> None:
        for p, z, beta in self.pairs() if self.is_training else ():
            p.lerp_(z, 1 - 1 / beta)
        self.turn(False)

    @torch.no_grad()
    def train(self) -> None:
        for p, z, beta in () if self.is_training else self.pairs():
            p.lerp_(z, 1 - beta)
        self.turn(True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.is_training
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("is_evaluating", [False, True], ids=["hardened in training", "hardened in evaluation"])
@each_method
def test_zeros_are_zero_in_both_modes(make: Callable[[], pomona.Method], is_evaluating: bool) -> None:
    model = net()
    optimizer = ScheduleFree(model.parameters())
    pruner = Pruner(model, optimizer, make())
    train(model, optimizer, batches(10))
    if is_evaluating:
        optimizer.eval()
    assert pruner.harden().nonzero <= KEPT
    for batch in batches(5, seed=1):
        for mode in (optimizer.eval, optimizer.train):
            mode()
            assert pomona.report(model).nonzero <= KEPT
            pruner.verify()
        train(model, optimizer, [batch])
    other, copied, twin = copy.deepcopy((model, optimizer, pruner))
    train(other, copied, batches(1))
    copied.eval()
    assert twin.verify().nonzero <= KEPT


def test_a_dense_copy_of_the_weights_that_is_loaded_after_the_cut_is_cut_at_the_next_step() -> None:
    model = net()
    optimizer = ScheduleFree(model.parameters())
    pruner = Pruner(model, optimizer, pomona.ADMM(0.75, every=2))
    train(model, optimizer, batches(5))
    dense = copy.deepcopy(optimizer.state_dict())
    pruner.harden()
    optimizer.load_state_dict(dense)
    with pytest.raises(RuntimeError, match=r"\d+ of the zeros of 0.weight are not zero in the copies .* swaps in"):
        pruner.verify()
    train(model, optimizer, batches(1))
    pruner.verify()
    optimizer.eval()
    assert pruner.verify().nonzero == KEPT


def test_the_average_that_an_optimizer_keeps_is_cut_and_stays_zero() -> None:
    model = net()
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.05, t0=3)
    pruner = Pruner(model, optimizer, pomona.ADMM(0.75, every=2))
    train(model, optimizer, batches(10))
    pruner.harden()
    train(model, optimizer, batches(10, seed=1))
    for name, kept in pruner.state_dict()["pruned"].items():
        average = optimizer.state[model.get_parameter(name)]["ax"]
        assert torch.equal(average == 0, kept)


def test_momentum_that_is_loaded_after_the_cut_is_dropped_once_more() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, optimizer, pomona.ADMM(0.75, every=2))
    train(model, optimizer, batches(5))
    dense = copy.deepcopy(optimizer.state_dict())
    pruner.harden()
    optimizer.load_state_dict(dense)
    train(model, optimizer, batches(1))
    for name, pruned in pruner.state_dict()["pruned"].items():
        assert not optimizer.state[model.get_parameter(name)]["exp_avg"][pruned].any()


def test_quantised_state_is_left_alone() -> None:
    # A zero in it is not the number 0.
    class EightBit(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("code", torch.full(p.shape, 7, dtype=torch.uint8))
            super().step(closure)

    model = net()
    optimizer = EightBit(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, Magnitude(0.75))
    train(model, optimizer, batches(3))
    pruner.harden()
    assert all(bool((optimizer.state[p]["code"] == 7).all()) for p in model.parameters())
    assert pruner.verify().nonzero == KEPT
