"""A language model that plans in a few latent vectors before it writes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.cache import Cache
from tokenlab.core.arrays import (
    Array,
    Float,
    Hidden,
    Int,
    Positions,
    Prompt,
    Scalar,
    Segments,
    Tokens,
)
from tokenlab.core.context import target_logits
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import dense_init, parameter
from tokenlab.core.reports import Reports
from tokenlab.core.weighted import Weighted
from tokenlab.models.passes import Passes
from tokenlab.models.transformer import ModelOutput, Transformer

Plan = Int[Array, "B P"]


class CapsuleTransformer(Transformer):
    """Reads its own plan of a question as K vectors behind it, squeezed through a bottleneck.

    In a row ``[Q; slots; Y]`` the K slots are places of the token ``slot_id``. Planning reads
    learned vectors ``c_k`` there and leaves states ``h_k``; ``z_k = h_k W_d`` has few numbers, and
    the capsule ``z_k W_u``, times the root mean square of the embeddings, is what execution reads
    in the slots. So ``Y`` follows a plan that nobody writes. Where the batch has a plan, the model
    is also asked for it with nothing but the capsule before it, ``[capsule; P]``: the nats of its
    tokens are the loss ``plan`` of the trace, which ``AuxiliaryTerm(name="plan")`` weighs.

    Decoding reads ``[Q; slots]`` as a prompt, in one pass, and goes on as any model does.

    Reference: Shan, Song, Dai, Liang, Chen, "R-Capsule: Compressing High-Level Plans for Efficient
    Large Language Model Reasoning", 2025, arXiv:2509.22131.

    Differences from the paper: its wiring is known from descriptions alone; the two losses are
    trained together; capsules begin at the scale of embeddings.

    Attributes:
        slot_id: the token that holds a slot open, not padding.
        slots: K, of every question; 0 is the plain model.
        bottleneck: numbers of a ``z_k``; 0 makes every capsule zero.
        generate: whether all slots are planned in one pass, or each after the capsules before it
            are read.
        plan_is_read: whether planning reads the plan before the question, which only training has.
        reader: a model of its own that reads plans back, of the same vocabulary and width; None is
            this one.
    """

    slot_id: int = 0
    slots: int = 2
    bottleneck: int = 16
    generate: Literal["parallel", "autoregressive"] = "parallel"
    plan_is_read: bool = False
    reader: Transformer | None = None

    def setup(self) -> None:
        """Creates the embeddings, the slots and the bottleneck."""
        super().setup()
        if self.slots == 0:
            return
        if self.slot_id == 0:
            raise UserError("slot_id 0 is padding; set model.slot_id to the token of a slot")
        small = nn.initializers.normal(0.02)
        self.slot_embedding = parameter(
            self, "slot_embedding", small, (self.slots, self.dim), ("positions", "embed")
        )
        if self.bottleneck:
            self.narrow = parameter(
                self, "narrow", dense_init, (self.dim, self.bottleneck), ("embed", "norm")
            )
            self.widen = parameter(
                self, "widen", dense_init, (self.bottleneck, self.dim), ("norm", "embed")
            )

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
        plan: Plan | None = None,
    ) -> ModelOutput:
        """Plans, where there are slots, and executes; see ``Transformer.__call__``.

        Args:
            tokens: token ids.
            positions: position of each token in its document.
            segments: document of each token in its row, 0 for padding.
            cache: from ``empty_cache`` or an earlier call; None in training.
            train: whether dropout is on.
            prompt: tokens that are given.
            embeddings: what enters the stack in place of tokens that are no slots.
            plan: ids of the plan of a row's first segment, its mark first, 0 behind them.

        Raises:
            UserError: a prompt comes in parts, or the plan that planning reads is missing.
        """
        options: dict[str, Any] = {
            "positions": positions, "segments": segments, "cache": cache, "prompt": prompt,
        }  # fmt: skip
        if self.is_initializing():
            if self.reader is not None:
                self.reader(tokens, positions=positions, segments=segments)
            return super().__call__(tokens, **options, train=train, embeddings=embeddings)
        if self.slots == 0 or not self._plans(cache, tokens.shape[1]):
            return super().__call__(tokens, **options, train=train, embeddings=embeddings)
        run = _CapsulePasses(self, tokens, options, train)
        x = self.embed(tokens) if embeddings is None else embeddings
        latents, flops = self._planned(run, x, plan)
        slot = run.slot[..., None]
        capsules = self._capsules(latents)
        out = run(jnp.where(slot >= 0, capsules, x).astype(self.dtype))
        aux = {}
        if plan is not None:
            first = _gathered(jnp.where(segments[..., None] == 1, slot, -1), capsules, self.slots)
            nats, weights, cost = self._read_back(run, first, plan)
            aux, flops = {"plan": Weighted.of(nats, weights)}, flops + cost
        own = Reports(aux=aux, figures={}, flops=out.trace.flops + flops, pairs=out.trace.pairs)
        return dataclasses.replace(out, trace=out.trace.reporting(own))

    def latents(
        self,
        tokens: Tokens,
        *,
        positions: Positions,
        segments: Segments,
        plan: Plan | None = None,
    ) -> Float[Array, "B K Z"]:
        """``z`` of a row's first segment, float32."""
        options = {"positions": positions, "segments": segments, "cache": None, "prompt": None}
        run = _CapsulePasses(self, tokens, options, train=False)
        latents, _ = self._planned(run, self.embed(tokens), plan)
        slot = jnp.where(segments == 1, run.slot, -1)[..., None]
        return _gathered(slot, latents, self.slots)

    def plan_logits(self, latents: Float[Array, "B K Z"], *, plan: Plan) -> Float[Array, "B P V"]:
        """Logits of what follows each token of a plan, with nothing but the capsule before them."""
        tokens = jnp.zeros((len(plan), 0), plan.dtype)
        empty = {"positions": tokens, "segments": tokens, "cache": None, "prompt": None}
        run = _CapsulePasses(self, tokens, empty, train=False)
        return self._reader().logits(self._reading(run, self._capsules(latents), plan)[0])

    def _plans(self, cache: Cache | None, length: int) -> bool:
        """Whether a pass may hold slots: in training, and where it begins a cache."""
        if cache is None or cache.stage == "draft":
            return cache is None
        if (length <= self.slots) if cache.stage == "first" else (length > 1):
            raise UserError(
                "a capsule is planned in one pass over the question; "
                "read prompts whole, with prefill_chunk=None"
            )
        return cache.stage == "first"

    def _planned(
        self, run: _CapsulePasses, x: Hidden, plan: Plan | None
    ) -> tuple[Float[Array, "B T Z"], Any]:
        """``z`` at every slot, anything elsewhere, and the operations it took."""
        slot = run.slot[..., None]
        learned = jnp.take(self.slot_embedding, jnp.maximum(run.slot, 0), axis=0)
        read = jnp.where(slot >= 0, learned, x).astype(self.dtype)
        before = None
        if self.plan_is_read:
            if plan is None:
                raise UserError(
                    "the capsule is made of question and plan, and there is no plan; "
                    "set model.plan_is_read=False to decode"
                )
            before = (plan, self.embed(plan))
        flops: Any = 0.0
        latents = jnp.zeros((*run.slot.shape, self.bottleneck), jnp.float32)
        for number in range(self.slots if self.generate == "autoregressive" else 1):
            hidden, cost = run.planning(read, before)
            flops += cost
            if self.bottleneck:
                found = hidden.astype(jnp.float32) @ self.narrow[None]
                alone = self.generate == "parallel"
                latents = found if alone else jnp.where(slot == number, found, latents)
            capsules = self._capsules(latents)
            read = jnp.where(slot == number, capsules, read).astype(self.dtype)
        return latents, flops

    def _capsules(self, latents: Float[Array, "B N Z"]) -> Float[Array, "B N D"]:
        """What the slots read, float32."""
        if not self.bottleneck:
            return jnp.zeros((*latents.shape[:2], self.dim), jnp.float32)
        table = jax.lax.stop_gradient(self.embedding) * self.embedding_scale
        return latents @ self.widen[None] * jnp.sqrt(jnp.mean(table**2))

    def _reader(self) -> Transformer:
        return self if self.reader is None else self.reader

    def _reading(
        self, run: _CapsulePasses, capsules: Float[Array, "B K D"], plan: Plan
    ) -> tuple[Float[Array, "B P D"], Any]:
        """The stream behind each token of a plan, and the operations."""
        model = self._reader()
        marks = jnp.full((len(plan), self.slots), self.slot_id, plan.dtype)
        tokens = jnp.concatenate([marks, plan], axis=1)
        x = jnp.concatenate([capsules.astype(self.dtype), model.embed(plan)], axis=1)
        hidden, cost = run.reading(model, tokens, x)
        return hidden[:, self.slots :], cost

    def _read_back(
        self, run: _CapsulePasses, capsules: Float[Array, "B K D"], plan: Plan
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Any]:
        """Nats of the tokens of a plan behind its mark, their weights, and the operations."""
        hidden, cost = self._reading(run, capsules, plan[:, :-1])
        model, targets = self._reader(), plan[:, 1:]
        found = target_logits(
            hidden, model.head_weight(), targets=targets, softcap=model.head.softcap
        )
        nats = found.log_sum_exp - found.target
        return nats, (targets > 0).astype(jnp.float32), cost


