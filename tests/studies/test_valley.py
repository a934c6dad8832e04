"""`pomona valley`: paths and curvature where the answer is known, networks with BatchNorm, and two runs."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pomona.studies.valley import Options, _along_curve
from pomona.studies.valley.curvature import (
    Parameters,
    coordinates,
    flat,
    hessian_product,
    pruned_like,
    shaped,
    top_eigenpairs,
)
from pomona.studies.valley.landscape import Landscape
from pomona.studies.valley.paths import barrier, bezier, segment, train_control
from pomona.train.progress import Progress
from pomona.zoo.data import DATA, Dataset, load_mnist
from pomona.zoo.models import build_model
from tests.runs import DESCRIPTION, Done, command_line, finish, rows_of, run_of, signal_at, write_digits

pytestmark = pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed")


def point(x: float, y: float) -> Parameters:
    """In the plane, as two named tensors of different shapes."""
    return {"x": torch.tensor([x], dtype=torch.float64), "y": torch.tensor([[y]], dtype=torch.float64)}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# Paths


def test_both_paths_begin_and_end_with_the_bits_of_their_ends() -> None:
    a, b, c = ({"w": torch.randn(1000, generator=seeded(seed))} for seed in range(3))
    for path in (segment(a, b, 0), bezier(a, c, b, 0)):
        assert torch.equal(path["w"], a["w"])
    for path in (segment(a, b, 1), bezier(a, c, b, 1)):
        assert torch.equal(path["w"], b["w"])


def test_the_curve_with_the_middle_as_control_point_is_the_segment() -> None:
    a, b = point(-1, 3), point(2, -1)
    for t in (-0.2, 0.25, 0.5, 0.9):
        torch.testing.assert_close(bezier(a, segment(a, b, 0.5), b, t), segment(a, b, t))


def test_the_curve_at_one_half_is_half_its_control_point_and_a_quarter_of_each_end() -> None:
    assert bezier(point(4, 0), point(2, 6), point(0, 8), 0.5) == point(2, 5)


@pytest.mark.parametrize(
    ("polynomial", "height", "top"),
    [
        (lambda x: 1 - (2 * x - 1) ** 2, 1.0, 0.5),  # ends 0 and 0
        (lambda x: 3 + 2 * x - 2.5 * x**2, 0.4, 0.4),  # ends 3 and 2.5, in between 3.4
        (lambda x: 2.5 - 2 * x + 2.5 * x**2, 0.0, 1.0),  # convex
        (lambda x: 5.0 - x, 0.0, 0.0),
    ],
)
def test_the_barrier_of_a_parabola_on_the_segment(polynomial: Any, height: float, top: float) -> None:
    ts = [i / 10 for i in range(-2, 13)]  # beyond the ends the loss may be what it likes
    path = [segment(point(0, 1), point(1, 1), t) for t in ts]
    found = barrier(ts, [float(polynomial(w["x"])) for w in path])
    assert found == pytest.approx((height, top), abs=1e-12)


def valley(w: Parameters, step: int = 0) -> Tensor:
    """Zero on the parabola y = 1 - x^2 alone: from (-1, 0) to (1, 0) the segment climbs to 1."""
    return ((w["y"] - 1 + w["x"] ** 2) ** 2).sum()


def test_the_curve_finds_the_valley_that_the_segment_leaves() -> None:
    a, b = point(-1, 0), point(1, 0)
    ts = [i / 20 for i in range(21)]
    assert barrier(ts, [float(valley(segment(a, b, t))) for t in ts]) == (1.0, 0.5)
    c = train_control(valley, a, b, num_steps=500, lr=0.1, generator=seeded())
    # A Bezier curve is a parabola: with its control point at (0, 2) it is the valley.
    assert [float(value) for value in flat(c)] == pytest.approx([0, 2], abs=1e-3)
    assert barrier(ts, [float(valley(bezier(a, c, b, t))) for t in ts])[0] < 1e-6


def test_the_training_of_the_curve_draws_t_uniformly_and_counts_its_steps() -> None:
    ts, steps = [], []

    def loss(w: Parameters, step: int) -> Tensor:
        ts.append(float(w["x"].detach()))  # from 0 to 1 on the segment, where a zero loss leaves the curve
        steps.append(step)
        return 0 * w["x"].sum() + 0 * w["y"].sum()

    train_control(loss, point(0, 0), point(1, 0), num_steps=2000, lr=0.1, generator=seeded())
    assert steps == list(range(2000))
    counts = torch.histc(torch.tensor(ts), 4, 0, 1)
    assert counts.sum() == 2000 and counts.sub(500).abs().max() < 4 * math.sqrt(2000 * 3 / 16)  # 4 sigma


def test_the_curve_does_not_move_its_ends_and_repeats_with_its_seed() -> None:
    a, b = point(-1, 0), point(1, 0.5)
    first, second, other = (train_control(valley, a, b, num_steps=9, lr=0.1, generator=seeded(i)) for i in (1, 1, 2))
    assert first == second != other
    assert (a, b) == (point(-1, 0), point(1, 0.5))


def test_the_control_point_moves_as_sgd_with_momentum_and_a_falling_rate_moves_it() -> None:
    num_steps, lr = 7, 0.3
    c = train_control(
        lambda w, _: 2 * w["y"].sum(), point(0, 1), point(2, 3), num_steps=num_steps, lr=lr, generator=seeded(5)
    )
    y, velocity, times = 2.0, 0.0, seeded(5)
    for step in range(num_steps):
        t = float(torch.rand((), generator=times, dtype=torch.float64))
        velocity = 0.9 * velocity + 2 * 2 * t * (1 - t)  # dL/dC = dL/dw 2 t (1 - t)
        y -= lr * (1 if step <= num_steps / 2 else 2 - 2 * step / num_steps) * velocity
    assert [float(value) for value in flat(c)] == pytest.approx([1, y], rel=1e-12)


def test_a_curve_that_diverges_is_an_error_that_names_its_rate() -> None:
    with pytest.raises(ValueError, match="diverged with a learning rate of 1e\\+06; lower it"):
        train_control(valley, point(-1, 0), point(1, 0), num_steps=50, lr=1e6, generator=seeded())


# Curvature


def small_network() -> tuple[list[Any], Parameters, Tensor]:
    """Two losses of a network with 29 parameters, where they are taken, and the dense Hessian of their sum."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    at = {name: value.detach() for name, value in model.named_parameters()}
    images = torch.randn(12, 3, dtype=torch.float64, generator=seeded())

    def part(rows: slice) -> Any:
        return lambda w: torch.func.functional_call(model, w, (images[rows],)).square().sum()

    losses = [part(slice(0, 5)), part(slice(5, 12))]
    H = torch.autograd.functional.hessian(lambda v: sum(loss(shaped(v, at)) for loss in losses), flat(at))
    assert isinstance(H, Tensor) and H.shape == (29, 29)
    return losses, at, H


