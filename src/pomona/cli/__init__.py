"""The command line: ``pomona train | watch | compare | sweep | ticket | valley | diagnose | report | export |
bench | recipes | env``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from pomona._version import __version__


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from pomona.cli import bench, compare, diagnose, env, export, recipes, report, sweep, ticket, train, valley, watch

    top = argparse.ArgumentParser(prog="pomona", description="Prune a neural network while it trains.")
    top.add_argument("--version", action="version", version=f"pomona {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, watch, compare, sweep, ticket, valley, diagnose, report, export, bench, recipes, env):
        command.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 negative answer, 2 bad input, 130 interrupted."""
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
    except BrokenPipeError:  # as with `| head`: the reader has gone
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:  # users can fix these; anything else is a bug and shows
        print(f"pomona: error: {error}", file=sys.stderr)
        return 2
