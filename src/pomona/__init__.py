"""Pomona prunes a neural network while it trains.

One line beside any ``torch.optim`` optimizer, one global budget, exact zeros at the end::

    pruner = pomona.Pruner(model, optimizer, pomona.GSM(sparsity=0.9))
    ...                      # your training loop, as it is
    print(pruner.harden())

Five questions, five nouns: WHAT is pruned (:class:`Scope`), HOW a weight is ranked (a score), HOW MUCH and WHERE (a
budget), WHEN (a :class:`Schedule`), and HOW weights move (a :class:`Method`).
"""

from pomona.budget import global_top_k
from pomona.diagnosis import Diagnosis
from pomona.harden import hold
from pomona.method import Method, Weight
from pomona.methods import ADMM, GRDA, GSM, METHODS, SET, Magnitude, RigL, WeightMom
from pomona.progressive import Candidate, progressive
from pomona.pruner import Pruner
from pomona.report import LayerReport, Report, report
from pomona.schedule import Constant, Cosine, Cubic, Every, Geometric, Linear, Schedule
from pomona.scope import Scope
from pomona.score import magnitude, saliency

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "GRDA",
    "GSM",
    "METHODS",
    "SET",
    "Candidate",
    "Constant",
    "Cosine",
    "Cubic",
    "Diagnosis",
    "Every",
    "Geometric",
    "LayerReport",
    "Linear",
    "Magnitude",
    "Method",
    "Pruner",
    "Report",
    "RigL",
    "Schedule",
    "Scope",
    "Weight",
    "WeightMom",
    "global_top_k",
    "hold",
    "magnitude",
    "progressive",
    "report",
    "saliency",
]