def test_the_hessian_product_is_that_of_the_dense_hessian_of_the_sum() -> None:
    losses, at, H = small_network()
    product = hessian_product(losses, at)
    for seed in range(3):
        vector = torch.randn(29, dtype=torch.float64, generator=seeded(seed))
        torch.testing.assert_close(product(vector), H @ vector, rtol=1e-10, atol=1e-10)


def test_the_hessian_product_has_zeros_for_parameters_without_curvature() -> None:
    at = {name: torch.tensor([value, 1.0]) for name, value in (("square", 2.0), ("linear", 3.0), ("unused", 4.0))}
    product = hessian_product([lambda w: w["square"].pow(3).sum() + w["linear"].sum()], at)
    assert product(torch.ones(6)).tolist() == [12, 6, 0, 0, 0, 0]


def lanczos(H: Tensor, k: int, *, max_steps: int = 100, seed: int = 1, **options: Any) -> Any:
    start = torch.randn(len(H), dtype=H.dtype, generator=seeded(seed))
    return top_eigenpairs(lambda v: H @ v, start, k, max_steps=max_steps, generator=seeded(seed + 1), **options)


def test_the_top_eigenpairs_are_those_of_the_dense_hessian() -> None:
    losses, at, H = small_network()
    start = torch.randn(29, dtype=torch.float64, generator=seeded(1))
    top = top_eigenpairs(hessian_product(losses, at), start, 5, max_steps=29, tolerance=1e-9, generator=seeded(2))
    values, vectors = torch.linalg.eigh(H)
    assert top.is_converged
    torch.testing.assert_close(top.values, values.flip(0)[:5], rtol=0, atol=1e-9 * float(values[-1]))
    cosines = (top.vectors @ vectors.flip(1)[:, :5]).abs()
    torch.testing.assert_close(cosines, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_lanczos_stops_early_with_residuals_within_the_tolerance(dtype: torch.dtype, seed: int) -> None:
    # As in a network: some large eigenvalues, a bulk around zero, some negative ones.
    spectrum = torch.cat([torch.linspace(2, 20, 6), torch.linspace(-1, 1, 394)]).to(dtype)
    Q = torch.linalg.qr(torch.randn(400, 400, dtype=dtype, generator=seeded(seed))).Q
    H = (Q * spectrum) @ Q.T
    top = lanczos(H, 6, seed=seed)
    assert top.is_converged and top.steps < 60
    torch.testing.assert_close(top.values.to(dtype), spectrum[:6].flip(0), rtol=0, atol=1e-3 * 20)
    torch.testing.assert_close(top.vectors @ top.vectors.T, torch.eye(6, dtype=dtype), rtol=0, atol=1e-5)
    true = (top.vectors @ H - top.values.to(dtype)[:, None] * top.vectors).norm(dim=1)
    assert (true <= 1.01e-3 * 20).all()
    torch.testing.assert_close(top.residuals.to(dtype), true, rtol=0, atol=1e-5 * 20)


def test_the_largest_eigenvalues_are_meant_not_the_largest_magnitudes() -> None:
    top = lanczos(torch.diag(torch.tensor([-10.0, 2.0, 1.0, -3.0])), 2)
    assert top.values.tolist() == pytest.approx([2, 1], abs=1e-5)
    assert top.vectors.abs().flatten().tolist() == pytest.approx([0, 1, 0, 0, 0, 0, 1, 0], abs=1e-5)


@pytest.mark.parametrize("diagonal", [[3.0, 1.0, 0.0, 0.0, 0.0, 0.0], [2.0] * 6, [0.0] * 6])
def test_lanczos_goes_on_where_its_vectors_are_closed_under_the_matrix(diagonal: list[float]) -> None:
    top = lanczos(torch.diag(torch.tensor(diagonal, dtype=torch.float64)), 4)
    assert top.is_converged and top.values.tolist() == pytest.approx(sorted(diagonal)[::-1][:4], abs=1e-10)
    torch.testing.assert_close(top.vectors @ top.vectors.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_vectors_stay_orthogonal_where_one_eigenvalue_outweighs_the_others() -> None:
    diagonal = torch.cat([torch.linspace(0, 1, 60, dtype=torch.float64), torch.tensor([1e8], dtype=torch.float64)])
    top = lanczos(torch.diag(diagonal), 8, tolerance=1e-15)
    torch.testing.assert_close(top.vectors @ top.vectors.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-13)


def test_lanczos_says_if_its_steps_were_too_few() -> None:
    H = torch.diag(torch.linspace(0, 1, 500, dtype=torch.float64))
    top = lanczos(H, 3, max_steps=10)
    assert not top.is_converged and top.steps == 10 and top.residuals.max() > 1e-3


@pytest.mark.parametrize("k", [0, 5])
def test_more_eigenvectors_than_parameters_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"eigenvectors must be in \[1, 4\], the number of parameters, got {k}"):
        lanczos(torch.eye(4), k)


def test_the_coordinates_of_a_known_vector() -> None:
    direction = torch.tensor([0.0, 6.0, 0.0, -8.0])
    assert coordinates(direction, torch.eye(4)[[3, 0]]).tolist() == pytest.approx([-0.8, 0])


def test_pruned_like_has_as_many_zeros_in_each_tensor_and_cuts_the_least() -> None:
    a = {"w": torch.tensor([[3.0, -1.0, 2.0], [0.5, -4.0, 1.5]]), "b": torch.tensor([1.0, 2.0])}
    b = {"w": torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 9.0]]), "b": torch.tensor([5.0, 6.0])}
    pruned = pruned_like(a, b, torch.abs)
    assert pruned["w"].tolist() == [[3.0, 0.0, 2.0], [0.0, -4.0, 0.0]]
    assert torch.equal(pruned["b"], a["b"]) and a["w"][0, 1] == -1


