"""`pomona ticket`: the masks, what is trained under them, and what is said of it."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pomona.budget import num_kept
from pomona.studies.ticket import ticket_phases
from pomona.train.checkpoint import Checkpoints
from pomona.train.recipe import load_recipe
from pomona.train.run import Run
from pomona.zoo.data import DATA, load_mnist
from pomona.zoo.models import build_model
from tests.runs import (
    DESCRIPTION,
    NUM_WEIGHTS,
    TINY,
    Finished,
    assert_same_end,
    command_in_child,
    command_line,
    finish,
    result_of,
    rows_of,
    run_of,
    signal_at,
)

pytestmark = pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed")

PUBLISHED = ("expected.tolerance=1", "expected.base_accuracy=98.19", "expected.ticket_accuracy=98.22")
KERNELS = ("fc1.weight", "fc2.weight", "fc3.weight")
KEPT = 26_620  # of NUM_WEIGHTS, at 10x
# Batches 1..20 are of the base, 21..60 of pruning, 61..80 of the method's ticket, 81..100 of magnitude's.


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Any:
    """They take longer than the training does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomona.train.stages.draw_all", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing disturbed."""
    return finish(digits, tmp_path_factory.mktemp("finished") / "run", *PUBLISHED, command="ticket")


def loaded(folder: Path) -> dict[str, Any]:
    found = Checkpoints(folder).load()
    assert found is not None
    return found[0]


