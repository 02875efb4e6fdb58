"""What a decoder remembers of the tokens it has read."""

from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Reading, Room
from tokenlab.cache.full import FullCache, Slots
from tokenlab.cache.layers import Cache, LayerCache
from tokenlab.cache.per_layer import PerLayer
from tokenlab.cache.token_select import TokenSelect
from tokenlab.cache.window import RingCache, SinkCache

__all__ = [
    "Cache",
    "CachePolicy",
    "CacheView",
    "Entries",
    "FullCache",
    "Heads",
    "LayerCache",
    "PerLayer",
    "Reading",
    "RingCache",
    "Room",
    "SinkCache",
    "Slots",
    "TokenSelect",
]
