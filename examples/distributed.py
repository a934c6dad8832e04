"""Several processes, one exact budget: DistributedDataParallel, or FSDP2 with --shard. Needs only torch.

torchrun --nproc-per-node 2 examples/distributed.py [--shard]
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pomona


def main(*, shard: bool, num_steps: int = 300) -> pomona.Report:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model on all ranks
    model: nn.Module = nn.Sequential(nn.Linear(16, 63), nn.ReLU(), nn.Linear(63, 1))
    if shard:
        mesh = init_device_mesh("cpu", (size,))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after wrapping or sharding
    method = pomona.Magnitude(pomona.Cubic(0.0, 0.9, steps=num_steps // 2), every=10)
    pruner = pomona.Pruner(model, optimizer, method)  # last, on every rank

    generator = torch.Generator().manual_seed(rank)  # different data on each rank
    for _ in range(num_steps):
        x = torch.randn(64, 16, generator=generator)
        loss = nn.functional.mse_loss(model(x), x[:, :1].abs())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    report = pruner.harden()  # every rank calls it and gets the same report
    pruner.verify()  # also checks that the ranks agree
    if rank == 0:
        print(report)
        print(f"loss on rank 0: {loss.item():.4f}")
    return report


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(shard="--shard" in sys.argv)
    dist.destroy_process_group()
