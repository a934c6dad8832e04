"""What happens inside ``optimizer.step()``, and the zeros that are held afterwards."""

from pomona.pruner.pruner import Pruner

__all__ = ["Pruner"]
