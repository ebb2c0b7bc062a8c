"""Masks: which queries see which keys. `base`: Mask, & and |. `kinds`: each mask, its definition. `paged`: over blocks.
For backends: `serialize` (primitives, pytrees), `program` (postfix, for C++), `blocks` (lists of tiles).
torch's own: `flex` takes a CausalBias or BlockMask; `mask_mod` reads its function by the rules of `mask_mod_rules`.
"""

from fastattn.masks.base import And, Mask, Or, visible_pairs
from fastattn.masks.kinds import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.stable_names import export

__all__ = [
    "And", "Causal", "Chunked", "Dense", "Full", "Lengths", "Mask", "Or", "Packed", "Prefix", "Segments", "Window",
    "visible_pairs",
]  # fmt: skip

export(globals())
