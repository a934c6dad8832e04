"""``pomona recipes``: list the built-in recipes."""

from __future__ import annotations

import argparse
from typing import Any

from pomona.pages.text import table


def add_to(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="list the built-in recipes")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.train.recipe import builtin_recipes, load_recipe

    recipes = {name: load_recipe(name) for name in builtin_recipes()}
    print(table([[name, f"{recipe.title} ({recipe.source})"] for name, recipe in recipes.items()]))
    return 0
