"""``pomona sweep``: how sparse can I go?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomona.cli.compare import add_job_options, execute
from pomona.cli.train import positive


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="find the highest compression within an allowed loss of accuracy",
        description="Bisect for the highest compression at which a recipe loses no more accuracy than allowed, "
        "compared with the dense network it starts from and tested on part of the training data. Then train once "
        "more at that compression on all training data, and test. The same command again resumes.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or a name of `pomona recipes`; with [base]")
    parser.add_argument(
        "--loss", metavar="POINTS", type=float, required=True, help="allowed loss of accuracy, in percentage points"
    )
    parser.add_argument("--low", metavar="C", type=float, default=2.0, help="least compression (default: 2)")
    parser.add_argument("--high", metavar="C", type=float, default=500.0, help="highest compression (default: 500)")
    parser.add_argument(
        "--resolution",
        metavar="R",
        type=float,
        default=1.1,
        help="stop when lowest bad / highest good is below this (default: 1.1)",
    )
    parser.add_argument(
        "--validation",
        metavar="N",
        type=positive,
        help="training examples to test on (default: as the recipe, or a sixth)",
    )
    add_job_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.studies.compare import plan
    from pomona.studies.sweep import lost_by, sweep
    from pomona.train.recipe import load_recipe
    from pomona.zoo.data import DATA

    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.base is None:
        raise ValueError(f"{options.recipe} has no [base] stage, so there is no dense network to lose accuracy against")
    count = options.validation or recipe.validation or len(DATA[recipe.data](options.data_dir).train_labels) // 6

    def lost(compression: float, validation: int, folder: Path) -> float:
        changes = [*options.overrides, f"validation={validation}"]
        jobs = plan([options.recipe], [compression], options.seeds, changes, folder)
        for failed, why in execute(jobs, options).items():
            raise ValueError(f"{failed.name} failed, {why}")
        return lost_by(jobs, compression)

    def measured(compression: float) -> float:
        points = lost(compression, count, options.out / "validation")
        print(f"{compression:g}x loses {points:.2f} on {count:,} held out examples", flush=True)
        return points

    found = sweep(measured, allowed=options.loss, low=options.low, high=options.high, resolution=options.resolution)
    if found.best is None:
        print(f"no compression: {found.limit:g}x, the least asked for, already loses more than {options.loss:g}")
        return 1
    points = lost(found.best, 0, options.out / "test")
    bound = f"{found.limit:g}x loses more" if found.limit else "the highest asked for"
    seeds = f"{len(options.seeds)} seed{'s' * (len(options.seeds) > 1)}"
    print(
        f"highest compression within {options.loss:g} points: {found.best:g}x ({bound}), found on held out examples; "
        f"trained on all, it loses {points:.2f} on the test set ({seeds})"
    )
    return 0
