"""Exact zeros, kept: through optimizers, copies, averages, checkpoints and trial cuts."""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pomona
from pomona import GSM, Budget, Pruner, Weights
from pomona.native import core
from pomona.pruner.zeros import all_but, cut_, zero_all_
from tests.problems import NUM_WEIGHTS, batches, bits, loss_of, net, sparse_net, train

KEPT = 18  # of the 72 weights, at sparsity 0.75
NUM_STEPS = 20

# These runs are far too short for passive weights to vanish, which is not what they are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed"),
]


def pruned(seed: int = 0, *, steps: int = NUM_STEPS, **options: Any) -> tuple[nn.Sequential, SGD, Pruner]:
    """Trained by GSM and not yet hardened, with a decay exponent of 0.05 a step."""
    model = net(seed)
    optimizer = SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, **options})
    pruner = Pruner(model, optimizer, GSM(sparsity=0.75))
    train(model, optimizer, batches(steps))
    return model, optimizer, pruner


def hardened() -> tuple[nn.Sequential, SGD, Pruner]:
    model, optimizer, pruner = pruned()
    pruner.harden()
    return model, optimizer, pruner


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim == 2}


def assert_plus_zero(model: nn.Module, zeros: dict[str, Tensor], prefix: str = "") -> None:
    """+0.0, neither -0.0 nor something small, at every place of ``zeros``."""
    for name, zero in zeros.items():
        at = model.get_parameter(prefix + name).detach()[zero]
        assert bits(at) == bits(torch.zeros_like(at))


# The cut


@pytest.mark.parametrize("with_core", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cut_writes_zeros_and_returns_the_largest_it_removed(dtype: torch.dtype, with_core: bool) -> None:
    values = [
        torch.tensor([[1.0, -4.0], [-0.0, 2.0]], dtype=dtype),
        torch.ones(3, dtype=dtype),
        torch.ones(0, dtype=dtype),
    ]
    pruned = [
        torch.tensor([[False, True], [True, True]]),
        torch.zeros(3, dtype=torch.bool),
        torch.ones(0, dtype=torch.bool),
    ]
    again = [value.clone() for value in values]
    with core.switched(with_core):
        assert cut_(values, pruned) == [4.0, 0.0, 0.0]
        zero_all_(again, pruned)
    assert values[0].tolist() == again[0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert not values[0].signbit().any() and values[1].tolist() == again[1].tolist() == [1.0, 1.0, 1.0]


def test_masks_are_inverted_in_place_unless_somebody_else_sees_them() -> None:
    remembered, ours, twice = torch.tensor([True, False]), torch.tensor([True, True]), torch.tensor([False, False])
    repeated = torch.ones(1, dtype=torch.bool).expand(2)
    pruned = all_but([remembered, ours, twice, twice.clone(), repeated], [remembered])
    assert [mask.tolist() for mask in pruned] == [
        [False, True],
        [False, False],
        [True, True],
        [True, True],
        [False, False],
    ]
    assert remembered.tolist() == [True, False]
    assert pruned[1].data_ptr() == ours.data_ptr()
    same = torch.tensor([True, False])
    first, second = all_but([same, same], [])
    assert first.tolist() == second.tolist() == [False, True]


def test_the_cut_keeps_the_largest_writes_plus_zero_and_changes_nothing_else() -> None:
    model, optimizer, pruner = pruned()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = copy.deepcopy(model)
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    groups = optimizer.state_dict()["param_groups"]
    grads = bits([p.grad for p in model.parameters()])
    rng = bits(torch.get_rng_state())
    report = pruner.harden()

    magnitudes = torch.cat([before[0].weight.detach().abs().view(-1), before[2].weight.detach().abs().view(-1)])
    smallest = magnitudes.topk(KEPT).values[-1]
    for p, old, known in zip(model.parameters(), before.parameters(), momentum, strict=True):
        kept = (old.abs() >= smallest) if p.ndim == 2 else torch.ones_like(old, dtype=torch.bool)
        assert bits(p[kept]) == bits(old[kept])
        assert bits(p[~kept]) == bits(torch.zeros_like(p[~kept]))
        assert bits(optimizer.state[p]["momentum_buffer"]) == bits(torch.where(kept, known, 0.0))
    assert report.nonzero == KEPT
    assert (report.total, report.smallest_kept) == (NUM_WEIGHTS, smallest.item())
    assert report.largest_cut == magnitudes.sort().values[-KEPT - 1].item()
    assert optimizer.state_dict()["param_groups"] == groups
    assert bits([p.grad for p in model.parameters()]) == grads
    assert bits(torch.get_rng_state()) == rng


def test_equal_magnitudes_are_cut_to_the_exact_count() -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.sign(p))
    pruner = Pruner(model, SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5), GSM(sparsity=0.75))
    with pytest.warns(UserWarning, match="have not decayed"):
        assert pruner.harden(one_shot=True).nonzero == KEPT
    assert pruner.verify().nonzero == KEPT


