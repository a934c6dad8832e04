"""What happens inside ``optimizer.step()``, and the zeros that are held afterwards."""

from pomona.pruner.hold import hold
from pomona.pruner.masks import apply_masks
from pomona.pruner.pruner import Pruner

__all__ = ["Pruner", "apply_masks", "hold"]
