"""``pomona export``: a run's network as a file that runs, its accuracy measured; any state dict as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pomona
import pomona.runtime
from pomona.files.unpack import read
from pomona.zoo.data import DATA
from tests.runs import Finished, command_line, finish, result_of

pytestmark = pytest.mark.filterwarnings("default:harden.. cuts weights that have not decayed")


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(digits, tmp_path_factory.mktemp("finished") / "run")


def test_a_run_becomes_a_file_that_runs(finished: Finished, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "lenet.pomona.safetensors"
    done = command_line(["export", str(finished.folder), "-o", str(out), "--data-dir", str(digits)])
    assert done.status == 0, done.err
    assert f"{out}: {out.stat().st_size:,} bytes (pomona)" in done.out and "90.00 % of the weights are zero" in done.out
    wanted = torch.load(finished.folder / "model.pt", weights_only=True)
    state = pomona.load(out)
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    images = DATA["mnist"](digits).test_inputs
    labels = DATA["mnist"](digits).test_labels
    right = (pomona.runtime.load(out).run(images.numpy()).argmax(1) == labels.numpy()).mean()
    assert 100 * right == pytest.approx(result_of(finished.folder)["accuracy"]["after_cut"])
    assert read(out).metadata["method"].startswith("gsm(compression=10")


def test_a_calibrated_file_runs_in_fixed_point(finished: Finished, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "lenet.pomona.safetensors"
    command = ["export", str(finished.folder), "-o", str(out), "--data-dir", str(digits), "--calibrate", "20"]
    assert command_line(command).status == 0
    assert len(read(out).graph["ranges"]) > 3
    images = DATA["mnist"](digits).test_inputs.numpy()
    exact, fixed = (pomona.runtime.load(out, precision=p).run(images) for p in ("float32", "int16"))
    assert abs(fixed - exact).max() < 5e-3 * abs(exact).max()
    assert (fixed.argmax(1) == exact.argmax(1)).mean() > 0.99


def test_quantisation_is_measured_on_the_test_set(finished: Finished, digits: Path, tmp_path: Path) -> None:
    sizes = {}
    for more in (
        [],
        ["--quantize", "k-means:8:biases=8"],
        ["--quantize", "k-means:8:biases=8", "--shrink", "--no-graph"],
    ):
        out = tmp_path / "x.pomona.safetensors"
        done = command_line(["export", str(finished.folder), "-o", str(out), "--data-dir", str(digits), *more])
        assert done.status == 0, done.err
        assert ("before quantisation" in done.out) == bool(more)
        sizes[len(more)] = out.stat().st_size
        assert (read(out).graph is None) == ("--no-graph" in more)
    assert sizes[4] < sizes[2] < sizes[0] / 3


def test_weights_become_a_file_and_the_other_way(finished: Finished, tmp_path: Path) -> None:
    weights, out, again = (
        finished.folder / "model.pt",
        tmp_path / "x.pomona.safetensors",
        tmp_path / "y.csr.safetensors",
    )
    assert command_line(["export", str(weights), "-o", str(out)]).status == 0
    assert read(out).graph is None
    assert command_line(["export", str(out), "-o", str(again)]).status == 0
    wanted, found = torch.load(weights, weights_only=True), pomona.load(again)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    reports = [command_line(["report", str(path)]).out for path in (weights, out, again)]
    assert reports[0] == reports[1] == reports[2] and "10.0x compression" in reports[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing", "-o", "x.pomona.safetensors"], "missing"),
        (["{model}", "-o", "x"], "does not show the format"),
        (["{model}", "-o", "x.onnx"], "needs a model"),
        (["{model}", "-o", "x.pomona.safetensors", "--shrink"], "give a run's folder"),
        (["{model}", "-o", "x.pomona.safetensors", "--calibrate", "9"], "give a run's folder"),
        (["{folder}", "-o", "x.csr.safetensors", "--calibrate", "9"], "give example= too"),
        (["{folder}", "-o", "x.pomona.safetensors", "--calibrate", "9", "--no-graph"], "give only one of them"),
        (["{model}", "-o", "x.pomona.safetensors", "--quantize", "k-means"], "quantize must be"),
        (["{folder}", "-o", "x.csr.safetensors", "--quantize", "k-means:4"], "is for format 'pomona'"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str], reason: str, finished: Finished, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POMONA_DATA", str(digits))
    places = {"model": finished.folder / "model.pt", "folder": finished.folder}
    done = command_line(["export", *(argument.format_map(places) for argument in arguments)])
    assert done.status == 2 and reason in done.err and len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
