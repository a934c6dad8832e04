"""A loop of Accelerate that prunes, accumulates gradients, and goes on from its last checkpoint.

python examples/accelerate_loop.py [FOLDER], or: accelerate launch examples/accelerate_loop.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn

import pomona
from pomona.integrations.accelerate import prune

NUM_EPOCHS = 8


def main(folder: str = "runs/accelerate", num_epochs: int = NUM_EPOCHS) -> pomona.Pruner:
    torch.manual_seed(0)
    project = ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(gradient_accumulation_steps=2, project_config=project)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.98, weight_decay=5e-3)
    x = torch.randn(2048, 16)
    y = x[:, :1] * x[:, 1:2]  # two of the inputs matter
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    pruner = prune(accelerator, model, optimizer, pomona.GSM(sparsity=0.9))  # after prepare(), before load_state()

    finished = len(list(Path(folder).glob("checkpoints/*")))
    if finished:
        accelerator.load_state()  # the newest; the Pruner's state comes with it
        accelerator.project_configuration.iteration = finished
    for epoch in range(finished, num_epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # pruning happens in here, at every second batch
                optimizer.zero_grad()
            total += float(loss.detach())
        accelerator.print(f"epoch {epoch}: {pruner.num_steps} steps, loss {total / len(loader):.4f}, {pruner.metrics()}")
        accelerator.save_state()
    report = pruner.harden()  # on every rank
    pruner.verify()
    accelerator.print(report)
    return pruner


if __name__ == "__main__":
    main(*sys.argv[1:2])
