"""``pomona watch``: follow a run in the terminal while another process trains it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "watch",
        help="follow a run while it trains",
        description="Follow a run from its folder while `pomona train` or `pomona ticket` writes it, until it ends: on "
        "a terminal a view that stays in place, with the course of losses, accuracies and of each layer's share; into "
        "a pipe or a file a line for each epoch. Reads only. Ends with status 0 if the run has finished and with 1 if "
        "it was stopped or killed.",
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.cli.train import conclusion
    from pomona.train.finished import read_run
    from pomona.train.watch import watch

    try:
        is_finished = watch(options.folder, sys.stdout)
    except KeyboardInterrupt:
        print("no longer watching; the run is not affected")
        return 130
    if not is_finished:
        print(f"nothing trains in {options.folder} any more, and the run has not finished; its command goes on with it")
        return 1
    if (options.folder / "result.json").exists():  # a dense network for other runs has none
        print(conclusion(read_run(options.folder)))
    return 0
