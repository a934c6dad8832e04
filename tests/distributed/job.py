"""A training that torchrun starts: it goes on from the last checkpoint, and one of its ranks may be killed.

torchrun --nproc-per-node 2 -m tests.distributed.job FOLDER STEPS [DIES_AT]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import pomona
from tests.distributed.checks import lay_out, odd_net, shard_, states_of, whole


def make(share: Any = None) -> tuple[nn.Module, torch.optim.Optimizer, pomona.Pruner]:
    model = odd_net()
    if share is not None:
        shard_(model, share)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    return model, optimizer, pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.75))


def step_(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        g = torch.randn(p.shape, generator=generator)
        p.grad = lay_out(g, p.device_mesh, p.placements) if hasattr(p, "placements") else g
    optimizer.step()


def main(folder: Path, num_steps: int, dies_at: int) -> None:
    dist.init_process_group("gloo")
    model, optimizer, pruner = make(init_device_mesh("cpu", (dist.get_world_size(),)))
    finished = sorted(folder.glob("*.done"))
    if finished:
        states = states_of(model, optimizer, pruner)
        dcp.load(states, checkpoint_id=str(finished[-1].with_suffix("")))
        set_model_state_dict(model, states["model"])
        set_optimizer_state_dict(model, optimizer, states["optimizer"])
    for step in range(pruner.num_steps, num_steps):
        if step == dies_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step_(model, optimizer, step)
        if step % 2:
            dcp.save(states_of(model, optimizer, pruner), checkpoint_id=str(folder / f"{step:03}"))
            (folder / f"{step:03}.done").touch()
    end = whole([dict(model.state_dict()), pruner.state_dict()])
    if dist.get_rank() == 0:
        torch.save(end, folder / "end.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1)
