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
        description="Follow a run in its folder while `pomona train` or `pomona ticket` writes it, until it ends. A "
        "terminal shows a view that stays in place, with curves of losses, accuracies and each layer's share; a pipe "
        "or a file gets one line per epoch. Changes nothing in the folder. Exits with 0 if the run has finished and "
        "with 1 if it was stopped or killed.",
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
        print(
            f"nothing is training in {options.folder}, and the run has not finished; run its command again to resume it"
        )
        return 1
    if (options.folder / "result.json").exists():  # a dense network for other runs has none
        print(conclusion(read_run(options.folder)))
    return 0
