"""Token mixers: the layers through which tokens read each other."""

from __future__ import annotations

import abc
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.block_sparse_attention import (
    Causal,
    MaskRule,
    UnorderedRule,
    block_sparse_attention,
)
from tokenlab.attention import PrefillAttention, Prefilled
from tokenlab.cache import Entries, Heads, LayerCache, SharedKeys
from tokenlab.cache.layers import Shares
from tokenlab.core.arrays import (
    Array,
    Bool,
    Float,
    Hidden,
    Int,
    Positions,
    Prompt,
    Scalar,
    Segments,
)
from tokenlab.core.errors import UserError
from tokenlab.core.per_device import per_device
from tokenlab.models.layers import Linear, LowRank, RMSNorm, Rotary, RotaryScaling

# What a layer may be given to read beside the tokens themselves.
Memory = LayerCache | SharedKeys

_HEADS, _ROWS = ("batch", None, "heads", None), ("batch", None)
# Whole sequences on every device: a query may see any key.
_AXES = {name: _HEADS for name in ("q", "k", "v")} | {
    name: _ROWS for name in ("q_positions", "kv_positions", "q_segments", "kv_segments")
}
_BLOCK = 128


class Mixer(nn.Module, abc.ABC):
    """The mixer family: reads other tokens of the same segment."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        cache: Memory | None = None,
        prompt: Prompt | None = None,
        train: bool = False,
    ) -> tuple[Hidden, Memory | None]:
        """The mixed tokens and the cache with theirs appended."""

    @nn.nowrap
    def causal_twin(self) -> Mixer:
        """The mixer to evaluate and decode with, on the same parameters; itself if causal."""
        return self

    @abc.abstractmethod
    def heads(self, dim: int) -> Heads:
        """How the heads score in a model of width ``dim``: what a cache is told."""

    @abc.abstractmethod
    def flops(self, dim: int, *, projects: bool = True) -> int:
        """Floating-point operations of the projections, per token of a width-D stream.

        Args:
            dim: width D.
            projects: whether tokens get keys and values of their own.
        """

    @abc.abstractmethod
    def flops_per_pair(self, dim: int) -> int:
        """Floating-point operations per admitted query-key pair, all heads together."""

    @abc.abstractmethod
    def pairs(
        self,
        *,
        active: Bool[Array, "R B T"],
        read: Bool[Array, "R B T"],
        positions: Positions,
        segments: Segments,
    ) -> Scalar:
        """Query-key pairs over all R applications, float32: active tokens with those they read."""


class Attention(Mixer):
    """Grouped-query softmax attention with rotary positions.

    Reference: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from
    Multi-Head Checkpoints", 2023, arXiv:2305.13245.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width of a head; None is model width / num_heads.
        rope_base: base of the rotary wavelengths.
        qk_norm: norm of queries and keys before rotation, or None.
        softcap: bound c of scores by ``c * tanh(score / c)``, or None.
        rule: which keys a query may see.
        impl: form of ``kernels_pallas.block_sparse_attention``; None takes the best that the
            platform has.
        qkv_bias: whether queries, keys and values have biases.
        rope_scaling: change of the rotary frequencies, or None.
        scale: factor of the scores; None is head width ** -0.5.
        prefill: attention of a whole prompt with itself, or None for all of what the rule shows.
        adapter: what is added to the kernels of projections, or None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    rope_base: float = 10_000.0
    qk_norm: RMSNorm | None = None
    softcap: float | None = None
    rule: MaskRule = Causal()
    impl: Literal["ref", "xla", "tpu", "gpu"] | None = None
    qkv_bias: bool = False
    rope_scaling: RotaryScaling | None = None
    scale: float | None = None
    prefill: PrefillAttention | None = None
    adapter: LowRank | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        super().__post_init__()

    def width(self, dim: int) -> int:
        """Width of a head in a model of width ``dim``."""
        if self.head_dim is None and dim % self.num_heads:
            raise ValueError(f"width {dim} is not a multiple of num_heads {self.num_heads}")
        return self.head_dim or dim // self.num_heads

    def heads(self, dim: int) -> Heads:
        """The query and key heads, and how they are turned."""
        width = self.width(dim)
        return Heads(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            width=width,
            scale=width**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            rotate=Rotary(base=self.rope_base, scaling=self.rope_scaling),
        )

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        cache: Memory | None = None,
        prompt: Prompt | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B C D"], Memory | None]:
        """Attends within segments, over the cache where one is given.

        Args:
            x: normalised residual stream.
            positions: position of each token in its document.
            segments: 0 for padding.
            cache: this layer's cache; then rows hold one segment each. Or the keys and values that
                it shares with earlier applications, or that only some tokens ask for; then the
                result is theirs.
            prompt: not read; the rule says who sees whom.
            train: not read.

        Raises:
            UserError: keys are shared, and ``prefill`` would leave out some of them.
        """
        heads = self.heads(x.shape[-1])
        asking = cache.asking(x) if isinstance(cache, SharedKeys) else x
        q = self._project(asking, self.num_heads, heads.width, "q", self.qk_norm)
        if isinstance(cache, SharedKeys) and not cache.projects:
            k, v = cache.own()
        else:
            k = self._project(x, self.num_kv_heads, heads.width, "k", self.qk_norm)
            v = self._project(x, self.num_kv_heads, heads.width, "v", None)
        new = Entries(q=q, k=k, v=v, positions=positions, segments=segments)
        if isinstance(cache, SharedKeys):
            new, cache = cache.begun(new)
            out, cache = self._over_shared(new, cache, heads)
        elif cache is None:
            out = self._within(new, new, heads)
        else:
            first = None if self.prefill is None else self._prefilled
            out, cache = cache.attend(new, rule=self.rule, impl=self.impl, first=first)
        out = out.reshape(*out.shape[:2], self.num_heads * heads.width)
        return self._projected(out, x.shape[-1], name="out", axes=("heads", "embed")), cache

    def _prefilled(
        self, new: Entries, heads: Heads
    ) -> tuple[Float[Array, "B T H E"], Float[Array, " B"], Shares]:
        """Whole prompts, turned already; the result, the pairs, and what was looked at."""
        part = self.prefill
        assert part is not None

        def attend(**arrays: Array) -> tuple[Array, ...]:
            options = {"rule": self.rule, "softcap": heads.softcap, "impl": self.impl}
            return tuple(part(**arrays, scale=heads.scale, **options))

        found = Prefilled(
            *per_device(
                attend,
                axes=_AXES | {"positions": _ROWS, "segments": _ROWS},
                out=(_HEADS, *[("batch", "heads")] * 3),
                **new._asdict(),
            )
        )
        pairs, density, visited = (
            jnp.mean(x, axis=1) for x in (found.pairs, found.density, found.visited)
        )
        return found.out, pairs, {"prefill_density": density, "prefill_visited": visited}

    def _over_shared(
        self, new: Entries, shared: SharedKeys, heads: Heads
    ) -> tuple[Float[Array, "B C H E"], SharedKeys]:
        """The tokens that come over all whose keys are shared, and over a cache if there is one."""
        if self.prefill is not None:
            raise UserError(
                f"{type(self.prefill).__name__} selects keys for all tokens of a prompt, and some "
                "of them come where keys are shared: set prefill=None, or keys='recursion_wise'"
            )
        shared = shared.joined(new)
        if shared.cache is not None:
            return shared.attend(new, rule=self.rule, impl=self.impl)
        keys = shared.entries
        assert keys is not None
        if shared.picked is None:
            return self._within(new, keys, heads), shared
        return self._within(new, keys, heads, blocks=self._blocks(new, keys)), shared

    def _blocks(self, new: Entries, keys: Entries) -> Int[Array, "B Q N"]:
        """Blocks of keys of which a block of queries sees any; -1 in the place of others."""

        def blocks(x: Int[Array, "B S"]) -> Int[Array, "B N 128"]:
            return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK))).reshape(len(x), -1, _BLOCK)

        kv_positions, kv_segments = blocks(keys.positions), blocks(keys.segments)

        def seen(rows: tuple[Array, Array]) -> Bool[Array, "B N"]:
            positions, segments = (x[:, None, :, None] for x in rows)
            shown = self.rule(
                positions, kv_positions[:, :, None], segments, kv_segments[:, :, None]
            )
            return jnp.any(shown, axis=(2, 3))

        # A block of queries at a time, so that no mask of all pairs is made.
        rows = tuple(blocks(x).swapaxes(0, 1) for x in (new.positions, new.segments))
        listed = jax.lax.map(seen, rows).swapaxes(0, 1)
        return jnp.where(listed, jnp.arange(listed.shape[2], dtype=jnp.int32)[None, None], -1)

    def _within(
        self,
        new: Entries,
        keys: Entries,
        heads: Heads,
        blocks: Int[Array, "B Q N"] | None = None,
    ) -> Float[Array, "B T H E"]:
        """Attention of ``new`` over ``keys``, of those ``blocks`` where they are given."""
        q = heads.rotate(new.q, positions=new.positions)
        k = heads.rotate(keys.k, positions=keys.positions)
        # For calibration; kept only where asked for.
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        if self.prefill is not None and not self.is_initializing():
            if not self.prefill.causal:
                raise UserError(
                    f"{type(self.prefill).__name__} looks at later queries, so no loss may be read"
                    " from it: set prefill=None, or score what follows a prompt read into a cache"
                )
            return self._prefilled(new._replace(q=q, k=k), heads)[0]
        attend = functools.partial(
            block_sparse_attention,
            rule=self.rule,
            scale=heads.scale,
            softcap=heads.softcap,
            block_shape=(_BLOCK, _BLOCK),
            impl=self.impl,
        )
        if blocks is None and isinstance(self.rule, UnorderedRule):
            blocks = self._blocks(new, keys)
        listed = {} if blocks is None else {"blocks": blocks}
        return per_device(
            attend,
            axes=_AXES | {"blocks": ("batch", None, None)},
            out=_HEADS,
            q=q,
            k=k,
            v=keys.v,
            q_positions=new.positions,
            kv_positions=keys.positions,
            q_segments=new.segments,
            kv_segments=keys.segments,
            **listed,
        )

    def flops(self, dim: int, *, projects: bool = True) -> int:
        """Queries and output, and keys and values where tokens get them."""
        queries, keys = (count * self.width(dim) for count in (self.num_heads, self.num_kv_heads))
        names = {"q": queries, "out": queries} | ({"k": keys, "v": keys} if projects else {})
        plain = 2 * dim * sum(names.values())
        if self.adapter is None:
            return plain
        return plain + sum(self.adapter.flops(name, dim, to) for name, to in names.items())

    def flops_per_pair(self, dim: int) -> int:
        """One product for the score and one for the value, in every query head."""
        return 2 * 2 * self.num_heads * self.width(dim)

    def pairs(
        self,
        *,
        active: Bool[Array, "R B T"],
        read: Bool[Array, "R B T"],
        positions: Positions,
        segments: Segments,
    ) -> Scalar:
        """Counts what the mask rule admits in each application."""

        def count(total: Scalar, masks: tuple[Array, Array]) -> tuple[Scalar, None]:
            q_seg, kv_seg = (jnp.where(mask_BxT, segments, 0) for mask_BxT in masks)
            admitted = self.rule(
                positions[:, :, None], positions[:, None, :], q_seg[:, :, None], kv_seg[:, None, :]
            )
            return total + jnp.sum(admitted, dtype=jnp.float32), None

        return jax.lax.scan(count, jnp.float32(0), (active, read))[0]

    def _project(
        self, x: Hidden, count: int, width: int, name: str, norm: RMSNorm | None
    ) -> Float[Array, "B T H E"]:
        axes = ("embed", "heads")
        flat = self._projected(x, count * width, name=name, axes=axes, bias=self.qkv_bias)
        heads = flat.reshape(*x.shape[:2], count, width)
        return heads if norm is None else norm.copy(parent=self, name=f"{name}_norm")(heads)

    def _projected(
        self, x: Hidden, features: int, *, name: str, axes: tuple[str, str], bias: bool = False
    ) -> Float[Array, "B T F"]:
        """The four projections; what another kind of projection replaces."""
        return Linear(features, axes=axes, bias=bias, adapter=self.adapter, name=name)(x)