def test_hardening_twice_writes_no_further_zeros_and_reports_anew() -> None:
    model, optimizer, pruner = hardened()
    zeros = zeros_of(model)
    train(model, optimizer, batches(5))
    before = bits(model.state_dict())
    report = pruner.harden()
    assert bits(model.state_dict()) == before
    assert (report.nonzero, report.num_steps) == (KEPT, NUM_STEPS + 5)
    assert_plus_zero(model, zeros)


def test_evaluation_runs_on_the_dense_and_on_the_cut_model_and_is_reported() -> None:
    model, _, pruner = pruned()
    report = pruner.harden(evaluate=lambda: 100 * pomona.report(model).sparsity)
    assert (report.accuracy_before, report.accuracy_after) == (0.0, 75.0)
    assert "accuracy 0.00 before the cut, 75.00 after (+75.00)" in str(report)
    assert (pruner.report().accuracy_before, pruner.report().accuracy_after) == (0.0, 75.0)


@pytest.mark.parametrize("as_user", [np.float64, torch.tensor], ids=["numpy", "tensor"])
def test_an_accuracy_that_is_no_plain_float_is_saved_and_told_all_the_same(as_user: Callable[[float], Any]) -> None:
    _, _, pruner = pruned()
    report = pruner.harden(evaluate=lambda: as_user(50.0))
    assert '"accuracy_after": 50.0' in report.to_json()
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["accuracy"] == [50.0, 50.0]


def test_a_cut_before_the_weights_have_decayed_is_warned_of() -> None:
    model, _, pruner = pruned(steps=130)
    with pytest.warns(UserWarning, match=r"cuts weights that have not decayed: decay exponent 6.50 over 130 steps"):
        assert pruner.harden().nonzero == KEPT
    assert pomona.report(model).nonzero == KEPT


def test_a_cut_after_the_weights_have_decayed_is_not() -> None:
    _, _, pruner = pruned(steps=150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruner.harden().nonzero == KEPT
    assert pruner.metrics()["decay_exponent"] == pytest.approx(7.5)


def test_a_cut_of_nothing_is_not_warned_of() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.0))
    train(model, optimizer, batches(3))
    assert pruner.harden().nonzero == NUM_WEIGHTS


def test_before_the_first_step_there_is_nothing_to_harden_unless_one_asks_for_it() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.75))
    before = bits(model.state_dict())
    with pytest.raises(RuntimeError, match=r"this Pruner has seen no step of its AdamW, so Magnitude has pruned noth"):
        pruner.harden()
    assert bits(model.state_dict()) == before and not pruner.is_hardened
    assert pruner.harden(one_shot=True).nonzero == KEPT  # as the message advises
    train(model, optimizer, batches(3))
    assert pruner.verify().num_steps == 3


def test_a_run_of_skipped_steps_is_no_run() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.75))
    x, y = batches(1)[0]
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        train(model, optimizer, [(x, y * math.nan)] * 2)
    with pytest.raises(RuntimeError, match="all 2 steps were skipped because a gradient was not finite"):
        pruner.harden()


def test_a_detached_pruner_does_not_cut() -> None:
    model, _, pruner = pruned()
    pruner.detach()
    before = bits(model.state_dict())
    with pytest.raises(RuntimeError, match="not attached to its optimizer any more"):
        pruner.harden()
    assert bits(model.state_dict()) == before