# Networks


def some_data(num: int, num_test: int = 50) -> Dataset:
    images = torch.randn(num + num_test, 6, generator=seeded())
    labels = torch.randint(3, (num + num_test,), generator=seeded(1))
    return Dataset("some", "some", images[:num], labels[:num], images[num:] + 1, labels[num:])


def parameters_of(model: nn.Module) -> Parameters:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_the_losses_of_the_hessian_sum_to_the_mean_loss_of_the_examples() -> None:
    data, model = some_data(1111), nn.Linear(6, 3)
    examples = torch.randperm(1111, generator=seeded())[:1003]  # neither a multiple of 200 nor below 1,000
    land, at = Landscape(model, data, examples), parameters_of(model)
    logits = model(data.train_inputs[examples])
    mean = F.cross_entropy(logits, data.train_labels[examples]).item()
    assert sum(float(loss(at)) for loss in land.losses()) == pytest.approx(mean, rel=1e-6)
    measured = land.measure(at)
    assert measured.loss == pytest.approx(mean, rel=1e-6)
    right = (logits.argmax(1) == data.train_labels[examples]).double().mean()
    assert measured.accuracy == pytest.approx(100 * float(right))


def test_batch_norm_gets_the_statistics_of_the_point_from_the_training_examples() -> None:
    data = some_data(300)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model.load_state_dict(
        model.state_dict() | {"1.running_mean": torch.ones(8), "1.num_batches_tracked": torch.tensor(9)}
    )
    land = Landscape(model, data, torch.arange(300))
    at = parameters_of(model) | {"1.weight": torch.linspace(0.5, 2, 8)}
    elsewhere = {name: value + 1 for name, value in at.items()}
    land.measure(elsewhere)  # leaves nothing behind

    hidden = data.train_inputs @ at["0.weight"].T + at["0.bias"]
    mean, variance = hidden.mean(0), hidden.var(0)

    def logits(images: Tensor) -> Tensor:
        hidden = images @ at["0.weight"].T + at["0.bias"]
        normed = (hidden - mean) / (variance + 1e-5).sqrt() * at["1.weight"] + at["1.bias"]
        return normed.relu() @ at["4.weight"].T + at["4.bias"]

    measured = land.measure(at)
    assert measured.loss == pytest.approx(
        float(F.cross_entropy(logits(data.train_inputs), data.train_labels)), rel=1e-5
    )
    right = (logits(data.test_inputs).argmax(1) == data.test_labels).double().mean()
    assert measured.test_accuracy == pytest.approx(100 * float(right))
    assert land.measure(at) == measured


