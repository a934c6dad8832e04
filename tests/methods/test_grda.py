"""gRDA: what the paper promises of it, the way to a target, and the authors' logged sparsities.

The paper in numpy, and what naive versions do instead, are in test_oracle_grda.py.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import pomona
from pomona.methods.grda import GRDA
from pomona.ops import soft_threshold
from pomona.zoo.models import build_model
from tests.problems import NUM_WEIGHTS, Batch, Kernels, Tensors, batches, bits, loss_of, net, train

# Most runs here are too short for the method to have done all.
pytestmark = pytest.mark.filterwarnings("ignore:harden.. at step .* comes early")

EVERYTHING = pomona.Scope(also="*")


def start(method: GRDA, *, lr: float = 0.1, scope: pomona.Scope = EVERYTHING) -> tuple[Any, SGD, pomona.Pruner]:
    model = net()
    optimizer = SGD(model.parameters(), lr=lr)
    return model, optimizer, pomona.Pruner(model, optimizer, method, scope=scope)


def tensors(method: GRDA, *values: list[float], lr: float = 1.0) -> tuple[Tensors, SGD, pomona.Pruner]:
    """Bare vectors, whose gradients the test hands out."""
    model = Tensors([np.array(value, dtype=np.float32) for value in values])
    optimizer = SGD(model.parameters(), lr=lr)
    return model, optimizer, pomona.Pruner(model, optimizer, method, scope=EVERYTHING)


def states(pruner: pomona.Pruner, key: str) -> list[Tensor]:
    return [state[key] for state in pruner.state_dict()["state"].values()]


def threshold_of(pruner: pomona.Pruner) -> float:
    """The one that all weights share."""
    (threshold,) = {float(threshold) for threshold in states(pruner, "threshold")}
    return threshold


def num_nonzero(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


# The rule


@pytest.mark.parametrize("scope", [pomona.Scope(), EVERYTHING], ids=["kernels", "everything"])
def test_without_strength_it_is_sgd_bit_for_bit(scope: pomona.Scope) -> None:
    ours, optimizer, _ = start(GRDA(c=0), scope=scope)
    plain = net()
    other = SGD(plain.parameters(), lr=0.1)
    for i, batch in enumerate(batches(60)):
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 0.1 * 0.7 ** (i // 10)
        train(ours, optimizer, [batch])
        train(plain, other, [batch])
        assert bits(ours.state_dict()) == bits(plain.state_dict())


@pytest.mark.parametrize("mu", [0.4, 0.501, 0.85])
@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_at_a_constant_rate_the_threshold_is_the_closed_form(mu: float, lr: float) -> None:
    c = 0.003
    model, optimizer, pruner = tensors(GRDA(c=c, mu=mu), [1.0, 2.0], lr=lr)
    model.give([np.zeros(2, dtype=np.float32)])
    for n in range(1, 501):
        optimizer.step()
        assert threshold_of(pruner) == pytest.approx(c * lr ** (0.5 + mu) * n**mu, rel=1e-12)


def test_the_threshold_grows_by_the_rate_of_each_step_and_never_falls() -> None:
    lrs = [0.5] * 10 + [0.05] * 10 + [0.0] * 5 + [0.2] * 10
    model, optimizer, pruner = tensors(GRDA(c=0.01, mu=0.6), [1.0, 2.0])
    before = expected = 0.0
    for n, lr in enumerate(lrs, start=1):
        optimizer.param_groups[0]["lr"] = lr
        model.give([np.ones(2, dtype=np.float32)])
        optimizer.step()
        expected += 0.01 * lr**1.1 * (n**0.6 - (n - 1) ** 0.6)
        assert threshold_of(pruner) == pytest.approx(expected, rel=1e-12)
        assert threshold_of(pruner) > before if lr else threshold_of(pruner) == before
        before = threshold_of(pruner)


def test_a_step_at_rate_zero_counts_and_changes_nothing_else() -> None:
    model, optimizer, pruner = tensors(GRDA(c=0.1), [1.0, -2.0], lr=0.5)
    model.give([np.array([0.5, -1.0], dtype=np.float32)])
    optimizer.step()
    weights, threshold = model.numpy(), threshold_of(pruner)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert (model.numpy()[0] == weights[0]).all()
    assert threshold_of(pruner) == threshold
    assert states(pruner, "n")[0] == 2


def test_weights_are_the_soft_thresholded_accumulators_with_exact_zeros_after_every_step() -> None:
    model, optimizer, pruner = start(GRDA(c=0.3, mu=0.6))
    zeros = []
    for batch in batches(40):
        train(model, optimizer, [batch])
        threshold = threshold_of(pruner)
        for p, v in zip(model.parameters(), states(pruner, "v"), strict=True):
            assert bits(p[v.abs() <= threshold]) == bits(torch.zeros_like(p[v.abs() <= threshold]))  # not -0.0
            assert torch.equal(p, v.sign() * (v.abs() - threshold).clamp(min=0.0))
        zeros.append(pruner.metrics()["sparsity"])
    assert 0.2 < zeros[-1] < 0.9


def test_a_zero_weight_collects_gradients_and_comes_back() -> None:
    """The threshold is 0.25 sqrt(n): 0.25, 0.354, 0.433, 0.5, ..."""
    model, optimizer, _ = tensors(GRDA(c=0.25, mu=0.5), [0.1, 2.0])
    seen = []
    for grad in (0.0, -0.2, -0.2, 0.4, 1.0):  # v = 0.1, 0.3, 0.5, 0.1, -0.9
        model.give([np.array([grad, 0.0], dtype=np.float32)])
        optimizer.step()
        seen.append(float(model.numpy()[0][0]))
    assert seen == pytest.approx([0.0, 0.0, 0.5 - 0.25 * 3**0.5, 0.0, -0.9 + 0.25 * 5**0.5], abs=1e-6)
    assert [weight == 0.0 for weight in seen] == [True, True, False, True, False]


def test_weights_that_are_loaded_after_construction_are_the_start() -> None:
    model, optimizer, pruner = tensors(GRDA(c=0), [1.0, 2.0])
    model.load_state_dict({"w.0": torch.tensor([5.0, -7.0])})
    model.give([np.array([1.0, 1.0], dtype=np.float32)])
    optimizer.step()
    assert model.w[0].tolist() == states(pruner, "v")[0].tolist() == [4.0, -8.0]


def test_a_weight_without_a_gradient_keeps_accumulator_count_and_threshold() -> None:
    model, optimizer, pruner = tensors(GRDA(c=0.1, mu=0.5), [1.0], [1.0])
    for step in range(4):
        model.give([np.array([0.1], dtype=np.float32)] * 2)
        if step in (0, 2):
            model.w[1].grad = None
        optimizer.step()
    assert [int(n) for n in states(pruner, "n")] == [4, 2]
    assert [float(t) for t in states(pruner, "threshold")] == pytest.approx([0.1 * 2.0, 0.1 * 2**0.5])
    assert [float(v) for v in states(pruner, "v")] == pytest.approx([0.6, 0.8])
    assert [float(w[0]) for w in model.numpy()] == pytest.approx([0.6 - 0.2, 0.8 - 0.1 * 2**0.5])
    model.load_state_dict({"w.0": torch.tensor([9.0]), "w.1": torch.tensor([9.0])})
    model.w[1].grad = None
    optimizer.step()
    assert model.w[1].item() == 9.0 != model.w[0].item()  # it is not touched, by whomever it was written


def test_biases_and_norms_are_pruned_where_the_scope_has_them_and_dense_elsewhere() -> None:
    def run(scope: pomona.Scope) -> tuple[nn.Module, pomona.Pruner]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        optimizer = SGD(model.parameters(), lr=0.1)
        pruner = pomona.Pruner(model, optimizer, GRDA(c=1e3), scope=scope)  # far too much: nothing is left at once
        model(torch.randn(8, 1, 4, 4)).square().mean().backward()
        optimizer.step()
        return model, pruner

    model, pruner = run(EVERYTHING)
    assert num_nonzero(model) == 0
    assert pruner.report().total == sum(p.numel() for p in model.parameters())
    model, pruner = run(pomona.Scope())
    assert num_nonzero(model) == 4 + 4 + 4 + 2 == sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert pruner.report().nonzero == 0


def test_half_precision_weights_have_a_full_precision_accumulator() -> None:
    """2,000 steps of 5e-5 from 0.7: SGD on bfloat16 stays where it is, the accumulator arrives at 0.8."""
    pruned, plain = (nn.Parameter(torch.tensor([0.7], dtype=torch.bfloat16)) for _ in range(2))
    model = Kernels([pruned])
    ours, other = SGD([pruned], lr=5e-5), SGD([plain], lr=5e-5)
    pruner = pomona.Pruner(model, ours, GRDA(c=1e-4), scope=EVERYTHING)
    pruned.grad = plain.grad = torch.tensor([-1.0], dtype=torch.bfloat16)
    at_start = plain.item()
    for _ in range(2000):
        ours.step()
        other.step()
    (v,) = states(pruner, "v")
    assert plain.item() == at_start
    assert v.dtype is torch.float32
    assert float(v) == pytest.approx(at_start + 0.1, abs=2000 * 2.0**-25)  # roundings
    assert torch.equal(pruned, (v - threshold_of(pruner)).to(torch.bfloat16))


@pytest.mark.parametrize("method", [GRDA(c=0.2, mu=0.6), GRDA(sparsity=0.7, steps=15)], ids=["strength", "target"])
@pytest.mark.parametrize("at", [1, 7, 17])
def test_a_run_resumed_in_the_middle_ends_on_the_same_bits(method: GRDA, at: int) -> None:
    def resume(states: dict[str, Any]) -> tuple[Any, SGD, pomona.Pruner]:
        model = net(seed=1)
        optimizer = SGD(model.parameters(), lr=0.3)
        pruner = pomona.Pruner(model, optimizer, method, scope=EVERYTHING)
        for part, state in zip((model, optimizer, pruner), states.values(), strict=True):
            part.load_state_dict(state)
        return model, optimizer, pruner

    def dump(model: Any, optimizer: SGD, pruner: pomona.Pruner) -> dict[str, Any]:
        parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
        return {name: part.state_dict() for name, part in parts.items()}

    data = batches(20)
    unbroken = start(method)
    train(*unbroken[:2], data[:at])
    file = io.BytesIO()
    torch.save(dump(*unbroken), file)
    train(*unbroken[:2], data[at:])
    file.seek(0)
    resumed = resume(torch.load(file, weights_only=True))
    train(*resumed[:2], data[at:])
    assert bits(dump(*resumed)) == bits(dump(*unbroken))


def test_harden_removes_nothing_and_plain_sgd_trains_what_is_left() -> None:
    model, optimizer, pruner = start(GRDA(c=0.3, mu=0.6))
    train(model, optimizer, batches(40))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = pruner.harden()
    assert bits(dict(model.named_parameters())) == bits(before)
    assert report.largest_cut == 0.0
    assert report.nonzero == num_nonzero(model) < report.total
    for batch in batches(5, seed=1):
        expected = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, w, g, old in zip(model.parameters(), expected, grads, before.values(), strict=True):
            assert torch.equal(p, w.add_(g.masked_fill_(old == 0, 0.0), alpha=-0.1))
    assert pruner.verify().nonzero == report.nonzero


def test_the_report_tells_the_threshold_and_how_each_layer_came_to_its_share() -> None:
    model, optimizer, pruner = tensors(GRDA(c=0.5, mu=0.5), [0.1, 0.2, 0.3], [1.0, 2.0, 0.1])
    model.give([np.zeros(3, dtype=np.float32)] * 2)
    optimizer.step()
    assert pruner.metrics() == {"threshold": 0.5, "sparsity": 4 / 6}
    first, second = pruner.harden().layers
    assert first.reason == "emptied by the threshold on |v|"
    assert second.reason == "2x the network's share, by the threshold on |v|"


# The way to a target


@pytest.mark.filterwarnings("ignore:.* starves layers")
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.98])
@pytest.mark.parametrize("mu", [0.3, 0.51, 0.9])
def test_the_target_is_met_exactly_at_its_step_and_not_left_again(sparsity: float, mu: float) -> None:
    model, optimizer, pruner = start(GRDA(mu=mu, sparsity=sparsity, steps=25))
    total = sum(p.numel() for p in model.parameters())
    budget = pomona.budget.num_kept(sparsity, total)
    threshold = 0.0
    for step, batch in enumerate(batches(40), start=1):
        train(model, optimizer, [batch])
        assert threshold_of(pruner) >= threshold
        threshold = threshold_of(pruner)
        if step == 25:
            assert num_nonzero(model) == budget
        if step > 25:
            assert num_nonzero(model) <= budget
    assert pruner.harden().nonzero == num_nonzero(model) <= budget


def test_while_the_accumulators_rest_the_threshold_follows_the_papers_curve() -> None:
    values = [0.5, -4.0, 1.0, 3.0, -2.0]  # two may stay, so the threshold ends at 2
    model, optimizer, pruner = tensors(GRDA(mu=0.6, sparsity=0.6, steps=50), values)
    model.give([np.zeros(5, dtype=np.float32)])
    for n in range(1, 60):
        optimizer.step()
        assert threshold_of(pruner) == pytest.approx(2.0 * min(n / 50, 1.0) ** 0.6, rel=1e-12)
    assert model.w[0].tolist() == [0.0, -2.0, 0.0, 1.0, 0.0]


def test_after_its_step_the_threshold_follows_upwards_only() -> None:
    model, optimizer, pruner = tensors(GRDA(sparsity=0.5, steps=1), [1.0, 2.0, 3.0, 4.0])
    seen = []
    for grad in ([0.0] * 4, [0.0, -0.5, 0.0, 0.0], [0.0, 1.5, 0.0, 0.0]):
        model.give([np.array(grad, dtype=np.float32)])
        optimizer.step()
        seen.append((threshold_of(pruner), model.w[0].tolist()))
    assert seen == [
        (2.0, [0.0, 0.0, 1.0, 2.0]),
        (2.5, [0.0, 0.0, 0.5, 1.5]),
        (2.5, [0.0, 0.0, 0.5, 1.5]),
    ]


def test_one_threshold_serves_groups_of_unlike_rates_and_layers_of_unlike_scale() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(0.01)
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in ((model[0], 0.001), (model[2], 0.2))]
    optimizer = SGD(groups)
    pruner = pomona.Pruner(model, optimizer, GRDA(sparsity=0.75, steps=20))
    for batch in batches(20):
        train(model, optimizer, [batch])
        threshold_of(pruner)  # one
    kernels = [layer.weight for layer in (model[0], model[2])]
    assert sum(int(w.count_nonzero()) for w in kernels) == NUM_WEIGHTS // 4
    assert not kernels[0].any()  # all of them are smaller than those of the other


@pytest.mark.parametrize("resting", [0, 1])
def test_a_weight_that_rested_takes_the_common_threshold_when_it_moves_again(resting: int) -> None:
    model, optimizer, pruner = tensors(GRDA(mu=0.5, sparsity=0.5, steps=4), [1.0, 4.0], [2.0, 3.0])
    before = model.numpy()[resting]
    for step in range(1, 5):
        model.give([np.zeros(2, dtype=np.float32)] * 2)
        if step < 4:
            model.w[resting].grad = None
        optimizer.step()
        if step == 3:
            thresholds = [float(t) for t in states(pruner, "threshold")]
            assert thresholds.pop(resting) == 0.0
            assert thresholds == pytest.approx([2.0 * 0.75**0.5])
            assert (model.numpy()[resting] == before).all()
    assert threshold_of(pruner) == 2.0
    assert [w.tolist() for w in model.w] == [[0.0, 2.0], [0.0, 1.0]]


def test_ties_at_the_threshold_all_go() -> None:
    model, optimizer, pruner = tensors(GRDA(sparsity=0.5, steps=1), [1.0, 2.0, -2.0, 4.0])
    model.give([np.zeros(4, dtype=np.float32)])
    optimizer.step()
    assert model.w[0].tolist() == [0.0, 0.0, 0.0, 2.0]
    assert pruner.harden().nonzero == 1


def test_hardened_before_its_step_it_keeps_the_largest_weights() -> None:
    model, optimizer, pruner = tensors(GRDA(sparsity=0.5, steps=1000), [1.0, -3.0, 2.0, 4.0])
    model.give([np.zeros(4, dtype=np.float32)])
    optimizer.step()
    assert num_nonzero(model) == 4
    assert pruner.harden().nonzero == 2
    assert (model.w[0] != 0).tolist() == [False, True, False, True]


def test_only_a_target_has_a_budget() -> None:
    assert GRDA(sparsity=0.9, steps=1).budget.num_kept(1000, step=5) == 100
    assert GRDA(c=0.1).budget.num_kept(1000, step=5) == 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_target_is_met_in_every_precision(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, GRDA(sparsity=0.75, steps=20))
    data: list[Batch] = [(x.to(dtype), y.to(dtype)) for x, y in batches(20)]
    train(model, optimizer, data)
    assert pruner.report().nonzero == NUM_WEIGHTS // 4
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {v.dtype for v in states(pruner, "v")} == {torch.promote_types(dtype, torch.float32)}


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "GRDA takes either c or sparsity, got neither; e.g. GRDA.c=1e-3. or"),
        ({"c": 0.1, "sparsity": 0.5, "steps": 9}, "GRDA takes either c or sparsity, got both"),
        ({"c": -0.1}, r"c must be in \[0, inf\), got -0.1"),
        ({"c": float("nan")}, r"c must be in \[0, inf\), got nan"),
        ({"c": float("inf")}, r"c must be in \[0, inf\), got inf"),
        ({"c": 0.1, "mu": 0}, r"mu must be in \(0, 1\), got 0; the paper recommends"),
        ({"c": 0.1, "mu": 1.0}, r"mu must be in \(0, 1\), got 1.0"),
        ({"c": 0.1, "mu": float("nan")}, r"mu must be in \(0, 1\), got nan"),
        ({"c": 0.1, "steps": 9}, "steps is for sparsity only, which c does not aim at, got steps=9"),
        ({"sparsity": 0.5}, "steps must be given with sparsity=0.5: the step at which it is reached"),
        ({"sparsity": 0.5, "steps": 0}, "steps must be >= 1, got 0"),
        ({"sparsity": 90, "steps": 9}, r"sparsity must be in \[0, 1\), got 90 \(did you mean 0.9\?\)"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRDA(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": "1e-3"}, "c must be a number, got '1e-3'"),
        ({"c": True}, "c must be a number, got True"),
        ({"c": 0.1, "mu": None}, "mu must be a number, got None"),
        ({"sparsity": pomona.Cubic(0.0, 0.9, steps=9), "steps": 9}, r"sparsity must be a number, got Cubic\("),
        ({"sparsity": 0.5, "steps": 10.0}, "steps must be an integer, got 10.0"),
        ({"sparsity": 0.5, "steps": True}, "steps must be an integer, got True"),
    ],
)
def test_what_is_no_number_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GRDA(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"momentum": 0.9},
            r"SGD\(momentum=0.9\): its theory and .* dual averaging has no velocity; leave momentum out",
        ),
        ({"momentum": 0.9, "nesterov": True}, r"SGD\(momentum=0.9\)"),
        ({"weight_decay": 5e-4}, r"SGD\(weight_decay=0.0005\): it would act on w, while v, .*; leave weight_decay out"),
        ({"dampening": 0.5}, r"SGD\(dampening=0.5\): it belongs to momentum"),
        ({"maximize": True}, r"SGD\(maximize=True\): its accumulators descend; negate the loss"),
    ],
)
def test_sgd_that_is_not_plain_is_refused(arguments: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=f"GRDA does not support {message}"):
        pomona.Pruner(model, SGD(model.parameters(), lr=0.1, **arguments), GRDA(c=0.1))


class Faster(SGD):
    """Whatever a subclass does to the weights would be overwritten."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, Faster])
