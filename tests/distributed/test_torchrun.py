"""A rank that dies ends the job, and the job goes on from its last checkpoint with the ranks that are left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import job
from tests.problems import bits

ROOT = Path(__file__).parents[2]


def torchrun(num: int, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
    return subprocess.run(
        [*command, "-m", "tests.distributed.job", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.check
def test_a_job_whose_rank_was_killed_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    killed = torchrun(2, tmp_path, 12, 7)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert sorted(file.name for file in tmp_path.glob("*.done")) == ["001.done", "003.done", "005.done"]
    resumed = torchrun(1, tmp_path, 12)
    assert resumed.returncode == 0, resumed.stderr
    model, optimizer, pruner = job.make()
    for step in range(12):
        job.step_(model, optimizer, step)
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert bits(end) == bits([dict(model.state_dict()), pruner.state_dict()])
