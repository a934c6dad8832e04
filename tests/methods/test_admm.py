"""ADMM: the pull, the projection, and what stays zero. tests/methods/test_oracle_admm.py has the paper in numpy."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import pomona
from pomona.methods.admm import ADMM
from pomona.schedule import Value
from tests.problems import NUM_WEIGHTS, Tensors, batches, bits, loss_of, net, sparse_net, train

# Most runs here are too short for the method to have done all.
pytestmark = pytest.mark.filterwarnings("ignore:harden.. at step .* comes early")

TINY = 1e-30  # a learning rate by which no weight of float32 moves

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(Adam, lr=0.05, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.05, weight_decay=0.01),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def state(pruner: pomona.Pruner, key: str) -> list[Tensor]:
    return [tensors[key].clone() for tensors in pruner.state_dict()["state"].values()]


def still(values: list[np.ndarray], method: ADMM, **options: Any) -> tuple[Tensors, Callable[[], None], pomona.Pruner]:
    """Weights that do not move and a loss that is flat: all that is left in ``grad`` is the pull."""
    model = Tensors(values)
    optimizer = SGD(model.parameters(), lr=TINY, **options)

    def step() -> None:
        model.give([np.zeros_like(v) for v in values])
        optimizer.step()

    return model, step, pomona.Pruner(model, optimizer, method)


def row(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def grad_of(model: Tensors, layer: int = 0) -> list[float]:
    grad = model.w[layer].grad
    assert grad is not None
    return grad.view(-1).tolist()


# The pull


def test_three_iterations_written_out() -> None:
    """W = (3, -2, 1) does not move and one weight may stay: U grows where Z is zero, until the second is chosen."""
    model, step, pruner = still([row(3, -2, 1)], ADMM(1 - 1 / 3, rho=0.5, every=2))
    expected = [
        # Z, U, rho (W - Z + U)
        ([3, 0, 0], [0, 0, 0], [0, -1, 0.5]),  # U is left at 0 the first time
        ([3, 0, 0], [0, -2, 1], [0, -2, 1]),
        ([0, -4, 0], [3, 0, 2], [3, 1, 1.5]),  # W + U = (3, -4, 2)
        ([6, 0, 0], [0, -2, 3], [-1.5, -2, 2]),  # W + U = (6, -2, 3)
    ]
    for z, u, pull in expected:
        for _ in range(2):
            step()
            assert state(pruner, "z")[0].view(-1).tolist() == z
            assert state(pruner, "u")[0].view(-1).tolist() == u
            assert grad_of(model) == pull
    assert model.numpy()[0].tolist() == row(3, -2, 1).tolist()


@each_optimizer
def test_the_pull_is_rho_times_the_difference_at_every_step(make: Callable[..., Optimizer]) -> None:
    """In each of 8 ADMM iterations the same, so that nothing of U's history is in it; and of moving weights."""
    values = [np.random.default_rng(layer).normal(size=(6, 4)).astype(np.float32) for layer in range(2)]
    model = Tensors(values)
    optimizer = make(model.parameters())
    pruner = pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.02, every=3))
    for step in range(24):
        before = [torch.tensor(w) for w in model.numpy()]
        grads = [np.random.default_rng((step, layer)).normal(size=(6, 4)).astype(np.float32) for layer in range(2)]
        model.give(grads)
        optimizer.step()
        for p, w, g, z, u in zip(model.w, before, grads, state(pruner, "z"), state(pruner, "u"), strict=True):
            assert p.grad is not None
            # float32: a sum of numbers below 10
            assert torch.allclose(p.grad - torch.tensor(g), 0.02 * (w - z + u), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "rho", [pomona.Linear(0.1, 0.9, steps=20), pomona.Geometric(1e-3, 1e-3 * 1.3**3, steps=15, begin=1), 0.25]
)
def test_rho_is_read_at_the_first_step_of_each_iteration(rho: Value) -> None:
    """Four ADMM iterations of five steps; the second ramp multiplies rho by 1.3 each time, as the first author does."""
    model, step, pruner = still([row(3, 2, 1)], ADMM(1 - 1 / 3, rho=rho, every=5))
    for number in range(1, 21):
        step()
        z, u = state(pruner, "z")[0], state(pruner, "u")[0]
        first = 5 * ((number - 1) // 5) + 1
        expected = pomona.schedule.value_at(rho, first) * (torch.tensor([[3.0, 2.0, 1.0]]) - z + u)
        assert grad_of(model) == pytest.approx(expected.view(-1).tolist(), rel=1e-6)  # float32
        if isinstance(rho, pomona.Geometric):
            assert pomona.schedule.value_at(rho, first) == pytest.approx(1e-3 * 1.3 ** ((number - 1) // 5), rel=1e-12)


def test_z_starts_from_the_weights_of_the_first_step_and_not_of_the_construction() -> None:
    model, step, pruner = still([row(9, 9, 9)], ADMM(1 - 1 / 3, every=2))
    with torch.no_grad():
        model.w[0].copy_(torch.tensor([[3.0, -2.0, 1.0]]))
    step()
    assert state(pruner, "z")[0].tolist() == [[3, 0, 0]]


def test_a_layer_of_density_1_is_not_pulled_at_all() -> None:
    """The paper sets rho to 0 for a layer that is not pruned; else it would be held back to where Z last was."""
    model = Tensors([row(3, -2, 1), row(4, 5, 6)])
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pomona.Pruner(model, optimizer, ADMM(densities={"w.0": 1, "w.1": 1 / 3}, rho=0.5, every=4))
    for _ in range(6):
        model.give([row(1, 1, 1), row(1, 1, 1)])
        optimizer.step()
        assert grad_of(model, 0) == [1, 1, 1]
        assert grad_of(model, 1) != [1, 1, 1]
    assert [layer.nonzero for layer in pruner.harden().layers] == [3, 1]


def test_a_held_layer_that_has_its_count_already_is_not_pulled() -> None:
    model = Tensors([row(3, -2, 0, 0), row(4, 5, 6, 7)])
    optimizer = SGD(model.parameters(), lr=0.1)
    method = ADMM(densities={"w.0": 0.5, "w.1": 0.5}, rho=0.5, every=4, hold_zeros=True)
    pomona.Pruner(model, optimizer, method)
    for _ in range(6):
        model.give([row(1, 1, 1, 1), row(1, 1, 1, 1)])
        optimizer.step()
        assert grad_of(model, 0) == [1, 1, 0, 0]
        assert grad_of(model, 1) != [1, 1, 1, 1]


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    model = Tensors([row(3, -2, 1), row(4, 5, 6)])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pomona.Pruner(model, optimizer, ADMM(0.5, rho=0.5, every=2))
    for _ in range(5):
        model.w[0].grad = torch.ones(1, 3)
        optimizer.step()
    assert model.numpy()[1].tolist() == [[4, 5, 6]]


# The projection


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_z_has_exactly_k_non_zeros_at_every_step(allocation: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.01, every=3, allocation=allocation))
    for batch in batches(20):
        train(model, optimizer, [batch])
        counts = [int(z.count_nonzero()) for z in state(pruner, "z")]
        assert sum(counts) == NUM_WEIGHTS // 4
        if allocation != "global":
            assert counts == {"uniform": [12, 6], "erk": [10, 8]}[allocation]  # (6 + 8) : (8 + 3) of 18
    assert pruner.harden().nonzero == NUM_WEIGHTS // 4


def test_ties_are_kept_by_position_and_zeros_never() -> None:
    ties, zeros = np.ones((2, 4), dtype=np.float32), row(0, 2, 0, 0)
    _, step, pruner = still([ties, zeros], ADMM(densities={"w.0": 0.375, "w.1": 0.5}, rho=0.5, every=2))
    for _ in range(2):
        step()
    assert [z.tolist() for z in state(pruner, "z")] == [[[1, 1, 1, 0], [0, 0, 0, 0]], [[0, 2, 0, 0]]]
    assert [layer.nonzero for layer in pruner.harden().layers] == [3, 1]


def test_shares_are_of_the_dense_layer_in_every_round() -> None:
    """24x after 10x leaves a twenty-fourth of 240 weights, and not of the 24 that the first round left."""
    model = nn.Linear(24, 10, bias=False)
    optimizer = SGD(model.parameters(), lr=0.01)
    pruner = pomona.Pruner(model, optimizer, ADMM(0.9, every=2))
    assert pruner.harden(one_shot=True).nonzero == 24
    pruner.detach()
    second = pomona.Pruner(model, optimizer, ADMM(1 - 1 / 24, every=2, hold_zeros=True))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 24)).square().mean().backward()
        optimizer.step()
    assert second.harden().nonzero == 10


