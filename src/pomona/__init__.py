"""Pomona prunes a neural network while it trains.

One line beside any ``torch.optim`` optimizer, one global budget, exact zeros at the end::

    pruner = pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.9))
    ...                      # your training loop, as it is
    print(pruner.harden())

Five questions, five nouns: WHAT is pruned (:class:`Scope`), HOW a weight is ranked (a score), HOW MUCH and WHERE (a
budget), WHEN (a :class:`Schedule`), and HOW weights move (a :class:`Method`).

Names are imported when they are first used, so that what needs no torch works without it: ``pomona.runtime``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pomona._version import __version__ as __version__

if TYPE_CHECKING:
    from pomona import layout, runtime
    from pomona.budget import Budget
    from pomona.diagnosis import Diagnosis
    from pomona.exporters import Exported, FormatError, export, load, shrink
    from pomona.layout import Layout
    from pomona.method import Method
    from pomona.methods import ADMM, GRDA, GSM, METHODS, SET, Feather, Magnitude, RigL, WeightMom
    from pomona.methods.rounds import Candidate, progressive
    from pomona.migrate.sparseml import SparseMLRecipe, from_sparseml
    from pomona.migrate.torch_prune import from_torch_prune
    from pomona.pruner import Pruner, apply_masks, hold
    from pomona.reporting import LayerReport, Report, report
    from pomona.runtime.compile import compile
    from pomona.schedule import Constant, Cosine, Cubic, Every, Geometric, Linear, Schedule
    from pomona.scope import Scope
    from pomona.score import magnitude, saliency
    from pomona.selection.top_k import global_top_k
    from pomona.weight import Weight, Weights

_NAMES_IN = {
    "budget": ("Budget",),
    "diagnosis": ("Diagnosis",),
    "exporters": ("Exported", "FormatError", "export", "load", "shrink"),
    "layout": ("Layout",),
    "method": ("Method",),
    "methods": ("ADMM", "GRDA", "GSM", "METHODS", "SET", "Feather", "Magnitude", "RigL", "WeightMom"),
    "methods.rounds": ("Candidate", "progressive"),
    "migrate.sparseml": ("SparseMLRecipe", "from_sparseml"),
    "migrate.torch_prune": ("from_torch_prune",),
    "pruner": ("Pruner", "apply_masks", "hold"),
    "reporting": ("LayerReport", "Report", "report"),
    "runtime.compile": ("compile",),
    "schedule": ("Constant", "Cosine", "Cubic", "Every", "Geometric", "Linear", "Schedule"),
    "scope": ("Scope",),
    "selection.top_k": ("global_top_k",),
    "weight": ("Weight", "Weights"),
    "score": ("magnitude", "saliency"),
}
_PLACE_OF = {name: place for place, names in _NAMES_IN.items() for name in names}

__all__ = [
    "ADMM",
    "GRDA",
    "GSM",
    "METHODS",
    "SET",
    "Budget",
    "Candidate",
    "Constant",
    "Cosine",
    "Cubic",
    "Diagnosis",
    "Every",
    "Exported",
    "Feather",
    "FormatError",
    "Geometric",
    "LayerReport",
    "Layout",
    "Linear",
    "Magnitude",
    "Method",
    "Pruner",
    "Report",
    "RigL",
    "Schedule",
    "Scope",
    "SparseMLRecipe",
    "Weight",
    "WeightMom",
    "Weights",
    "apply_masks",
    "compile",
    "export",
    "from_sparseml",
    "from_torch_prune",
    "global_top_k",
    "hold",
    "layout",
    "load",
    "magnitude",
    "progressive",
    "report",
    "runtime",
    "saliency",
    "shrink",
]


def __getattr__(name: str) -> Any:
    if name in ("layout", "runtime"):
        return importlib.import_module(f"pomona.{name}")
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'pomona' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pomona.{_PLACE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
