"""``pomona diagnose``: can this recipe's run succeed, before it is spent?"""

from __future__ import annotations

import argparse
from typing import Any

from pomona.cli.train import add_recipe_options, recipe_and_data


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="check before training whether a recipe's passive weights will reach zero",
        description="Compute the decay exponent of a recipe's pruning stage: how far momentum and weight decay shrink "
        "a weight that receives no gradient. Exits with 1 if that is not enough for a cut without loss.",
    )
    add_recipe_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pomona.train.run import check, diagnose, num_steps_per_epoch

    recipe, data = recipe_and_data(options)
    data = data.hold_out(recipe.validation) if recipe.validation else data
    stage = recipe.prune
    steps_per_epoch = num_steps_per_epoch(recipe, data)
    check(recipe, steps_per_epoch)
    print(f"{recipe.title}: {recipe.make_method(steps_per_epoch)}")
    print(f"data: {data.description}")
    print(
        f"prune: {stage.epochs} epochs of {steps_per_epoch} steps, lr {stage.lr:g} times {stage.lr_drop:g} after "
        f"{list(stage.lr_drops)}, momentum {stage.momentum:g}, weight decay {stage.weight_decay:g}"
    )
    diagnosis = diagnose(recipe, steps_per_epoch)
    if diagnosis is None:
        print("this method has no diagnosis")
        return 0
    print(diagnosis)
    return 0 if diagnosis.is_enough else 1