# Holding

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda ps: SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "fused sgd": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda ps: Adam(ps, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda ps: Adam(ps, lr=0.01, amsgrad=True),
    "fused adam": lambda ps: Adam(ps, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "rprop": lambda ps: torch.optim.Rprop(ps),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.05),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_zeros_are_held_for_fifty_steps_while_the_others_train(name: str) -> None:
    model = sparse_net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    pruner = pomona.hold(model, optimizer)
    zeros = zeros_of(model)
    before = copy.deepcopy(model)
    for batch in batches(50):
        train(model, optimizer, [batch])
        assert_plus_zero(model, zeros)
    assert sum(int(zero.sum()) for zero in zeros.values()) == NUM_WEIGHTS // 2
    for key, zero in zeros.items():
        assert bool((model.get_parameter(key)[~zero] != before.get_parameter(key)[~zero]).all())
    assert pruner.verify().num_steps == 50


@each_optimizer
def test_moments_that_know_the_dense_model_revive_nothing(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, batches(10))
    with torch.no_grad():
        for p in (model[0].weight, model[2].weight):
            p.view(-1)[::2] = 0.0  # cut by hand, with the moments as they are
    pomona.hold(model, optimizer)
    zeros = zeros_of(model)
    for batch in batches(10, seed=1):
        train(model, optimizer, [batch])
        assert_plus_zero(model, zeros)


def test_a_momentum_buffer_written_by_hand_revives_nothing() -> None:
    model, optimizer, pruner = hardened()
    zeros = zeros_of(model)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"].fill_(100.0)
    train(model, optimizer, batches(1))
    assert_plus_zero(model, zeros)
    assert pruner.verify().nonzero == KEPT


def test_survivors_train_as_if_the_zeros_were_not_there() -> None:
    # Against a run in which gradients and weights are masked by hand.
    model, optimizer, _ = hardened()
    by_hand = copy.deepcopy(model)
    plain = SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks = {name: ~zero for name, zero in zeros_of(by_hand).items()}
    data = batches(20, seed=1)
    train(model, optimizer, data)
    for batch in data:
        plain.zero_grad()
        loss_of(by_hand, batch).backward()
        for name, mask in masks.items():
            by_hand.get_parameter(name).grad.mul_(mask)  # type: ignore[union-attr]
        plain.step()
        with torch.no_grad():
            for name, mask in masks.items():
                by_hand.get_parameter(name).mul_(mask)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # -0.0 from the multiplication may differ
    assert bits(optimizer.state_dict()["state"]) == bits(plain.state_dict()["state"])


def test_a_nan_at_a_pruned_place_becomes_zero_at_the_next_step() -> None:
    model, optimizer, pruner = hardened()
    zeros = zeros_of(model)
    place = tuple(zeros["0.weight"].nonzero()[0])
    with torch.no_grad():
        model[0].weight[place] = math.nan
    with pytest.raises(RuntimeError, match=r"1 of the zeros of 0\.weight in Sequential are not zero any more"):
        pruner.verify()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"1 of the zeros that harden\(\) wrote \(0.weight\) were not zero any more"):
        optimizer.step()
    assert_plus_zero(model, zeros)
    assert pruner.verify().nonzero == KEPT


def test_dense_weights_loaded_by_mistake_are_noticed_and_cut_at_the_next_step() -> None:
    model, optimizer, pruner = hardened()
    zeros = zeros_of(model)
    model.load_state_dict(net(1).state_dict())
    with pytest.raises(RuntimeError, match="the sparsity contract is broken"):
        pruner.verify()
    with pytest.warns(UserWarning, match=r"54 of the zeros .* when step 21 began.*call harden\(\) again"):
        train(model, optimizer, batches(1))
    assert_plus_zero(model, zeros)
    assert pruner.verify().nonzero == KEPT


def test_hardening_again_writes_the_zeros_into_weights_that_were_loaded() -> None:
    # Back to the first weights, as of a lottery ticket.
    model, optimizer, pruner = hardened()
    zeros = zeros_of(model)
    model.load_state_dict(net().state_dict())
    assert pruner.harden().nonzero == KEPT
    assert_plus_zero(model, zeros)
    for name, p in net().named_parameters():
        kept = ~zeros[name] if name in zeros else torch.ones_like(p, dtype=torch.bool)
        assert bits(model.get_parameter(name)[kept]) == bits(p[kept])
    train(model, optimizer, batches(3))  # without a warning
    assert pruner.verify().nonzero == KEPT


