"""``pomona train``: train and prune by a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train and prune by a recipe",
        description="Train and prune by a recipe. The same command again resumes a run that was stopped or killed, "
        "and the resumed run ends with the same bits.",
    )
    add_run_options(parser)
    parser.add_argument(
        "--base",
        metavar="DIR",
        type=Path,
        help="start from the dense network in this folder, which is trained there first if necessary; several recipes "
        "with the same [base] can share one",
    )
    parser.add_argument(
        "--start",
        metavar="FILE",
        type=Path,
        help="start from the dense network in this file (a state dict that torch.save wrote) instead of [base] or of "
        "the initial weights",
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw no pictures and write no page")
    parser.set_defaults(run=_run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all commands with runs share."""
    add_recipe_options(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the run (default: runs/RECIPE-seedN)")
    parser.add_argument(
        "--threads", metavar="N", type=positive, help="torch threads (default: torch's own choice, up to 4)"
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of where and how to train."""
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="as torch names it, e.g. cuda (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="compile training passes with torch.compile")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, changes to it, and the folder of its data."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or a name that `pomona recipes` lists")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one value of the recipe, e.g. --set prune.lr=0.01; may be given several times",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data's files (default: $POMONA_DATA)")


def positive(text: str) -> int:
    """A whole number >= 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def recipe_and_data(options: argparse.Namespace) -> tuple[Any, Any]:
    """The recipe and the data that the options name."""
    from pomona.train.recipe import load_recipe
    from pomona.zoo.data import DATA

    recipe = load_recipe(options.recipe, options.overrides)
    return recipe, DATA[recipe.data](options.data_dir)


def folder_of(options: argparse.Namespace, recipe: Any, suffix: str = "") -> Path:
    """The folder of the run."""
    out: Path = options.out or Path("runs") / f"{Path(options.recipe).stem}{suffix}-seed{recipe.seed}"
    return out


def threads_of(options: argparse.Namespace, folder: Path) -> int:
    """The number of threads asked for; otherwise that of the existing run; otherwise torch's choice, up to 4."""
    if options.threads:
        return int(options.threads)
    try:
        return int(json.loads((folder / "run.json").read_text())["threads"])
    except (OSError, ValueError, KeyError):
        import torch

        return min(torch.get_num_threads(), 4)


def until_stopped(
    train: Callable[..., dict[str, Any]], options: argparse.Namespace, suffix: str = ""
) -> dict[str, Any]:
    """Run a training function on the options; a stop by a signal exits with 130."""
    from pomona.train.progress import Progress
    from pomona.train.run import Stopped

    recipe, data = recipe_and_data(options)
    folder = folder_of(options, recipe, suffix)
    progress = Progress()
    try:
        how: dict[str, Any] = {"device": options.device, "compiled": options.compile}
        return train(recipe, data, folder, threads=threads_of(options, folder), progress=progress, **how)
    except Stopped as stopped:
        progress.line(f"{stopped}; run the same command again to resume. Checkpoint and metrics are in {folder}")
        sys.exit(130)
    finally:
        progress.clear()


def _run(options: argparse.Namespace) -> int:
    from pomona.studies.progressive import train_progressive
    from pomona.train.stages import read_base, train, train_base

    if options.start and options.base:
        raise ValueError("--start and --base both name a network to start from; give one of them")

    def go(recipe: Any, data: Any, folder: Path, **how: Any) -> dict[str, Any]:
        base: Any
        if recipe.progressive:
            if options.start:
                raise ValueError("--start does not work with [progressive]; name the dense network with --base")
            return train_progressive(recipe, data, folder, base=options.base, **how)
        if options.start:
            base = read_base(options.start, recipe, data, device=options.device)
            recipe = replace(recipe, base=None)
        else:
            base = train_base(recipe, data, options.base, **how) if options.base else None
        return train(recipe, data, folder, base=base, pictures=not options.no_pictures, **how)

    print(conclusion(until_stopped(go, options)))
    return 0


def conclusion(result: Mapping[str, Any]) -> str:
    """The results of a run, in two or three lines."""
    from pomona.pages.pictures import times

    accuracy, loss = result["accuracy"], result.get("loss") or {}  # runs of earlier versions have no losses
    steps = [("base", "dense"), ("before_cut", "before the cut"), ("after_cut", "after"), ("retrained", "retrained")]
    accuracies = ", ".join(f"{accuracy[key]:.2f} {name}" for key, name in steps if accuracy.get(key) is not None)
    losses = ", ".join(f"{loss[key]:.4f} {name}" for key, name in steps if loss.get(key) is not None)
    report = result["report"]
    lines = [f"test loss (nats) {losses}"] if losses else []
    lines.append(f"{times(report['total'], report['nonzero'])} compression; accuracy {accuracies}, on {result['data']}")
    published = (result["expected"] or {}).get("accuracy")
    if published is not None:
        lines.append(f"published: {published:.2f} at the end; here {accuracy['final'] - published:+.2f}")
    return "\n".join(lines)
