"""``pomona ticket``: are the masks that pruning finds winning tickets?"""

from __future__ import annotations

import argparse
from typing import Any

from pomona.cli.train import add_run_options, until_stopped


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "ticket",
        help="compare winning tickets: the method's mask and magnitude's, trained from the initial weights",
        description="Train a dense network and prune it; then put the mask that the method found, and that of the "
        "dense network's largest weights, on the initial weights and train each. Resumes like train.",
    )
    add_run_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.studies.ticket import train_tickets

    result = until_stopped(train_tickets, options, "-ticket")
    expected = result["expected"] or {}
    rows = [("dense", result["report"]["total"], result["accuracy"]["base"], expected.get("base_accuracy"))]
    for mask, key in (("method", "ticket_accuracy"), ("magnitude", "magnitude_ticket_accuracy")):
        ticket = result["tickets"][mask]
        rows.append((f"ticket by {mask}", ticket["nonzero"], ticket["accuracy"], expected.get(key)))
    print(f"test accuracy on {result['data']}, seed {result['seed']}")
    print(f"{'':22}{'weights':>10}{'accuracy':>10}{'published':>11}")
    for name, weights, accuracy, published in rows:
        print(f"{name:22}{weights:>10,}{accuracy:>10.2f}{f'{published:.2f}' if published else '-':>11}")
    kept = result["tickets"]["method"]["nonzero"]
    print(f"the two masks share {result['shared_by_both_masks']:,} of {kept:,} weights")
    return 0