# hold()


def test_zeros_left_by_torch_prune_are_held() -> None:
    model = net()
    parameters = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.9)
    for module, name in parameters:
        prune.remove(module, name)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    pruner = pomona.hold(model, optimizer)
    zeros = zeros_of(model)
    train(model, optimizer, batches(20))
    assert_plus_zero(model, zeros)
    assert pruner.verify().nonzero == 7  # 0.1 of 72
    assert set(model.state_dict()) == set(net().state_dict())


def test_masks_of_torch_prune_that_were_not_removed_are_refused() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(
        ValueError, match=r"0.weight_orig \(by a mask of torch.nn.utils.prune\).*pomona.from_torch_prune\(model\)"
    ):
        pomona.hold(model, SGD(model.parameters(), lr=0.1))


def test_a_model_without_zeros_is_refused_and_left_alone() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"hold\(\) found no zero"):
        pomona.hold(model, optimizer)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    train(model, optimizer, batches(1))
    assert model[0].weight[0, 0].item() != 0.0
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    assert pomona.hold(model, optimizer).verify().nonzero == NUM_WEIGHTS - 1


def test_hold_follows_a_pruner_that_has_let_go() -> None:
    model, _, first = hardened()
    zeros = zeros_of(model)
    with pytest.raises(ValueError, match="already pruned by another Pruner"):
        pomona.hold(model, first.optimizer)
    first.detach()
    optimizer = AdamW(model.parameters(), lr=0.01)
    second = pomona.hold(model, optimizer)
    train(model, optimizer, batches(20))
    assert_plus_zero(model, zeros)
    assert second.verify().nonzero == KEPT


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_resumed_hold_ends_where_the_unbroken_one_does(name: str) -> None:
    model = sparse_net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    pruner = pomona.hold(model, optimizer)
    train(model, optimizer, batches(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    again = net(1)
    again.load_state_dict(saved[0])
    other = OPTIMIZERS[name](list(again.parameters()))
    other.load_state_dict(saved[1])
    resumed = pomona.hold(again, other)
    resumed.load_state_dict(saved[2])
    train(model, optimizer, batches(20)[5:])
    train(again, other, batches(20)[5:])
    assert bits([again.state_dict(), resumed.state_dict()]) == bits([model.state_dict(), pruner.state_dict()])


# Copies and averages


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@pytest.mark.parametrize("average", [ema, AveragedModel], ids=["exponential", "equal"])
def test_an_average_given_to_harden_stays_zero_while_it_goes_on(average: Callable[[nn.Module], AveragedModel]) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    pruner = Pruner(model, optimizer, GSM(sparsity=0.75))
    averaged = average(model)
    for batch in batches(NUM_STEPS):
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
    assert pruner.harden(averaged).nonzero == KEPT
    zeros = zeros_of(model)
    for batch in batches(20, seed=1):
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
        assert_plus_zero(averaged, zeros, prefix="module.")
    assert pomona.report(averaged).nonzero == KEPT
    assert pruner.verify(averaged).nonzero == KEPT


def test_an_average_made_after_harden_stays_zero() -> None:
    model, optimizer, pruner = hardened()
    averaged = ema(model)
    for batch in batches(20, seed=1):
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
    assert_plus_zero(averaged, zeros_of(model), prefix="module.")
    assert pruner.verify(averaged).nonzero == KEPT


def test_an_average_that_comes_late_is_cut_by_a_second_harden() -> None:
    model, _, pruner = pruned()
    averaged = ema(net(1))
    pruner.harden()
    with pytest.raises(RuntimeError, match="in AveragedModel are not zero any more"):
        pruner.verify(averaged)
    pruner.harden(averaged)
    assert_plus_zero(averaged, zeros_of(model), prefix="module.")
    assert pruner.verify(averaged, model).nonzero == KEPT


def test_a_copy_of_a_hardened_model_is_a_plain_model_with_the_same_zeros() -> None:
    model, _, pruner = hardened()
    copied = copy.deepcopy(model)
    assert bits(copied.state_dict()) == bits(model.state_dict())
    fresh = net(1)
    fresh.load_state_dict(copied.state_dict())
    assert pruner.verify(copied, fresh).nonzero == KEPT


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Linear(6, 8), r"Linear is not a copy of the pruned model: 0.weight has .* no such parameter here"),
        (
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
            r"2.weight has shape \(3, 8\) there and shape \(4, 8\) here",
        ),
    ],
    ids=["another model", "another shape"],
)
def test_what_is_no_copy_is_refused(other: Callable[[], nn.Module], message: str) -> None:
    _, _, pruner = pruned()
    with pytest.raises(ValueError, match=message):
        pruner.harden(other())
    pruner.harden()
    with pytest.raises(ValueError, match=message):
        pruner.verify(other())


