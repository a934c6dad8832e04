"""docs/tried.md, the page of the models that were tried: ``make tried`` makes it, and tests compare what comes out."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from tests.foreign.models import MODELS, Tried
from tests.foreign.packages import prepare
from tests.foreign.trial import WAYS, Found, attempt

PAGE = Path(__file__).parents[2] / "docs" / "tried.md"

HEAD = """# Models that were tried

{count} networks that nobody here wrote, or that people put together from torch's own modules. Each has random weights,
few layers and a small input, because these are tests of mechanics and not of accuracy. `make check` takes each of them
through the same life and compares the numbers below; `make tried` makes this page. A new one is a line in
`tests/foreign/models.py`.

- The default [scope](concepts.md) selects what layers multiply with: as many tensors as the table says, and no bias,
  norm, scale, token, position, relative table or embedding.
- Pruned with [GSM](methods/gsm.md) and with [Magnitude](methods/magnitude.md) to {sparsity} zeros (those with a \\*
  also with Feather, RigL and ADMM): three steps, a checkpoint, two steps, `harden()`, two steps, `verify()`. The number
  of zeros is exact, and a layer that is emptied is named in a warning.
- The same again from the checkpoint (`weights_only=True`, in a new model), and in a `deepcopy` of model, optimizer and
  Pruner: equal bit for bit.
- Exported and loaded: equal bit for bit.
- [`pomona.compile`](runtime.md), with every layer sparse that can be: the outputs are torch's, to 1 part in 10,000.
  "Sparse layers" says how many these are, of the `Conv2d` and `Linear` that there are. Whether they gain depends on
  size and zeros.
- `pomona.runtime` runs the whole network without torch, and again the outputs are torch's; or its error names the first
  operation that is missing, which is then in the column.

Versions: {versions}.
"""

PACKAGES = {
    "torch": "Modules of torch",
    "transformers": "transformers",
    "timm": "timm",
    "torchvision": "torchvision",
    "segmentation-models-pytorch": "segmentation-models-pytorch",
    "torch-geometric": "torch-geometric",
    "ultralytics": "ultralytics",
}
"""What stands before the slash in a model's name -> heading."""


def versions() -> str:
    return ", ".join(f"{package} {version(package).partition('+')[0]}" for package in PACKAGES)


def row(name: str, tried: Tried, found: Found) -> str:
    """A model's line in the table."""
    star = " \\*" if len(tried.ways) == len(WAYS) - 1 else ""
    share = f"{found.weights:,} of {found.parameters:,}" if found.tensors else "none"
    runtime = f"`{found.runtime}`" if found.runtime.startswith("aten.") else found.runtime
    return (
        f"| {name.partition('/')[2]}{star} | {found.tensors or '-'} | {share} | {found.compiled} | {runtime} "
        f"| {_note(tried)} |"
    )


def said(name: str, found: Found) -> str:
    """What the Pruner says of the default scope."""
    text = textwrap.fill(found.said, 118, break_long_words=False, break_on_hyphens=False)
    return f"{name.partition('/')[2]}:\n\n```text\n{text}\n```\n"


def _note(tried: Tried) -> str:
    if tried.refused:
        return "refused" if tried.scope is None else "refused, and pruned with the scope that the error advises"
    if not tried.warned:
        return ""
    also = getattr(tried.scope, "also", ())
    return "left dense with a warning" + (f", and pruned with `Scope(also={list(also)})`" if also else "")


def page(found: Mapping[str, Found]) -> str:
    lines = [HEAD.format(count=len(found), sparsity="50 %", versions=versions())]
    for package, heading in PACKAGES.items():
        lines += [
            f"## {heading}\n",
            "| model | tensors | weights in scope | sparse layers | in the runtime | by default |",
            "| --- | ---: | ---: | ---: | --- | --- |",
            *(row(name, MODELS[name], f) for name, f in found.items() if name.partition("/")[0] == package),
            "",
        ]
    lines += ["## What the Pruner says\n", 'An error where the last column has "refused", and otherwise a warning.\n']
    lines += [said(name, f) for name, f in found.items() if f.said]
    return "\n".join(lines)


def main() -> None:
    prepare()
    torch.set_num_threads(1)
    found = {}
    for name, tried in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = attempt(tried, Path(folder))
        print(name, flush=True)
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
