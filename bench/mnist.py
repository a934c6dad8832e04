"""Run recipes over seeds, side by side with one thread each, and print the rows of RESULTS.md.

    python bench/mnist.py lenet300-gsm-60x --seeds 0 1 2 --data-dir DIR
    python bench/mnist.py --ticket lenet300-ticket-60x --seeds 0 1 2 --data-dir DIR
    python bench/mnist.py --table

Runs that were interrupted go on; finished ones are not repeated. Each leaves its ``result.json`` in bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names or files")
    parser.add_argument("--ticket", action="store_true", help="run `pomona ticket` instead of `pomona train`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is in bench/results")
    options = parser.parse_args()
    runs = [(recipe, seed) for recipe in options.recipes for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [
            run for run, ok in zip(runs, pool.map(lambda run: execute(*run, options), runs), strict=True) if not ok
        ]
    found = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    print_tables([result for result in found if "recipe" in result])  # others are of other benches
    if failed:
        sys.exit(f"failed: {failed}; see the logs in {options.out}")


def execute(recipe: str, seed: int, options: argparse.Namespace) -> bool:
    """One run in a process of its own; True if it succeeded."""
    name = f"{Path(recipe).stem}-seed{seed}"
    folder = options.out / name
    options.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pomona", "ticket" if options.ticket else "train", recipe]
    command += ["--threads", "1", "--out", str(folder)]
    for override in [f"seed={seed}", *options.overrides]:
        command += ["--set", override]
    if options.data_dir:
        command += ["--data-dir", options.data_dir]
    with (options.out / f"{name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode == 0:
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(folder / "result.json", RESULTS / f"{name}.json")
    return done.returncode == 0


def print_tables(results: list[dict[str, Any]]) -> None:
    """One row for each recipe, mean and standard deviation over its seeds; how often it is tested changes no row."""
    texts = [result for result in results if result["recipe"]["data"] == "shakespeare"]
    print_accuracies([result for result in results if result not in texts])
    print_losses(texts)


def print_losses(results: list[dict[str, Any]]) -> None:
    """One row for each run of a language model."""
    print("\n| run | seed | zeros | dense before | before cut | after cut | at the end | accuracy | largest cut |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        report, loss = result["report"], result["loss"]
        cells = [
            result["title"],
            str(result["seed"]),
            f"{report['total'] - report['nonzero']:,} of {report['total']:,}",
            *(f"{loss[key]:.4f}" for key in ("base", "before_cut", "after_cut", "final")),
            f"{result['accuracy']['final']:.2f}",
            f"{report['largest_cut']:.3f}",
        ]
        print(f"| {' | '.join(cells)} |")


def print_accuracies(results: list[dict[str, Any]]) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        recipe = {key: value for key, value in result["recipe"].items() if key not in ("seed", "eval_every")}
        rows.setdefault(json.dumps([recipe, result["data"]], sort_keys=True), []).append(result)
    print("\n| run | seeds | compression | base | before cut | after cut | at the end | published | largest cut |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for group in rows.values():
        first, accuracy = group[0], [result["accuracy"] for result in group]
        cells = [
            first["title"],
            str(len(group)),
            f"{first['report']['compression']:.1f}x",
            *(spread(a[key] for a in accuracy) for key in ("base", "before_cut", "after_cut")),
            spread(a.get("final", a["after_cut"]) for a in accuracy),
            published(first, "accuracy"),
            spread((result["report"]["largest_cut"] for result in group), digits=3),
        ]
        print(f"| {' | '.join(cells)} |")
    print("\n| tickets | seeds | weights | by the method | published | by magnitude | published |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for group in rows.values():
        if "tickets" not in group[0]:
            continue
        cells = [group[0]["title"], str(len(group)), f"{group[0]['tickets']['method']['nonzero']:,}"]
        for mask, key in (("method", "ticket_accuracy"), ("magnitude", "magnitude_ticket_accuracy")):
            cells.append(spread(result["tickets"][mask]["accuracy"] for result in group))
            cells.append(published(group[0], key))
        print(f"| {' | '.join(cells)} |")


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def published(result: dict[str, Any], key: str) -> str:
    value = (result["expected"] or {}).get(key)
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
