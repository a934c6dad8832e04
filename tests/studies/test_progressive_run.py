"""`pomona train` of a recipe with rounds: what each candidate starts from, what is kept, kills and stops."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pomona.budget import num_kept
from pomona.train.checkpoint import Checkpoints
from pomona.zoo.data import DATA, load_mnist
from tests.runs import (
    DESCRIPTION,
    NUM_WEIGHTS,
    Finished,
    Tripwire,
    command_in_child,
    command_line,
    result_of,
    rows_of,
    signal_at,
)
from tests.studies.test_compare import Forked, compare, forks
from tests.train.test_stages import KERNELS, RECIPE, accuracy_of, arguments_of, finish, refusal, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:.* starves layers")  # 400x after 10 steps

# 10 steps an epoch of 200 images: 10 of the dense network, and for each candidate 10 of pruning and 10 of retraining;
# 8 where 40 images are held out.
CHAIN = "\n[progressive]\ncompressions = [8, 9]\n"

WIDE = "\n[progressive]\ncompressions = [4, 8, 16]\nwidth = 2\nvalidation = 40\n"


def write_recipe(folder: Path, rounds: str, last: int) -> Path:
    text = RECIPE.replace("epochs = 2", "epochs = 1").replace("lr_drops = [1]\n", "")
    path = folder / "rounds.toml"
    path.write_text(text.replace("compression = 10", f"compression = {last}") + rounds)
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("chain"), CHAIN, 32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("wide"), WIDE, 400)


@pytest.fixture(scope="module")
def in_chain(chain: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of three rounds, each from the one before, that nothing disturbed."""
    return finish(chain, digits, tmp_path_factory.mktemp("in-chain") / "run")