def test_other_optimizers_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(
        ValueError, match=f"GRDA cannot prune with {kind.__name__}: it is plain SGD .* use torch.optim.S"
    ):
        pomona.Pruner(model, optimizer, GRDA(c=0.1))


def test_groups_without_pruned_weights_may_have_momentum() -> None:
    model = net()
    kernels = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = SGD([{"params": kernels}, {"params": biases, "momentum": 0.9, "weight_decay": 0.1}], lr=0.1)
    pruner = pomona.Pruner(model, optimizer, GRDA(c=0.5))
    train(model, optimizer, batches(3))
    assert pruner.report().nonzero < NUM_WEIGHTS


# The authors' logs. In the first epochs weights have hardly moved, so the initialisation and the threshold alone tell
# how many are zero, and no data are needed.

STEPS_PER_EPOCH = 391  # 50,000 images in batches of 128


@cache
def network(name: str) -> list[Tensor]:
    return [p.detach() for p in build_model(name, seed=0).parameters()]


@pytest.mark.parametrize(
    ("name", "total", "c", "mu", "percent"),
    [
        ("wrn-28-10", 36_489_290, 1e-3, 0.501, [13.54, 19.14]),
        pytest.param("wrn-28-10", 36_489_290, 1e-3, 0.55, [16.21, 23.69], marks=pytest.mark.check),
        pytest.param("wrn-28-10", 36_489_290, 1e-3, 0.65, [23.37, 36.61], marks=pytest.mark.check),
        pytest.param("vgg16-cifar", 15_245_130, 5e-4, 0.4, [2.49, 3.29, 3.86], marks=pytest.mark.check),
        ("vgg16-cifar", 15_245_130, 5e-4, 0.51, [3.73, 5.30, 6.52]),
        pytest.param("vgg16-cifar", 15_245_130, 5e-4, 0.7, [7.48, 12.11, 16.02], marks=pytest.mark.check),
    ],
)
def test_the_first_epochs_are_as_sparse_as_in_the_authors_logs(
    name: str, total: int, c: float, mu: float, percent: list[float]
) -> None:
    model, optimizer, pruner = tensors(GRDA(c=c, mu=mu), [1.0], lr=0.1)
    model.give([np.zeros(1, dtype=np.float32)])
    sparsities = []
    for _ in percent:
        for _ in range(STEPS_PER_EPOCH):
            optimizer.step()
        pruned = [soft_threshold(p, threshold_of(pruner)) for p in network(name)]
        assert sum(p.numel() for p in pruned) == total
        sparsities.append(100 * sum(int((p == 0).sum()) for p in pruned) / total)
    assert sparsities == pytest.approx(percent, abs=0.1)


def test_a_layer_without_a_gradient_does_not_win_the_final_ranking() -> None:
    model = nn.ModuleDict({"used": nn.Linear(20, 20, bias=False), "unused": nn.Linear(20, 20, bias=False)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, GRDA(sparsity=0.9, steps=30))
    for _ in range(40):
        optimizer.zero_grad()
        model["used"](torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    used, unused = pruner.harden().layers
    assert used.nonzero + unused.nonzero == 80
    assert used.nonzero > 0  # it would be 0 if the other's weights ranked as they are, unthresholded


def test_momentum_loaded_into_the_optimizer_is_refused_at_the_next_step() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pomona.Pruner(model, optimizer, GRDA(c=0.1))
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict())
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"GRDA does not support SGD\(momentum=0.9\)"):
        optimizer.step()
