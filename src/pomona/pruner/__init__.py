"""What happens inside ``optimizer.step()``, and the zeros that are held afterwards."""

from pomona.pruner.hold import hold
from pomona.pruner.pruner import Pruner

__all__ = ["Pruner", "hold"]