def test_the_curvature_of_a_network_with_batch_norm_goes_through_its_statistics() -> None:
    data = some_data(150)
    model = nn.Sequential(
        nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4, eps=1e-12), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    data = replace(data, train_inputs=data.train_inputs.double())
    land, at = Landscape(model, data, torch.arange(150)), parameters_of(model)
    along = torch.cat([at["0.weight"].flatten(), torch.zeros(flat(at).numel() - 24)])  # a scale that BatchNorm undoes
    assert float(along @ hessian_product(land.losses(), at)(along)) == pytest.approx(0, abs=1e-9)
    inner = torch.cat([torch.randn(24, dtype=torch.float64), torch.zeros(flat(at).numel() - 24)])
    assert abs(float(inner @ hessian_product(land.losses(), at)(inner))) > 1e-4


def test_the_curve_is_trained_on_full_batches_of_the_whole_training_set_in_a_new_order_each_epoch() -> None:
    class Recorded(Landscape):
        def loss(self, parameters: Parameters, batch: Tensor) -> Tensor:
            batches.append(batch.tolist())
            return super().loss(parameters, batch)

    batches: list[list[int]] = []
    model = nn.Linear(6, 3)
    land, a = Recorded(model, some_data(100), torch.arange(7)), parameters_of(model)
    b = {name: value + 1 for name, value in a.items()}
    told = _along_curve(land, a, b, Options(points=3, curve_epochs=2), 30, Progress(quiet=True))
    assert told["steps"] == 6 and [len(set(batch)) for batch in batches] == [30] * 6
    epochs = [{i for batch in batches[start : start + 3] for i in batch} for start in (0, 3)]
    assert all(len(epoch) == 90 for epoch in epochs) and batches[:3] != batches[3:]


