"""The decay law against a step-by-step simulation, remedies that are enough, and rehearsals that are exact."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from pomona.diagnosis import ENOUGH, Diagnosis, decay_per_step, diagnose_decay, rehearse
from tests import oracles

RESNET56 = oracles.schedule(5e-3, 600, [400, 500], 0.1, warmup_epochs=5, steps_per_epoch=781)
LENET = oracles.schedule(1e-2, 280, [160, 200, 240], 0.1, warmup_epochs=5, steps_per_epoch=234)


def diagnosed(lrs: list[float], *, momentum: float, weight_decay: float, dampening: float = 0.0) -> Diagnosis:
    group = {"momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
    return diagnose_decay(sum(decay_per_step(lr, group) for lr in lrs), len(lrs), group)


# the law


@pytest.mark.parametrize(
    ("lrs", "momentum", "weight_decay", "exponent", "remains", "is_enough"),
    [
        pytest.param(RESNET56, 0.98, 1e-4, 7.98, 3.4e-4, True, id="resnet56"),
        pytest.param(RESNET56, 0.90, 1e-4, 1.60, 0.20, False, id="resnet56-low-momentum"),
        pytest.param(LENET, 0.99, 5e-4, 18.9, 6.0e-9, True, id="lenet"),
        pytest.param(LENET, 0.90, 5e-4, 1.9, 0.15, False, id="lenet-low-momentum"),
    ],
)
def test_published_schedules_of_gsm(
    lrs: list[float], momentum: float, weight_decay: float, exponent: float, remains: float, is_enough: bool
) -> None:
    diagnosis = diagnosed(lrs, momentum=momentum, weight_decay=weight_decay)
    assert diagnosis.exponent == pytest.approx(exponent, rel=5e-3)  # the digits that are published
    assert diagnosis.shrinkage == pytest.approx(remains, rel=5e-2)  # likewise
    assert diagnosis.num_steps == len(lrs)
    assert diagnosis.is_enough is is_enough
    assert bool(diagnosis.remedy) is not is_enough


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("lrs", "momentum", "weight_decay"), [(RESNET56, 0.98, 1e-4), (RESNET56, 0.9, 1e-4), (LENET, 0.9, 5e-4)]
)
def test_the_law_is_what_a_passive_weight_does(
    lrs: list[float], momentum: float, weight_decay: float, nesterov: bool
) -> None:
    diagnosis = diagnosed(lrs, momentum=momentum, weight_decay=weight_decay)
    # The law is of first order in lr weight_decay / (1 - momentum)^2, at most 1.25e-3 here, of an exponent up to 8.
    remains = oracles.passive_weight(lrs, momentum, weight_decay, nesterov)
    assert diagnosis.shrinkage == pytest.approx(remains, rel=1e-2)


def test_where_decay_is_strong_a_weight_falls_further_than_the_law_says() -> None:
    """LeNet at momentum 0.99: exp(-18.9) = 6e-9 by the law, 2.1e-9 step by step; both vanish beside any weight."""
    remains = oracles.passive_weight(LENET, 0.99, 5e-4)
    assert remains == pytest.approx(2.1e-9, rel=5e-2)  # the digits that are published
    assert remains < diagnosed(LENET, momentum=0.99, weight_decay=5e-4).shrinkage


def test_decoupled_decay_is_the_law_without_the_factor_of_momentum() -> None:
    assert diagnosed(RESNET56, momentum=0.0, weight_decay=1e-4).shrinkage == pytest.approx(0.85, rel=5e-3)


@given(
    st.lists(st.floats(1e-6, 0.1), min_size=1, max_size=20),
    st.floats(0.0, 0.99),
    st.just(0.0) | st.floats(1e-8, 4e-4),  # at most 0.004 a step: the law holds up to momentum 0.99
    st.floats(0.0, 0.9),
)
@settings(deadline=None)
def test_the_exponent_equals_the_oracle(
    lrs: list[float], momentum: float, weight_decay: float, dampening: float
) -> None:
    group = {"momentum": momentum, "weight_decay": weight_decay, "dampening": dampening}
    expected = oracles.decay_exponent(lrs, momentum, weight_decay, dampening)
    assert sum(decay_per_step(lr, group) for lr in lrs) == pytest.approx(expected, rel=1e-13)  # another order of sums


def test_one_step_by_hand() -> None:
    assert decay_per_step(0.5, {"momentum": 0.75, "weight_decay": 0.0625}) == 0.125
    assert decay_per_step(0.5, {"momentum": 0.75, "weight_decay": 0.0625, "dampening": 0.5}) == 0.0625
    assert decay_per_step(0.0, {"momentum": 0.75, "weight_decay": 0.0625}) == 0.0


@pytest.mark.parametrize("weight_decay", [0.01, 0.1, 1.0, 10.0])
def test_strong_decay_shrinks_no_faster_than_the_root_of_the_momentum(weight_decay: float) -> None:
    """Step by step the weight swings through zero: its largest size in the last swings is what is left of it."""
    lrs = [0.1] * 300
    exponent = sum(decay_per_step(lr, {"momentum": 0.9, "weight_decay": weight_decay}) for lr in lrs)
    assert exponent <= 300 * -0.5 * math.log(0.9)
    left = max(abs(oracles.passive_weight(lrs[: 300 - back], 0.9, weight_decay)) for back in range(30))
    assert left >= math.exp(-exponent) / 2


def test_one_step_reads_the_group_of_an_optimizer() -> None:
    (group,) = torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.75, weight_decay=0.0625).param_groups
    assert decay_per_step(group["lr"], group) == 0.125


# the verdict


def test_seven_is_enough_and_less_is_not() -> None:
    assert ENOUGH == 7.0
    assert Diagnosis(7.0, 1).is_enough
    assert not Diagnosis(6.99, 1).is_enough
    assert Diagnosis(7.0, 1).shrinkage < 1e-3


def test_a_good_run_is_told_in_one_sentence() -> None:
    assert str(diagnosed(RESNET56, momentum=0.98, weight_decay=1e-4)) == (
        "decay exponent 7.98 over 468,600 steps: passive weights shrink to 0.034 % of their size; "
        "enough for passive weights to vanish"
    )


def test_a_bad_run_is_told_with_the_remedy() -> None:
    diagnosis = diagnosed(RESNET56, momentum=0.9, weight_decay=1e-4)
    told = str(diagnosis)
    assert told.startswith("decay exponent 1.60 over 468,600 steps: passive weights shrink to 20 % of their size; NOT")
    assert "will cost accuracy" in told
    assert told.endswith(diagnosis.remedy)
    assert "instead of 0.9," in diagnosis.remedy
    assert "instead of 0.0001," in diagnosis.remedy


@pytest.mark.parametrize(("exponent", "share"), [(0.1, "90 %"), (4.6052, "1 %"), (7.0, "0.091 %"), (20.0, "2.1e-07 %")])
def test_the_share_that_remains_has_two_digits(exponent: float, share: str) -> None:
    assert f"shrink to {share} of their size" in str(Diagnosis(exponent, 10))


@pytest.mark.parametrize("exponent", [0.0, 1e-3])
def test_all_that_remains_is_one_hundred_percent(exponent: float) -> None:
    assert "shrink to 100 % of their size" in str(Diagnosis(exponent, 10))


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "lr"), [(0.9, 0.0, 0.1), (0.9, 1e-4, 0.0)], ids=["no weight decay", "no learning rate"]
)
def test_without_any_decay_there_are_no_numbers_to_suggest(momentum: float, weight_decay: float, lr: float) -> None:
    diagnosis = diagnosed([lr] * 10, momentum=momentum, weight_decay=weight_decay)
    assert diagnosis.exponent == 0.0
    assert diagnosis.shrinkage == 1.0
    assert diagnosis.remedy == "Learning rate and weight decay must be above 0, and dampening below 1."


# the remedies

NUMBER = r"([0-9.,]+(?:e[+-]?[0-9]+)?)"
PATTERNS = {
    "momentum": rf"momentum {NUMBER} instead of",
    "num_steps": rf"(?:would be: |or ){NUMBER} steps",
    "weight_decay": rf"weight_decay {NUMBER} instead of",
    "lr": rf"learning rates {NUMBER} times as high",
}


def suggestions(remedy: str) -> dict[str, float]:
    assert remedy.startswith("Enough would be: ")
    found = {name: re.search(pattern, remedy) for name, pattern in PATTERNS.items()}
    return {name: float(match[1].rstrip(".,").replace(",", "")) for name, match in found.items() if match}


def follow(name: str, number: float, run: dict[str, float]) -> Diagnosis:
    """The same run with one thing changed as suggested."""
    changed = {**run, name: number * run["lr"] if name == "lr" else number}
    exponent = changed["num_steps"] * decay_per_step(changed["lr"], changed)
    return diagnose_decay(exponent, int(changed["num_steps"]), changed)


def remedies(run: dict[str, float]) -> dict[str, float]:
    exponent = run["num_steps"] * decay_per_step(run["lr"], run)
    return suggestions(diagnose_decay(exponent, int(run["num_steps"]), run).remedy)


def is_short(run: dict[str, float]) -> bool:
    return run["num_steps"] * decay_per_step(run["lr"], run) < ENOUGH


def remains(name: str, number: float, run: dict[str, float]) -> float:
    """What is left of a passive weight, step by step, in the run with one thing changed as suggested."""
    changed = {**run, name: number * run["lr"] if name == "lr" else number}
    lrs = [changed["lr"]] * int(changed["num_steps"])
    return abs(oracles.passive_weight(lrs, changed["momentum"], changed["weight_decay"]))


RUNS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-4, 3e-3, 5e-3, 0.0123, 0.1]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.98, 0.99]),
        "weight_decay": st.sampled_from([1e-5, 1e-4, 4.4e-4, 5e-4, 1e-3]),
        "num_steps": st.integers(1, 10**6),
    }
).filter(is_short)


@given(RUNS)
@settings(deadline=None)
def test_more_steps_or_decay_or_learning_rate_are_enough_as_suggested(run: dict[str, float]) -> None:
    found = remedies(run)
    assert "num_steps" in found
    if run["num_steps"] * (1 - run["momentum"]) > 100:  # much longer than the memory of the momentum
        assert {"weight_decay", "lr"} <= found.keys()
    for name in found.keys() - {"momentum"}:
        # 1e-12: products of the same numbers in another order
        assert follow(name, found[name], run).exponent >= ENOUGH * (1 - 1e-12), name


@given(RUNS)
@settings(deadline=None)
def test_the_remedies_are_not_much_more_than_enough(run: dict[str, float]) -> None:
    found = remedies(run)
    assert follow("num_steps", found["num_steps"], run).exponent <= ENOUGH + decay_per_step(run["lr"], run) * 1.000001
    for name in found.keys() & {"weight_decay", "lr"}:  # two digits, rounded up: at most a tenth too much
        assert follow(name, found[name], run).exponent <= ENOUGH * 1.1000001, name


def test_more_momentum_is_enough_as_suggested() -> None:
    for num_steps in range(1_500, 6_900, 100):
        run = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4, "num_steps": num_steps}
        # 1e-9: 1 - momentum cancels digits
        assert follow("momentum", remedies(run)["momentum"], run).exponent >= ENOUGH * (1 - 1e-9), num_steps


def test_a_run_with_the_suggested_momentum_is_judged_enough() -> None:
    run = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4, "num_steps": 1600}  # exponent 1.6, as ResNet-56 at 0.9
    assert follow("momentum", remedies(run)["momentum"], run).is_enough


def test_momentum_one_is_never_suggested() -> None:
    run = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-5, "num_steps": 3 * 10**6}
    assert remedies(run).get("momentum", 0.0) < 1.0


def test_no_momentum_is_suggested_whose_memory_is_as_long_as_the_run() -> None:
    run = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "num_steps": 100}  # it would take 0.9998, 7,000 steps
    assert "momentum" not in remedies(run)


def test_the_suggested_momentum_is_enough_step_by_step() -> None:
    """At 0.9 ResNet-56's schedule leaves 20 %; what is suggested is a little less than the paper's 0.98."""
    momentum = suggestions(diagnosed(RESNET56, momentum=0.9, weight_decay=1e-4).remedy)["momentum"]
    assert 0.97 < momentum < 0.98
    assert oracles.passive_weight(RESNET56, momentum, 1e-4) < 1e-3


@pytest.mark.parametrize("name", ["num_steps", "weight_decay", "lr"])
def test_in_a_long_run_suggestions_are_enough_step_by_step(name: str) -> None:
    run = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "num_steps": 10_000}  # exponent 5
    assert remains("lr", 1.0, run) > 5e-3
    assert remains(name, remedies(run)[name], run) < math.exp(-ENOUGH)


@pytest.mark.parametrize("name", ["weight_decay", "lr"])
def test_nothing_is_suggested_that_the_memory_of_momentum_forbids(name: str) -> None:
    run = {"lr": 0.1, "momentum": 0.99, "weight_decay": 1e-4, "num_steps": 1_000}  # exponent 1
    found = remedies(run)
    assert name not in found or remains(name, found[name], run) < 2e-3  # twice what is aimed at


def test_a_run_as_short_as_the_memory_of_momentum_is_not_enough() -> None:
    run = {"lr": 0.1, "momentum": 0.99, "weight_decay": 5e-3, "num_steps": 300}
    assert remains("lr", 1.0, run) > 0.1
    assert not diagnosed([run["lr"]] * 300, momentum=run["momentum"], weight_decay=run["weight_decay"]).is_enough


@pytest.mark.parametrize("num_steps", [1, 5])
def test_suggestions_are_plain_numbers(num_steps: int) -> None:
    remedy = diagnosed([0.1] * num_steps, momentum=0.9, weight_decay=1e-2).remedy
    assert "e+" not in remedy


# rehearsals

Ahead = list[list[dict[str, Any]]]


def sgd(**options: Any) -> Optimizer:
    """Two groups of unlike rate, each of one weight."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.4, 0.05)]
    return torch.optim.SGD(groups, momentum=0.9, **options)


