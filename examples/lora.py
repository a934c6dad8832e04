"""LoRA over a sparse base: its zeros stay while adapters train; merging keeps them and reports what that costs.

python examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import pomona
from pomona.integrations.peft import merge


def data(turn: float, num: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(num, 16, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :1] + turn * x[:, 1:2] > 0).float()


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, turn: float, num_steps: int = 400) -> None:
    x, y = data(turn)
    for i in range(num_steps):
        batch = slice(64 * i % 4096, 64 * i % 4096 + 64)
        nn.functional.binary_cross_entropy_with_logits(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: nn.Module) -> float:
    x, y = data(turn=2.0)
    return 100 * float(((model(x) > 0) == (y > 0)).float().mean())


def main() -> tuple[pomona.Report, pomona.Report]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))  # or any sparse model
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    pruner = pomona.Pruner(base, optimizer, pomona.Magnitude(pomona.Cubic(0.0, 0.9, steps=200), every=10))
    fit(base, optimizer, turn=0.5)
    pruner.harden()
    print(f"the base, {pomona.report(base).sparsity:.1%} zeros, on the new task: {accuracy(base):.1f} %")

    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))  # freezes the base, including its zeros
    fit(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), turn=2.0)

    merged, report = merge(model, evaluate=accuracy)
    print(report)  # accuracy before and after, and how much of the update fell on zeros

    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    holder = pomona.hold(merged, optimizer)  # a little training of the survivors recovers what was lost
    fit(merged, optimizer, turn=2.0)
    print(f"after holding and training: {accuracy(merged):.1f} %, {holder.verify().sparsity:.1%} zeros")
    return report, holder.report()


if __name__ == "__main__":
    main()
