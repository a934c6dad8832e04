"""The papers again, rewritten in numpy: the slow and obvious versions that the library is tested against.

Nothing here shares code with the library. Arrays keep the dtype they come in. One file a paper; section numbers in them
refer to the project's fact sheet. Every file names the wrong variants that tests must be able to tell from the paper.
"""

from tests.oracles.gsm import decay_exponent, gsm_cut, gsm_step, passive_weight, schedule
from tests.oracles.masks import Array, Mask, top_k_mask, top_k_mask_with_floor

__all__ = [
    "Array",
    "Mask",
    "decay_exponent",
    "gsm_cut",
    "gsm_step",
    "passive_weight",
    "schedule",
    "top_k_mask",
    "top_k_mask_with_floor",
]
