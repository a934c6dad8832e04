"""Runs with more or fewer stages than two: retraining, no base, a shared base, other optimizers, held out examples."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.budget import num_kept
from pomona.train.checkpoint import Checkpoints
from pomona.train.folder import FolderError
from pomona.train.progress import Progress
from pomona.train.recipe import load_recipe
from pomona.train.run import Run
from pomona.train.stages import make_base, train, train_base
from pomona.zoo.data import DATA, load_mnist
from pomona.zoo.models import build_model
from tests.runs import (
    DESCRIPTION,
    NUM_WEIGHTS,
    Finished,
    assert_same_end,
    command_in_child,
    command_line,
    result_of,
    rows_of,
    signal_at,
    write_digits,
)

# 10 steps an epoch of 200 images. Batches 1..10 are of the base, 11..30 of pruning, 31..50 of retraining.
RECIPE = """
title = "Three stages"
source = "nowhere"
model = "lenet-300-100"
data = "mnist"
batch_size = 20

[base]
epochs = 1
lr = 0.05
momentum = 0.9
weight_decay = 5e-4

[prune]
epochs = 2
lr = 0.05
momentum = 0.9

[retrain]
epochs = 2
lr = 0.02
lr_drops = [1]
momentum = 0.9
weight_decay = 0.1

[method]
name = "admm"
compression = 10
every = 5
rho = 0.01
"""
KERNELS = ("fc1.weight", "fc2.weight", "fc3.weight")
KEPT = num_kept(1 - 1 / 10, NUM_WEIGHTS)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "three.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def no_base(three: Path) -> Path:
    """The same from the initial weights, without retraining."""
    path = three.with_name("no-base.toml")
    head, _, rest = RECIPE.partition("[base]")
    prune, method = rest[rest.index("[prune]") : rest.index("[retrain]")], rest[rest.index("[method]") :]
    path.write_text(head + prune + method)
    return path


def arguments_of(recipe: Path, digits: Path, out: Path, *overrides: str, base: Path | None = None) -> list[str]:
    words = ["train", str(recipe), "--data-dir", str(digits), "--out", str(out), "--threads", "1", "--no-pictures"]
    words += ["--base", str(base)] if base else []
    return words + [word for override in overrides for word in ("--set", override)]


def finish(recipe: Path, digits: Path, out: Path, *overrides: str, base: Path | None = None) -> Finished:
    done = command_line(arguments_of(recipe, digits, out, *overrides, base=base))
    assert (done.status, done.err) == (0, "")
    return Finished(done.status, done.out, done.err, out)


def refusal(arguments: list[str]) -> str:
    done = command_line(arguments)
    assert done.status == 2 and done.err.startswith("pomona: error: "), done
    return done.err


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "model.pt", weights_only=True))


def accuracy_of(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    x = images.flatten(1)
    for name in ("fc1", "fc2"):
        x = F.relu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    logits = x @ weights["fc3.weight"].T + weights["fc3.bias"]
    return 100 * float((logits.argmax(1) == labels).double().mean())


@pytest.fixture(scope="module")
def finished(three: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of all three stages that nothing disturbed."""
    return finish(three, digits, tmp_path_factory.mktemp("finished") / "run")


# Retraining


def test_the_stages_follow_one_another_each_with_its_own_rates(finished: Finished) -> None:
    rows = rows_of(finished.folder)
    assert [(row["stage"], row["epoch"], row["step"]) for row in rows] == [
        ("base", 1, 10),
        *(("prune", epoch, 10 * epoch) for epoch in (1, 2)),
        *(("retrain", epoch, 10 * epoch) for epoch in (1, 2)),
    ]
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.05, 0.05, 0.02, 0.002], rel=1e-12)
    assert "retrain: 2 epochs of 10 steps, batch 20, sgd, lr 0.02, momentum 0.9, weight decay 0.1\n" in finished.out
    assert all("density_if_cut" in row for row in rows[1:3]) and not any(
        "density_if_cut" in row for row in (rows[0], *rows[3:])
    )


