"""Ideas beyond the papers, each as a method or as a change of a recipe, and what came of them.

    python bench/beyond.py run --data-dir DIR --out DIR     LeNet-300-100 on MNIST, as `compare-*`: 40 epochs, 3 seeds
    python bench/beyond.py table --out DIR                  the table, and bench/results/beyond.json
    python bench/beyond.py train ...                        `pomona train` with the methods below beside the library's
    python bench/beyond.py recalibrate RUN ... --data-dir DIR    accuracy of finished runs with fresh batch statistics

`run` goes on where it was; with --only it runs some, so that several can run at once. What came of it: bench/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pomona import METHODS, Method, Weight, Weights, cli, magnitude
from pomona.ops import drop_buffers_, drop_gradients_, drop_weights_, masks_of, sparsity_of
from pomona.schedule import Value, check_value
from pomona.score import saliency
from pomona.studies.compare import base_key, conclude
from pomona.train.evaluate import evaluate
from pomona.train.finished import read_run
from pomona.train.progress import Progress
from pomona.train.recipe import load_recipe, recipe_from_dict
from pomona.train.stages import train, train_base
from pomona.zoo.data import DATA
from pomona.zoo.models import build_model


@dataclass(frozen=True, slots=True)
class Fade(Method):
    r"""GSM with a decay that comes to its end on time, whatever the optimizer and its schedule.

    With `s = |w g|` (or `|w|`), averaged over steps, B the floor((1 - sparsity) N) largest s of the whole network, and
    R steps left, this one included,

        g <- B g;   the optimizer's step;   w <- w (R - 1) / R  outside of B

    so that a weight that stays passive goes straight to zero, wherever it began, and is exactly zero after step
    `steps`. From then on the zeros are held.

    Args:
        sparsity: a number, or a schedule.
        steps: the step at which passive weights are zero.
        score: "saliency" or "magnitude".
        average: share of the old score in the new one, in [0, 1); 0: each step's own.
    """

    sparsity: Value
    _: KW_ONLY
    steps: int
    score: str = "saliency"
    average: float = 0.0
    min_density: float = 1e-4

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        check_value("average", self.average, low=0.0, high=1.0)

    def init(self, w: Weight) -> dict[str, Tensor]:
        return {"mask": torch.ones_like(w.value, dtype=torch.bool), "s": torch.zeros_like(w.value, dtype=torch.float32)}

    def before_step(self, weights: Weights, step: int) -> None:
        if step <= self.steps:
            for w in weights:
                now = magnitude(w.value) if self.score == "magnitude" else saliency(w.value, w.grad)
                w.state["s"].mul_(self.average).add_(now.tensor(), alpha=1.0 - self.average)
            scores = [magnitude(w.state["s"]) for w in weights]
            for w, mask in zip(weights, self.budget.keep(scores, step, of=weights).masks(), strict=True):
                w.state["mask"].copy_(mask)
        drop_gradients_(weights, masks_of(weights))
        if step == self.steps + 1:
            drop_buffers_(weights, masks_of(weights))

    def after_step(self, weights: Weights, step: int) -> None:
        left = self.steps - step + 1
        if left <= 1:
            drop_weights_(weights, masks_of(weights))
            return
        for w in weights:
            w.value.mul_(torch.where(w.state["mask"], 1.0, (left - 1) / left))

    def support(self, weights: Weights, step: int) -> list[Tensor]:
        if step >= self.steps:
            return masks_of(weights)
        return self.budget.keep([magnitude(w.value) for w in weights], step, of=weights).masks()

    def metrics(self, weights: Weights) -> dict[str, float]:
        return {"sparsity": sparsity_of(weights)}


METHODS["fade"] = Fade

RESULT = Path(__file__).parent / "results" / "beyond.json"
FADE = ("method.name=fade", "method.steps=60 %")
ADAMW = (
    "prune.optimizer=adamw",
    "prune.lr=1e-3",
    "prune.momentum=0",
    "prune.nesterov=false",
    "prune.weight_decay=0.01",
)
IDEAS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> recipe and what is changed in it
    "feather": ("compare-feather", ()),
    "feather-erk": ("compare-feather", ("method.allocation=erk",)),
    "feather-adamw": ("compare-feather", ADAMW),
    "fade-saliency": ("compare-feather", FADE),
    "fade-average": ("compare-feather", (*FADE, "method.average=0.95")),
    "fade-magnitude": ("compare-feather", (*FADE, "method.score=magnitude")),
    "fade-adamw": ("compare-feather", (*FADE, *ADAMW)),
    "magnitude-adamw": ("compare-magnitude-global", ADAMW),
    "magnitude-floor": ("compare-magnitude-global", ("method.min_density=0.002",)),
    "magnitude-erk-restart": ("compare-magnitude-erk", ("prune.lr_restart=15", "prune.lr_drops=[10, 13]")),
    "gsm-ramp": ("compare-gsm", ('method.ramp={ shape = "cubic", steps = "60 %" }',)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "recalibrate"))
    parser.add_argument("runs", nargs="*", type=Path, help="recalibrate: folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("runs/beyond"))
    parser.add_argument("--data-dir")
    parser.add_argument("--only", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--compressions", nargs="+", type=float, default=[10, 30, 100, 300])
    options = parser.parse_args()
    if options.what == "run":
        run(options)
    elif options.what == "recalibrate":
        for folder in options.runs:
            print(json.dumps(recalibrate(folder, options.data_dir)), flush=True)
    else:
        print(conclude(options.out))
        shutil.copy(options.out / "compare.json", RESULT)


def run(options: argparse.Namespace) -> None:
    data = DATA["mnist"](options.data_dir)
    how = {"threads": 1, "progress": Progress()}
    for seed in options.seeds:
        for name in options.only:
            source, changes = IDEAS[name]
            for compression in options.compressions:
                recipe = load_recipe(source, [*changes, f"method.compression={compression:g}", f"seed={seed}"])
                base = train_base(recipe, data, options.out / f"base-{base_key(recipe)}", **how)
                train(
                    recipe, data, options.out / f"{name}-{compression:g}x-seed{seed}", base=base, pictures=False, **how
                )


def recalibrate(folder: Path, data_dir: str | None, num_batches: int = 100) -> dict[str, object]:
    """Test accuracy of what a run left, and with running means and variances of augmented training batches of 128."""
    recipe = recipe_from_dict(read_run(folder)["recipe"])
    data = DATA[recipe.data](data_dir)
    model = build_model(recipe.model, seed=0)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    before = evaluate(model, data).accuracy
    order = data.order(torch.Generator().manual_seed(0))
    torch.optim.swa_utils.update_bn((data.batch(part)[0] for part in order.split(128)[:num_batches]), model)
    return {"run": folder.name, "accuracy": before, "recalibrated": evaluate(model, data).accuracy}


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(cli.main())
    main()
