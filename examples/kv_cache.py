"""Decoding with a cache: a long prompt, then token by token; and the same with blocks found through a table."""

import torch

import fastattn
from fastattn.masks import Causal

batch, heads, kv_heads, dim = 2, 8, 2, 16
for cache in (
    fastattn.KVCache.growing(batch, kv_heads, dim),
    fastattn.KVCache.static(batch, kv_heads, 64, dim),
    fastattn.KVCache.sliding(batch, kv_heads, 16, dim),
    fastattn.KVCache.paged(batch, kv_heads, dim, blocks=8, block_size=24),
):
    for new in (30, 1, 1):
        query, key, value = (torch.randn(batch, each, new, dim) for each in (heads, kv_heads, kv_heads))
        cache.update(key, value)
        out = fastattn.attention(query, cache.key, cache.value, mask=Causal())
    print(cache, tuple(out.shape))
