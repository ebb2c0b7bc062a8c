"""flash-attn's functions on fastattn: the same signatures and layouts, on a CPU too."""

import torch

from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache

q, k, v = (torch.randn(2, 10, heads, 16) for heads in (4, 2, 2))  # [batch, length, heads, head_dim]
out = flash_attn_func(q, k, v, causal=True, window_size=(4, 0))

caches, held = [torch.zeros(2, 32, 2, 16) for _ in range(2)], torch.zeros(2, dtype=torch.int32)
for step in range(10):  # token by token, the cache written in place
    now = slice(step, step + 1)
    row = flash_attn_with_kvcache(
        q[:, now], *caches, k[:, now], v[:, now], cache_seqlens=held + step, causal=True, window_size=(4, 0)
    )
    torch.testing.assert_close(row, out[:, now])
