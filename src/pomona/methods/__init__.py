"""The methods, one paper and one file each."""

from pomona.method import Method
from pomona.methods.admm import ADMM
from pomona.methods.feather import Feather
from pomona.methods.grda import GRDA
from pomona.methods.gsm import GSM
from pomona.methods.magnitude import Magnitude
from pomona.methods.rigl import RigL
from pomona.methods.set import SET
from pomona.methods.weightmom import WeightMom

METHODS: dict[str, type[Method]] = {
    "admm": ADMM,
    "feather": Feather,
    "grda": GRDA,
    "gsm": GSM,
    "magnitude": Magnitude,
    "rigl": RigL,
    "set": SET,
    "weightmom": WeightMom,
}

__all__ = ["ADMM", "GRDA", "GSM", "METHODS", "SET", "Feather", "Magnitude", "RigL", "WeightMom"]
