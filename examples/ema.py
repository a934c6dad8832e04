"""An exponential moving average of a network that is pruned: harden() writes the same zeros into both.

python examples/ema.py
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pomona


def main(num_steps: int = 400) -> tuple[pomona.Pruner, AveragedModel]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    method = pomona.Magnitude(pomona.Cubic(0.0, 0.9, steps=num_steps // 2), every=10)
    pruner = pomona.Pruner(model, optimizer, method)

    for i in range(num_steps):
        x = torch.randn(64, 16)
        nn.functional.mse_loss(model(x), x[:, :1].abs()).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        if i == 3 * num_steps // 4:
            print(pruner.harden(ema))  # both are sparse from now on; the average of zeros is zero

    pruner.verify(ema)
    print(f"zeros in the average: {pomona.report(ema).sparsity:.1%}")
    torch.save(ema.module.state_dict(), "ema.pt")
    return pruner, ema


if __name__ == "__main__":
    main()
