"""A compiled model and a compiled optimizer step: the Pruner's hooks run as usual, outside the graphs.

python examples/compiled.py
"""

import torch
from torch import nn

import pomona


def main(backend: str = "inductor", num_steps: int = 300) -> pomona.Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    method = pomona.Magnitude(pomona.Cubic(0.0, 0.9, steps=num_steps // 2), every=10)
    pruner = pomona.Pruner(model, optimizer, method)  # takes the plain model, so names stay plain

    forward = torch.compile(model, backend=backend)
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(num_steps):
        x = torch.randn(64, 16)
        nn.functional.mse_loss(forward(x), x[:, :1].abs()).backward()
        step()
        optimizer.zero_grad()

    print(pruner.harden())
    return pruner


if __name__ == "__main__":
    main()