def test_u_is_summed_in_float32_under_bfloat16_weights() -> None:
    """After 319 updates of 1/256 each, U is 319/256; in bfloat16 it would stop at 1, of which 1/256 is half a unit."""
    model = Tensors([row(4, 1 / 256)]).to(torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=TINY)
    pruner = pomona.Pruner(model, optimizer, ADMM(0.5, rho=0.5, every=1))
    for _ in range(320):
        model.w[0].grad = torch.zeros(1, 2, dtype=torch.bfloat16)
        optimizer.step()
    assert state(pruner, "u")[0].tolist() == [[0, 319 / 256]]
    assert {t.dtype for key in "zu" for t in state(pruner, key)} == {torch.float32}
    assert model.w[0].dtype == torch.bfloat16
    assert grad_of(model) == [0, 0.5 * 320 / 256]


# A problem whose answer is known


@pytest.mark.parametrize(
    "make",
    [partial(SGD, lr=0.05, momentum=0.9), partial(SGD, lr=0.05, momentum=0.9, nesterov=True), partial(Adam, lr=0.01)],
    ids=["momentum", "nesterov", "adam"],
)
def test_the_best_support_of_a_convex_quadratic_is_found(make: Callable[..., Optimizer]) -> None:
    """f = sum h (w - m)^2 / 2: the best 5 of 20 are those of largest h m^2, while the largest |m| are all others.

    Outside the support U ends at h m / rho. A support is at rest if that is below |m| inside it, which with rho = 0.1
    holds for the best one alone: 0.005 * 2 / 0.1 < 1, but 1 * 1 / 0.1 > 2.
    """
    matters = torch.arange(20) % 4 == 1
    h = torch.where(matters, 1.0, 0.005).view(4, 5)
    m = torch.where(matters, -1.0, 2.0).view(4, 5)
    best = matters.view(4, 5)
    model = Tensors([m.numpy().copy()])
    (w,) = model.w
    optimizer = make([w])
    pruner = pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.1, every=50))

    def steps(count: int) -> None:
        for _ in range(count):
            w.grad = h * (w.detach() - m)
            optimizer.step()

    steps(1)
    assert not (state(pruner, "z")[0].bool() & best).any()  # it starts from the wrong one
    steps(1499)
    assert torch.equal(state(pruner, "z")[0] != 0, best)
    metrics = pruner.metrics()
    assert metrics["overlap"] == 1.0
    assert metrics["primal_residual"] < 0.1
    with pruner.trial_cut():
        assert torch.equal(w != 0, best)
    pruner.harden()
    steps(500)  # masked retraining
    assert torch.equal(w != 0, best)
    assert torch.allclose(w[best], m[best], rtol=0, atol=1e-3)


