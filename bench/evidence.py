"""The long runs behind RESULTS.md, in order of worth: start it, leave it, start it again.

    nice -n 19 python bench/evidence.py --data-dir DIR --jobs 1 [--list]

Each job is one run of `pomona train` with one thread. A run that was stopped resumes from its checkpoint; a finished
one is not repeated. Its result goes into bench/results, with the mean of its last ten tests beside the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pomona.train.folder import read_rows

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Job:
    """One run; those that name the same ``base`` share its dense network."""

    recipe: str
    seed: int
    base: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.recipe}-seed{self.seed}"


JOBS = [
    Job(f"lenet5-caffe-gsm-{compression}x", seed, f"lenet5-caffe-dense-seed{seed}", ("precision=bfloat16",))
    for seed in (0, 1, 2)
    for compression in (125, 300)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--list", action="store_true", help="only say what is done")
    options = parser.parse_args()
    if options.list:
        for job in JOBS:
            print("done" if (RESULTS / f"{job.name}.json").exists() else "open", job.name)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [
            job.name for job, ok in zip(JOBS, pool.map(lambda job: run(job, options), JOBS), strict=True) if not ok
        ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see the logs in {options.out}")


def run(job: Job, options: argparse.Namespace) -> bool:
    """Run the job unless its result is there; True if it succeeded."""
    result = RESULTS / f"{job.name}.json"
    if result.exists():
        return True
    folder = options.out / job.name
    command = [sys.executable, "-m", "pomona", "train", job.recipe, "--threads", "1", "--no-pictures"]
    command += ["--out", str(folder), "--base", str(options.out / job.base), "--data-dir", options.data_dir]
    for override in (f"seed={job.seed}", *job.overrides):
        command += ["--set", override]
    with (options.out / f"{job.name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        return False
    rows = read_rows(folder / "metrics.jsonl")
    tests = [row["test_accuracy"] for row in rows if row["stage"] == "prune" and "test_accuracy" in row]
    text = json.loads((folder / "result.json").read_text())
    text["accuracy"]["before_cut_mean_of_last_ten"] = round(statistics.mean(tests[-10:]), 4)
    result.write_text(json.dumps(text, indent=1) + "\n")
    return True


if __name__ == "__main__":
    main()
