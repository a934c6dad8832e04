"""Which parts of a network's tensors belong to which channel, and which are constants whatever the input: a proof.

The model is read by ``torch.export`` into a program of ATen operators, which is walked once without running it. A
*slot* is one index along one dimension of one parameter or buffer: row 3 of a weight, entry 3 of its bias. Every
element of every tensor in between carries the slot that it goes with, if any, and its value, if all inputs have it.
The rules say, operator by operator, what follows for its result, and which slots go together: those are a channel.
Whatever has no rule holds every slot that reaches it, so a channel goes only where each operator on its way is known to
treat it alone. ``state`` has the facts and what follows from all of them, ``rules`` the operators, ``program`` the
walk.
"""

from pomona.exporters.flow.program import UnreadableError, differing, read, rigid, sizes_by_module
from pomona.exporters.flow.state import Flow

__all__ = ["Flow", "UnreadableError", "differing", "read", "rigid", "sizes_by_module"]
