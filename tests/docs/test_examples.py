"""Each example is short, runs, and does what it says."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def main_of(name: str) -> Any:
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"examples/{path.name}" in text.split('"""')[1]  # how to start it


def test_transformers_trainer() -> None:
    callback = main_of("transformers_trainer")("runs", num_steps=40)
    assert callback.report.sparsity == pytest.approx(0.8, abs=1e-3)
    assert callback.pruner.num_steps == 40
    assert Path("runs/sparse/model.safetensors").exists()


@pytest.mark.check
def test_transformers_hold(capsys: pytest.CaptureFixture[str]) -> None:
    callback = main_of("transformers_hold")(num_steps=4)
    assert callback.pruner.num_steps == 4
    assert capsys.readouterr().out.splitlines()[-1].startswith("0.599")


@pytest.mark.check
def test_accelerate_loop() -> None:
    main = main_of("accelerate_loop")
    with pytest.warns(UserWarning, match=r"have not decayed"):  # one epoch of eight
        assert main("runs", num_epochs=1).num_steps == 128
    with pytest.warns(UserWarning, match=r"have not decayed"):
        assert main("runs", num_epochs=2).num_steps == 256  # it resumes


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_compiled() -> None:
    assert main_of("compiled")(backend="eager").verify().sparsity == pytest.approx(0.9, abs=1e-3)
    torch._dynamo.reset()


def test_ema() -> None:
    pruner, ema = main_of("ema")(num_steps=100)
    assert pruner.verify(ema).sparsity == pytest.approx(0.9, abs=1e-3)
    assert Path("ema.pt").exists()


@pytest.mark.check
def test_lora() -> None:
    merged, held = main_of("lora")()
    assert merged.sparsity == held.sparsity == pytest.approx(0.9, abs=2e-3)
    assert 0 < merged.metrics["update_lost"] < 1
    assert merged.accuracy_before is not None and merged.accuracy_before > 95


@pytest.mark.check
@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_distributed(options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, FOLDER / "distributed.py", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "10.0x compression" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES if path.stem != "distributed"])
def test_as_a_user_starts_it(name: str) -> None:
    """With all its steps, and without a warning from Pomona."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:pomona", FOLDER / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "have not decayed" not in done.stderr and "in the middle of a schedule" not in done.stderr