def stopped_at(batch: int, digits: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The checkpoint of a run that was stopped after `batch` steps in all."""
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(batch, signal.SIGINT))
        assert command_line(run_of(digits, folder, *PUBLISHED, command="ticket")).status == 130
    return loaded(folder)


def test_the_phases_follow_one_another(finished: Finished) -> None:
    stages = [row["stage"] for row in rows_of(finished.folder)]
    assert stages == ["base"] * 2 + ["prune"] * 4 + ["ticket by method"] * 2 + ["ticket by magnitude"] * 2
    announced = [line.split(":")[0] for line in finished.out.splitlines() if " epochs of 10 steps" in line]
    assert announced == ["base", "prune", "ticket by method", "ticket by magnitude"]


def test_both_masks_have_the_budgets_size_and_are_the_largest_weights_of_two_networks(
    finished: Finished, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = loaded(finished.folder)["memory"]["masks"]
    assert list(masks) == ["method", "magnitude"]
    for mask in masks.values():
        assert list(mask) == list(KERNELS) and {m.dtype for m in mask.values()} == {torch.bool}
        assert sum(int(m.sum()) for m in mask.values()) == num_kept(1 - 1 / 10, NUM_WEIGHTS) == KEPT
    assert not all(torch.equal(masks["method"][name], masks["magnitude"][name]) for name in KERNELS)

    pruned = torch.load(finished.folder / "model.pt", weights_only=True)
    assert all(torch.equal(masks["method"][name], pruned[name] != 0) for name in KERNELS)

    base = stopped_at(21, digits, tmp_path / "run", monkeypatch)["memory"]["model"]
    sizes = np.concatenate([base[name].abs().numpy().ravel() for name in KERNELS])
    largest = np.zeros(NUM_WEIGHTS, dtype=bool)
    largest[np.argsort(-sizes, kind="stable")[:KEPT]] = True
    assert np.array_equal(largest, np.concatenate([masks["magnitude"][name].numpy().ravel() for name in KERNELS]))

    shared = sum(int((masks["method"][name] & masks["magnitude"][name]).sum()) for name in KERNELS)
    assert result_of(finished.folder)["shared_by_both_masks"] == shared
    assert f"the two masks share {shared:,} of {KEPT:,} weights\n" in finished.out


@pytest.mark.parametrize(("phase", "mask"), [(2, "method"), (3, "magnitude")])
def test_a_ticket_starts_from_the_initial_weights_times_its_mask(finished: Finished, phase: int, mask: str) -> None:
    recipe = load_recipe("demo", TINY)
    memory = loaded(finished.folder)["memory"]
    start = ticket_phases(recipe)[phase].start(recipe, memory).state_dict()
    for name, initial in build_model("lenet-300-100", seed=0).state_dict().items():
        kept = memory["masks"][mask][name].numpy() if name in KERNELS else 1
        np.testing.assert_array_equal(start[name].numpy(), initial.numpy() * kept)


@pytest.mark.parametrize(("batch", "mask"), [(67, "method"), (97, "magnitude")])
def test_the_zeros_of_a_ticket_hold_while_the_rest_is_trained(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, mask: str
) -> None:
    state = stopped_at(batch, digits, tmp_path / "run", monkeypatch)
    assert state["inside"]["step"] == (batch - 1) % 20 + 1
    masks, weights = state["memory"]["masks"][mask], state["inside"]["model"]
    initial = build_model("lenet-300-100", seed=0).state_dict()
    for name in KERNELS:
        assert torch.all(weights[name][~masks[name]] == 0)
        assert torch.all(weights[name][masks[name]] != 0)
        assert (weights[name] != initial[name])[masks[name]].double().mean() > 0.5  # trained; dead inputs stay


def test_the_result_has_accuracy_and_count_of_both_tickets(finished: Finished) -> None:
    result, rows = result_of(finished.folder), rows_of(finished.folder)
    masks = loaded(finished.folder)["memory"]["masks"]
    assert list(result["tickets"]) == ["method", "magnitude"]
    for mask, ticket in result["tickets"].items():
        last = [row for row in rows if row["stage"] == f"ticket by {mask}"][-1]
        assert ticket["accuracy"] == last["test_accuracy"]
        assert ticket["kept"] == {name: int(masks[mask][name].sum()) for name in KERNELS}
        assert (ticket["nonzero"], ticket["compression"]) == (KEPT, 10)
    assert result["tickets"]["method"]["accuracy"] > 30  # a guess is right in 10
    json.dumps(result, allow_nan=False)


def test_the_accuracy_of_a_ticket_is_that_of_its_weights(
    finished: Finished, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stopped_at(80, digits, tmp_path / "run", monkeypatch)["inside"]["model"]  # after its last step
    data, model = load_mnist(digits), build_model("lenet-300-100", seed=1)
    model.load_state_dict(weights)
    with torch.no_grad():
        right = model(data.test_inputs).argmax(1) == data.test_labels
    accuracy = result_of(finished.folder)["tickets"]["method"]["accuracy"]
    assert accuracy == pytest.approx(100 * right.double().mean().item(), abs=1e-9)


@pytest.mark.check
@pytest.mark.parametrize(
    ("batch", "resumed"),
    [
        (61, "ticket by method after step 0"),
        (75, "ticket by method after step 10"),
        (95, "ticket by magnitude after step 10"),
    ],
)
def test_a_run_killed_in_a_ticket_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, finished: Finished, batch: int, resumed: str
) -> None:
    arguments = run_of(digits, tmp_path / "run", *PUBLISHED, command="ticket")
    assert command_in_child(arguments, batch, signal.SIGKILL)[0] == -signal.SIGKILL
    done = command_line(arguments)
    assert done.status == 0 and f"resuming {resumed}\n" in done.out
    assert_same_end(tmp_path / "run", finished.folder)


def test_the_table_sets_each_network_beside_what_was_published(finished: Finished) -> None:
    result = result_of(finished.folder)
    lines = finished.out.splitlines()
    table = lines[lines.index(f"test accuracy on {DESCRIPTION}, seed 0") + 1 :]
    assert table[0].split() == ["weights", "accuracy", "published"]
    accuracy = {name: f"{ticket['accuracy']:.2f}" for name, ticket in result["tickets"].items()}
    assert [line.split() for line in table[1:4]] == [
        ["dense", f"{NUM_WEIGHTS:,}", f"{result['accuracy']['base']:.2f}", "98.19"],
        ["ticket", "by", "method", f"{KEPT:,}", accuracy["method"], "98.22"],
        ["ticket", "by", "magnitude", f"{KEPT:,}", accuracy["magnitude"], "-"],
    ]
    assert len({len(line) for line in table[:4]}) == 1


def test_the_command_of_a_finished_run_trains_nothing(
    finished: Finished, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = (finished.folder / "model.pt").read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(Run, "_step", never)
    done = command_line(run_of(digits, finished.folder, *PUBLISHED, command="ticket"))
    assert done.status == 0
    assert done.out.splitlines()[-6:] == finished.out.splitlines()[-6:]
    assert (finished.folder / "model.pt").read_bytes() == model


def test_a_compression_that_leaves_no_ticket_is_refused_before_training(digits: Path, tmp_path: Path) -> None:
    done = command_line(run_of(digits, tmp_path / "run", "method.compression=1", command="ticket"))
    assert done.status == 2
    assert "base 1/2" not in done.out and "compression" in done.err
