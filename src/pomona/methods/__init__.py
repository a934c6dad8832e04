"""The methods, one paper and one file each."""

from pomona.method import Method
from pomona.methods.gsm import GSM

METHODS: dict[str, type[Method]] = {"gsm": GSM}

__all__ = ["GSM", "METHODS"]
