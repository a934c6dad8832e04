"""An Accelerate loop that prunes, accumulates gradients, and resumes from its last checkpoint.

python examples/accelerate_loop.py [FOLDER], or: accelerate launch examples/accelerate_loop.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import pomona
from pomona.integrations.accelerate import prune


def main(folder: str = "runs/accelerate", num_epochs: int = 8) -> pomona.Pruner:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.98, weight_decay=1e-2)
    x = torch.randn(2048, 16)
    y = x[:, :1] * x[:, 1:2]  # only two of the inputs matter
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    pruner = prune(accelerator, model, optimizer, pomona.GSM(sparsity=0.9))  # after prepare(), before load_state()

    epochs = sorted(Path(folder).glob("epoch-*"))
    if epochs:
        accelerator.load_state(epochs[-1])  # includes the Pruner's state
    for epoch in range(len(epochs), num_epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # prunes, at every second batch
                optimizer.zero_grad()
            total += loss.item()
        accelerator.print(f"epoch {epoch}: step {pruner.num_steps}, loss {total / len(loader):.4f}, {pruner.metrics()}")
        accelerator.save_state(f"{folder}/epoch-{epoch:03}")
    report = pruner.harden()  # on every rank
    pruner.verify()
    accelerator.print(report)
    return pruner


if __name__ == "__main__":
    main(*sys.argv[1:2])
