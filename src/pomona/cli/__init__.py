"""The command line: ``pomona train | watch | compare | sweep | ticket | valley | diagnose | report | export |
bench | recipes | env``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from pomona._version import __version__


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    from pomona.cli import bench, compare, diagnose, env, export, recipes, report, sweep, ticket, train, valley, watch

    top = argparse.ArgumentParser(prog="pomona", description="Prune a neural network while it trains.")
    top.add_argument("--version", action="version", version=f"pomona {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, watch, compare, sweep, ticket, valley, diagnose, report, export, bench, recipes, env):
        command.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a negative answer, 2 bad input, 130 interrupted."""
    try:
        options = parser().parse_args(arguments)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        way_out = "pip install torch; without it the library runs networks: pomona.runtime"
        print(f"pomona: error: the command line needs torch, which is not installed ({way_out})", file=sys.stderr)
        return 2
    warnings.showwarning = lambda message, *_, **__: print(f"WARNING: {message}", file=sys.stderr, flush=True)
    try:
        status: int = options.run(options)
        return status
    except BrokenPipeError:  # as of `| head`: nobody reads on
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:  # what users can mend; anything else is a defect and shows
        print(f"pomona: error: {error}", file=sys.stderr)
        return 2
