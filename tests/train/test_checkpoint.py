"""A run must survive a kill at any moment, a damaged newest checkpoint and a full disk."""

import contextlib
import errno
import hashlib
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pomona.train.checkpoint import Checkpoints, write_atomically


class Custom:
    pass


def state_at(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((1000,), float(step))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


@contextlib.contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """A real refusal by the kernel, EFBIG in the middle of a write; Python ignores SIGXFSZ by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.tensor([torch.nan, -0.0, 1e-45])),
        "optimizer": optimizer.state_dict(),
        "generator": torch.Generator().get_state(),
        "mask": torch.tensor([True, False]),
        "log": [(1, 0.5, "warm"), (2, float("inf"), None)],
        "huge": 2**70,
    }
    checkpoints = Checkpoints(tmp_path / "new" / "run")
    checkpoints.save(state, 7)
    loaded = checkpoints.load()
    assert loaded is not None
    torch.testing.assert_close(loaded[0]["parameter"].view(torch.int32), state["parameter"].view(torch.int32))
    torch.testing.assert_close(loaded[0]["model"], state["model"], rtol=0, atol=0)
    torch.testing.assert_close(loaded[0]["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)
    assert loaded[0]["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(loaded[0]["generator"], state["generator"])
    assert torch.equal(loaded[0]["mask"], state["mask"])
    assert (loaded[0]["log"], loaded[0]["huge"], loaded[1]) == (state["log"], 2**70, 7)
    assert checkpoints.damaged == []


def test_a_plain_torch_load_opens_the_file(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(state_at(1), 1)
    assert torch.load(path, weights_only=True)["step"] == 1


def test_a_folder_without_checkpoints_loads_as_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load() is None
    assert Checkpoints(tmp_path / "missing").load() is None
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    paths = [checkpoints.save(state_at(step), step) for step in (8, 9, 10, 100_000_000)]
    assert names(tmp_path) == sorted(path.name for path in paths[-keep:])
    loaded = checkpoints.load()
    assert loaded is not None and loaded[1] == 100_000_000


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(state_at(1), 1)
    checkpoints.save({"old": 1}, 2)
    again = checkpoints.save({"new": 1}, 2)
    assert names(tmp_path) == sorted([first.name, again.name])
    assert checkpoints.save({"new": 1}, 2) == again
    assert checkpoints.load() == ({"new": 1}, 2)


def test_of_two_files_of_one_step_the_later_counts(tmp_path: Path) -> None:
    old = Checkpoints(tmp_path).save({"old": 1}, 2)
    content = old.read_bytes()
    new = Checkpoints(tmp_path).save({"new": 1}, 2)
    old.write_bytes(content)
    for path, time, expected in [(new, 2_000_000_000, "new"), (old, 3_000_000_000, "old")]:
        os.utime(path, (time, time))
        loaded = Checkpoints(tmp_path).load()
        assert loaded is not None and list(loaded[0]) == [expected]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, make_unreadable])
def test_a_damaged_newest_is_told_and_the_previous_used(tmp_path: Path, damage: Any) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(1), 1)
    newest = checkpoints.save(state_at(2), 2)
    damage(newest)
    loaded = checkpoints.load()
    assert loaded is not None and loaded[1] == 1 and torch.equal(loaded[0]["weight"], torch.ones(1000))
    assert len(checkpoints.damaged) == 1 and newest.name in checkpoints.damaged[0]
    assert newest.exists()


def test_a_file_of_the_right_hash_that_torch_refuses_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(1), 1)
    content = io.BytesIO()
    torch.save({"code": Custom()}, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest()[:16]
    forged = tmp_path / f"checkpoint-00000009-{digest}.pt"
    forged.write_bytes(content.getvalue())
    loaded = checkpoints.load()
    assert loaded is not None and loaded[1] == 1
    assert forged.name in checkpoints.damaged[0] and "raises UnpicklingError" in checkpoints.damaged[0]
    checkpoints.save(state_at(2), 2)  # not blocked by step 9
    assert forged.exists()


def test_a_damaged_checkpoint_neither_counts_nor_blocks(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    paths = {step: checkpoints.save(state_at(step), step) for step in (1, 4)}
    flip_a_bit(paths[4])
    resumed = Checkpoints(tmp_path)
    resumed.load()
    paths[2] = resumed.save(state_at(2), 2)
    assert names(tmp_path) == sorted(paths[step].name for step in (1, 2, 4))
    paths[3] = resumed.save(state_at(3), 3)
    assert names(tmp_path) == sorted(paths[step].name for step in (2, 3, 4))
    resumed.save(state_at(4), 4)
    assert names(tmp_path) == sorted(paths[step].name for step in (3, 4))
    paths[5] = resumed.save(state_at(5), 5)
    assert names(tmp_path) == sorted(paths[step].name for step in (4, 5))
    loaded = resumed.load()
    assert loaded is not None and loaded[1] == 5 and resumed.damaged == []


def test_the_last_whole_one_outlives_a_damaged_newer_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    whole = checkpoints.save(state_at(1), 1)
    flip_a_bit(checkpoints.save(state_at(2), 2))
    newest = checkpoints.save(state_at(3), 3)
    assert names(tmp_path) == sorted([whole.name, newest.name])


def test_if_all_are_damaged_load_says_so_instead_of_starting_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    paths = [checkpoints.save(state_at(step), step) for step in (1, 2)]
    flip_a_bit(paths[0])
    empty(paths[1])
    with pytest.raises(ValueError, match=f"delete {tmp_path} to start again") as raised:
        checkpoints.load()
    assert all(path.name in str(raised.value) for path in paths)
    assert len(checkpoints.damaged) == 2


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = ["checkpoint-1.pt", "checkpoint-00000009-xyz.pt", "log.json", ".log.json.tmp", "checkpoint.tmp"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.load() is None and checkpoints.damaged == []
    checkpoints.save(state_at(1), 1)
    newest = checkpoints.save(state_at(2), 2)
    assert names(tmp_path) == sorted([*foreign, newest.name])


def test_the_temporary_of_a_killed_process_is_deleted_by_the_next_save(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint-00000001-0123456789abcdef.pt.tmp"
    leftover.write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    newest = checkpoints.save(state_at(1), 1)
    assert names(tmp_path) == [newest.name]


def tensor_with_an_attribute() -> torch.Tensor:
    tensor = torch.ones(1)
    tensor.note = Custom()  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"optimizer": {"state": {0: {"buffer": np.ones(2)}}}},
            r"optimizer\.state\.0\.buffer, a numpy\.ndarray",
        ),
        ({"log": [1.0, (2.0, np.float64(3.0))]}, r"log\.1\.1, a numpy\.float64"),
        ({"weight": tensor_with_an_attribute()}, r"weight\.note, a .*Custom"),
        ({"ema": {Custom: 1}}, r"the key <class .*> of ema, a builtins\.type"),
        ({Custom: 1}, r"the key <class .*> of the state"),
        (Custom(), r"the state, a .*Custom"),
    ],
)
def test_what_would_not_load_is_refused_by_its_place(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path).save(state, 1)
    assert names(tmp_path) == []


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        checkpoints.save({}, -1)
    newest = checkpoints.save(state_at(5), 5)
    with pytest.raises(ValueError, match=f"step 4 is behind {newest.name}"):
        checkpoints.save(state_at(4), 4)


def test_a_full_disk_is_told_and_costs_nothing_earlier(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with files_limited_to(4096), pytest.raises(OSError, match="there is no earlier checkpoint"):
        checkpoints.save({"weight": torch.ones(10_000)}, 1)
    kept = [checkpoints.save(state_at(step), step) for step in (1, 2)]
    with files_limited_to(4096), pytest.raises(OSError) as raised:
        checkpoints.save({"weight": torch.ones(10_000)}, 3)
    assert raised.value.errno == errno.EFBIG
    for part in (
        str(tmp_path / "checkpoint-00000003-"),
        " bytes): File too large",
        f"{kept[1].name} is still good",
    ):
        assert part in str(raised.value)
    assert names(tmp_path) == sorted(path.name for path in kept)
    loaded = checkpoints.load()
    assert loaded is not None and loaded[1] == 2 and checkpoints.damaged == []
    checkpoints.save({"weight": torch.ones(10_000)}, 3)  # there is space again


def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    kept = checkpoints.save(state_at(1), 1)
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root writes everywhere")
    try:
        with pytest.raises(PermissionError, match=f"{kept.name} is still good"):
            checkpoints.save(state_at(2), 2)
    finally:
        tmp_path.chmod(0o700)


def test_write_atomically_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, b"old")
    with (
        files_limited_to(4096),
        pytest.raises(OSError, match=r"report\.json \(5,000 bytes\): File too large"),
    ):
        write_atomically(path, b"x" * 5000)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["report.json"]
    (tmp_path / ".report.json.tmp").write_bytes(b"left by a kill, longer than what comes next")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["report.json"]


# One process imports torch and then forks the victims, so that a kill costs milliseconds. A victim resumes
# and saves step after step, telling each step through a pipe once save() has returned.
VICTIMS = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from pomona.train import checkpoint

folder = Path(sys.argv[1])

def load():
    checkpoints = checkpoint.Checkpoints(folder)
    state, step = checkpoints.load() or ({"weight": torch.zeros(1)}, 0)
    assert not checkpoints.damaged, checkpoints.damaged
    assert torch.all(state["weight"] == step), (step, state)
    return step

def save_on(pipe, size, num_steps):
    step, checkpoints = load(), checkpoint.Checkpoints(folder)
    for step in range(step + 1, step + 1 + num_steps):
        checkpoints.save({"weight": torch.full((size,), float(step))}, step)
        os.write(pipe, step.to_bytes(8, "big"))

def die_before_line(number):
    def trace(frame, event, _):
        nonlocal number
        number -= event == "line"
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename == checkpoint.__file__ else None)

def run(victim, seconds=None):
    # Kills the victim after its first save and `seconds` more, or waits for its own end.
    pipe, its_pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            victim(its_pipe)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(its_pipe)
    told = os.read(pipe, 8)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    told += os.read(pipe, 1 << 16)
    os.close(pipe)
    global num_leftovers
    num_leftovers += any(path.suffix == ".tmp" for path in folder.iterdir())
    saved = int.from_bytes(told[-8:], "big")
    loaded = load()
    assert saved <= loaded <= saved + 1, (saved, loaded)
    return status == signal.SIGKILL

def before_line(number):
    def victim(pipe):
        save_on(pipe, 10, 2)  # so that each killed save has an old checkpoint to delete
        die_before_line(number)
        save_on(pipe, 10, 1)
    return victim

num_kills = num_leftovers = 0
if sys.argv[2] == "each line":
    while run(before_line(num_kills + 1)):
        num_kills += 1
else:
    generator, end = random.Random(0), time.monotonic() + 2
    while time.monotonic() < end:
        num_kills += run(lambda pipe: save_on(pipe, 300_000, 10_000), generator.uniform(0, 0.03))
print(num_kills, num_leftovers)
"""


@pytest.mark.check
@pytest.mark.parametrize("moment", ["each line", "random"])
def test_a_kill_at_any_moment_loses_no_step_that_was_saved(tmp_path: Path, moment: str) -> None:
    """Killed before each line that a load and a save execute, and at random moments of large saves."""
    done = subprocess.run(
        [sys.executable, "-c", VICTIMS, str(tmp_path), moment],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    num_kills, num_leftovers = map(int, done.stdout.split())
    assert num_kills >= 10 and num_leftovers >= 1  # some kills came in the middle of a write
