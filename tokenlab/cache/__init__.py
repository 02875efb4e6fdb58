"""What a decoder remembers of the tokens it has read."""

from tokenlab.cache.base import CachePolicy, CacheView
from tokenlab.cache.full import FullCache, FullCacheState

__all__ = ["CachePolicy", "CacheView", "FullCache", "FullCacheState"]
