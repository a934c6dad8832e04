"""Networks with sparse weights, executed as a whole, from a file or from a torch model; numpy only.

    >>> import pomona.runtime  # doctest: +SKIP
    >>> logits = pomona.runtime.load("lenet.pomona.safetensors").run(images)  # doctest: +SKIP

Only :meth:`Network.from_model` needs torch. Without the compiled core a network runs in numpy, literally and slowly
(:mod:`pomona.runtime.reference`); ``Network.is_compiled`` says which it is.
"""

from pomona.runtime.graph import Graph
from pomona.runtime.network import Network, load

__all__ = ["Graph", "Network", "load"]
