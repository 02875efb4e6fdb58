"""What a decoder remembers of the tokens it has read."""

from tokenlab.cache.act_qkv import ActQKV
from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Picked, Reading, Room
from tokenlab.cache.ems import EMS
from tokenlab.cache.full import FullCache, Slots
from tokenlab.cache.layers import Cache, LayerCache
from tokenlab.cache.looped import LoopedCache
from tokenlab.cache.louis_kv import LouisKV
from tokenlab.cache.page_top_k import PageTopK
from tokenlab.cache.paged import PagedCache
from tokenlab.cache.per_layer import PerLayer
from tokenlab.cache.recurrent import Recurrent, RecurrentState
from tokenlab.cache.shared import SharedKeys
from tokenlab.cache.token_select import TokenSelect
from tokenlab.cache.window import RingCache, SinkCache

__all__ = [
    "EMS",
    "ActQKV",
    "Cache",
    "CachePolicy",
    "CacheView",
    "Entries",
    "FullCache",
    "Heads",
    "LayerCache",
    "LoopedCache",
    "LouisKV",
    "PageTopK",
    "PagedCache",
    "PerLayer",
    "Picked",
    "Reading",
    "Recurrent",
    "RecurrentState",
    "RingCache",
    "Room",
    "SharedKeys",
    "SinkCache",
    "Slots",
    "TokenSelect",
]