# Two runs

FEW = ["--points", "6", "--hessian", "2", "--curve-epochs", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, ``a`` that cuts nothing and ``b``; and ``base``, a dense network that others may start from."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomona.train.stages.draw_all", lambda *_: [])
        finish(digits, folder / "a", "method.compression=1")
        done = command_line([*run_of(digits, folder / "b"), "--base", str(folder / "base")])
        assert done.status == 0, done.err
    return folder


def look(digits: Path, a: Path, b: Path, *more: str) -> Done:
    return command_line(["valley", str(a), str(b), "--data-dir", str(digits), *FEW, *more])


def refusal(digits: Path, a: Path, b: Path, *more: str) -> str:
    done = look(digits, a, b, *more)
    assert done.status == 2, done.err
    return done.err


@pytest.fixture(scope="module")
def seen(digits: Path, runs: Path) -> tuple[Done, dict[str, Any]]:
    done = look(digits, runs / "a", runs / "b")
    assert done.status == 0, done.err
    return done, json.loads((runs / "valley-a-b" / "valley.json").read_text())


def test_both_paths_run_from_a_to_b(digits: Path, runs: Path, seen: tuple[Done, dict[str, Any]]) -> None:
    result, data, model = seen[1], load_mnist(digits), build_model("lenet-300-100", seed=0)
    assert result["segment"]["t"] == pytest.approx([i / 5 for i in range(-1, 7)])
    assert result["curve"]["t"] == pytest.approx([i / 5 for i in range(6)])
    for name, t in (("a", 0.0), ("b", 1.0)):
        model.load_state_dict(torch.load(runs / name / "model.pt", weights_only=True))
        with torch.no_grad():
            loss = float(F.cross_entropy(model(data.train_inputs), data.train_labels))
            right = (model(data.test_inputs).argmax(1) == data.test_labels).double().mean()
        for path in (result["segment"], result["curve"]):
            at = path["t"].index(t)
            assert path["loss"][at] == pytest.approx(loss, rel=1e-5)
            assert path["test_accuracy"][at] == pytest.approx(100 * float(right))
    for path in (result["segment"], result["curve"]):
        inside = [loss for t, loss in zip(path["t"], path["loss"], strict=True) if 0 <= t <= 1]
        assert path["barrier"] == max(inside) - max(inside[0], inside[-1])
    assert result["curve"]["steps"] == 2 * 10
    assert result["curve"]["loss"] != result["segment"]["loss"][1:-1]


