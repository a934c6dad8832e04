"""What every method owes the user's loop. A new method adds one line to CASES and nothing else.

Each way of training is compared with the plain loop over the same batches: weights, optimizer state and the
Pruner's own state, bit for bit wherever the arithmetic is the same.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import pomona
from tests.documented import Taylor
from tests.problems import NUM_WEIGHTS, Batch, batches, bits, loss_of, net, train

STEPS = 20

# These runs are far too short for passive weights to vanish, which is not what they are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed"),
    pytest.mark.filterwarnings("ignore:harden.. at step .* comes early"),
]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.5),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}
ALL = tuple(OPTIMIZERS)


@dataclass(frozen=True)
class Case:
    """A method, the optimizers that suit it, and how many of the 72 weights of `net` it must leave in 20 steps."""

    name: str
    method: pomona.Method
    optimizers: tuple[str, ...]
    budget: int | None = 18  # None: sparsity is an outcome
    which: str = ""  # of the optimizers

    @property
    def optimizer(self) -> Callable[..., Optimizer]:
        return OPTIMIZERS[self.which]


def by_size(w: pomona.Weight) -> Tensor:
    """A score of the user's own."""
    return w.value.abs() * w.numel**0.5


METHODS = [
    Case("gsm", pomona.GSM(sparsity=0.75), ("momentum", "nesterov")),
    Case("gsm by a schedule", pomona.GSM(sparsity=pomona.Cubic(0.0, 0.75, steps=12)), ("momentum",)),
    Case("grda", pomona.GRDA(c=0.2, mu=0.6), ("sgd",), budget=None),
    Case("grda to a target", pomona.GRDA(sparsity=0.75, steps=15), ("sgd",)),
    Case("admm", pomona.ADMM(sparsity=0.75, rho=0.1, every=6), ALL),
    Case("admm by layer", pomona.ADMM(densities={"0.*": 0.25, "2.*": 0.25}, rho=0.1, every=6), ("momentum",)),
    Case("weightmom", pomona.WeightMom(sparsity=0.75, every=2, window=3, patience=2), ALL),
    Case("magnitude, one-shot", pomona.Magnitude(sparsity=0.75, begin=9), ALL),
    Case("magnitude, gradual", pomona.Magnitude(sparsity=pomona.Cubic(0.0, 0.75, steps=12), every=3), ALL),
    Case(
        "magnitude, 1:2",
        pomona.Magnitude(pomona.Cubic(0.0, 0.5, steps=12), every=3, granularity="1:2"),
        ("momentum",),
        budget=36,
    ),
    Case("admm, channels", pomona.ADMM(0.4, rho=0.1, every=6, granularity="channel"), ("momentum",), budget=None),
    Case("gsm, 1:2", pomona.GSM(0.5, granularity="1:2"), ("momentum",), budget=36),
    Case("weightmom, blocks", pomona.WeightMom(0.75, every=2, window=3, patience=2, granularity=(1, 2)), ("momentum",)),
    Case("magnitude, erk", pomona.Magnitude(sparsity=0.75, allocation="erk"), ("momentum",)),
    Case("magnitude, lamp", pomona.Magnitude(pomona.Cubic(0.0, 0.75, steps=12), every=3, score="lamp"), ("momentum",)),
    Case("magnitude, its own score", pomona.Magnitude(0.75, begin=9, score=by_size), ("momentum",)),
    Case("gsm, lamp", pomona.GSM(sparsity=0.75, score="lamp"), ("momentum",)),
    Case("admm, lamp by blocks", pomona.ADMM(0.75, rho=0.1, every=6, score="lamp", granularity=(1, 2)), ("momentum",)),
    Case("feather, lamp", pomona.Feather(pomona.Cubic(0.0, 0.75, steps=12), score="lamp"), ("momentum",)),
    Case("feather", pomona.Feather(pomona.Cubic(0.0, 0.75, steps=12)), ALL),
    Case("feather, erk", pomona.Feather(0.75, allocation="erk", gradient_scale=0.5), ("momentum",)),
    Case(
        "rigl, 1:2",
        pomona.RigL(0.5, every=4, end=16, allocation="uniform", granularity="1:2"),
        ("momentum",),
        budget=36,
    ),
    Case("rigl", pomona.RigL(sparsity=0.75, every=4, end=16), ALL),
    Case("taylor, of docs/writing-a-method.md", Taylor(sparsity=0.75, at=9), ALL),
    Case(
        "set", pomona.SET(sparsity=0.75, every=4, seed=1), ALL
    ),  # seed 0 grows behind a dead unit: no gradient, still zero
]
CASES = [replace(case, which=which) for case in METHODS for which in case.optimizers]


