"""A finished run is opened from its folder in one way, and refused in one way, by every command that needs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pomona.train.checkpoint import Checkpoints
from pomona.train.finished import open_finished, read_run
from pomona.train.folder import FolderError
from pomona.zoo.models import build_model
from tests.runs import command_line

RECIPE = {"title": "t", "source": "s", "seed": 0, "model": "lenet-300-100", "data": "mnist"}


def write_manifest(folder: Path, command: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    manifest = {"command": command, "recipe": RECIPE, "data": "d", "checksum": "c", "threads": 1}
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def write_dense(folder: Path, phase: int) -> Path:
    weights = build_model("lenet-300-100", seed=3).state_dict()
    state: dict[str, Any] = {"phase": phase, "memory": {"model": dict(weights), "commits": ["abc", None]}}
    Checkpoints(write_manifest(folder, "base")).save(state, 7)
    return folder


def test_its_network_and_what_is_known_of_it(tmp_path: Path) -> None:
    wanted = build_model("lenet-300-100", seed=3).state_dict()
    torch.save(wanted, write_manifest(tmp_path) / "model.pt")
    run = open_finished(tmp_path)
    found = run.make_model().state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert run.recipe == RECIPE and run.checksum == "c"
    assert run.facts == read_run(tmp_path)


def test_a_dense_network_for_other_runs(tmp_path: Path) -> None:
    run = open_finished(write_dense(tmp_path, phase=1))
    assert (run.facts["title"], run.facts["commit"], run.checksum) == ("dense lenet-300-100", "abc", "c")
    wanted = build_model("lenet-300-100", seed=3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in run.make_model().state_dict().items())


def test_the_held_out_examples_are_its_test_set(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps({"command": "train", "recipe": RECIPE | {"validation": 40}, "data": "d"})
    )
    torch.save(build_model("lenet-300-100", seed=3).state_dict(), tmp_path / "model.pt")
    data = open_finished(tmp_path).load_data(digits)
    assert len(data.test_labels) == 40 and len(data.train_labels) == 160


@pytest.mark.parametrize("command", [["export", "-o", "x.pomona.safetensors"], ["bench"], ["valley", "other"]])
def test_every_command_says_the_same_of_a_run_that_has_not_finished(tmp_path: Path, command: list[str]) -> None:
    name, *more = command
    done = command_line([name, str(write_manifest(tmp_path / "run")), *more])
    assert done.status == 2
    way_out = "run the same command again to resume it"
    assert done.err == f"pomona: error: {tmp_path / 'run'} holds no model.pt: the run has not finished; {way_out}\n"


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds no run of pomona"):
        open_finished(tmp_path)
    with pytest.raises(ValueError, match=r"the dense network in .* has not finished; run the same command again"):
        open_finished(write_dense(tmp_path / "dense", phase=0))
    (write_manifest(tmp_path / "run") / "model.pt").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"model\.pt cannot be read .*; run the same command again to write them again"
    ):
        open_finished(tmp_path / "run")
    torch.save({"fc1.weight": torch.zeros(2, 2)}, tmp_path / "run" / "model.pt")
    with pytest.raises(ValueError, match=r"are not those of a lenet-300-100; run the same command again"):
        open_finished(tmp_path / "run").make_model()
