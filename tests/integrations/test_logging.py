"""What is logged stands in the files of TensorBoard and of Weights & Biases, offline, under the names of the docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard import SummaryWriter

import pomona
from pomona.integrations import numbers
from pomona.integrations.lightning import PrunerCallback
from tests.integrations.loggers import Curves, read_events, read_wandb
from tests.integrations.test_lightning import GSM, SGD_, Loader, Module, trainer
from tests.problems import batches, loss_of, sparse_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:harden.. cuts weights that have not decayed"),
    pytest.mark.filterwarnings("ignore:decay exponent"),
]

NAMES = {
    "pomona/sparsity",
    "pomona/num_skipped",
    "pomona/decay_exponent",
    "pomona/active",
    "pomona/density_if_cut/net.0.weight",
    "pomona/density_if_cut/net.2.weight",
}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights & Biases without a network, in a folder of its own, whatever ran before: it reads its settings once."""
    import wandb

    wandb.teardown()
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    wandb.teardown()


def expected(every: int, *, count: int = 16) -> Curves:
    """By a loop without any logger: after each `every` steps, and once more after harden()."""
    model = Module()
    optimizer = SGD_(model.parameters())
    pruner = pomona.Pruner(model, optimizer, GSM)
    curves: Curves = {}

    def note(step: int) -> None:
        for name, value in numbers(pruner).items():
            curves.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))  # loggers keep float32

    for step, batch in enumerate(batches(8) * 2, 1):
        optimizer.zero_grad()
        loss_of(model.net, batch).backward()
        optimizer.step()
        if step % every == 0:
            note(step - 1)  # Lightning counts the steps that it logs from 0
    pruner.harden()
    note(count)
    return curves


def test_lightning_logs_as_often_as_it_logs_all_else_and_once_after_the_cut(offline: Path) -> None:
    loggers = [
        TensorBoardLogger(offline, "", "tb"),
        WandbLogger(save_dir=offline, offline=True),
        CSVLogger(offline, "", "csv"),
    ]
    run = trainer(PrunerCallback(GSM), logger=loggers, log_every_n_steps=5)
    run.fit(Module(), Loader())
    loggers[1].experiment.finish()
    curves = expected(5)
    assert curves.keys() == NAMES
    assert curves["pomona/sparsity"] == [(4, 0), (9, 0), (14, 0), (16, pytest.approx(0.75))]
    for read in (read_events(offline / "tb"), read_wandb(offline)):
        assert {name: points for name, points in read.items() if name.startswith("pomona/")} == curves
    assert (offline / "csv/metrics.csv").read_text().count("\n") == 5  # heads, three while training, one at the end


def test_what_is_logged_can_be_monitored() -> None:
    seen: list[Any] = []

    class Watches(Module):
        def on_train_epoch_end(self) -> None:
            seen.append(float(self.trainer.callback_metrics["pomona/density_if_cut/net.0.weight"]))

    run = trainer(PrunerCallback(GSM), log_every_n_steps=4)
    run.fit(Watches(), Loader())
    assert seen == [point[1] for point in expected(4)["pomona/density_if_cut/net.0.weight"][1:4:2]]


def test_accumulated_batches_are_logged_once_a_step(tmp_path: Path) -> None:
    run = trainer(
        PrunerCallback(GSM),
        logger=TensorBoardLogger(tmp_path, "", "tb"),
        log_every_n_steps=1,
        accumulate_grad_batches=4,
    )
    run.fit(Module(), Loader())
    assert [step for step, _ in read_events(tmp_path / "tb")["pomona/active"]] == [0, 1, 2, 3, 4]


def test_a_plain_loop_logs_the_same_to_tensorboard(tmp_path: Path) -> None:
    model = Module()
    optimizer = SGD_(model.parameters())
    pruner = pomona.Pruner(model, optimizer, GSM)
    with SummaryWriter(tmp_path) as writer:
        for step, batch in enumerate(batches(8) * 2):
            optimizer.zero_grad()
            loss_of(model.net, batch).backward()
            optimizer.step()
            if step % 5 == 4:
                for name, value in numbers(pruner).items():
                    writer.add_scalar(name, value, step)
    assert read_events(tmp_path) == {name: points[:-1] for name, points in expected(5).items()}


def test_numbers_of_held_zeros_and_of_a_skipped_step() -> None:
    model = sparse_net()
    optimizer = SGD_(model.parameters())
    pruner = pomona.hold(model, optimizer)
    (loss_of(model, batches(1)[0]) * torch.nan).backward()
    with pytest.warns(UserWarning, match="a gradient is not finite at step 1"):
        optimizer.step()
    assert numbers(pruner) == {
        "pomona/sparsity": 0.5,
        "pomona/num_skipped": 1.0,
        "pomona/density_if_cut/0.weight": 0.5,
        "pomona/density_if_cut/2.weight": 0.5,
    }