# What is held at zero


@each_optimizer
def test_hold_zeros_keeps_them_under_momentum_of_the_time_before(make: Callable[..., Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, batches(5))  # moments of all weights
    model.load_state_dict(sparse_net().state_dict())
    zeros = [p.detach() == 0 for p in model.parameters() if p.ndim == 2]
    pruner = pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.01, every=3, hold_zeros=True))
    for batch in batches(12, seed=1):
        train(model, optimizer, [batch])
        weights = [p for p in model.parameters() if p.ndim == 2]
        for p, zero, z, u in zip(weights, zeros, state(pruner, "z"), state(pruner, "u"), strict=True):
            assert p.grad is not None
            for held in (p.detach(), p.grad, z, u):
                assert bits(held[zero]) == bits(torch.zeros_like(held[zero]))  # +0.0
            assert bool((p[~zero] != 0).all())
    assert pruner.harden().nonzero == NUM_WEIGHTS // 4
    assert all(bool((p[zero] == 0).all()) for p, zero in zip(weights, zeros, strict=True))


def test_only_what_is_zero_before_the_first_step_is_held() -> None:
    """A weight that comes by zero on its way, at the start of an ADMM iteration, goes on."""
    model = Tensors([row(2, 5, 0)])
    optimizer = SGD(model.parameters(), lr=1.0)
    pomona.Pruner(model, optimizer, ADMM(0.5, rho=0.0, every=2, hold_zeros=True))
    seen = []
    for _ in range(4):
        model.give([row(1, 1, 1)])
        optimizer.step()
        seen.append(model.numpy()[0].tolist()[0])
    assert seen == [[1, 4, 0], [0, 3, 0], [-1, 2, 0], [-2, 1, 0]]


