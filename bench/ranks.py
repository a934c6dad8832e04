"""A language model pruned on several ranks under FSDP2: loss, exact zeros, traffic and time.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 bench/ranks.py --data-dir DIR

``gpt-tiny`` (embedding and head tied, both in scope) on the characters of tiny Shakespeare: dense training under AdamW,
then from there each method at one sparsity, and the same without a method. Prints a table, writes
bench/results/ranks.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pomona
from pomona import distributed
from pomona.zoo.data import Dataset, load_shakespeare
from pomona.zoo.models import build_model

WHOLE = StateDictOptions(full_state_dict=True)
BATCH = 16  # of all ranks together
METHODS = ("dense", "gsm", "magnitude", "admm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--dense-steps", type=int, default=490)
    parser.add_argument("--steps", type=int, default=980, help="of each method")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    data = load_shakespeare(options.data_dir)
    model = sharded(options.seed, mesh)
    train(model, adamw(model), data, options.dense_steps, options.seed)
    start = get_model_state_dict(model, options=WHOLE)
    rows = [run(method, start, data, mesh, options) | {"dense_loss": loss(model, data)} for method in METHODS]
    if dist.get_rank() == 0:
        head = ("method", "optimizer", "zeros", "before cut", "after cut", "sums a step", "bytes a step", "ms a step")
        print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
        for row in rows:
            print("| " + " | ".join(str(row[key]) for key in head) + " |")
        told = {key: value for key, value in vars(options).items() if key != "data_dir"}
        out = Path(__file__).parent / "results" / "ranks.json"
        out.write_text(json.dumps({"ranks": dist.get_world_size(), "options": told, "rows": rows}, indent=1))
    dist.destroy_process_group()


def sharded(seed: int, mesh: Any) -> nn.Module:
    model = build_model("gpt-tiny", seed=seed)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def run(method: str, start: dict[str, Any], data: Dataset, mesh: Any, options: argparse.Namespace) -> dict[str, Any]:
    model = sharded(options.seed, mesh)
    # A copy: what is loaded may take over the tensors of one process.
    set_model_state_dict(model, copy.deepcopy(start), options=WHOLE)
    optimizer = adamw(model)
    if method == "gsm":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.98, nesterov=True, weight_decay=1e-3)
    prune_steps = options.steps
    pruner = None
    if method == "gsm":
        pruner = pomona.Pruner(model, optimizer, pomona.GSM(options.sparsity))
    elif method == "magnitude":
        ramp = pomona.Cubic(0.0, options.sparsity, steps=options.steps * 6 // 10)
        pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(ramp, every=20))
    elif method == "admm":
        prune_steps = options.steps * 6 // 10
        rho = pomona.Geometric(1e-4, 1e-2, steps=prune_steps)
        pruner = pomona.Pruner(model, optimizer, pomona.ADMM(options.sparsity, rho=rho, every=50))
    sums, times = train(model, optimizer, data, prune_steps, options.seed + 1, drop_after=0.6)
    before = loss(model, data)
    zeros = "-"
    if pruner is not None:
        pruner.harden()
        if prune_steps < options.steps:  # the zeros held
            train(model, optimizer, data, options.steps - prune_steps, options.seed + 2, drop_after=0.5)
        report = pruner.verify()
        zeros = f"{report.total - report.nonzero:,} of {report.total:,}"
        assert report.nonzero <= pomona.budget.num_kept(options.sparsity, report.total)
    return {
        "method": method,
        "optimizer": type(optimizer).__name__,
        "zeros": zeros,
        "before cut": f"{before:.4f}",
        "after cut": f"{loss(model, data):.4f}",
        "sums a step": f"{statistics.mean(len(s) for s in sums):.2f}",
        "bytes a step": f"{statistics.mean(sum(s) for s in sums):,.0f}",
        "ms a step": f"{1e3 * statistics.median(times):.1f}",
    }


def train(
    model: nn.Module, optimizer: Any, data: Dataset, steps: int, seed: int, drop_after: float = 2.0
) -> tuple[list[list[int]], list[float]]:
    """Of each step the sizes of what Pomona sums over the ranks, in bytes, and the seconds."""
    generator = torch.Generator().manual_seed(seed)
    share = BATCH // dist.get_world_size()
    order = data.order(generator)
    sent: list[list[int]] = []
    times = []
    quietly = distributed._all_reduce

    def counting(numbers: torch.Tensor, operation: Any, group: Any) -> None:
        sent[-1].append(numbers.numel() * numbers.element_size())
        quietly(numbers, operation, group)

    distributed._all_reduce = counting
    at = 0
    for step in range(steps):
        if step == int(drop_after * steps):
            for group in optimizer.param_groups:
                group["lr"] *= 0.2
        if at + BATCH > len(order):
            order, at = data.order(generator), 0
        mine = order[at + dist.get_rank() * share :][:share]
        at += BATCH
        sent.append([])
        begun = time.perf_counter()
        inputs, labels = data.batch(mine)
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
        if step % 100 == 0 and dist.get_rank() == 0:
            print(f"step {step} of {steps}", flush=True)
    distributed._all_reduce = quietly
    return sent, times


@torch.no_grad()
def loss(model: nn.Module, data: Dataset) -> float:
    """Nats a character of the test part."""
    total = torch.zeros(2)
    for i in range(0, len(data.test_inputs), 64):  # all ranks the same: FSDP2 gathers together
        logits = model(data.test_inputs[i : i + 64]).flatten(0, 1)
        labels = data.test_labels[i : i + 64].flatten()
        total += torch.tensor([float(nn.functional.cross_entropy(logits, labels, reduction="sum")), len(labels)])
    return float(total[0] / total[1])


if __name__ == "__main__":
    main()