def test_the_final_accuracy_is_that_of_the_retrained_weights(finished: Finished, digits: Path) -> None:
    accuracy, rows, data = result_of(finished.folder)["accuracy"], rows_of(finished.folder), load_mnist(digits)
    assert list(accuracy) == ["base", "before_cut", "after_cut", "retrained", "final"]
    assert accuracy["final"] == accuracy["retrained"] == rows[-1]["test_accuracy"]
    assert accuracy["final"] == accuracy_of(weights_of(finished.folder), data.test_inputs, data.test_labels)
    assert (accuracy["base"], accuracy["before_cut"]) == (rows[0]["test_accuracy"], rows[2]["test_accuracy"])
    assert accuracy["after_cut"] == rows[2]["accuracy_if_cut"]
    assert finished.out.splitlines()[-1] == (
        f"10.0x compression; accuracy {accuracy['base']:.2f} dense, {accuracy['before_cut']:.2f} before the cut, "
        f"{accuracy['after_cut']:.2f} after, {accuracy['retrained']:.2f} retrained, on {DESCRIPTION}"
    )


def test_the_final_accuracy_of_a_run_without_retraining_is_that_after_the_cut(
    no_base: Path, digits: Path, tmp_path: Path
) -> None:
    finish(no_base, digits, tmp_path / "run", "prune.epochs=1")
    accuracy = result_of(tmp_path / "run")["accuracy"]
    assert list(accuracy) == ["base", "before_cut", "after_cut", "final"]
    assert accuracy["final"] == accuracy["after_cut"]


def test_retraining_starts_from_the_cut_weights_holds_their_zeros_and_moves_the_rest(
    finished: Finished, three: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATA, "mnist", signal_at(31, signal.SIGINT))
    stopped = command_line(arguments_of(three, digits, tmp_path / "run"))
    assert stopped.status == 130 and "stopped in retrain at step 1 of 20" in stopped.out
    found = Checkpoints(tmp_path / "run").load()
    assert found is not None
    cut, inside = found[0]["memory"]["model"], found[0]["inside"]
    last = weights_of(finished.folder)
    assert sum(int((cut[name] != 0).sum()) for name in KERNELS) == KEPT
    for name in KERNELS:
        assert torch.equal(last[name] == 0, cut[name] == 0) and torch.equal(inside["model"][name] == 0, cut[name] == 0)
        assert bool((last[name] != cut[name])[cut[name] != 0].all())  # weight decay moves every one
    momenta = [state["momentum_buffer"] for state in inside["optimizer"]["state"].values()]
    steps = [inside["model"][name] - cut[name] for name in KERNELS]
    # A fresh optimizer: after one step its momentum is one gradient, by which the weights have just moved.
    for momentum, step in zip(momenta, steps, strict=False):
        torch.testing.assert_close(step, torch.where(step == 0, step, -0.02 * momentum), rtol=0, atol=1e-6)


# Killed and started again