def test_directions_are_told_with_what_a_random_one_would_have(seen: tuple[Done, dict[str, Any]]) -> None:
    result = seen[1]
    assert result["parameters"] == 266_610
    assert result["random_projection"] == pytest.approx(math.sqrt(2 / 266_610))
    assert list(result["directions"]) == ["B", "random pruning of A", "magnitude pruning of A"]
    largest = result["hessian"]["values"][0]
    for way in result["directions"].values():
        assert way["projection"] >= max(way["coordinates"]) and len(way["coordinates"]) == 2
        assert way["curvature"] <= largest * 1.001
    assert result["directions"]["B"]["length"] == pytest.approx(result["distance"])
    lengths = [result["directions"][f"{how} pruning of A"]["length"] for how in ("magnitude", "random")]
    assert lengths[0] < lengths[1]
    # Five random prunings of 2 coordinates: the ratio of their root mean square to a random direction's is near 1.
    assert 0.2 < result["directions"]["random pruning of A"]["projection"] / result["random_projection"] < 3


def test_where_the_numbers_come_from_is_kept(runs: Path, seen: tuple[Done, dict[str, Any]]) -> None:
    result = seen[1]
    assert result["data"] == DESCRIPTION and result["threads"] == 1
    assert result["options"] == {
        "points": 6,
        "examples": 200,
        "hessian": 2,
        "curve_epochs": 2,
        "curve_lr": 0.05,
        "seed": 0,
    }
    for name, sparsity in (("A", 0.0), ("B", 0.9)):
        run = json.loads((runs / name.lower() / "result.json").read_text())
        assert result[name]["folder"] == str(runs / name.lower())
        assert all(result[name][key] == run[key] for key in ("title", "seed", "commit", "recipe"))
        assert result[name]["sparsity"] == pytest.approx(sparsity, abs=1e-6)


def test_the_words_say_the_numbers_of_the_file(runs: Path, seen: tuple[Done, dict[str, Any]]) -> None:
    done, result = seen
    segment, curve, way = result["segment"], result["curve"], result["directions"]["B"]
    assert f"rises {segment['barrier']:.4g} above the larger end, on the curve {curve['barrier']:.4g};" in done.out
    held = f"hold {100 * way['projection'] ** 2:.3g} % of the squared length of B - A; of a random direction they hold"
    assert f"The 2 sharpest directions at A {held} {100 * 2 / 266_610:.3g} %." in done.out
    assert f"{runs / 'valley-a-b' / 'valley.png'}\n" in done.out
    assert (runs / "valley-a-b" / "valley.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.check
def test_the_same_command_gives_the_same_numbers(
    digits: Path, runs: Path, tmp_path: Path, seen: tuple[Done, dict[str, Any]]
) -> None:
    assert look(digits, runs / "a", runs / "b", "--out", str(tmp_path / "again")).status == 0
    again = json.loads((tmp_path / "again" / "valley.json").read_text())
    assert again.pop("seconds") > 0
    assert again == {key: value for key, value in seen[1].items() if key != "seconds"}


def test_a_shared_dense_network_may_be_an_end_and_a_network_without_zeros_has_no_prunings(
    digits: Path, runs: Path, tmp_path: Path
) -> None:
    done = look(digits, runs / "base", runs / "a", "--out", str(tmp_path), "--examples", "64", "--seed", "3")
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "valley.json").read_text())
    assert result["A"]["title"] == "dense lenet-300-100"
    at_a = result["segment"]["test_accuracy"][result["segment"]["t"].index(0.0)]
    assert at_a == rows_of(runs / "base")[-1]["test_accuracy"]
    assert result["options"]["examples"] == 64
    assert list(result["directions"]) == ["B"]


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    """A run with some entries of its recipe changed."""
    shutil.copytree(folder, to)
    result = json.loads((to / "result.json").read_text())
    result["recipe"] |= changes
    (to / "result.json").write_text(json.dumps(result))
    return to


