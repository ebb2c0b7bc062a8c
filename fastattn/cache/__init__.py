"""Keys and values kept between calls, for decoding: contiguous, or in the blocks of a pool."""

from fastattn.cache.base import CacheView, KVCache
from fastattn.stable_names import export

__all__ = ["CacheView", "KVCache"]

export(globals())
