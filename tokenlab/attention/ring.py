"""Attention over sequences that are split over devices: what travels round the ring, and back."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.block_sparse_attention import (
    NOTHING,
    Bidirectional,
    Causal,
    merge_partial,
    partial_attention,
)
from tokenlab.core.arrays import Array, Float, Int, Positions, Segments
from tokenlab.core.errors import UserError
from tokenlab.core.per_device import mesh_axes, per_device

Partial = tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]
_TOKENS = ("batch", "length")
_HEADS = (*_TOKENS, "heads", None)


class Keys(NamedTuple):
    """Keys and values of some tokens, and whose they are."""

    k: Float[Array, "B S K E"]
    v: Float[Array, "B S K E"]
    segments: Int[Array, "B S"]


class Queries(NamedTuple):
    """Queries of some tokens."""

    q: Float[Array, "B T H E"]
    segments: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceAttention(abc.ABC):
    """Exact attention where every device holds a part of each row: the sequence-parallel family.

    ``out`` and its log-sum-exp are those of attention on one device. Causal rows are laid out in a
    zigzag: cut into 2P chunks, device r holds chunks r and 2P-1-r, so that every device has the
    same work in every step, two products of a chunk with a chunk. Differentiable through both
    results.

    Attributes:
        causal: whether a token sees no later one.
        axis: the mesh axis over which rows are split.
        impl: form of ``kernels_pallas.block_sparse_attention``.
    """

    causal: bool = True
    axis: str = "sequence"
    impl: Literal["ref", "xla", "tpu", "gpu"] | None = None

    def __call__(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Positions,
        segments: Segments,
        scale: float,
    ) -> Partial:
        """The result and its log-sum-exp, on arrays of whole rows in the order of the text.

        The mesh in force says over how many devices they are split. Bringing a causal row into
        the zigzag and back moves it once each way; who keeps rows there calls :meth:`local`.

        Args:
            q: queries.
            k: keys.
            v: values.
            positions: positions of the tokens; rising within a segment.
            segments: 0 for padding; tokens see their own segment only.
            scale: factor of the scores.

        Raises:
            UserError: causal rows do not split into two chunks per device.
        """
        length = q.shape[1]
        if not mesh_axes("length", length):
            rule = Causal() if self.causal else Bidirectional()
            return partial_attention(
                q=q, k=k, v=v, q_positions=positions, kv_positions=positions, q_segments=segments,
                kv_segments=segments, rule=rule, scale=scale, impl=self.impl,
            )  # fmt: skip
        devices = jax.sharding.get_abstract_mesh().shape[self.axis]
        order = np.arange(length)
        if self.causal:
            if length % (2 * devices):
                raise UserError(
                    f"rows of {length} do not split into two chunks on each of {devices} devices;"
                    f" pad them to a multiple of {2 * devices}"
                )
            order = zigzag(length, devices)
        arrays = {"q": q, "k": k, "v": v, "positions": positions, "segments": segments}
        out, log_sum_exp = per_device(
            functools.partial(self.local, scale=scale),
            axes={name: _HEADS if name in "qkv" else _TOKENS for name in arrays},
            out=(_HEADS, _HEADS[:3]),
            **{name: jnp.take(x, order, axis=1) for name, x in arrays.items()},
        )
        back = np.argsort(order)
        return jnp.take(out, back, axis=1), jnp.take(log_sum_exp, back, axis=1)

    @abc.abstractmethod
    def local(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Positions,
        segments: Segments,
        scale: float,
    ) -> Partial:
        """The same inside ``jax.shard_map``, on this device's part."""

    @abc.abstractmethod
    def sent(self, *, heads: int, kv_heads: int, width: int, itemsize: int) -> tuple[int, int]:
        """Bytes per token that a device sends in a step, one way round the ring and the other."""

    def _own(self, queries: Queries, keys: Keys, positions: Positions, scale: float) -> Partial:
        """A device's queries with its own keys; float32 from here on."""
        rule = Causal() if self.causal else Bidirectional()
        attend = functools.partial(
            partial_attention, rule=rule, scale=scale, impl=self.impl, q_positions=positions,
            kv_positions=positions, q_segments=queries.segments, kv_segments=keys.segments,
        )  # fmt: skip
        # Both chunks of a zigzag lie in the order of the text, as the causal map wants them.
        out, log_sum_exp = attend(q=queries.q, k=keys.k, v=keys.v)
        return out.astype(jnp.float32), log_sum_exp

    def _block(
        self, queries: Queries, keys: Keys, owners: tuple[Array, Array], scale: float
    ) -> Partial:
        """Queries of one device with keys of another, which need no causal mask."""
        attend = functools.partial(self._seen, scale=scale)
        if not self.causal:
            return attend(queries, keys)
        (q_low, q_high), (k_low, k_high) = _chunks(queries), _chunks(keys)
        later = owners[0] > owners[1]
        high = attend(q_high, k_low)
        mixed = attend(_where(later, q_low, q_high), _where(later, k_low, k_high))
        nothing = (jnp.zeros_like(mixed[0]), jnp.full_like(mixed[1], NOTHING))
        low = _where(later, mixed, nothing)
        high = merged(high, _where(later, nothing, mixed))
        out, log_sum_exp = (jnp.concatenate(x, axis=1) for x in zip(low, high, strict=True))
        return out, log_sum_exp

    def _seen(self, queries: Queries, keys: Keys, scale: float) -> Partial:
        def anywhere(segments: Array) -> Array:
            return jnp.zeros_like(segments)

        return partial_attention(
            q=queries.q, k=keys.k, v=keys.v, q_positions=anywhere(queries.segments),
            kv_positions=anywhere(keys.segments), q_segments=queries.segments,
            kv_segments=keys.segments, rule=Bidirectional(), scale=scale, impl=self.impl,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingAttention(SequenceAttention):
    """Keys and values travel, one device further in each step.

    Reference: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite
    Context", 2023, arXiv:2310.01889.

    Differences from the paper: causal rows lie in a zigzag.

    Attributes:
        causal: whether a token sees no later one.
        axis: the mesh axis over which rows are split.
        impl: form of ``kernels_pallas.block_sparse_attention``.
    """

    def local(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Positions,
        segments: Segments,
        scale: float,
    ) -> Partial:
        """Sends the keys on before it computes with them."""
        devices, here = lax.axis_size(self.axis), lax.axis_index(self.axis)
        every = lax.all_gather(segments, self.axis)
        queries, keys = Queries(q, segments), Keys(k, v, segments)
        result = self._own(queries, keys, positions, scale)
        for step in range(1, devices):
            k, v = (_shifted(x, self.axis, 1) for x in (k, v))
            owner = (here - step) % devices
            block = self._block(queries, Keys(k, v, every[owner]), (here, owner), scale)
            result = merged(result, block)
        return result[0].astype(q.dtype), result[1]

    def sent(self, *, heads: int, kv_heads: int, width: int, itemsize: int) -> tuple[int, int]:
        """Keys and values one way, nothing the other."""
        return 2 * kv_heads * width * itemsize, 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRing(SequenceAttention):
    """Queries travel one way round the ring, and what they found goes straight back the other.

    In step i device r holds the queries of device ``o = (r + i) mod P``; keys and values stay.
    While it computes, it sends the queries on to r - 1 and the result of the step before to its
    owner, who merges: ``out += sigmoid(lse_b - lse) (out_b - out)``,
    ``lse = log(exp(lse) + exp(lse_b))``.

    Reference: Wang, Liu, Li, Jiang, "TokenRing: An Efficient Parallelism Framework for
    Infinite-Context LLMs via Bidirectional Communication", 2024, arXiv:2412.20501.

    Differences from the paper: queries are always sent whole, for shapes may not depend on the
    device, where the released code sends half of them in some steps; gradients, which travel the
    same ways back, are an addition.

    Attributes:
        causal: whether a token sees no later one.
        axis: the mesh axis over which rows are split.
        impl: form of ``kernels_pallas.block_sparse_attention``.
    """

    def local(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Positions,
        segments: Segments,
        scale: float,
    ) -> Partial:
        """Sends queries and results on before it computes the next block."""
        devices, here = lax.axis_size(self.axis), lax.axis_index(self.axis)
        every = lax.all_gather(segments, self.axis)
        keys, dtype = Keys(k, v, segments), q.dtype
        result = self._own(Queries(q, segments), keys, positions, scale)
        block = None
        for step in range(1, devices):
            q = _shifted(q, self.axis, -1)
            if block is not None:
                result = merged(result, self._returned(block, step - 1))
            owner = (here + step) % devices
            block = self._block(Queries(q, every[owner]), keys, (owner, here), scale)
        if block is not None:
            result = merged(result, self._returned(block, devices - 1))
        return result[0].astype(dtype), result[1]

    def sent(self, *, heads: int, kv_heads: int, width: int, itemsize: int) -> tuple[int, int]:
        """Queries one way; results and their float32 log-sum-exps the other."""
        return heads * width * itemsize, heads * (width * itemsize + 4)

    def _returned(self, block: Partial, step: int) -> Partial:
        """What other devices found for this one's queries, from ``step`` devices away."""
        out, log_sum_exp = (_shifted(x, self.axis, step) for x in block)
        return out, log_sum_exp


def zigzag(length: int, devices: int) -> Int[np.ndarray, " T"]:
    """Index of the token in each place where device r holds chunks r and 2P-1-r of 2P."""
    chunks = np.arange(length).reshape(2 * devices, -1)
    pairs = [(device, 2 * devices - 1 - device) for device in range(devices)]
    return np.concatenate([chunks[i] for pair in pairs for i in pair])


def merged(left: Partial, right: Partial) -> Partial:
    """Attention over both sets of keys, float32."""
    outs, log_sum_exps = (jnp.stack(x) for x in zip(left, right, strict=True))
    return merge_partial(outs.astype(jnp.float32), log_sum_exps)


def _shifted(x: Array, axis: str, by: int) -> Array:
    """What the device ``by`` places before this one holds."""
    devices = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + by) % devices) for i in range(devices)])


