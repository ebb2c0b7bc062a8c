"""flash-attn's functions on fastattn: the same names, signatures, layouts and window convention (flash-attn 2.8)."""

from fastattn.former_names import export
from fastattn.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

export(globals())
