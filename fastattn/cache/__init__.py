"""Keys and values kept between calls, for decoding: of a fixed size, growing, sliding, or in blocks.

    cache = fastattn.KVCache.growing(batch, num_kv_heads, head_dim)
    cache.update(key, value)                                     # [batch, num_kv_heads, new, head_dim]
    out = fastattn.attention(query, cache.key, cache.value, mask=Causal())

`cache.key` and `cache.value` stand for what is held. `attention` sees the tokens that are there and no others, and a
mask that is aligned bottom-right puts the last query at the last token, whatever empty slots there are. Nothing is
copied: kernels read the cache in place, blocks too.
"""

from fastattn.cache.base import CacheView, KVCache

__all__ = ["CacheView", "KVCache"]