def _chunks(tokens):
    """Both chunks of a zigzag."""
    half, kind = tokens.segments.shape[1] // 2, type(tokens)
    return kind(*(x[:, :half] for x in tokens)), kind(*(x[:, half:] for x in tokens))


def _where(condition: Array, left, right):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), left, right)


class StepCost(NamedTuple):
    """What one step of a ring costs a device.

    Attributes:
        forward_bytes: sent one way round the ring.
        backward_bytes: sent the other way.
        compute_seconds: of the products.
        seconds: the longest of the products and either way.
        warning: why another member is better here, or nothing.
    """

    forward_bytes: int
    backward_bytes: int
    compute_seconds: float
    seconds: float
    warning: str


def step_cost(
    part: SequenceAttention,
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    flops: float,
    bandwidth: float,
    itemsize: int = 2,
    hops: int = 1,
) -> StepCost:
    """Predicted cost of a step that hides communication behind computation as far as it goes.

    ``seconds = max(flops of the products / flops, bytes each way / bandwidth)``.

    Args:
        part: the algorithm.
        tokens: per device, of all rows of one length; the products grow with their square.
        heads: query heads.
        kv_heads: key heads.
        width: of a head.
        flops: rate of the products, per second.
        bandwidth: of a link in one direction, bytes per second.
        itemsize: bytes of an element.
        hops: links that a result crosses; 1 where all devices are linked with each other, the
            number of the step on a ring.
    """
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "itemsize": itemsize}
    forward, backward = (tokens * each for each in part.sent(**sizes))
    products = 4 * tokens**2 * heads * width // (2 if part.causal else 1)
    compute = products / flops
    seconds = max(compute, forward / bandwidth, hops * backward / bandwidth)
    ring = RingAttention().sent(**sizes)[0]
    warning = ""
    if max(part.sent(**sizes)) > ring:
        warning = (
            f"{heads} query heads share {kv_heads} key heads, so that queries and results are"
            f" larger than keys and values ({max(part.sent(**sizes))} against {ring} bytes a"
            " token); RingAttention sends less"
        )
    return StepCost(forward, backward, compute, seconds, warning)
