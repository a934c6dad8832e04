"""`pomona train` from end to end: what it leaves, and that no kill, stop, damage or full disk changes a bit of it."""

import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pomona.budget import num_kept
from pomona.zoo.data import DATA, load_mnist
from pomona.zoo.models import build_model
from tests.runs import (
    DESCRIPTION,
    NUM_WEIGHTS,
    Finished,
    assert_same_end,
    checkpoints_of,
    command_in_child,
    command_line,
    finish,
    result_of,
    rows_of,
    run_of,
    settings,
    signal_at,
    start,
    write_digits,
)
from tests.train.test_checkpoint import files_limited_to, flip_a_bit

pytestmark = pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed")


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing disturbed."""
    return finish(digits, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the training does."""
    monkeypatch.setattr("pomona.train.stages.draw_all", lambda *_: [])


# What a run leaves


def test_a_run_leaves_all_the_files_that_it_promises(finished: Finished) -> None:
    pictures = ["history.png", "layers.png", "magnitudes.png", "training.png"]
    names = sorted(path.name for path in finished.folder.iterdir() if not path.name.startswith("checkpoint-"))
    assert names == sorted(["run.json", "metrics.jsonl", "result.json", "model.pt", "report.html", *pictures])
    for name in pictures:
        assert (finished.folder / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert len(checkpoints_of(finished.folder)) <= 2
    for name in ("report.html", *pictures):
        assert str(finished.folder / name) in finished.out
    assert finished.err == ""


def test_the_data_stand_wherever_a_number_stands(finished: Finished) -> None:
    assert f"data: {DESCRIPTION}\n" in finished.out
    assert finished.out.splitlines()[-1].endswith(f"on {DESCRIPTION}")
    assert result_of(finished.folder)["data"] == DESCRIPTION
    assert DESCRIPTION in (finished.folder / "report.html").read_text()


def test_model_pt_is_a_plain_state_dict_with_exactly_the_promised_zeros(finished: Finished) -> None:
    state = torch.load(finished.folder / "model.pt", weights_only=True)
    model = build_model("lenet-300-100", seed=1)
    assert all(torch.equal(state[name] != 0, state[name].abs() > 0) for name in state)
    model.load_state_dict(state)  # strict: no name more or less
    kernels = [p for p in model.parameters() if p.ndim > 1]
    assert sum(p.numel() for p in kernels) == NUM_WEIGHTS
    assert sum(int((p != 0).sum()) for p in kernels) == num_kept(1 - 1 / 10, NUM_WEIGHTS) == 26_620
    assert (finished.folder / "model.pt").stat().st_size < 1.01 * 4 * sum(t.numel() for t in state.values()) + 4096


def test_the_numbers_of_the_result_are_those_of_model_pt(finished: Finished, digits: Path) -> None:
    result, state = result_of(finished.folder), torch.load(finished.folder / "model.pt", weights_only=True)
    data = load_mnist(digits)
    x = data.test_inputs.flatten(1)
    for name in ("fc1", "fc2"):
        x = F.relu(x @ state[f"{name}.weight"].T + state[f"{name}.bias"])
    logits = x @ state["fc3.weight"].T + state["fc3.bias"]
    accuracy = 100 * (logits.argmax(1) == data.test_labels).double().mean().item()
    assert accuracy > 30  # a guess is right in 10
    assert result["accuracy"]["after_cut"] == pytest.approx(accuracy, abs=1e-9)
    assert f"{accuracy:.2f} after, on" in finished.out.splitlines()[-1]

    kernels = {name: tensor for name, tensor in state.items() if tensor.ndim > 1}
    report = result["report"]
    for layer in report["layers"]:
        kernel = kernels.pop(layer["name"])
        alive = kernel[kernel != 0].abs()
        assert (layer["total"], layer["nonzero"]) == (kernel.numel(), alive.numel())
        assert layer["smallest_kept"] == alive.min().item() and layer["smallest_kept"] >= report["largest_cut"]
        assert layer["dead_channels"] == int((kernel == 0).all(dim=1).sum())
    assert kernels == {}
    assert (report["total"], report["nonzero"], report["compression"]) == (NUM_WEIGHTS, 26_620, 10)
    assert {entry["name"]: entry["total"] for entry in report["outside"]} == {
        "fc1.bias": 300,
        "fc2.bias": 100,
        "fc3.bias": 10,
    }


def test_the_metrics_have_a_row_for_each_epoch_that_agrees_with_the_result(finished: Finished) -> None:
    rows, result = rows_of(finished.folder), result_of(finished.folder)
    assert [(row["stage"], row["epoch"], row["step"]) for row in rows] == [
        *(("base", epoch, 10 * epoch) for epoch in (1, 2)),
        *(("prune", epoch, 10 * epoch) for epoch in (1, 2, 3, 4)),
    ]
    assert rows[1]["test_accuracy"] == result["accuracy"]["base"]
    assert rows[5]["test_accuracy"] == result["accuracy"]["before_cut"]
    assert rows[5]["accuracy_if_cut"] == result["accuracy"]["after_cut"]
    assert rows[5]["largest_cut"] == result["report"]["largest_cut"]
    assert rows[5]["decay_exponent"] == pytest.approx(result["diagnosis"]["exponent"], rel=1e-12)
    layers = result["report"]["layers"]
    assert rows[5]["density_if_cut"] == {layer["name"]: layer["density"] for layer in layers}
    sizes = {layer["name"]: layer["total"] for layer in layers}
    for row in rows[2:]:
        kept = {name: sizes[name] * density for name, density in row["density_if_cut"].items()}
        assert sum(kept.values()) == pytest.approx(26_620) and 26_620 >= row["active"]
        assert sum(row["histogram"]["counts"]) + row["histogram"]["zeros"] == NUM_WEIGHTS


def test_the_output_goes_from_the_recipe_to_the_result(finished: Finished) -> None:
    told = [
        "LeNet-300-100 at 60x with GSM, small (after arXiv 1909.12778, Table 1), seed 0, 1 thread",
        "WARNING: decay exponent 1.00 over 40 steps",
        "base: 2 epochs of 10 steps, batch 20, sgd, lr 0.02, momentum 0.9, weight decay 0.0005",
        "base 2/2  lr",
        "prune: 4 epochs of 10 steps, batch 20, sgd, lr 0.05, momentum 0.95, weight decay 0.3",
        "prune 4/4  lr",
        "266,200    26,620  10.00 %",
        "10.0x compression; accuracy",
    ]
    places = [finished.out.find(text) for text in told]
    assert -1 not in places and places == sorted(places)


def test_bfloat16_computes_in_half_and_keeps_all_state_in_float32(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None
) -> None:
    done = command_line(run_of(digits, tmp_path / "run", "precision=bfloat16"))
    assert done.status == 0, done.err
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert sum(int((t != 0).sum()) for t in state.values() if t.ndim > 1) == 26_620
    half, full = rows_of(tmp_path / "run"), rows_of(finished.folder)
    # bfloat16 has 8 significant bits: the first epoch differs, but not by much.
    assert half[0]["loss"] != full[0]["loss"] and half[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.05)
    assert any(bool((tensor != tensor.bfloat16()).any()) for tensor in state.values())


# Killed and started again


@pytest.mark.parametrize(
    ("batch", "resumed"),
    [
        pytest.param(1, None, marks=pytest.mark.check),
        pytest.param(8, None, marks=pytest.mark.check),
        pytest.param(15, "base after step 10", marks=pytest.mark.check),
        pytest.param(21, "prune after step 0", marks=pytest.mark.check),
        pytest.param(27, "prune after step 0", marks=pytest.mark.check),
        (44, "prune after step 20"),
        pytest.param(60, "prune after step 30", marks=pytest.mark.check),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None, batch: int, resumed: str | None
) -> None:
    """Before the first checkpoint, in both phases, and between them."""
    arguments = run_of(digits, tmp_path / "run")
    assert command_in_child(arguments, batch, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    done = command_line(arguments)
    assert done.status == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith("resuming")] == (
        [f"resuming {resumed}"] if resumed else []
    )
    assert_same_end(tmp_path / "run", finished.folder)


@pytest.mark.check
def test_a_killed_run_of_a_network_with_convolutions_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, no_pictures: None
) -> None:
    tiny = ("model=lenet-5", "base.epochs=1", "prune.epochs=2", "prune.lr_drops=[]", "prune.lr=0.3")
    assert command_line(run_of(digits, tmp_path / "whole", *tiny)).status == 0
    arguments = run_of(digits, tmp_path / "killed", *tiny)
    assert command_in_child(arguments, 25, signal.SIGKILL)[0] == -signal.SIGKILL
    done = command_line(arguments)
    assert "resuming prune after step 10" in done.out
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def end_after_kills(arguments: list[str], generator: random.Random, longest: float, num_kills: int) -> int:
    """Kill the run at random moments, starts and ends included, then let it end; how often it was killed."""
    out = Path(arguments[arguments.index("--out") + 1]).with_suffix(".txt")
    killed = 0
    for _ in range(num_kills):
        process = start(arguments, out)
        process.join(generator.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), out.read_text()
        killed += process.exitcode != 0
    process = start(arguments, out)
    process.join()
    assert process.exitcode == 0, out.read_text()
    return killed


@pytest.mark.check
def test_kills_at_random_moments_leave_no_trace(digits: Path, tmp_path: Path, finished: Finished) -> None:
    assert end_after_kills(run_of(digits, tmp_path / "run"), random.Random(0), 0.9, 4) >= 2
    assert_same_end(tmp_path / "run", finished.folder)


@pytest.mark.check
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_kills_at_random_moments_leave_no_trace(
    digits: Path, tmp_path: Path, finished: Finished, seed: int
) -> None:
    end_after_kills(run_of(digits, tmp_path / "run"), random.Random(seed), 2.0, 20)
    assert_same_end(tmp_path / "run", finished.folder)


# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("batch", "where"), [(13, "base at step 13 of 20"), (36, "prune at step 16 of 40"), (60, "prune at step 40 of 40")]
)
def test_a_stopped_run_saves_in_the_middle_of_an_epoch_and_ends_with_the_same_bits(
    digits: Path,
    tmp_path: Path,
    finished: Finished,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    batch: int,
    where: str,
) -> None:
    arguments, handler = run_of(digits, tmp_path / "run"), signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(batch, number))
        stopped = command_line(arguments)
    assert stopped.status == 130 and stopped.err == ""
    assert stopped.out.splitlines()[-1] == (
        f"stopped in {where}; run the same command again to resume. Checkpoint and metrics are in {tmp_path / 'run'}"
    )
    assert signal.getsignal(number) is handler
    phase, step = where.split(" at step ")
    assert f"resuming {phase} after step {step.split()[0]}\n" in (done := command_line(arguments)).out
    assert done.status == 0
    assert_same_end(tmp_path / "run", finished.folder)