class _CapsulePasses(Passes):
    """Passes over one row, and which of its places are slots."""

    def __init__(
        self, module: CapsuleTransformer, tokens: Tokens, options: dict[str, Any], train: bool
    ) -> None:
        super().__init__(module, train=train)
        self.tokens, self.options = tokens, options
        is_slot = (tokens == module.slot_id) & (options["segments"] > 0)
        number = jnp.cumsum(is_slot, axis=1) - 1
        self.slot = jnp.where(is_slot, number % module.slots, -1)

    def __call__(self, x: Hidden) -> ModelOutput:
        """Execution."""
        return self.run(self.tokens, x, **self.options)

    def planning(
        self, x: Hidden, before: tuple[Plan, Float[Array, "B P D"]] | None
    ) -> tuple[Hidden, Any]:
        """States of a pass over the row up to its last slot, and its operations."""
        ahead = jnp.cumsum((self.slot >= 0)[:, ::-1], axis=1)[:, ::-1] > 0
        options = self.options | {"segments": jnp.where(ahead, self.options["segments"], 0)}
        tokens, count = self.tokens, 0
        if before is not None:
            plan, embedded = before
            count = plan.shape[1]
            places = jnp.broadcast_to(jnp.arange(count)[None], plan.shape)
            options["positions"] = jnp.concatenate([places, options["positions"] + count], axis=1)
            options["segments"] = jnp.concatenate(
                [(plan > 0).astype(jnp.int32), options["segments"]], axis=1
            )
            tokens = jnp.concatenate([plan, tokens], axis=1)
            x = jnp.concatenate([embedded, x], axis=1)
        out = self.run(tokens, x, **options)
        return out.hidden[:, count:], _work(self.model, out, options)

    def reading(self, model: Transformer, tokens: Tokens, x: Hidden) -> tuple[Hidden, Any]:
        """States of a pass of ``model`` over capsule and plan, and its operations."""
        options = {
            "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape),
            "segments": (tokens > 0).astype(jnp.int32),
            "cache": None,
            "prompt": None,
        }
        if isinstance(model, CapsuleTransformer):
            out = self.run(tokens, x, **options)
        else:
            out = model(tokens, **options, train=self.train, embeddings=x)
        return out.hidden, _work(model, out, options)


def _work(model: Transformer, out: ModelOutput, options: dict[str, Any]) -> Scalar:
    """Operations of a pass, but for those of the vocabulary."""
    return model.work(out.trace, positions=options["positions"], segments=options["segments"])[0]


def _gathered(
    slot: Int[Array, "B T 1"], values: Float[Array, "B T N"], slots: int
) -> Float[Array, "B K N"]:
    """The values at a row's slots, in their order; zero where it has none."""
    chosen = (slot == jnp.arange(slots)[None, None]).astype(values.dtype)
    return jnp.einsum("btk,btn->bkn", chosen, values, precision=jax.lax.Precision.HIGHEST)