def test_what_is_no_copy_is_refused_before_anything_is_cut() -> None:
    model, _, pruner = pruned()
    good = copy.deepcopy(model)
    before = bits([model.state_dict(), good.state_dict()])
    with pytest.raises(ValueError, match="not a copy"):
        pruner.harden(good, nn.Linear(6, 8))
    assert not pruner.is_hardened
    assert bits([model.state_dict(), good.state_dict()]) == before


# verify()


def test_there_is_nothing_to_verify_before_harden() -> None:
    _, _, pruner = pruned()
    with pytest.raises(RuntimeError, match=r"call harden\(\) first"):
        pruner.verify()


def test_weights_revived_by_hand_are_counted_by_layer() -> None:
    model, _, pruner = hardened()
    assert pruner.verify().nonzero == KEPT
    with torch.no_grad():
        for layer, count in ((model[0], 2), (model[2], 1)):
            layer.weight[tuple((layer.weight == 0).nonzero()[:count].T)] = 1e-30
    expected = r"2 of the zeros of 0.weight in Sequential .*; 1 of the zeros of 2.weight in Sequential .* 21 weights"
    with pytest.raises(RuntimeError, match=expected):
        pruner.verify()


def test_a_weight_revived_in_a_copy_is_told_from_the_model() -> None:
    model, _, pruner = hardened()
    averaged = ema(model)
    place = tuple(zeros_of(model)["2.weight"].nonzero()[0])
    with torch.no_grad():
        averaged.module[2].weight[place] = -1.0
    assert pruner.verify().nonzero == KEPT
    with pytest.raises(
        RuntimeError, match=r"broken: 1 of the zeros of 2.weight in AveragedModel are not zero any more$"
    ):
        pruner.verify(averaged)


@dataclass(frozen=True, slots=True)
class Greedy(pomona.Method):
    """Says that one weight may stay, and keeps two."""

    def support(self, weights: Sequence[pomona.Weight], step: int) -> list[Tensor]:
        return pomona.global_top_k([pomona.magnitude(w.value) for w in weights], 2)

    @property
    def budget(self) -> Budget:
        return Budget(71 / 72)


def test_a_method_that_keeps_more_than_its_budget_is_found_out() -> None:
    model = net()
    pruner = Pruner(model, Adam(model.parameters()), Greedy())
    with pytest.raises(RuntimeError, match="a budget of 1 weights, but its support has 2"):
        pruner.harden(one_shot=True)
    state = pruner.state_dict()
    pruner.load_state_dict(
        state | {"is_hardened": True, "pruned": {name: p == 0 for name, p in pruner.parameters().items()}}
    )
    with pytest.raises(RuntimeError, match="72 weights survived, more than the budget of 1"):
        pruner.verify()


def test_a_survivor_that_reaches_zero_by_itself_breaks_nothing() -> None:
    model, _, pruner = hardened()
    with torch.no_grad():
        model[0].weight[tuple(model[0].weight.nonzero()[0])] = 0.0
    assert pruner.verify().nonzero == KEPT - 1


# trial_cut()


def everything(model: nn.Module, optimizer: Optimizer, pruner: Pruner) -> Any:
    parts = [model.state_dict(), optimizer.state_dict(), pruner.state_dict(), torch.get_rng_state()]
    return bits([*parts, [p.grad for p in model.parameters()]])