@pytest.mark.check
@pytest.mark.parametrize(
    ("batch", "resumed"),
    [
        (25, "prune after step 10"),
        (31, "retrain after step 0"),
        (45, "retrain after step 10"),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    three: Path, digits: Path, tmp_path: Path, finished: Finished, batch: int, resumed: str
) -> None:
    arguments = arguments_of(three, digits, tmp_path / "run")
    assert command_in_child(arguments, batch, signal.SIGKILL)[0] == -signal.SIGKILL
    done = command_line(arguments)
    assert done.status == 0 and f"resuming {resumed}\n" in done.out
    assert_same_end(tmp_path / "run", finished.folder)


def test_a_run_stopped_in_the_middle_of_a_retraining_epoch_ends_with_the_same_bits(
    three: Path, digits: Path, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(three, digits, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(37, signal.SIGTERM))
        assert command_line(arguments).status == 130
    assert "resuming retrain after step 7\n" in command_line(arguments).out
    assert_same_end(tmp_path / "run", finished.folder)


# A shared dense network


@pytest.fixture(scope="module")
def shared(three: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run from a dense network in a folder of its own, ``dense`` beside it."""
    folder = tmp_path_factory.mktemp("shared")
    return finish(three, digits, folder / "run", base=folder / "dense")


def assert_same_but_for_the_base(folder: Path, reference: Path) -> None:
    mine, theirs = weights_of(folder), weights_of(reference)
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(torch.int32), theirs[name].view(torch.int32)), name
    assert rows_of(folder) == [row for row in rows_of(reference) if row["stage"] != "base"]
    result = result_of(folder)
    assert set(result.pop("base")) == {"name", "checksum"}
    assert result == result_of(reference)


def test_a_run_from_a_shared_dense_network_ends_with_the_same_bits_as_one_that_trains_its_own(
    shared: Finished, finished: Finished
) -> None:
    assert_same_but_for_the_base(shared.folder, finished.folder)
    assert result_of(shared.folder)["base"]["name"] == "dense"
    assert [row["stage"] for row in rows_of(shared.folder.with_name("dense"))] == ["base"]


def test_the_dense_network_is_trained_once_for_recipes_that_agree_in_it(
    shared: Finished, three: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = shared.folder.with_name("dense")
    before = {path: path.read_bytes() for path in dense.iterdir()}
    monkeypatch.setitem(DATA, "mnist", signal_at(1, signal.SIGINT))  # it stops after its first step
    other = three.with_name("other.toml")
    other.write_text(RECIPE.replace("rho = 0.01", "").replace("admm", "magnitude").replace("Three", "Other"))
    arguments = arguments_of(other, digits, tmp_path / "run", "retrain.epochs=3", base=dense)
    done = command_line(arguments)
    assert done.status == 130 and "stopped in prune at step 1 of 20" in done.out
    assert {path: path.read_bytes() for path in dense.iterdir()} == before


@pytest.mark.check
@pytest.mark.parametrize(
    ("batch", "place", "resumed"),
    [
        (6, "dense", None),
        (21, "run", "prune after step 10"),
        (41, "run", "retrain after step 10"),
    ],
)
def test_a_run_killed_in_its_shared_dense_network_or_after_it_ends_with_the_same_bits(
    three: Path, digits: Path, tmp_path: Path, finished: Finished, batch: int, place: str, resumed: str | None
) -> None:
    arguments = arguments_of(three, digits, tmp_path / "run", base=tmp_path / "dense")
    assert command_in_child(arguments, batch, signal.SIGKILL)[0] == -signal.SIGKILL
    assert (tmp_path / "run").exists() == (place == "run")
    done = command_line(arguments)
    assert done.status == 0 and (resumed is None or f"resuming {resumed}\n" in done.out)
    assert_same_but_for_the_base(tmp_path / "run", finished.folder)


def test_a_run_stopped_in_the_middle_of_its_shared_dense_network_goes_on_there(
    three: Path, digits: Path, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(three, digits, tmp_path / "run", base=tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(6, signal.SIGTERM))
        stopped = command_line(arguments)
    assert stopped.status == 130 and "stopped in base at step 6 of 10" in stopped.out
    assert "resuming base after step 6\n" in command_line(arguments).out
    assert_same_but_for_the_base(tmp_path / "run", finished.folder)


def test_the_folder_of_a_dense_network_that_is_another_is_refused(
    shared: Finished, three: Path, digits: Path, tmp_path: Path
) -> None:
    dense = shared.folder.with_name("dense")
    message = refusal(arguments_of(three, digits, tmp_path / "run", "base.lr=0.1", base=dense))
    assert f"{dense} belongs to another run: recipe.base.lr is 0.05 there and 0.1 here. Name another folder " in message
    assert "with --base, or delete it" in message
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_dense_network_that_it_began_with(
    shared: Finished, three: Path, digits: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(shared.folder, tmp_path / "run")
    assert "base.name is 'dense' there and None here" in refusal(arguments_of(three, digits, run))

    recipe, data, progress = load_recipe(three), load_mnist(digits), Progress(quiet=True)
    base = train_base(recipe, data, shared.folder.with_name("dense"), threads=1, progress=progress)
    again = make_base(base.model, base.accuracy, "dense", loss=base.loss)
    assert again == base and train(recipe, data, run, threads=1, progress=progress, base=again, pictures=False)
    changed = dict(base.model)
    changed["fc3.bias"] = changed["fc3.bias"] + 1e-3
    with pytest.raises(FolderError, match=r"belongs to another run: base\.checksum is '[0-9a-f]{16}' there and '"):
        base = make_base(changed, base.accuracy, "dense")
        train(recipe, data, run, threads=1, progress=progress, base=base, pictures=False)


def test_a_dense_network_for_a_recipe_that_starts_without_one_is_refused(
    no_base: Path, digits: Path, tmp_path: Path
) -> None:
    message = refusal(arguments_of(no_base, digits, tmp_path / "run", base=tmp_path / "dense"))
    assert "'Three stages' has no [base] stage, it prunes from the initial weights" in message
    assert list(tmp_path.iterdir()) == []


def test_a_dense_network_is_not_taken_for_a_run(shared: Finished) -> None:
    dense = shared.folder.with_name("dense")
    assert f"{dense} holds a dense network for other runs to start from" in refusal(["report", str(dense)])


# From the initial weights


def test_without_a_base_pruning_starts_from_the_initial_weights(
    no_base: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    step = Run._step

    def spy(self: Run, stage: Any, learner: Any, batch: Tensor) -> None:
        seen.append({name: tensor.clone() for name, tensor in learner.model.state_dict().items()})
        step(self, stage, learner, batch)

    monkeypatch.setattr(Run, "_step", spy)
    done = finish(no_base, digits, tmp_path / "run", "seed=3")
    initial = build_model("lenet-300-100", seed=3).state_dict()
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in initial.items())
    assert [row["stage"] for row in rows_of(tmp_path / "run")] == ["prune", "prune"]
    assert result_of(tmp_path / "run")["accuracy"]["base"] is None
    assert "dense" not in done.out.splitlines()[-1] and "base:" not in done.out


# Scope


def test_biases_in_scope_are_pruned_and_counted(no_base: Path, digits: Path, tmp_path: Path) -> None:
    recipe = no_base.with_name("grda.toml")
    stages, _, _ = no_base.read_text().partition("[method]")
    recipe.write_text(stages + '[scope]\nalso = ["*"]\n[method]\nname = "grda"\ncompression = 10\nsteps = 20\n')
    finish(recipe, digits, tmp_path / "run", "prune.momentum=0")
    report, weights = result_of(tmp_path / "run")["report"], weights_of(tmp_path / "run")
    assert [layer["name"] for layer in report["layers"]] == list(weights) and report["outside"] == []
    assert report["total"] == sum(tensor.numel() for tensor in weights.values()) == NUM_WEIGHTS + 410
    nonzero = sum(int(tensor.count_nonzero()) for tensor in weights.values())
    assert report["nonzero"] == nonzero <= num_kept(0.9, NUM_WEIGHTS + 410)
    assert rows_of(tmp_path / "run")[-1]["sparsity"] >= 0.9


def test_what_is_out_of_scope_stays_dense_also_in_retraining(three: Path, digits: Path, tmp_path: Path) -> None:
    finish(three, digits, tmp_path / "run", 'scope.exclude=["fc3"]', "retrain.epochs=1", "retrain.lr_drops=[]")
    weights, report = weights_of(tmp_path / "run"), result_of(tmp_path / "run")["report"]
    assert bool((weights["fc3.weight"] != 0).all())
    assert sum(int(weights[name].count_nonzero()) for name in KERNELS[:2]) == num_kept(0.9, 265_200)
    assert {entry["name"]: entry["reason"] for entry in report["outside"]}["fc3.weight"] == "excluded by 'fc3'"


# Optimizers, against loops of torch


def trained_by_hand(digits: Path, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> nn.Module:
    """Ten steps of the dense network; no decay of biases, whose rate is twice that of the others."""
    data, model = load_mnist(digits), build_model("lenet-300-100", seed=0)
    kernels, biases = ([p for p in model.parameters() if (p.ndim > 1) == is_kernel] for is_kernel in (True, False))
    optimizer = make([{"params": kernels, "weight_decay": 0.1}, {"params": biases, "lr": 0.004, "weight_decay": 0.0}])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for batch in order.split(20):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_an_optimizer_of_a_recipe_is_that_of_torch(three: Path, digits: Path, tmp_path: Path, name: str) -> None:
    made: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.002, momentum=0.9, nesterov=True),
        "adam": lambda groups: torch.optim.Adam(groups, lr=0.002),
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.002),
    }
    momentum = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {"momentum": 0.0}
    recipe = load_recipe(three)
    assert recipe.base is not None
    stage = replace(recipe.base, optimizer=name, lr=0.002, weight_decay=0.1, bias_lr=2.0, **momentum)
    recipe = replace(recipe, base=stage)
    base = train_base(recipe, load_mnist(digits), tmp_path / "dense", threads=1, progress=Progress(quiet=True))
    for key, tensor in trained_by_hand(digits, made[name]).state_dict().items():
        # Fused kernels round otherwise; the other optimizers and decays differ by 1e-3 and more.
        torch.testing.assert_close(base.model[key], tensor, rtol=0, atol=2e-5)


def test_pruning_and_retraining_go_with_adamw_and_resume_with_its_state(
    three: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adamw = [f"{stage}.{change}" for stage in ("prune", "retrain") for change in ("optimizer=adamw", "momentum=0")]
    adamw += ["prune.lr=0.001", "retrain.lr=0.001"]
    whole = finish(three, digits, tmp_path / "whole", *adamw)
    assert "prune: 2 epochs of 10 steps, batch 20, adamw, lr 0.001, momentum 0, weight decay 0\n" in whole.out
    assert result_of(whole.folder)["report"]["nonzero"] == KEPT
    for batch in (17, 27):  # in pruning; when that goes on, in retraining
        with monkeypatch.context() as patch:
            patch.setitem(DATA, "mnist", signal_at(batch, signal.SIGINT))
            assert command_line(arguments_of(three, digits, tmp_path / "run", *adamw)).status == 130
    finish(three, digits, tmp_path / "run", *adamw)
    assert_same_end(tmp_path / "run", whole.folder)


# What cannot work is refused before anything is trained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['scope.exclude=["nope"]'], "Scope(exclude=['nope']) matches no parameter of the model"),
        (['method={name="grda", c=0.001}'], "GRDA does not support SGD(momentum=0.9)"),
        (['method={name="admm", densities={fc1=0.1}}'], "fc2.weight matches no pattern of densities"),
        (
            ['method={name="rigl", sparsity=0.5, end="50 %"}'],
            "method.end must be >= every (100), the first update, got ",
        ),
        (
            ['method={name="gsm", sparsity=0.9}', "prune.optimizer=adam", "prune.momentum=0"],
            "GSM cannot prune with Adam",
        ),
        (["validation=150"], "validation must be in [1, 100], half of the training examples, got 150"),
    ],
)
@pytest.mark.parametrize("command", ["train", "train from a shared base", "diagnose"])
def test_what_the_network_or_the_optimizer_rules_out_is_refused_before_the_first_step(
    three: Path, digits: Path, tmp_path: Path, overrides: list[str], message: str, command: str
) -> None:
    arguments = arguments_of(three, digits, tmp_path / "run", *overrides)
    if command == "train from a shared base":
        arguments += ["--base", str(tmp_path / "dense")]
    if command == "diagnose":
        arguments = ["diagnose", str(three), "--data-dir", str(digits), *arguments[arguments.index("--set") :]]
    assert message in refusal(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
@pytest.mark.parametrize("stage", ["base", "prune", "retrain"])
def test_a_stage_that_diverges_is_told_by_its_rate(three: Path, digits: Path, tmp_path: Path, stage: str) -> None:
    """Also under a Pruner, which skips the steps that would make weights infinite."""
    done = command_line(arguments_of(three, digits, tmp_path / "run", f"{stage}.lr=1e4"))
    assert done.status == 2
    assert f"{stage} diverged: the loss or a weight is not finite in epoch 1; lower {stage}.lr\n" in done.err


def test_a_run_that_leaves_no_weight_says_so(no_base: Path, digits: Path, tmp_path: Path) -> None:
    nothing = 'method={name="magnitude", compression=1000000, min_density=0}'
    done = finish(no_base, digits, tmp_path / "run", nothing)
    assert done.out.splitlines()[-1].startswith("all cut compression; accuracy ")
    assert result_of(tmp_path / "run")["report"]["compression"] is None


# Held out examples


def test_held_out_examples_are_tested_on_and_neither_trained_on_nor_mixed_with_the_test_set(
    three: Path, digits: Path, tmp_path: Path
) -> None:
    done = finish(three, digits, tmp_path / "run", "validation=40")
    data, result = load_mnist(digits), result_of(tmp_path / "run")
    told = f"{DESCRIPTION}, of which the last 40 training examples serve as the test"
    assert result["data"] == told and f"data: {told}\n" in done.out and done.out.splitlines()[-1].endswith(f"on {told}")
    assert {row["step"] / row["epoch"] for row in rows_of(tmp_path / "run")} == {8.0}  # of 160 images
    last = accuracy_of(weights_of(tmp_path / "run"), data.train_inputs[160:], data.train_labels[160:])
    assert result["accuracy"]["final"] == last

    # The same run again where the test set and the last 40 labels are others: not a bit of the weights depends on them.
    other = shutil.copytree(digits, tmp_path / "other")
    shutil.copy(write_digits(tmp_path / "third", seed=5) / "t10k-images-idx3-ubyte", other)
    labels = bytearray((other / "train-labels-idx1-ubyte").read_bytes())
    labels[-40:] = bytes((label + 1) % 10 for label in labels[-40:])
    (other / "train-labels-idx1-ubyte").write_bytes(labels)
    finish(three, other, tmp_path / "again", "validation=40")
    assert all(torch.equal(t, weights_of(tmp_path / "again")[name]) for name, t in weights_of(tmp_path / "run").items())
    assert result_of(tmp_path / "again")["accuracy"]["final"] < last


# Pictures


def test_without_pictures_the_rest_is_the_same_and_report_draws_them_later(finished: Finished, tmp_path: Path) -> None:
    assert "pictures:" not in finished.out and "page:" not in finished.out
    run = shutil.copytree(finished.folder, tmp_path / "run")
    kept = {path.name for path in run.iterdir() if not path.name.startswith("checkpoint-")}
    assert kept == {"run.json", "metrics.jsonl", "result.json", "model.pt"}
    assert command_line(["report", str(run)]).status == 0
    drawn = {path.name for path in run.glob("*.png")}
    assert drawn == {"history.png", "layers.png", "magnitudes.png", "training.png"}
    page = (run / "report.html").read_text()
    assert "[retrain]" in page and f"{json.loads((run / 'result.json').read_text())['accuracy']['final']:.2f}" in page