def _cases(more: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """All cases; those with ``more`` in `make check` only."""
    marked = [
        pytest.param(case, id=f"{case.name}, {case.which}", marks=[pytest.mark.check] * more(case)) for case in CASES
    ]
    return pytest.mark.parametrize("case", marked)


# What depends on a method and on its optimizer together is asked of every pair, and all else of a method with the first
# of its optimizers. `make check` asks everything of every pair.
each_case = _cases(lambda case: False)
each_method = _cases(lambda case: case.which != case.optimizers[0])


def two_ways(name: str, first: object, second: object, ids: tuple[str, str]) -> pytest.MarkDecorator:
    """Two ways to the same end that no method tells apart: the second in `make check` only."""
    return pytest.mark.parametrize(
        name, [pytest.param(first, id=ids[0]), pytest.param(second, id=ids[1], marks=pytest.mark.check)]
    )


@dataclass
class Run:
    model: nn.Sequential
    optimizer: Optimizer
    pruner: pomona.Pruner

    def states(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
        }

    def load(self, states: dict[str, Any], order: Iterable[str] = ("model", "optimizer", "pruner")) -> None:
        for part in order:
            getattr(self, part).load_state_dict(states[part])

    def train(self, data: list[Batch]) -> Run:
        train(self.model, self.optimizer, data)
        return self

    def end(self) -> Any:
        """Everything that training changed, bit for bit."""
        states = self.states()
        return bits([states["model"], states["optimizer"]["state"], states["pruner"]])


def start(case: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    model = net(seed).to(dtype)
    optimizer = case.optimizer(model.parameters(), **options)
    return Run(model, optimizer, pomona.Pruner(model, optimizer, case.method))


def plain(case: Case, data: list[Batch], **options: Any) -> Run:
    return start(case, **options).train(data)


def assert_budget(case: Case, report: pomona.Report) -> None:
    assert report.nonzero == case.budget if case.budget is not None else 0 < report.nonzero < NUM_WEIGHTS


def closure(run: Run, batch: Batch) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run.model, batch)
        loss.backward()
        return loss

    return evaluate


@each_case
def test_the_budget_is_exact_and_the_contract_verified(case: Case) -> None:
    run = plain(case, batches(STEPS))
    assert run.pruner.num_steps == STEPS
    assert_budget(case, run.pruner.harden())
    assert_budget(case, run.pruner.verify())
    assert_budget(case, pomona.report(run.model))


@each_case
def test_the_density_if_cut_is_that_of_harden_and_asking_changes_nothing(case: Case) -> None:
    run, other = start(case), plain(case, batches(STEPS))
    run.pruner.density_if_cut()  # before the first step too
    run.train(batches(STEPS))
    densities = run.pruner.density_if_cut()
    assert run.end() == other.end()
    report = run.pruner.harden()
    assert densities == run.pruner.density_if_cut() == {layer.name: layer.density for layer in report.layers}


@each_method
def test_what_is_left_learns(case: Case) -> None:
    """Where nothing is learnt, the loss stays at the targets' mean square, or above."""
    data = batches(350)
    run = start(case).train(data[:100])
    run.pruner.harden()
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.0
    run.train(data[100:])
    losses, squares = zip(
        *((loss_of(run.model, b).item(), b[1].square().mean().item()) for b in data[-50:]), strict=True
    )
    assert sum(losses) < 0.8 * sum(squares)


@each_case
def test_zeros_are_held_while_the_survivors_train_on(case: Case) -> None:
    run = plain(case, batches(STEPS))
    run.pruner.harden()
    at_cut = copy.deepcopy(run.model)
    run.train(batches(30, seed=1))
    for before, after in zip(at_cut.parameters(), run.model.parameters(), strict=True):
        assert bits(after[before == 0]) == bits(before[before == 0])  # +0.0 and not -0.0
        assert bool((after[before != 0] != before[before != 0]).any())
    assert_budget(case, run.pruner.verify())


@each_method
@two_ways("keyword", True, False, ids=("keyword", "positional"))
def test_a_closure_ends_where_the_plain_loop_does(case: Case, keyword: bool) -> None:
    run = start(case)
    for batch in batches(STEPS):
        expected = loss_of(run.model, batch).item()
        loss = closure(run, batch)
        returned: Any = run.optimizer.step(closure=loss) if keyword else run.optimizer.step(loss)
        assert returned.item() == expected
    assert run.end() == plain(case, batches(STEPS)).end()


@each_method
def test_accumulated_gradients_end_where_the_large_batch_does(case: Case) -> None:
    data = [(x.double(), y.double()) for x, y in batches(STEPS)]
    run = start(case, dtype=torch.float64)
    for x, y in data:
        run.optimizer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            (loss_of(run.model, (x[half], y[half])) / 2).backward()
        run.optimizer.step()
    large = plain(case, data, dtype=torch.float64)
    assert run.pruner.num_steps == STEPS
    for ours, theirs in zip(run.model.parameters(), large.model.parameters(), strict=True):
        # only the order of additions differs: 2^-53 relative a step, of numbers below 10
        assert (ours - theirs).abs().max().item() < 1e-13


def train_scaled(run: Run, data: list[Batch], *, overflow_at: int | None = None) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # powers of two: scaling is exact
    for i, batch in enumerate(data):
        run.optimizer.zero_grad()
        loss = loss_of(run.model, batch)
        scaler.scale(loss * torch.inf if i == overflow_at else loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
    assert scaler.get_scale() == (512.0 if overflow_at is not None else 1024.0)


@each_method
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_a_loss_scale_changes_nothing(case: Case, fused: bool) -> None:
    run = start(case, fused=fused)
    train_scaled(run, batches(STEPS))
    assert run.end() == plain(case, batches(STEPS), fused=fused).end()


@each_method
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_an_overflowing_step_leaves_no_trace(case: Case, fused: bool) -> None:
    data = batches(STEPS)
    run = start(case, fused=fused)
    if fused:  # the scaler leaves the skipping to the optimizer, and so to us
        with pytest.warns(UserWarning, match="a gradient is not finite at step 8; skipping this step"):
            train_scaled(run, data, overflow_at=7)
    else:
        train_scaled(run, data, overflow_at=7)
    assert run.pruner.num_skipped == int(fused)
    run.pruner._hooks.num_skipped = 0
    assert run.end() == plain(case, data[:7] + data[8:], fused=fused).end()


@each_method
def test_a_step_with_a_gradient_that_is_not_finite_leaves_no_trace(case: Case) -> None:
    data = batches(STEPS)
    run = start(case).train(data[:7])
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        run.train([(data[0][0], data[0][1] * torch.nan)])
    run.train(data[7:])
    assert run.pruner.num_skipped == 1
    run.pruner._hooks.num_skipped = 0
    assert run.end() == plain(case, data).end()


@each_case
@two_ways(
    "order", ("model", "optimizer", "pruner"), ("pruner", "optimizer", "model"), ids=("pruner last", "pruner first")
)
def test_a_resumed_run_ends_where_the_unbroken_one_does(case: Case, order: tuple[str, ...]) -> None:
    data = batches(STEPS)
    file = io.BytesIO()
    torch.save(plain(case, data[:7]).states(), file)
    file.seek(0)
    run = start(case, seed=1)
    run.load(torch.load(file, weights_only=True), order)
    assert run.train(data[7:]).end() == plain(case, data).end()


@each_case
def test_a_run_resumed_after_harden_keeps_its_zeros(case: Case) -> None:
    unbroken = plain(case, batches(STEPS))
    unbroken.pruner.harden()
    file = io.BytesIO()
    torch.save(unbroken.states(), file)
    file.seek(0)
    run = start(case, seed=1)
    run.load(torch.load(file, weights_only=True))
    more = batches(10, seed=1)
    assert run.train(more).end() == unbroken.train(more).end()
    assert_budget(case, run.pruner.verify())


@each_method
def test_copies_of_model_optimizer_and_pruner_train_apart_from_the_originals(case: Case) -> None:
    data = batches(STEPS)
    run = plain(case, data[:7])
    twin = copy.deepcopy(run)
    before = run.end()
    twin.train(data[7:])
    assert run.end() == before
    assert twin.end() == plain(case, data).end()
    assert_budget(case, twin.pruner.harden())


@each_method
def test_half_precision_keeps_its_dtype_and_the_exact_budget(case: Case) -> None:
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(STEPS)]
    run = plain(case, data, dtype=torch.bfloat16)
    assert_budget(case, run.pruner.harden())
    run.train(data[:5])
    assert_budget(case, run.pruner.verify())
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
    buffers = [t for state in run.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    assert {t.dtype for t in buffers} <= {torch.bfloat16}


@each_method
@two_ways("first", "pruner", "scheduler", ids=("pruner", "scheduler"))
def test_a_scheduler_ends_where_learning_rates_set_by_hand_do(case: Case, first: str) -> None:
    if first == "pruner":
        run = start(case)
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 5, gamma=0.5)
    else:
        model = net()
        optimizer = case.optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        run = Run(model, optimizer, pomona.Pruner(model, optimizer, case.method))
    by_hand = start(case)
    base: float = by_hand.optimizer.param_groups[0]["lr"]
    for i, batch in enumerate(batches(STEPS)):
        run.train([batch])
        scheduler.step()
        by_hand.optimizer.param_groups[0]["lr"] = base * 0.5 ** (i // 5)
        by_hand.train([batch])
    assert run.end() == by_hand.end()


@pytest.mark.check
@pytest.mark.parametrize("case", [c for c in CASES if c.which == c.optimizers[0]], ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_ends_where_the_plain_one_does(case: Case) -> None:
    torch._dynamo.reset()
    run = start(case)
    compiled = torch.compile(run.optimizer.step, backend="eager")
    for batch in batches(STEPS):
        run.optimizer.zero_grad()
        loss_of(run.model, batch).backward()
        compiled()
    torch._dynamo.reset()
    there = plain(case, batches(STEPS))
    if _rounds_as_the_plain_one():
        assert run.end() == there.end()
    else:
        torch.testing.assert_close(run.states()["model"], there.states()["model"], rtol=1e-4, atol=1e-6)
        assert run.pruner.num_steps == STEPS


@cache
def _rounds_as_the_plain_one() -> bool:
    """Whether torch's own compiled step, with no Pruner near, has the bits of the plain one; that of 2.6 has not."""
    ends = []
    for is_compiled in (False, True):
        model = net(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for batch in batches(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            step()
        ends.append(bits(model.state_dict()))
    torch._dynamo.reset()
    return bool(ends[0] == ends[1])
