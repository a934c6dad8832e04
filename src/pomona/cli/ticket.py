"""``pomona ticket``: are the masks that pruning finds winning tickets?"""

from __future__ import annotations

import argparse
from typing import Any

from pomona.cli.train import add_run_options, until_stopped
from pomona.pages.text import table


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "ticket",
        help="compare winning tickets: the initial weights trained with the method's mask and with magnitude's",
        description="Train a dense network and prune it. Then train the initial weights with the mask that the method "
        "found, and with the mask of the dense network's largest weights. Resumes like train.",
    )
    add_run_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.studies.ticket import train_tickets

    result = until_stopped(train_tickets, options, "-ticket")
    expected = result["expected"] or {}
    masks = (("method", "ticket_accuracy"), ("magnitude", "magnitude_ticket_accuracy"))
    tickets = {mask: (result["tickets"][mask], expected.get(key)) for mask, key in masks}
    rows = [
        ["", "weights", "accuracy", "published"],
        _row("dense", result["report"]["total"], result["accuracy"]["base"], expected.get("base_accuracy")),
        *(_row(f"ticket by {m}", t["nonzero"], t["accuracy"], published) for m, (t, published) in tickets.items()),
    ]
    print(f"test accuracy on {result['data']}, seed {result['seed']}")
    print(table(rows, right=range(1, 4)))
    kept = result["tickets"]["method"]["nonzero"]
    print(f"the two masks share {result['shared_by_both_masks']:,} of {kept:,} weights")
    return 0


def _row(name: str, weights: int, accuracy: float, published: float | None) -> list[str]:
    return [name, f"{weights:,}", f"{accuracy:.2f}", f"{published:.2f}" if published else "-"]