@each_optimizer
def test_without_hold_zeros_they_return(make: Callable[..., Optimizer]) -> None:
    model = sparse_net()
    optimizer = make(model.parameters())
    pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.01, every=3))
    train(model, optimizer, batches(2))
    assert all(bool((p != 0).all()) for p in model.parameters() if p.ndim == 2)


@each_optimizer
def test_masked_retraining_revives_none_of_500_cut_weights(make: Callable[..., Optimizer]) -> None:
    """Masking the gradients alone does not do: momentum and decay of the time before move all that was cut."""
    model = nn.Linear(20, 50, bias=False)
    optimizer = make(model.parameters())
    pruner = pomona.Pruner(model, optimizer, ADMM(0.5, rho=0.01, every=3))

    def loss() -> Tensor:
        return (model(torch.randn(16, 20)) - 1.0).square().mean()

    def steps(count: int, mask: Tensor | None = None) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            if mask is not None:
                model.weight.grad.mul_(mask)
            optimizer.step()

    steps(10)
    assert pruner.harden().nonzero == 500
    kept = model.weight.detach() != 0
    steps(20)
    assert bool((model.weight[~kept] == 0).all())
    assert pruner.verify().nonzero == 500

    pruner.detach()
    with torch.no_grad():  # as if it had just been cut: the moments of the cut weights are those of before
        for moments in optimizer.state[model.weight].values():
            if moments is not None and moments.ndim:
                moments.copy_(torch.full_like(moments, 0.1))
    steps(1, mask=kept)
    assert int((model.weight[~kept] != 0).sum()) == 500


# Where it is cut, and what is told of it


def test_the_cut_is_one_ranking_of_the_weights_and_not_the_counts_of_z() -> None:
    """Z has both of its weights in the first layer; by the cut one layer keeps one each, as the weights now are."""
    model, step, pruner = still([row(4, 3), row(2, 1)], ADMM(0.5, every=10, min_density=0.0))
    step()
    assert [z.tolist() for z in state(pruner, "z")] == [[[4, 3]], [[0, 0]]]
    with torch.no_grad():
        model.w[1].mul_(3)  # 6, 3
    assert pruner.metrics()["overlap"] == 0.5
    pruner.harden()
    assert [w.tolist() for w in model.numpy()] == [[[4, 0]], [[6, 0]]]


def test_metrics_are_of_the_layers_that_are_pruned() -> None:
    values = [row(3, 0.75, 0.5, 0.25), row(100, 100, 100, 100)]
    model, step, pruner = still(values, ADMM(densities={"w.0": 0.25, "w.1": 1}, every=10))
    assert pruner.metrics() == {}  # there is no Z yet
    step()
    # ||(0, 0.75, 0.5, 0.25)|| / ||(3, 0.75, 0.5, 0.25)||
    assert pruner.metrics() == {"primal_residual": pytest.approx((0.875 / 9.875) ** 0.5), "overlap": 1.0}
    with torch.no_grad():
        model.w[0].copy_(torch.tensor([[0.0, 4.0, 0.0, 0.0]]))
    assert pruner.metrics() == {"primal_residual": pytest.approx(1.25), "overlap": 0.0}  # 5 / 4


def test_the_report_says_where_the_shares_come_from() -> None:
    def reasons(method: ADMM) -> list[str]:
        model = net()
        pruner = pomona.Pruner(model, SGD(model.parameters(), lr=0.1), method)
        return [layer.reason for layer in pruner.harden(one_shot=True).layers]

    assert reasons(ADMM(densities={"0": 0.25, "2": 0.5})) == ["its share by densities"] * 2
    assert reasons(ADMM(0.75, allocation="uniform")) == ["1x the network's share, by allocation='uniform'"] * 2
    assert reasons(ADMM(0.75, min_density=0.25)) == ["held at the floor min_density=0.25"] * 2


