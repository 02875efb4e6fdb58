"""Keys and values that several applications of one layer read in a pass."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import MaskRule
from tokenlab.cache.attending import Impl
from tokenlab.cache.base import Entries, Picked
from tokenlab.cache.layers import LayerCache
from tokenlab.core.arrays import Array, Float


class SharedKeys(flax.struct.PyTreeNode):
    """What a layer is given in the place of its cache, where later applications read its keys.

    The first application comes without ``entries`` and leaves those of its tokens. Later ones come
    with some of these tokens, all of which they read. Where a cache is given, what it holds is read
    as well; whoever runs the layer appends with :meth:`finished`.

    Attributes:
        projects: whether the tokens that come bring keys and values, in the place of theirs.
        cache: of the layer, or None.
        entries: the tokens of the first application, not turned.
        picked: which of them come; None is all, in order.
        asks: of a first application that all tokens come to, for their keys, those that ask for
            what it makes of them; None is all.
    """

    projects: bool = flax.struct.field(pytree_node=False, default=True)
    cache: LayerCache | None = None
    entries: Entries | None = None
    picked: Picked | None = None
    asks: Picked | None = None

    def asking(self, x: Float[Array, "B T D"]) -> Float[Array, "B C D"]:
        """The tokens whose queries are wanted."""
        return x if self.asks is None else self.asks.gather(x)

    def begun(self, new: Entries) -> tuple[Entries, SharedKeys]:
        """What those bring that ask, and the keys of all, which they read.

        Args:
            new: queries of those that ask, the rest of all tokens.
        """
        asks = self.asks
        if asks is None:
            return new, self
        k, v, positions, segments = (asks.gather(x) for x in new[1:])
        segments = jnp.where(asks.in_use(), segments, 0)
        batch, length = new.segments.shape
        none = jnp.zeros((batch, length, *new.q.shape[2:]), new.q.dtype)
        entries = new._replace(q=asks.spread(new.q, none))
        shared = self.replace(projects=False, entries=entries, picked=asks, asks=None)
        return Entries(new.q, k, v, positions, segments), shared

    def own(self) -> tuple[Float[Array, "B C K E"], Float[Array, "B C K E"]]:
        """Keys and values that the tokens that come have already."""
        assert self.entries is not None
        k, v = self.entries.k, self.entries.v
        return (k, v) if self.picked is None else (self.picked.gather(k), self.picked.gather(v))

    def joined(self, new: Entries) -> SharedKeys:
        """With what the tokens bring."""
        if self.entries is None or (self.projects and self.picked is None):
            return self.replace(entries=new)
        if not self.projects:
            return self
        picked = self.picked
        assert picked is not None
        own = {
            name: picked.spread(getattr(new, name), getattr(self.entries, name)) for name in "qkv"
        }
        return self.replace(entries=self.entries._replace(**own))

    def attend(
        self, new: Entries, *, rule: MaskRule, impl: Impl | None
    ) -> tuple[Float[Array, "B C H E"], SharedKeys]:
        """Attention of the tokens that come over the cache and all entries.

        Args:
            new: the tokens, not turned, already :meth:`joined`.
            rule: which keys a query may see.
            impl: form of the kernels.
        """
        cache, entries, picked = self.cache, self.entries, self.picked
        assert cache is not None and entries is not None
        if picked is None:
            out, cache = cache.look(entries._replace(q=new.q), rule=rule, impl=impl)
            return out, self.replace(cache=cache, entries=entries.following(out))
        asking = entries._replace(q=picked.spread(new.q, jnp.zeros_like(entries.q)))
        out, cache = cache.look(asking, rule=rule, impl=impl, asks=picked.kept)
        return picked.gather(out), self.replace(cache=cache, entries=entries.following(out))

    def finished(self) -> LayerCache:
        """The cache with the entries appended, or waiting where they are a draft."""
        assert self.cache is not None and self.entries is not None
        return self.cache.keep(self.entries)