def _sequential(optimizer: Optimizer) -> LRScheduler:
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[3])


def _chained(optimizer: Optimizer) -> LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 4, 0.5)]
    )


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.5**t]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[1.0, 0.2], total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
}


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def real_loop(optimizer: Optimizer, scheduler: LRScheduler, num_steps: int, per_update: int = 1) -> Ahead:
    """The settings that a training loop really steps with, a list for each group."""
    used: Ahead = [[] for _ in optimizer.param_groups]
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        for group_used, now in zip(used, settings_of(optimizer), strict=True):
            group_used.append(now)
        optimizer.step()
        if step % per_update == 0:
            scheduler.step()
    return used


def rates(ahead: Ahead) -> list[list[float]]:
    return [[now["lr"] for now in group] for group in ahead]


def states(optimizer: Optimizer, scheduler: LRScheduler) -> tuple[Any, ...]:
    values = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), scheduler.state_dict())), values


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.6 steps so itself
@pytest.mark.parametrize("per_update", [1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rehearsal_is_what_the_loop_then_does(name: str, per_update: int) -> None:
    optimizer = sgd()
    scheduler = SCHEDULERS[name](optimizer)
    ahead = rehearse(optimizer, 12, scheduler, steps_per_update=per_update)
    assert ahead == real_loop(optimizer, scheduler, 12, per_update)
    assert len({rate for group in rates(ahead) for rate in group}) > 2  # the rates do move


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # SequentialLR of torch 2.6 steps so itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rehearsal_in_the_middle_of_a_run_goes_on_from_there(name: str) -> None:
    optimizer = sgd()
    scheduler = SCHEDULERS[name](optimizer)
    real_loop(optimizer, scheduler, 4)
    assert rehearse(optimizer, 8, scheduler) == real_loop(optimizer, scheduler, 8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_rehearsal_leaves_optimizer_and_scheduler_untouched(name: str) -> None:
    optimizer = sgd()
    scheduler = SCHEDULERS[name](optimizer)
    real_loop(optimizer, scheduler, 2)
    groups, before = optimizer.param_groups, states(optimizer, scheduler)
    rehearse(optimizer, 9, scheduler)
    assert states(optimizer, scheduler) == before
    assert optimizer.param_groups is groups
    assert scheduler.optimizer is optimizer


def test_a_rehearsal_warns_of_nothing_and_does_not_hide_the_loop_s_own_warning() -> None:
    optimizer = sgd()
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    rehearse(optimizer, 3, scheduler)  # a warning would be an error here
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_rehearsal_by_hand() -> None:
    optimizer = sgd()
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    assert rates(rehearse(optimizer, 5, scheduler)) == [[0.4, 0.4, 0.2, 0.2, 0.1], [0.05, 0.05, 0.025, 0.025, 0.0125]]
    once_an_epoch = rehearse(optimizer, 5, scheduler, steps_per_update=2)
    assert rates(once_an_epoch) == [[0.4, 0.4, 0.4, 0.4, 0.2], [0.05, 0.05, 0.05, 0.05, 0.025]]


def test_without_a_scheduler_settings_are_constant() -> None:
    optimizer = sgd(weight_decay=0.25)
    first, second = settings_of(optimizer)
    assert (first["lr"], second["lr"], first["momentum"], first["weight_decay"]) == (0.4, 0.05, 0.9, 0.25)
    assert rehearse(optimizer, 3) == [[first] * 3, [second] * 3]


def test_a_rehearsal_follows_a_momentum_that_moves() -> None:
    """OneCycleLR lowers it where the rate is high: 0.95 throughout would overstate the exponent."""
    optimizer = sgd()
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=11, pct_start=0.5, anneal_strategy="linear")
    group = rehearse(optimizer, 11, scheduler)[0]
    moved = [now["momentum"] for now in group]
    assert moved == [now["momentum"] for now in real_loop(optimizer, scheduler, 11)[0]]
    assert (max(moved), min(moved)) == pytest.approx((0.95, 0.85), abs=0.02)  # the peak lies between two steps


def test_rates_kept_in_tensors_are_told_as_numbers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(0.5))
    assert rates(rehearse(optimizer, 2)) == [[0.5, 0.5]]


def test_a_rehearsal_leaves_rates_kept_in_tensors_untouched() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(0.5))
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    assert rates(rehearse(optimizer, 3, scheduler)) == [[0.5, 0.25, 0.125]]
    assert optimizer.param_groups[0]["lr"].item() == 0.5