def test_the_budget_is_told_unless_the_layers_have_theirs() -> None:
    assert ADMM(0.9).budget.num_kept(1000, 1) == 100
    assert ADMM(densities={"*": 0.1}).budget.num_kept(1000, 1) == 1000


def test_a_layer_with_more_zeros_than_its_share_leaves_some_of_the_budget_unused() -> None:
    method = ADMM(0.5, allocation="uniform", hold_zeros=True)
    _, step, pruner = still([row(1, 0, 0, 0), row(1, 2, 3, 4)], method)
    step()
    assert [layer.nonzero for layer in pruner.harden().layers] == [1, 2]


# Going on


@pytest.mark.parametrize("at", [1, 5, 7, 10], ids=lambda at: f"after step {at}")
def test_a_run_resumed_inside_an_iteration_ends_where_the_unbroken_one_does(at: int) -> None:
    def start(model: nn.Sequential, shares: dict[str, float]) -> tuple[nn.Sequential, Optimizer, pomona.Pruner]:
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        rho = pomona.Geometric(0.01, 0.1, steps=15, begin=1)
        return (
            model,
            optimizer,
            pomona.Pruner(model, optimizer, ADMM(densities=shares, rho=rho, every=5, hold_zeros=True)),
        )

    data = batches(20)
    run = start(sparse_net(), {"0.weight": 0.25, "2.weight": 0.5})
    train(*run[:2], data[:at])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    file.seek(0)
    # Zeros elsewhere before it is loaded; and the same shares in another order are the same method.
    resumed = start(net(1), {"2.weight": 0.5, "0.weight": 0.25})
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    for model, optimizer, pruner in (run, resumed):
        train(model, optimizer, data[at:])
        pruner.harden()
        train(model, optimizer, data[:5])
    assert bits([part.state_dict() for part in resumed]) == bits([part.state_dict() for part in run])


# What is refused


