"""Masks: which queries see which keys, and the forms in which backends read that. `kinds` is the definition."""

from fastattn.masks.base import And, Mask, Or, visible_pairs
from fastattn.masks.kinds import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.stable_names import export

__all__ = [
    "And", "Causal", "Chunked", "Dense", "Full", "Lengths", "Mask", "Or", "Packed", "Prefix", "Segments", "Window",
    "visible_pairs",
]  # fmt: skip

export(globals())
