"""The decoder-only Transformer, assembled from swappable parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.cache import Cache, CachePolicy, Room
from tokenlab.core.arrays import (
    Array,
    Float,
    Hidden,
    Logits,
    Positions,
    Prompt,
    Scalar,
    Segments,
    Tokens,
)
from tokenlab.core.ledger import Ledger
from tokenlab.core.parameters import parameter
from tokenlab.core.projection import SharedRows
from tokenlab.core.reports import gathered
from tokenlab.depth import DepthProgram, DepthTrace, Sequential
from tokenlab.models.attention import Attention, Memory, Mixer
from tokenlab.models.heads import Head, TiedHead
from tokenlab.models.layers import FeedForward, RMSNorm


class Block(nn.Module):
    """Pre-norm residual block: ``x += mixer(norm(x)); x += feedforward(norm(x))``.

    Attributes:
        mixer: reads other tokens.
        feedforward: mixes channels.
        norm: the norm before each of them.
        dropout: share of the residual updates dropped in training.
        post_norm: the norm of each update before it is added, or None.
    """

    mixer: Mixer
    feedforward: FeedForward
    norm: RMSNorm = RMSNorm()
    dropout: float = 0.0
    post_norm: RMSNorm | None = None

    @nn.nowrap
    def kinds(self) -> tuple[Block, ...]:
        """The kinds of layer that take turns: this one alone."""
        return (self,)

    @nn.nowrap
    def causal_twin(self) -> Block:
        """The layer to evaluate and decode with, on the same parameters; itself if causal."""
        twin = self.mixer.causal_twin()
        return self if twin is self.mixer else self.clone(mixer=twin)

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        cache: Memory | None = None,
        train: bool = False,
        prompt: Prompt | None = None,
    ) -> tuple[Hidden, Memory | None]:
        """One layer; returns the stream and the layer's new cache."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        normed = self.norm.copy(parent=self, name="mixer_norm")(x)
        update, cache = self.mixer(
            normed,
            positions=positions,
            segments=segments,
            cache=cache,
            prompt=prompt,
            train=train,
        )
        x = x + drop(self._post_normed(update, "mixer"))
        normed = self.norm.copy(parent=self, name="feedforward_norm")(x)
        update = self.feedforward(normed, valid=segments > 0, train=train)
        x = x + drop(self._post_normed(update, "feedforward"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), cache

    def _post_normed(self, update: Hidden, part: str) -> Hidden:
        if self.post_norm is None:
            return update
        return self.post_norm.copy(parent=self, name=f"{part}_post_norm")(update)


class BlockPattern(nn.Module):
    """Layers of several kinds that take turns: layer i is of kind ``i % len(blocks)``.

    Attributes:
        blocks: one layer of each place in a turn.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if len(self.blocks) < 2:
            raise ValueError("a pattern has at least two blocks; give the model the one instead")
        super().__post_init__()

    @nn.nowrap
    def kinds(self) -> tuple[Block, ...]:
        """The kinds of layer that take turns."""
        return tuple(self.blocks)

    @nn.nowrap
    def causal_twin(self) -> BlockPattern:
        """The layers to evaluate and decode with, on the same parameters."""
        return self.clone(blocks=tuple(block.causal_twin() for block in self.blocks))


def layered(blocks: Sequence[Block]) -> Block | BlockPattern:
    """Layers that take turns in this order; the block itself where there is one."""
    return blocks[0] if len(blocks) == 1 else BlockPattern(blocks=tuple(blocks))


@flax.struct.dataclass
class ModelOutput:
    """What a forward pass gives.

    Attributes:
        hidden: final normalised stream, ready for the head.
        trace: what the depth program did.
        cache: caches of all layers with the new tokens appended, or None.
    """

    hidden: Hidden
    trace: DepthTrace
    cache: Cache | None = None


class Transformer(nn.Module):
    """Decoder-only language model.

    Attributes:
        vocab_size: rows of the embedding; must equal the tokenizer's.
        dim: model width D.
        num_layers: nominal layers; the depth program decides what runs.
        block: the layer, or the kinds of layer that take turns.
        depth: the program that runs the layers.
        head: the vocabulary projection.
        norm: the norm before the head.
        dtype: dtype of activations; parameters stay float32.
        embedding_scale: factor on input embeddings.
        max_length: longest document position the model is meant for.
        learned_positions: whether an embedding of each position, up to ``max_length``, is learned
            and added to what enters the stack, as in GPT-2 and BERT.
    """

    vocab_size: int
    dim: int
    num_layers: int
    block: Block | BlockPattern
    depth: DepthProgram = Sequential()
    head: Head = TiedHead()
    norm: RMSNorm = RMSNorm()
    dtype: Literal["float32", "bfloat16"] = "float32"
    embedding_scale: float = 1.0
    max_length: int = 2048
    learned_positions: bool = False

    def setup(self) -> None:
        """Creates the embedding, which both ends share, and that of positions."""
        shape, axes = (self.vocab_size, self.dim), ("vocab", "embed")
        small = nn.initializers.normal(0.02)
        self.embedding = parameter(self, "embedding", small, shape, axes)
        if self.learned_positions:
            self.position_embedding = parameter(
                self,
                "position_embedding",
                small,
                (self.max_length, self.dim),
                ("positions", "embed"),
            )

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Positions,
        segments: Segments,
        cache: Cache | None = None,
        train: bool = False,
        prompt: Prompt | None = None,
        embeddings: Hidden | None = None,
    ) -> ModelOutput:
        """Runs the stack.

        Args:
            tokens: token ids.
            positions: position of each token in its document.
            segments: document of each token in its row, 0 for padding.
            cache: from ``empty_cache`` or an earlier call; None in training.
            train: whether dropout is on (stream ``dropout``).
            prompt: tokens that are given, for mixers that read them in both directions; None is
                none, or with a cache that the first pass begins, all of its tokens.
            embeddings: what enters the stack in place of ``embed(tokens)``, such as mixtures of
                tokens; None is that.

        Raises:
            UserError: a prompt is marked, and the depth program does not tell its layers.
        """
        if self.is_initializing():
            self.head(self.embedding)
        x = self.entering(tokens, positions=positions, embeddings=embeddings)
        x, trace, cache = self.depth(
            x,
            self.block,
            num_layers=self.num_layers,
            positions=positions,
            segments=segments,
            cache=cache,
            train=train,
            prompt=prompt,
        )
        trace = trace.reporting(gathered(self.variables))
        if trace.streams is not None:
            trace = dataclasses.replace(trace, streams=self.norm(trace.streams))
        return ModelOutput(hidden=self.norm(x), trace=trace, cache=cache)

    def entering(
        self, tokens: Tokens, *, positions: Positions, embeddings: Hidden | None = None
    ) -> Hidden:
        """What enters the stack; the arguments are those of the call."""
        x = self.embed(tokens) if embeddings is None else embeddings.astype(self.dtype)
        if self.learned_positions:
            x += jnp.take(self.position_embedding, positions, axis=0, mode="clip").astype(x.dtype)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act"))

    def embed(self, tokens: Tokens) -> Hidden:
        """The embedding of each token."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return x * self.embedding_scale

    def mix(self, tokens: Tokens, *, mixture: Float[Array, "B T V"]) -> Hidden:
        """What enters the stack for mixtures of tokens: the means of their embeddings.

        Args:
            tokens: what is read where there is no mixture.
            mixture: share of each token, float32, with sum one, or zero where there is none.
        """
        x = jnp.einsum("btv,vd->btd", mixture, self.embedding, precision=jax.lax.Precision.HIGHEST)
        there = jnp.sum(mixture, axis=-1, keepdims=True) > 0.5
        return jnp.where(there, x.astype(self.dtype) * self.embedding_scale, self.embed(tokens))

    @nn.nowrap
    def causal_twin(self) -> Transformer:
        """The model to evaluate and decode with, on the same parameters; an equal one if causal."""
        return self.clone(block=self.block.causal_twin(), depth=self.depth.causal_twin())

    def head_weight(self) -> Float[Array, "V D"] | SharedRows:
        """The vocabulary projection, float32."""
        return self.head(self.embedding)

    def logits(self, hidden: Hidden) -> Logits:
        """Float32 logits of a few positions; training never calls this on whole batches."""
        weight = self.head_weight()
        if isinstance(weight, SharedRows):
            return weight.logits(hidden)
        weight = weight.astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)
        cap = self.head.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def ledger(self, trace: DepthTrace, *, positions: Positions, segments: Segments) -> Ledger:
        """Costs of one forward pass and its vocabulary projection, without a cache.

        Matrix products only: a block costs ``2 * parameters`` per token and ``4 * heads * width``
        per admitted pair; the projection costs ``2 * rows * width`` per token.
        """
        valid = jnp.sum(segments > 0).astype(jnp.float32)
        flops, pairs = self.work(trace, positions=positions, segments=segments)
        return Ledger(
            passes=jnp.float32(1),
            tokens=valid,
            slots=jnp.float32(segments.size),
            block_tokens=jnp.sum(trace.depth).astype(jnp.float32),
            attended_pairs=pairs,
            flops=flops + valid * 2 * self.head.rows(self.vocab_size) * self.dim,
        )

    def work(
        self, trace: DepthTrace, *, positions: Positions, segments: Segments
    ) -> tuple[Scalar, Scalar]:
        """Operations and query-key pairs of the blocks in one forward pass, without a cache."""
        kinds = self.block.kinds()
        pairs = jnp.stack(
            [
                kind.mixer.pairs(
                    active=trace.asking()[number :: len(kinds)],
                    read=trace.tokens_read()[number :: len(kinds)],
                    positions=positions,
                    segments=segments,
                )
                for number, kind in enumerate(kinds)
            ]
        )
        runs = jnp.sum(trace.active, axis=(1, 2), dtype=jnp.float32)
        return self.flops(runs, pairs) + trace.flops, jnp.sum(pairs) + trace.pairs

    @nn.nowrap
    def flops(self, runs: Any, pairs: Any) -> Any:
        """Operations of the blocks, without the vocabulary projection.

        Args:
            runs: tokens that went through each application, ``[R]``.
            pairs: query-key pairs of each application, ``[R]``, or of each kind of layer.
        """
        kinds = self.block.kinds()
        shares = ~np.asarray(self.depth.projects(self.num_layers))
        total = 0.0
        for number, kind in enumerate(kinds):
            mine, projections = runs[number :: len(kinds)], kind.mixer.flops(self.dim)
            total += mine.sum() * (projections + kind.feedforward.flops(self.dim))
            total += pairs[number :: len(kinds)].sum() * kind.mixer.flops_per_pair(self.dim)
            saved = projections - kind.mixer.flops(self.dim, projects=False)
            total -= mine[shares[number :: len(kinds)]].sum() * saved
        return total

    @nn.nowrap
    def empty_cache(self, policy: CachePolicy, *, batch: int, capacity: int) -> Cache:
        """Caches of all layers, for ``batch`` rows of up to ``capacity`` tokens.

        Raises:
            UserError: the policy has no room for this, or the depth program does not decode.
        """
        order = self.depth.cached_layers(self.num_layers)
        mixers = self.mixers()
        heads = tuple(mixers[i].heads(self.dim) for i in order)
        return Cache.empty(policy, Room(batch, capacity, self.dtype), heads)

    @nn.nowrap
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixer of every nominal layer."""
        kinds = self.block.kinds()
        return tuple(kinds[i % len(kinds)].mixer for i in range(self.num_layers))

    @nn.nowrap
    def attentions(self) -> tuple[Attention, ...]:
        """The attention of every nominal layer.

        Raises:
            ValueError: a mixer is not attention.
        """
        mixers = self.mixers()
        for mixer in mixers:
            if not isinstance(mixer, Attention):
                raise ValueError(f"{type(mixer).__name__} is not attention over keys and values")
        return cast(tuple[Attention, ...], mixers)


def for_decoding(model: Transformer, params: PyTree) -> tuple[Transformer, PyTree]:
    """The causal twin, unrolled: what a decoder runs of a model."""
    return unrolled(model.causal_twin(), params)


def unrolled(model: Transformer, params: PyTree) -> tuple[Transformer, PyTree]:
    """The same function with one parameter tree per layer, as decoding needs it."""
    depth = model.depth
    if not (isinstance(depth, Sequential) and depth.scan):
        return model, params
    rest = {name: value for name, value in params.items() if name != "block"}
    layers = {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["block"])
        for i in range(model.num_layers)
    }
    return model.clone(depth=depth.clone(scan=False)), rest | layers