@pytest.fixture(scope="module")
def in_width(wide: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four rounds with two partial models held, chosen by held out examples."""
    return finish(wide, digits, tmp_path_factory.mktemp("in-width") / "run")


def folders_of(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.is_dir()}


def zeros_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor == 0 for name, tensor in weights_of(folder).items() if name in KERNELS}


def without_commit(run: Path) -> dict[str, Any]:
    """The result; a killed run names the commits of both its parts."""
    return result_of(run) | {"commit": None}


def assert_same_rounds(run: Path, reference: Path) -> None:
    """Bit for bit: the result, its weights, and those of every candidate."""
    assert folders_of(run) == folders_of(reference)
    assert without_commit(run) == without_commit(reference)
    for name in (".", *folders_of(reference) - {"dense"}):
        mine, theirs = weights_of(run / name), weights_of(reference / name)
        assert all(torch.equal(mine[key].view(torch.int32), theirs[key].view(torch.int32)) for key in theirs), name
        assert name == "." or rows_of(run / name) == rows_of(reference / name)


# One after the other


def test_each_round_starts_from_the_one_before(in_chain: Finished) -> None:
    assert folders_of(in_chain.folder) == {"dense", "8x-from-dense", "9x-from-8x", "32x-from-9x"}
    parents = {"8x-from-dense": "dense", "9x-from-8x": "8x-from-dense", "32x-from-9x": "9x-from-8x"}
    for name, parent in parents.items():
        result = result_of(in_chain.folder / name)
        compression = int(name.partition("x")[0])
        assert result["base"]["name"] == parent
        assert result["recipe"]["method"]["compression"] == compression
        assert result["recipe"]["method"]["hold_zeros"] == (parent != "dense")
        assert result["recipe"]["title"] == f"Three stages: {compression}x from {parent.partition('-')[0]}"
        assert "progressive" not in result["recipe"] and result["expected"] is None
        assert [row["stage"] for row in rows_of(in_chain.folder / name)] == ["prune", "retrain"]


def test_a_rate_counts_from_the_dense_network_and_the_zeros_of_a_parent_stay(in_chain: Finished) -> None:
    rounds = [zeros_of(in_chain.folder / name) for name in ("8x-from-dense", "9x-from-8x", "32x-from-9x")]
    for zeros, compression in zip(rounds, (8, 9, 32), strict=True):
        assert sum(int(zeros[name].sum()) for name in KERNELS) == NUM_WEIGHTS - num_kept(
            1 - 1 / compression, NUM_WEIGHTS
        )
    for parent, child in pairwise(rounds):
        assert all(bool(child[name][parent[name]].all()) for name in KERNELS)


def test_the_zeros_of_a_parent_stay_at_every_step(
    chain: Path, digits: Path, tmp_path: Path, in_chain: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only because the cut takes the smallest, which are mostly those that began at zero."""
    monkeypatch.setitem(DATA, "mnist", signal_at(35, signal.SIGINT))
    done = command_line(arguments_of(chain, digits, tmp_path / "run"))
    assert done.status == 130 and "stopped in prune at step 5 of 10" in done.out
    found = Checkpoints(tmp_path / "run" / "9x-from-8x").load()
    assert found is not None
    weights = found[0]["inside"]["model"]
    for name, zeros in zeros_of(in_chain.folder / "8x-from-dense").items():
        assert torch.equal(weights[name] == 0, zeros)


def test_the_result_is_the_last_candidates_with_all_that_was_tried(in_chain: Finished, digits: Path) -> None:
    result, last = result_of(in_chain.folder), result_of(in_chain.folder / "32x-from-9x")
    data = load_mnist(digits)
    final = accuracy_of(weights_of(in_chain.folder), data.test_inputs, data.test_labels)
    # The base of each candidate is its parent; that of the whole run is the dense network.
    dense = rows_of(in_chain.folder / "dense")[-1]["test_accuracy"]
    assert result["accuracy"] == last["accuracy"] | {"base": dense} and result["accuracy"]["final"] == final
    assert result["title"] == "Three stages" and result["recipe"]["progressive"]["compressions"] == [8, 9]
    assert result["data"] == DESCRIPTION and result["report"] == last["report"] and result["table"] == last["table"]
    names = ("8x-from-dense", "9x-from-8x", "32x-from-9x")
    accuracies = [result_of(in_chain.folder / name)["accuracy"] for name in names]
    assert result["rounds"] == [
        {
            "round": number,
            "path": [8, 9, 32][:number],
            "accuracy": accuracy["final"],
            "before_cut": accuracy["before_cut"],
            "after_cut": accuracy["after_cut"],
            "kept": True,
        }
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    seconds = [json.loads((in_chain.folder / name / "result.json").read_text())["seconds"] for name in ("", *names)]
    assert seconds[0] == sum(seconds[1:])
    kept = {path.name for path in in_chain.folder.iterdir() if path.is_file()}
    assert kept == {"run.json", "result.json", "model.pt"}
    assert all(
        torch.equal(t, weights_of(in_chain.folder)[n]) for n, t in weights_of(in_chain.folder / names[-1]).items()
    )
    assert in_chain.out.splitlines()[-1].startswith(f"32.0x compression; accuracy {dense:.2f} dense, ")
    assert in_chain.out.splitlines()[-1].endswith(f"{final:.2f} retrained, on {DESCRIPTION}")


@pytest.mark.check
@pytest.mark.parametrize("batch", [35, *(pytest.param(batch, marks=pytest.mark.check) for batch in (7, 25, 59))])
def test_a_killed_run_goes_on_in_the_candidate_it_was_at(
    chain: Path, digits: Path, tmp_path: Path, in_chain: Finished, batch: int
) -> None:
    """In the dense network; in the first candidate's retraining; in the second's pruning; in the last's."""
    arguments = arguments_of(chain, digits, tmp_path / "run")
    assert command_in_child(arguments, batch, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    assert (
        folders_of(tmp_path / "run")
        == {
            7: {"dense"},
            25: {"dense", "8x-from-dense"},
            35: {"dense", "8x-from-dense", "9x-from-8x"},
            59: {"dense", "8x-from-dense", "9x-from-8x", "32x-from-9x"},
        }[batch]
    )
    done = command_line(arguments)
    assert done.status == 0, done.err
    assert_same_rounds(tmp_path / "run", in_chain.folder)


def test_given_again_it_trains_nothing(chain: Path, digits: Path, in_chain: Finished) -> None:
    before = result_of(in_chain.folder)
    done = finish(chain, digits, in_chain.folder)
    assert not [line for line in done.out.splitlines() if line.startswith(("base 1/", "prune 1/", "retrain 1/"))]
    assert done.out.splitlines()[-1] == in_chain.out.splitlines()[-1] and result_of(in_chain.folder) == before


def test_a_run_may_start_from_a_dense_network_elsewhere(
    chain: Path, digits: Path, tmp_path: Path, in_chain: Finished
) -> None:
    base = in_chain.folder / "dense"
    finish(chain, digits, tmp_path / "run", base=base)
    assert folders_of(tmp_path / "run") == folders_of(in_chain.folder) - {"dense"}
    assert without_commit(tmp_path / "run") == without_commit(in_chain.folder)
    message = refusal(arguments_of(chain, digits, tmp_path / "other", "base.lr=1", base=base))
    assert f"{base} belongs to another run: recipe.base.lr is 0.05 there and 1 here" in message


def test_the_folder_of_another_search_is_refused(chain: Path, digits: Path, in_chain: Finished) -> None:
    message = refusal(arguments_of(chain, digits, in_chain.folder, "progressive.compressions=[8, 10]"))
    assert (
        f"{in_chain.folder} belongs to another run: recipe.progressive.compressions is [8, 9] there and [8" in message
    )
    message = refusal(arguments_of(chain, digits, in_chain.folder / "9x-from-8x"))
    assert "belongs to another run: command is 'train' there and 'progressive' here" in message


def test_a_report_of_the_search_tells_its_result(in_chain: Finished) -> None:
    done = command_line(["report", str(in_chain.folder), "--json"])
    assert json.loads(done.out) == json.loads((in_chain.folder / "result.json").read_text())


# Several partial models


@pytest.mark.check
def test_with_two_models_held_each_next_round_is_tried_from_both_and_the_best_is_kept(in_width: Finished) -> None:
    rounds = result_of(in_width.folder)["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3, 3, 4, 4]
    assert [entry["path"] for entry in rounds[:4]] == [[4], [8], [4, 16], [8, 16]]
    held = [[4], [8]]
    for number in (3, 4):
        tried = [entry for entry in rounds if entry["round"] == number]
        assert [entry["path"][:-1] for entry in tried] == held
        best = max(tried, key=lambda entry: float(entry["accuracy"]))
        assert [entry["kept"] for entry in tried] == [entry is best for entry in tried]
        held = [path for path in held if path != best["path"][:-1]] + [best["path"]]
    folders = {
        f"{path[-1]}x-from-{'dense' if len(path) == 1 else f'{path[-2]}x'}" for path in (e["path"] for e in rounds)
    }
    assert folders_of(in_width.folder) == folders | {"dense"}


def test_candidates_are_tested_on_held_out_examples_and_only_the_last_on_the_test_set(
    in_width: Finished, digits: Path
) -> None:
    result, data = result_of(in_width.folder), load_mnist(digits)
    for entry in result["rounds"]:
        path = entry["path"]
        folder = in_width.folder / f"{path[-1]}x-from-{'dense' if len(path) == 1 else f'{path[-2]}x'}"
        held_out = accuracy_of(weights_of(folder), data.train_inputs[160:], data.train_labels[160:])
        assert entry["accuracy"] == held_out == result_of(folder)["accuracy"]["final"]
        assert result_of(folder)["data"].endswith("of which the last 40 training examples serve as the test")
        assert {row["step"] for row in rows_of(folder)} == {8}

    weights = weights_of(in_width.folder)
    final = accuracy_of(weights, data.test_inputs, data.test_labels)
    accuracy = result["accuracy"]
    assert accuracy == {
        "base": accuracy["base"],
        "before_cut": None,
        "after_cut": None,
        "retrained": final,
        "final": final,
    }
    (best,) = (entry for entry in result["rounds"] if entry["round"] == 4 and entry["kept"])
    kept = weights_of(in_width.folder / f"400x-from-{best['path'][-2]}x")
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert result["data"] == DESCRIPTION
    note = "accuracies in this table: on 40 held out training examples"
    assert result["table"].splitlines()[-1] == note and in_width.out.splitlines()[-3] == note
    assert in_width.out.splitlines()[-1] == (
        f"400.3x compression; accuracy {accuracy['base']:.2f} dense, {final:.2f} retrained, on {DESCRIPTION}"
    )


class Cut(Tripwire):
    """A Tripwire whose wire goes through what is cut from it, as when examples are held out."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Cut(self.images[index], self.left, self.signals) if index.start is None else self.images[index]
        return super().__getitem__(index)


def test_a_stopped_search_of_several_models_goes_on_to_the_same_result(
    wide: Path, digits: Path, tmp_path: Path, in_width: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wire is laid anew for each candidate, whose 16 steps count from 1 where none of them is done."""
    arguments = arguments_of(wide, digits, tmp_path / "run")
    stops = [(5, "base at step 5 of 8"), (13, "retrain at step 5 of 8"), (16, "retrain at step 8 of 8")]
    for batch, where in stops:

        def load(data_dir: Any, batch: int = batch) -> Any:
            data = load_mnist(data_dir)
            images: Any = Cut(data.train_inputs, batch, (signal.SIGTERM,))
            return replace(data, train_inputs=images)

        with monkeypatch.context() as patch:
            patch.setitem(DATA, "mnist", load)
            done = command_line(arguments)
        assert done.status == 130 and done.out.splitlines()[-1].startswith(f"stopped in {where};")
    assert folders_of(tmp_path / "run") == {"dense", "4x-from-dense", "8x-from-dense"}
    assert command_line(arguments).status == 0
    assert_same_rounds(tmp_path / "run", in_width.folder)


# Beside other recipes


@pytest.fixture
def forked() -> Iterator[type[Forked]]:
    yield from forks()


@pytest.mark.check
@pytest.mark.usefixtures("forked")
def test_rounds_stand_in_a_comparison_by_the_epochs_of_all_candidates(
    wide: Path, chain: Path, digits: Path, tmp_path: Path
) -> None:
    """Each with a dense network that has seen what it may see."""
    single = tmp_path / "single.toml"
    single.write_text(
        RECIPE.replace("epochs = 2", "epochs = 6").replace("lr_drops = [1]\n", "").replace("10\n", "32\n")
    )
    two_wide = tmp_path / "two.toml"
    text = chain.read_text().replace("compressions = [8, 9]", "compressions = [4]\nwidth = 2\nvalidation = 40")
    two_wide.write_text(text.replace("epochs = 1", "epochs = 3").replace("[base]\nepochs = 3", "[base]\nepochs = 1"))
    done = compare(digits, tmp_path / "out", single, two_wide, compressions="32")
    assert (done.status, done.err) == (0, "")
    assert "; 13 epochs in all; " in done.out and len(list((tmp_path / "out").glob("base-*"))) == 2
    entries = {e["name"]: e for e in json.loads((tmp_path / "out" / "compare.json").read_text())}
    assert entries.keys() == {"single", "two"} and entries["two"]["before_cut"] is None
    result = result_of(tmp_path / "out" / "two-32x-seed0")
    assert entries["two"]["accuracy"] == result["accuracy"]["final"]
