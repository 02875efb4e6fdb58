"""What a decoder remembers of the tokens it has read."""

from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Reading, Room
from tokenlab.cache.full import FullCache, Slots
from tokenlab.cache.layers import Cache, LayerCache

__all__ = [
    "Cache",
    "CachePolicy",
    "CacheView",
    "Entries",
    "FullCache",
    "Heads",
    "LayerCache",
    "Reading",
    "Room",
    "Slots",
]
