"""What a network of many small layers costs, here and in another version: construction, step, harden, verify, report.

    git worktree add /tmp/before COMMIT && cp src/pomona/native/_core.so /tmp/before/src/pomona/native/
    python bench/layers.py --against /tmp/before/src [--layers 300]

The versions take turns in processes of their own, one thread each; the least of all rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src"
RESULT = Path(__file__).parent / "results" / "speed" / "layers.json"


def measure(num_layers: int) -> dict[str, float]:
    """Milliseconds of each part, for GSM and for Magnitude."""
    import torch
    from torch import nn

    import pomona

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the runs are short
    found: dict[str, float] = {}
    for method in (pomona.GSM(0.9), pomona.Magnitude(0.9)):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(num_layers)])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        parts: dict[str, float] = {}

        def timed(part: str, begin: float, parts: dict[str, float] = parts) -> None:
            parts[part] = min(parts.get(part, 1e9), 1e3 * (time.perf_counter() - begin))

        begin = time.perf_counter()
        pruner = pomona.Pruner(model, optimizer, method)
        timed("construction", begin)
        for _ in range(10):
            begin = time.perf_counter()
            optimizer.step()
            timed("step", begin)
        begin = time.perf_counter()
        pruner.harden()
        timed("harden", begin)
        for _ in range(3):
            begin = time.perf_counter()
            pruner.verify()
            timed("verify", begin)
            begin = time.perf_counter()
            str(pruner.report())
            timed("report", begin)
        found |= {f"{type(method).__name__} {part}": ms for part, ms in parts.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the src folder of another version")
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.layers)))
        return
    versions = {"here": SOURCES, **({"there": options.against.resolve()} if options.against else {})}
    least: dict[str, dict[str, float]] = {name: {} for name in versions}
    for _ in range(options.rounds):
        for name, path in versions.items():
            environment = {**os.environ, "PYTHONPATH": str(path)}
            command = [sys.executable, __file__, "--one", "--layers", str(options.layers)]
            got = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
            least[name] = {part: min(ms, least[name].get(part, ms)) for part, ms in got.items()}
    for part, ms in least["here"].items():
        ratio = f"  {ms / least['there'][part]:5.2f} x there" if "there" in least else ""
        print(f"{part:24} {ms:8.2f} ms{ratio}")
    rounded = {name: {part: round(ms, 3) for part, ms in parts.items()} for name, parts in least.items()}
    RESULT.write_text(json.dumps({"layers": options.layers, "rounds": options.rounds, "ms": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