def test_a_second_sigint_ends_the_run_at_once_and_costs_only_what_was_not_saved(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run_of(digits, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(33, signal.SIGINT, signal.SIGINT))
        stopped = command_line(arguments)
    assert (stopped.status, stopped.err) == (130, "interrupted\n")
    done = command_line(arguments)
    assert "resuming prune after step 0\n" in done.out
    assert_same_end(tmp_path / "run", finished.folder)


def test_a_second_sigterm_ends_the_run_at_once(digits: Path, tmp_path: Path) -> None:
    status, _ = command_in_child(run_of(digits, tmp_path / "run"), 13, signal.SIGTERM, signal.SIGTERM)
    assert status == -signal.SIGTERM


@pytest.mark.check
def test_control_c_in_a_shell_exits_with_130_and_says_how_to_go_on(digits: Path, tmp_path: Path) -> None:
    arguments = run_of(digits, tmp_path / "run", "prune.epochs=1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "pomona", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("prune 1/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert re.search(r"stopped in prune at step [\d,]+ of 10,000; run the same command again to resume", out)
    assert len(checkpoints_of(tmp_path / "run")) == 2


# Damage


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None
) -> None:
    arguments = run_of(digits, tmp_path / "run")
    command_in_child(arguments, 46, signal.SIGKILL)
    newest = checkpoints_of(tmp_path / "run")[-1]
    flip_a_bit(newest)
    done = command_line(arguments)
    assert done.status == 0
    assert f"WARNING: {newest.name} was passed over" in done.out
    assert "resuming prune after step 10\n" in done.out
    assert_same_end(tmp_path / "run", finished.folder)


def test_if_all_checkpoints_are_damaged_nothing_is_started_over(digits: Path, tmp_path: Path) -> None:
    arguments = run_of(digits, tmp_path / "run")
    command_in_child(arguments, 46, signal.SIGKILL)
    damaged = checkpoints_of(tmp_path / "run")
    for path in damaged:
        flip_a_bit(path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    done = command_line(arguments)
    assert done.status == 2
    assert f"pomona: error: delete {tmp_path / 'run'} to start again, no checkpoint in it is whole" in done.err
    assert len(damaged) == 2 and all(path.name in done.err for path in damaged)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_metrics_that_lost_rows_are_told(digits: Path, tmp_path: Path, no_pictures: None) -> None:
    """As after a power cut: checkpoints are flushed to the disk, metrics need not be."""
    arguments = run_of(digits, tmp_path / "run")
    command_in_child(arguments, 46, signal.SIGKILL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    done = command_line(arguments)
    assert "metrics.jsonl" in done.out + done.err


def test_a_row_cut_off_by_a_power_cut_is_named_with_its_file(digits: Path, tmp_path: Path, no_pictures: None) -> None:
    arguments = run_of(digits, tmp_path / "run")
    command_in_child(arguments, 46, signal.SIGKILL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + '\n{"stage": "ba')
    done = command_line(arguments)
    assert "metrics.jsonl" in done.out + done.err


# Finished already


def test_the_command_of_a_finished_run_reports_and_trains_nothing(finished: Finished, digits: Path) -> None:
    kept = ("model.pt", "metrics.jsonl", "result.json", "run.json")
    before = {name: (finished.folder / name).read_bytes() for name in kept}
    checkpoints = [path.name for path in checkpoints_of(finished.folder)]
    done = command_line(run_of(digits, finished.folder))
    assert done.status == 0
    assert done.out.splitlines()[-1] == finished.out.splitlines()[-1]
    assert "266,200    26,620  10.00 %" in done.out
    for word in ("resuming", "base:", "prune:", "base 1/", "prune 1/"):
        assert not any(line.startswith(word) for line in done.out.splitlines())
    assert {name: (finished.folder / name).read_bytes() for name in kept} == before
    assert [path.name for path in checkpoints_of(finished.folder)] == checkpoints


# A full disk


def test_a_disk_too_full_for_a_checkpoint_is_told_and_the_run_goes_on_once_there_is_room(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run_of(digits, tmp_path / "run")
    command_in_child(arguments, 44, signal.SIGKILL)
    good = checkpoints_of(tmp_path / "run")
    with monkeypatch.context() as patch, files_limited_to(200_000):
        patch.setattr("pomona.train.run._CHECKPOINT_SECONDS", 0.0)
        done = command_line(arguments)
    assert done.status == 2
    for text in (
        "pomona: error: ",
        f"could not write {tmp_path / 'run' / 'checkpoint-'}",
        "File too large",
        f"{good[-1].name} is still good\n",
    ):
        assert text in done.err
    assert checkpoints_of(tmp_path / "run") == good
    done = command_line(arguments)
    assert done.status == 0 and "resuming prune after step 20\n" in done.out
    assert_same_end(tmp_path / "run", finished.folder)


def test_a_disk_too_full_for_the_metrics_is_told_by_name_and_the_run_goes_on_once_there_is_room(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run_of(digits, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "mnist", signal_at(25, signal.SIGINT))
        command_line(arguments)
    with files_limited_to(1500):  # cuts the first row of prune
        done = command_line(arguments)
    assert done.status == 2
    message = done.err
    done = command_line(arguments)
    assert done.status == 0 and "resuming prune after step 5\n" in done.out
    assert_same_end(tmp_path / "run", finished.folder)
    assert "metrics.jsonl" in message and "File too large" in message


def test_a_disk_too_full_to_begin_is_told(digits: Path, tmp_path: Path) -> None:
    with files_limited_to(100):
        done = command_line(run_of(digits, tmp_path / "run"))
    assert done.status == 2
    assert done.err.startswith(f"pomona: error: cannot write to {tmp_path / 'run'}: ")
    assert "File too large" in done.err
    assert list((tmp_path / "run").iterdir()) == []


# The output folder


def test_a_file_in_place_of_the_folder_is_told(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        done = command_line(run_of(digits, out))
        assert done.status == 2
        assert done.err.startswith(f"pomona: error: cannot write to {out}: ") and "--out" in done.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_leave_to_write_is_told(digits: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root writes everywhere")
    try:
        for out in (tmp_path, tmp_path / "run"):
            done = command_line(run_of(digits, out))
            assert done.status == 2 and f"cannot write to {out}" in done.err
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_with_other_things_in_it_is_left_alone(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = command_line(run_of(digits, tmp_path))
    assert done.status == 2
    assert done.err == f"pomona: error: {tmp_path} is not empty and holds no run; name another with --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        (["prune.lr=0.2"], "recipe.prune.lr is 0.05 there and 0.2 here"),
        (["seed=1"], "recipe.seed is 0 there and 1 here"),
        (["expected.tolerance=1"], "recipe.expected.tolerance is None there and 1 here"),
        (["--threads", "2"], "threads is 1 there and 2 here"),
        (["ticket"], "command is 'train' there and 'ticket' here"),
    ],
)
def test_the_folder_of_another_run_is_refused_by_the_difference(
    finished: Finished, digits: Path, overrides: list[str], difference: str
) -> None:
    before = {path: path.read_bytes() for path in finished.folder.iterdir()}
    arguments = run_of(digits, finished.folder, *(word for word in overrides if "=" in word))
    if "--threads" in overrides:
        arguments += overrides
    if "ticket" in overrides:
        arguments[0] = "ticket"
    done = command_line(arguments)
    assert done.status == 2
    assert f"{finished.folder} belongs to another run: {difference}" in done.err and "--out" in done.err
    assert {path: path.read_bytes() for path in finished.folder.iterdir()} == before


def test_the_folder_of_a_run_on_other_data_is_refused(finished: Finished, tmp_path: Path) -> None:
    done = command_line(run_of(write_digits(tmp_path / "digits", seed=1), finished.folder))
    assert done.status == 2 and "belongs to another run: checksum is " in done.err


def test_data_that_have_moved_are_the_same_data(finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    assert command_line(run_of(write_digits(tmp_path / "moved"), folder)).status == 0


def test_two_processes_do_not_share_a_folder(digits: Path, finished: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    with (folder / "run.json").open() as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        done = command_line(run_of(digits, folder))
    assert done.status == 2 and f"another process is running in {folder}" in done.err
    assert command_line(run_of(digits, folder)).status == 0


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_run_json_is_named(digits: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    done = command_line(run_of(digits, tmp_path))
    assert done.status == 2 and "run.json" in done.err


def test_a_kill_while_run_json_is_written_does_not_block_the_folder(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.tmp").write_text('{"comm')
    assert command_line(run_of(digits, tmp_path / "run")).status == 0
    assert_same_end(tmp_path / "run", finished.folder)


def test_without_threads_a_run_keeps_those_that_it_began_with(finished: Finished, digits: Path) -> None:
    arguments = run_of(digits, finished.folder)
    place = arguments.index("--threads")
    done = command_line(arguments[:place] + arguments[place + 2 :])
    assert done.status == 0 and result_of(finished.folder)["threads"] == 1


def test_without_out_a_run_goes_to_runs_by_recipe_and_seed(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATA, "mnist", signal_at(1, signal.SIGINT))
    for name, suffix in (("train", ""), ("ticket", "-ticket")):
        assert command_line([name, "demo", "--data-dir", str(digits), *settings("seed=7")]).status == 130
        assert (tmp_path / "runs" / f"demo{suffix}-seed7" / "run.json").is_file()


def test_a_run_does_not_depend_on_the_random_state_around_it(
    digits: Path, tmp_path: Path, finished: Finished, no_pictures: None
) -> None:
    torch.manual_seed(time.time_ns())
    assert command_line(run_of(digits, tmp_path / "run")).status == 0
    assert_same_end(tmp_path / "run", finished.folder)


def test_a_finished_run_keeps_the_commit_that_trained_it(
    digits: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.setattr("pomona.train.run.commit_of_source", lambda: "another")
    done = command_line(run_of(digits, folder))
    assert "this run has finished" in done.out
    assert result_of(folder) == result_of(finished.folder)


@pytest.mark.check
def test_a_resumed_run_names_both_commits(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, batch in (("first", 36), ("second", 0)):
        monkeypatch.setattr("pomona.train.run.commit_of_source", lambda commit=commit: commit)
        monkeypatch.setitem(DATA, "mnist", signal_at(batch, signal.SIGINT))
        command_line(run_of(digits, tmp_path / "run"))
    assert result_of(tmp_path / "run")["commit"] == "first, second"
