"""flash-attn's functions on fastattn: the same names, signatures, layouts and window convention (flash-attn 2.8)."""

from fastattn.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from fastattn.stable_names import export

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

export(globals())