def test_inside_a_trial_the_model_is_cut_and_afterwards_as_it_was() -> None:
    model, optimizer, pruner = pruned()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0  # also this comes back
    before = everything(model, optimizer, pruner)
    with pruner.trial_cut() as report:
        assert report.nonzero == pomona.report(model).nonzero == KEPT
        assert not pruner.is_hardened
        in_trial = bits(model.state_dict())
    assert everything(model, optimizer, pruner) == before
    train(model, optimizer, batches(5, seed=1))
    same, plain, undisturbed = pruned()
    with torch.no_grad():
        same[0].weight[0, 0] = -0.0
    train(same, plain, batches(5, seed=1))
    assert everything(model, optimizer, pruner) == everything(same, plain, undisturbed)

    certain, _, cut = pruned()
    with torch.no_grad():
        certain[0].weight[0, 0] = -0.0
    cut.harden()
    assert bits(certain.state_dict()) == in_trial


def test_a_trial_that_raises_leaves_no_trace() -> None:
    model, optimizer, pruner = pruned()
    before = everything(model, optimizer, pruner)
    with pytest.raises(KeyboardInterrupt), pruner.trial_cut():
        raise KeyboardInterrupt
    assert everything(model, optimizer, pruner) == before


def test_trials_within_trials_and_after_harden_leave_no_trace() -> None:
    model, optimizer, pruner = pruned()
    before = everything(model, optimizer, pruner)
    with pruner.trial_cut() as outer, pruner.trial_cut() as inner:
        assert outer.nonzero == inner.nonzero == KEPT
    assert everything(model, optimizer, pruner) == before
    pruner.harden()
    before = everything(model, optimizer, pruner)
    with pruner.trial_cut() as report:
        assert report.nonzero == KEPT
        assert report.largest_cut == pruner.report().largest_cut
    assert everything(model, optimizer, pruner) == before


def test_a_trial_while_the_sparsity_is_still_low_cuts_to_the_sparsity_of_now() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    pruner = Pruner(model, optimizer, GSM(sparsity=pomona.Linear(0.0, 0.5, steps=10)))
    train(model, optimizer, batches(5))
    with pruner.trial_cut() as report:
        assert report.nonzero == 54
    train(model, optimizer, batches(5, seed=1))
    with pruner.trial_cut() as report:
        assert report.nonzero == 36


def test_harden_inside_a_trial_is_for_good_or_refused() -> None:
    model, _, pruner = pruned()
    try:
        with pruner.trial_cut() as report:
            if report.sparsity >= 0.75:  # good enough: make it so
                pruner.harden()
    except RuntimeError:
        assert not pruner.is_hardened
        assert pomona.report(model).nonzero == NUM_WEIGHTS
    else:
        assert pruner.verify().nonzero == KEPT


def test_a_method_that_breaks_its_own_budget_cuts_nothing() -> None:
    class Careless(GSM):
        @property
        def budget(self) -> Budget:
            return Budget(1 - (KEPT - 1) / 72)

        def support(self, weights: Weights, step: int) -> list[Tensor]:
            return GSM(0.75).support(weights, step)

    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    pruner = Pruner(model, optimizer, Careless(sparsity=0.75))
    train(model, optimizer, batches(3))
    before = bits(model.state_dict())
    with pytest.raises(RuntimeError, match=r"a budget of 17 .* has 18"):
        pruner.harden()
    assert bits(model.state_dict()) == before


def test_a_cut_in_the_middle_of_a_ramp_is_warned_of() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    pruner = Pruner(model, optimizer, GSM(sparsity=pomona.Linear(0.0, 0.75, steps=100)))
    train(model, optimizer, batches(10))
    with pytest.warns(UserWarning, match=r"sparsity is 0.075 at step 10 and goes to 0.75") as told:
        pruner.harden()
    assert all(warning.filename == __file__ for warning in told)  # names the user's line


def test_training_inside_a_trial_is_refused() -> None:
    model, optimizer, pruner = pruned()
    before = bits(model.state_dict())
    with pruner.trial_cut(), pytest.raises(RuntimeError, match=r"inside trial_cut\(\) would be undone"):
        train(model, optimizer, batches(1))
    assert bits(model.state_dict()) == before


def test_hold_warns_of_layers_that_are_zero_throughout() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.warns(UserWarning, match=r"2.weight is zero throughout and will stay so"):
        pomona.hold(model, SGD(model.parameters(), lr=0.1))


