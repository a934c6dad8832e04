"""``pomona compare``: methods side by side at equal cost."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pomona.cli.train import positive


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare methods with the same network, data, epochs and seeds; writes a table and a picture",
        description="Train every recipe at every compression with every seed, several runs at once, from shared dense "
        "networks. All recipes must have the same network, data and total epochs. The same command again resumes; with "
        "more recipes, compressions or seeds and the same --out it adds to the table.",
    )
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="a TOML file, or a name of `pomona recipes`")
    parser.add_argument("--compressions", metavar="C", type=float, nargs="+", required=True, help="e.g. 10 30 100")
    parser.add_argument(
        "--start", metavar="FILE", type=Path, help="dense network that all runs start from, as in train"
    )
    parser.add_argument("--dense", metavar="RECIPE", help="a recipe to run at compression 1, as a baseline")
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="also run the recipe of --dense on narrower networks, for each compression one with about as many weights",
    )
    add_job_options(parser)
    parser.set_defaults(run=_run)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that commands with many runs share."""
    parser.add_argument("--seeds", metavar="N", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=positive,
        help="parallel runs (default: one per core, or one per device other than the CPU)",
    )
    parser.add_argument(
        "--devices",
        metavar="D",
        nargs="+",
        default=["cpu"],
        help="devices to take turns on, e.g. cuda:0 cuda:1 (default: cpu)",
    )
    parser.add_argument("--compile", action="store_true", help="compile training passes with torch.compile")
    parser.add_argument("--threads", metavar="N", type=positive, default=1, help="torch threads per run (default: 1)")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change a value of all recipes",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files (default: $POMONA_DATA)")


def execute(jobs: Sequence[Any], options: argparse.Namespace) -> dict[Path, str]:
    """Run jobs as the options say; returns the failed ones with their reasons. A stop by a signal exits with 130."""
    from pomona.studies.compare import run_jobs
    from pomona.train.progress import Progress

    progress = Progress()
    cores = max(1, (os.cpu_count() or 1) // options.threads)
    at_once = options.jobs or (cores if options.devices == ["cpu"] else len(options.devices))
    how: dict[str, Any] = {"threads": options.threads, "devices": options.devices, "compiled": options.compile}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_jobs(jobs, data_dir=options.data_dir, at_once=at_once, progress=progress, **how)
    except KeyboardInterrupt:
        progress.line(f"stopped; run the same command again to resume. Finished runs are in {options.out}")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    from pomona.studies.compare import check_equal_cost, conclude, plan

    jobs = plan(
        options.recipes,
        options.compressions,
        options.seeds,
        options.overrides,
        options.out,
        start=options.start,
        dense=options.dense,
        narrow=options.narrow,
    )
    check_equal_cost(jobs, options.out)
    failed = execute(jobs, options)
    print(conclude(options.out))
    print(f"picture: {options.out / 'compare.png'}")
    for folder, why in failed.items():
        print(f"FAILED: {folder.name}: {why}")
    return 1 if failed else 0
