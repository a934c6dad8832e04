"""What two ranks run: `python -m tests.integrations.lightning_ranks FOLDER`; Lightning starts the second."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from pomona.integrations.lightning import PrunerCallback
from tests.integrations.test_lightning import GSM, Module, trainer
from tests.problems import bits

SAMPLES = torch.randn(64, 6, generator=torch.Generator().manual_seed(5))


class Sharded(Module):
    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def loader() -> Any:
    return DataLoader([(x, x[:3].tanh()) for x in SAMPLES], batch_size=4)  # 8 steps an epoch on each of two ranks


def main(kind: str, folder: Path) -> None:
    module: Any = Module if kind == "ddp" else Sharded

    def run(max_epochs: int, **options: Any) -> tuple[Any, PrunerCallback]:
        strategy = "ddp" if kind == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        callback = PrunerCallback(GSM, harden=max_epochs == 2)
        lightning = trainer(callback, max_epochs=max_epochs, strategy=strategy, devices=2)
        lightning.fit(module(), loader(), **options)
        return lightning, callback

    _, whole = run(2)
    half, _ = run(1)
    half.save_checkpoint(folder / f"{kind}.ckpt")
    _, resumed = run(2, ckpt_path=folder / f"{kind}.ckpt")
    ends = []
    for callback in (whole, resumed):
        assert callback.pruner is not None and callback.report is not None
        assert callback.report.num_steps == 16 and callback.pruner.verify().nonzero == 18
        parameters: list[Any] = list(callback.pruner.parameters().values())
        ends.append(bits([p.full_tensor() if kind != "ddp" else p for p in parameters]))
    every: list[Any] = [None, None]
    dist.all_gather_object(every, ends)
    assert len({str(one) for rank in every for one in rank}) == 1, "ranks or runs differ"
    (folder / f"{kind}-{dist.get_rank()}").write_text("alike")


if __name__ == "__main__":
    for kind in ("ddp", "fsdp2"):
        main(kind, Path(sys.argv[1]))