@pytest.mark.check
def test_runs_with_a_validation_set_are_tested_on_it(digits: Path, runs: Path, tmp_path: Path) -> None:
    a, b = (copied(runs / name, tmp_path / name, validation=40) for name in "ab")
    held_out = load_mnist(digits).hold_out(40)
    for folder in (a, b):
        (folder / "run.json").write_text(json.dumps({"checksum": held_out.checksum}))
    done = look(digits, a, b)
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "valley-a-b" / "valley.json").read_text())
    assert result["options"]["examples"] == 160 and result["data"] == held_out.description


@pytest.mark.check
def test_other_seeds_are_warned_of(digits: Path, runs: Path, tmp_path: Path) -> None:
    other = copied(runs / "b", tmp_path / "b", seed=7)
    done = look(digits, runs / "a", other, "--examples", "16", "--points", "3")
    assert done.status == 0 and "WARNING: the seeds are [0, 7]" in done.out


def test_an_interrupt_leaves_no_file(digits: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA, "mnist", signal_at(12, signal.SIGINT))
    done = look(digits, runs / "a", runs / "b", "--out", str(tmp_path / "out"))
    assert (done.status, done.err) == (130, "interrupted\n")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("key", ["model", "data", "validation"])
def test_runs_that_differ_are_refused_by_what_differs(digits: Path, runs: Path, tmp_path: Path, key: str) -> None:
    other = copied(runs / "b", tmp_path / "b", **{key: 7})
    assert f"A and B must have the same {key}, got " in refusal(digits, runs / "a", other)


def test_a_network_is_not_compared_with_itself(digits: Path, runs: Path) -> None:
    assert "A and B must be two networks, got the same one" in refusal(digits, runs / "a", runs / "a")


def test_a_folder_without_a_run_is_refused(digits: Path, runs: Path, tmp_path: Path) -> None:
    assert f"{tmp_path} holds no run of pomona" in refusal(digits, tmp_path, runs / "b")


def test_a_run_that_has_not_finished_is_refused(digits: Path, runs: Path, tmp_path: Path) -> None:
    other = copied(runs / "b", tmp_path / "b")
    (other / "model.pt").unlink()
    assert f"{other} holds no model.pt: the run has not finished; run the same command again" in refusal(
        digits, runs / "a", other
    )


def test_a_dense_network_that_has_not_finished_is_refused(
    digits: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(5, signal.SIGINT))
        assert command_line([*run_of(digits, tmp_path / "run"), "--base", str(base)]).status == 130
    assert f"the dense network in {base} has not finished; run the same command again" in refusal(
        digits, base, runs / "b"
    )


def test_weights_that_cannot_be_read_are_refused(digits: Path, runs: Path, tmp_path: Path) -> None:
    other = copied(runs / "b", tmp_path / "b")
    (other / "model.pt").write_bytes((runs / "b" / "model.pt").read_bytes()[:1000])
    assert f"{other / 'model.pt'} cannot be read" in refusal(digits, runs / "a", other)
    torch.save({"fc1.weight": torch.zeros(2, 2)}, other / "model.pt")
    assert f"the weights in {other} are not those of a lenet-300-100; run the same command" in refusal(
        digits, runs / "a", other
    )


def test_other_data_than_the_runs_are_refused(runs: Path, tmp_path: Path) -> None:
    message = refusal(write_digits(tmp_path / "others", seed=1), runs / "a", runs / "b")
    assert f"A was trained on other data: '{DESCRIPTION}' in {runs / 'a'}" in message and "--data-dir" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--points", "2", "must be >= 3, got 2"),
        ("--hessian", "0", "must be >= 1, got 0"),
        ("--curve-epochs", "1.5", "must be a whole number >= 1, got '1.5'"),
        ("--curve-lr", "0", "must be a number > 0, got '0'"),
        ("--curve-lr", "much", "must be a number > 0, got 'much'"),
        ("--examples", "201", "--examples must be in [1, 200], the training examples of mnist, got 201"),
    ],
)
def test_an_option_out_of_range_is_refused(digits: Path, runs: Path, option: str, value: str, message: str) -> None:
    assert message in refusal(digits, runs / "a", runs / "b", option, value)
