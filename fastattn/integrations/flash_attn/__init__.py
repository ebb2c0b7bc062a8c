"""flash-attn's functions on fastattn: the same names, signatures, layouts and window convention (flash-attn 2.8).

    from fastattn.integrations.flash_attn import flash_attn_func      # in place of: from flash_attn import ...

Their conventions, turned into fastattn's here and nowhere else: tensors are [batch, length, heads, head_dim]; causal
and windows are aligned bottom-right; a window's side of -1 has no end, and causal=True ends the right one at 0. They
run on a CPU and in float32 too. What differs: a row that sees no key has lse -inf (flash-attn: +inf), dropout has
fastattn's bits, and under torch.use_deterministic_algorithms `deterministic=False` is deterministic too.
"""

from fastattn.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
