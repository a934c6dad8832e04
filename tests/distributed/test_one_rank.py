"""The ways of several ranks on a single one, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pomona
from tests.distributed import checks
from tests.test_contract import METHODS, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),  # a layer's output; harmless
    pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support"),  # of torch 2.6
]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    checks.mesh_of.cache_clear()
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=(tmp_path / "store").as_uri())
    yield
    dist.destroy_process_group()
    checks.mesh_of.cache_clear()


@pytest.mark.parametrize("changed", checks.VARIANTS, ids=lambda changed: ", ".join(changed) or "as it is")
def test_one_rank_selects_as_a_full_sort(changed: dict[str, object]) -> None:
    drawn = np.random.default_rng(0).standard_normal((20, 30))
    for k in (0, 77, 500):
        for w in (drawn, np.round(drawn, 1), np.ones((20, 30))):
            checks.selects_as_a_full_sort("one rank", [w, w[:3]], [None, None], k, torch.float32, changed)
    with_nan = np.where(drawn > 1, np.nan, drawn)
    checks.selects_as_a_full_sort("one rank", [with_nan], [None], 3, torch.float32, changed)


@pytest.mark.parametrize("case", METHODS[::2], ids=lambda case: case.name)  # the others: on two ranks
def test_every_method_prunes_a_sharded_model_as_a_plain_one(case: Case) -> None:
    checks.prunes_as_on_one_process("fsdp over 1", case.name, 14, case.budget)


def test_steps_of_another_optimizer_are_noticed() -> None:
    model = checks.shard_(checks.net(), checks.mesh_of((1,)))
    ours, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    pruner = pomona.Pruner(model, ours, pomona.Magnitude(sparsity=0.5))
    for optimizer in (ours, other, other, other):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.warns(UserWarning, match="the weights were changed 3 times since the last optimizer step"):
        pruner.harden()


def test_a_checkpoint_goes_on(tmp_path: Path) -> None:
    file = str(tmp_path / "checkpoint")
    checks.go_on(1, "weightmom", "", file, 0, 10)
    resumed = checks.go_on(1, "weightmom", file, "", 10, 6)
    assert resumed == checks.go_on(0, "weightmom", "", "", 0, 16)