def test_an_optimizer_of_another_kind_can_be_rehearsed() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=6)  # cycles betas
    before = states(optimizer, scheduler)
    ahead = rehearse(optimizer, 6, scheduler)
    assert states(optimizer, scheduler) == before
    assert ahead == real_loop(optimizer, scheduler, 6)


def test_a_rehearsal_longer_than_the_scheduler_fails_as_the_loop_would() -> None:
    optimizer = sgd()
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)
    with pytest.raises(ValueError, match="Tried to step 6 times"):
        rehearse(optimizer, 6, scheduler)


def test_a_scheduler_that_follows_the_loss_is_refused() -> None:
    optimizer = sgd()
    scheduler: Any = lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match=r"^ReduceLROnPlateau follows the loss, so its learning rates cannot be known"):
        rehearse(optimizer, 3, scheduler)


@pytest.mark.parametrize(("num_steps", "per_update"), [(0, 1), (-1, 1), (1, 0), (5, -2)])
def test_counts_below_one_are_refused(num_steps: int, per_update: int) -> None:
    told = f"num_steps and steps_per_update must be >= 1, got {num_steps} and {per_update}"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        rehearse(sgd(), num_steps, steps_per_update=per_update)


def test_a_rehearsed_run_has_the_exponent_of_the_run() -> None:
    optimizer = sgd(weight_decay=0.01)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    (ahead, _) = rehearse(optimizer, 3, scheduler)
    exponent = sum(decay_per_step(now["lr"], now) for now in ahead)
    assert math.isclose(exponent, (0.4 + 0.2 + 0.1) * 0.01 / (1 - 0.9), rel_tol=1e-14)  # sums in another order
