"""What the fuzzers share: cases that can be repeated by seed and number, and a limit of time for each."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable


def run(
    cases: range, seed: int, once: Callable[[int], str], *, seconds: float, clock: Callable[[], float]
) -> Counter[str]:
    """How often each answer of ``once(case)`` came; a wrong or slow case is named."""
    told = Counter[str]()
    for case in cases:
        start = clock()
        try:
            told[once(case)] += 1
        except Exception as error:
            raise AssertionError(f"--seed {seed} --only {case}: {type(error).__name__}: {error}") from error
        taken = clock() - start
        assert taken < seconds, f"--seed {seed} --only {case} took {taken:.1f} s"
    return told


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of the options that all have; ``cases_of`` reads them."""
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("--cases", type=int, default=100_000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", type=int, help="one case, which is shown")
    return made


def cases_of(options: argparse.Namespace) -> range:
    return range(options.cases) if options.only is None else range(options.only, options.only + 1)