def attach(method: ADMM, model: nn.Module | None = None) -> pomona.Pruner:
    model = model or net()
    return pomona.Pruner(model, SGD(model.parameters(), lr=0.1), method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ADMM takes either sparsity or densities, got neither"),
        ({"sparsity": 0.9, "densities": {"*": 0.1}}, "ADMM takes either sparsity or densities, got both"),
        ({"sparsity": 90}, r"sparsity must be in \[0, 1\), got 90 \(did you mean 0.9\?\)"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": 0.9, "rho": -1.0}, r"rho must be in \[0, inf\), got -1.0"),
        ({"sparsity": 0.9, "rho": float("nan")}, r"rho must be in \[0, inf\), got nan"),
        ({"sparsity": 0.9, "every": 0}, "every must be >= 1, got 0"),
        ({"sparsity": 0.9, "allocation": "layerwise"}, "allocation must be one of global, uniform, erk"),
        ({"sparsity": 0.9, "min_density": 1.5}, r"min_density must be in \[0, 1\], got 1.5"),
        ({"densities": {"*": 0.1}, "allocation": "erk"}, "allocation='erk' allocates a sparsity .* which densities do"),
        (
            {"densities": {"*": 0.1}, "score": "lamp"},
            "score='lamp' makes layers comparable .*, and densities give each",
        ),
        ({"densities": {"fc*": 0.0}}, r"densities\['fc\*'\] must be in \(0, 1\], the share to keep, got 0.0"),
        ({"densities": {"fc*": 10}}, r"densities\['fc\*'\] must be in \(0, 1\], the share to keep, got 10"),
        ({"densities": {"fc*": float("nan")}}, r"densities\['fc\*'\] must be in \(0, 1\], the share to keep, got nan"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADMM(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": pomona.Linear(0.0, 0.9, steps=10)}, "ADMM's sparsity is one number for the whole round"),
        ({"sparsity": "0.9"}, "sparsity must be a number"),
        ({"sparsity": 0.9, "every": 1.5}, "every must be an integer"),
        ({"sparsity": 0.9, "hold_zeros": 1}, "hold_zeros must be True or False, got 1"),
        ({"sparsity": 0.9, "min_density": None}, "min_density must be a number, got None"),
        ({"densities": {}}, "densities must be a mapping such as"),
        ({"densities": 0.1}, "densities must be a mapping such as"),
        ({"densities": {0: 0.1}}, r"densities has strings such as 'conv\*' for keys, got 0"),
        ({"densities": {"fc*": "0.1"}}, r"densities\['fc\*'\] must be a number, got '0.1'"),
        ({"densities": {"fc*": True}}, r"densities\['fc\*'\] must be a number, got True"),
    ],
)
def test_what_is_no_number_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ADMM(**options)


@pytest.mark.parametrize(
    ("densities", "message"),
    [
        ({"0.weight": 0.1}, r"2.weight matches no pattern of densities; .* densities=\{'2.weight': 1.0, ...\}"),
        ({"*": 0.1, "2": 0.5}, r"2.weight matches 2 patterns of densities \(\*, 2\); .* must match exactly one"),
        ({"*": 0.1, "fc": 0.5}, r"densities\['fc'\] matches no weight in scope; these are 0.weight, 2.weight"),
        ({"*.weight": 0.1, "*.bias": 1}, r"densities\['\*.bias'\] matches no weight in scope"),
        ({"0": 0.1, "2": 0.04}, "keeps none of the 24 weights of 2.weight; keep more of it"),
    ],
)
def test_densities_that_do_not_fit_the_model_are_refused(densities: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(ADMM(densities=densities))


def test_a_pattern_is_of_the_parameter_or_of_its_module() -> None:
    report = attach(ADMM(densities={"0": 0.25, "2.w*": 0.5})).harden(one_shot=True)
    assert [layer.nonzero for layer in report.layers] == [12, 12]


def test_a_budget_that_would_empty_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_density=0.5 alone keeps 36 of 72 scores, more than the budget of 18"):
        attach(ADMM(0.75, min_density=0.5))
    with pytest.raises(ValueError, match=r"keeps none of the 24 weights of 2\.weight"):
        attach(ADMM(1 - 1 / 72, allocation="uniform"))


def test_densities_cannot_be_edited_behind_its_back() -> None:
    shares = {"*": 0.25}
    method = ADMM(densities=shares)
    shares["*"] = 1.0
    assert attach(method).harden(one_shot=True).nonzero == 18


def test_the_pull_is_that_of_the_squared_norm() -> None:
    """Twice as far, twice the force; at the target none, and no NaN. (NNI's and others' norms are not squared.)"""
    pulls = []
    for scale in (0.0, 1e-3, 2e-3):
        model, step, _ = still([row(3, scale)], ADMM(0.5, rho=0.5))
        step()
        pulls.append(grad_of(model))
    assert pulls == [[0, 0], [0, pytest.approx(0.5e-3)], [0, pytest.approx(1e-3)]]


def test_loss_and_pull_reach_the_optimizer_together() -> None:
    """Under momentum the pull is in the buffer with the loss, and scaled by the learning rate."""
    model = net()
    weight = model[0].weight
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.5, every=10))
    (batch,) = batches(1)
    (grad,) = torch.autograd.grad(loss_of(model, batch), [weight])
    before = weight.detach().clone()
    train(model, optimizer, [batch])
    expected = grad + 0.5 * (before - state(pruner, "z")[0])
    assert torch.allclose(optimizer.state[weight]["momentum_buffer"], expected, rtol=0, atol=1e-6)  # float32
    assert torch.allclose(weight.detach(), before - 0.1 * expected, rtol=0, atol=1e-6)


def test_a_loss_that_is_maximised_is_pruned_like_its_negative() -> None:
    ends = []
    for sign in (1.0, -1.0):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=sign < 0)
        pomona.Pruner(model, optimizer, ADMM(0.75, rho=0.5, every=3))
        for batch in batches(10):
            optimizer.zero_grad()
            (sign * loss_of(model, batch)).backward()
            optimizer.step()
        ends.append(bits(model.state_dict()))
    assert ends[0] == ends[1]
