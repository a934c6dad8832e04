"""``pomona recipes``: what there is to train."""

from __future__ import annotations

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="list the built-in recipes")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.train.recipe import builtin_recipes, load_recipe

    for name in builtin_recipes():
        recipe = load_recipe(name)
        print(f"{name:28}{recipe.title} ({recipe.source})")
    return 0