def test_a_state_that_lacks_a_part_changes_nothing() -> None:
    _, _, pruner = pruned()
    before = bits(pruner.state_dict())
    state = pruner.state_dict() | {"num_steps": 99}
    del state["accuracy"]
    with pytest.raises(ValueError, match="the state lacks accuracy"):
        pruner.load_state_dict(state)
    state = pruner.state_dict() | {"num_steps": 99}
    state["shared"] = {key: torch.zeros(3) for key in state["shared"]}
    with pytest.raises(ValueError, match=r"of the network has shape \(3,\) in the state"):
        pruner.load_state_dict(state)
    assert bits(pruner.state_dict()) == before


def test_a_state_of_the_first_format_loads_where_the_method_has_no_state_of_the_network() -> None:
    model = net()
    pruner = Pruner(model, SGD(model.parameters(), lr=0.1), pomona.Magnitude(0.75))
    old = pruner.state_dict() | {"format": 1, "num_steps": 7}
    del old["shared"]
    pruner.load_state_dict(old)
    assert pruner.num_steps == 7
    _, _, of_gsm = pruned()
    old = of_gsm.state_dict() | {"format": 1}
    del old["shared"]
    with pytest.raises(ValueError, match=r"saved by an earlier version of Pomona \(format 1\)"):
        of_gsm.load_state_dict(old)


def test_a_state_with_a_tensor_of_another_shape_changes_nothing() -> None:
    model = net()
    pruner = Pruner(model, SGD(model.parameters(), lr=0.1), pomona.Magnitude(0.75))
    before = bits(pruner.state_dict())
    state = pruner.state_dict() | {"num_steps": 99}
    state["state"] = {name: {key: torch.zeros(3) for key in parts} for name, parts in state["state"].items()}
    with pytest.raises(ValueError, match=r"mask of 0.weight has shape \(3,\) in the state"):
        pruner.load_state_dict(state)
    assert bits(pruner.state_dict()) == before


@pytest.mark.parametrize(
    ("method", "enough", "message"),
    [
        (pomona.GRDA(sparsity=0.75, steps=10), 10, "GRDA reaches sparsity=0.75 at step 10, and what is"),
        (pomona.ADMM(sparsity=0.75, every=4), 5, "the first ADMM iteration takes every=4 steps"),
        (pomona.RigL(sparsity=0.75, every=4), 4, "the masks are still the random ones of step 1"),
        (pomona.SET(sparsity=0.75, every=4), 4, "their first update is at step every=4"),
        (
            pomona.WeightMom(sparsity=0.75, every=2, window=3, patience=2),
            6,
            "WeightMom first prunes at update max.window, patience. = 3, one each 2 steps, and has made",
        ),
    ],
)
def test_a_cut_before_the_method_is_done_is_warned_of(method: pomona.Method, enough: int, message: str) -> None:
    for num_steps, early in ((enough - 1, True), (enough, False)):
        model = net()
        optimizer = SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model, optimizer, method)
        train(model, optimizer, batches(num_steps))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert pruner.harden().nonzero <= KEPT
        assert [bool(re.search(message, str(warning.message))) for warning in caught] == [True] * early


def test_a_plain_copy_of_a_wrapped_model_gets_the_zeros() -> None:
    class Wrapped(nn.Module):  # as DistributedDataParallel does
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = net()
    model = Wrapped(copy.deepcopy(plain))
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, pomona.Magnitude(0.75))
    pruner.harden(plain, one_shot=True)
    assert pomona.report(plain).nonzero == KEPT
    assert pruner.verify(plain).nonzero == KEPT


def test_hold_names_zeros_that_the_default_scope_leaves_out() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight[::2] = 0.0  # type: ignore[index,operator]
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=r"0\.weight has zeros that hold\(\) does not keep.*Scope\(also=\['0\.weight'\]\)"
    ):
        pomona.hold(model, optimizer).detach()
    pruner = pomona.hold(model, optimizer, scope=pomona.Scope(also=["0.weight"]))
    model(torch.arange(20)).square().sum().backward()
    optimizer.step()
    assert pruner.verify().sparsity == 0.5
