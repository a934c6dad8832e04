"""Runs of the command line on a tiny data set: in this process, in another, with signals at a given batch."""

import io
import json
import multiprocessing
import signal
import struct
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

import pomona.train.run
from pomona.cli import main
from pomona.zoo.data import DATA, Dataset, load_mnist

# 10 steps an epoch of 200 images: 20 steps of `base`, then 40 of `prune`, too few for passive weights to vanish.
TINY = (
    "eval_every=1 batch_size=20 method.compression=10 "
    "base.epochs=2 base.lr=0.02 base.lr_drops=[] base.warmup_epochs=1 "
    "prune.epochs=4 prune.lr=0.05 prune.lr_drops=[3] prune.warmup_epochs=1 prune.momentum=0.95 prune.weight_decay=0.3"
).split()
NUM_WEIGHTS = 266_200
DESCRIPTION = "MNIST files with 200 training and 50 test images (digits)"
SERVER = multiprocessing.get_context("forkserver")  # children that have imported torch already


def write_digits(folder: Path, seed: int = 0) -> Path:
    """Noisy pictures of ten random patterns, as MNIST's four files."""
    random = np.random.default_rng(seed)
    patterns = random.random((10, 28, 28)) < 0.15
    for part, count in (("train", 200), ("t10k", 50)):
        labels = random.permutation(np.arange(count) % 10)
        images = 75 * patterns[labels] + random.integers(0, 160, (count, 28, 28)) * (
            random.random((count, 28, 28)) < 0.4
        )
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    return folder


def settings(*overrides: str) -> list[str]:
    return [word for override in (*TINY, *overrides) for word in ("--set", override)]


def run_of(digits: Path, out: Path, *overrides: str, command: str = "train") -> list[str]:
    paths = ["--data-dir", str(digits), "--out", str(out), "--threads", "1"]
    return [command, "demo", *paths, *settings(*overrides)]


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


def command_line(arguments: Sequence[str], stdout: TextIO | None = None) -> Done:
    """The command line in this process."""
    out, err = stdout or io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            status = exit.code
    return Done(status, out.getvalue() if isinstance(out, io.StringIO) else "", err.getvalue())


class Tripwire:
    """Training images that signal their own process when it takes batch number `batch`, counted from 1."""

    def __init__(self, images: Tensor, batch: int, signals: Sequence[int]) -> None:
        self.images, self.left, self.signals = images, batch, signals

    def __getitem__(self, index: Tensor) -> Tensor:
        self.left -= 1
        for number in self.signals if self.left == 0 else ():
            signal.raise_signal(number)
        return self.images[index]

    def contiguous(self) -> Tensor:  # for the checksum
        return self.images


LEFT = [0]  # batches until Stopping signals


class Stopping(Dataset):
    """Signals its own process."""

    def batch(self, order: Tensor) -> tuple[Tensor, Tensor]:
        LEFT[0] -= 1
        if LEFT[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return super().batch(order)


def signal_at(batch: int, *signals: int) -> Any:
    """A loader whose data send `signals` at the batch of that number."""

    def load(data_dir: str | Path | None) -> Any:
        data = load_mnist(data_dir)
        images: Any = Tripwire(data.train_inputs, batch, signals)
        return replace(data, train_inputs=images)

    return load


def child(arguments: list[str], out: Path, batch: int, signals: tuple[int, ...]) -> None:
    """The command line in a process of its own, with a checkpoint after every epoch, writing to file `out`."""
    pomona.train.run._CHECKPOINT_SECONDS = 0.0
    DATA["mnist"] = signal_at(batch, *signals)
    with out.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(main(arguments))


def start(arguments: list[str], out: Path, batch: int = 0, *signals: int) -> Any:
    SERVER.set_forkserver_preload(["pytest", "tests.runs"])
    process = SERVER.Process(target=child, args=(arguments, out, batch, signals))
    process.start()
    return process


def command_in_child(arguments: list[str], batch: int = 0, *signals: int) -> tuple[int, str]:
    """Exit status, negative if a signal killed it, and what it wrote."""
    out = Path(arguments[arguments.index("--out") + 1]).with_suffix(".txt")
    process = start(arguments, out, batch, *signals)
    process.join(60)
    assert process.exitcode is not None, f"no end after a minute: {out.read_text()}"
    return process.exitcode, out.read_text()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Metrics, less the time they took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def result_of(folder: Path) -> dict[str, Any]:
    """The result, less the time it took."""
    result = json.loads((folder / "result.json").read_text())
    assert result.pop("seconds") > 0
    return dict(result)


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))


def assert_same_end(folder: Path, reference: Path) -> None:
    """Bit for bit: the weights, each row of the metrics, the result."""
    mine, theirs = (torch.load(f / "model.pt", weights_only=True) for f in (folder, reference))
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    assert rows_of(folder) == rows_of(reference)
    assert result_of(folder) == result_of(reference)


@dataclass(frozen=True)
class Finished(Done):
    folder: Path


def finish(digits: Path, folder: Path, *overrides: str, command: str = "train") -> Finished:
    """A run that nothing disturbs."""
    done = command_line(run_of(digits, folder, *overrides, command=command))
    assert done.status == 0, done.err
    return Finished(done.status, done.out, done.err, folder)
