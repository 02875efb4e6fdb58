"""One token at a time: jitted prefill, then a while loop on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.cache import CachePolicy, FullCache
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, PRNGKeyArray, RowKeys
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.decode.sampling import Categorical, Sampler
from tokenlab.depth import DepthTrace
from tokenlab.models import Transformer, unrolled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a decoder wrote after each prompt.

    Attributes:
        tokens: new tokens, the end token included where it was drawn; 0 after them.
        lengths: new tokens per row.
        logp_model: log-probability of each under the model, nats; 0 after the end.
        logp_behaviour: log-probability under what was sampled from, nats; 0 after the end.
        ledger: cost of all passes.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    logp_model: Float[np.ndarray, "B N"]
    logp_behaviour: Float[np.ndarray, "B N"]
    ledger: Ledger


@flax.struct.dataclass
class _State:
    """The while loop's carry."""

    cache: PyTree
    logits: Float[Array, "B V"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    processors: PyTree
    tokens: Int[Array, "B N"]
    logp_model: Float[Array, "B N"]
    logp_behaviour: Float[Array, "B N"]
    count: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """Decodes a ragged batch of prompts left to right.

    A row's tokens depend on its prompt, its key and nothing else of the batch.

    Attributes:
        max_new_tokens: bound on the tokens written per row.
        sampler: draws tokens.
        end_ids: tokens that end a row.
        stream_every: tokens between calls of ``on_tokens``.
    """

    max_new_tokens: int = 128
    sampler: Sampler = Categorical()
    end_ids: tuple[int, ...] = (2,)
    stream_every: int = 16

    def __call__(
        self,
        view: View,
        prompts: Sequence[Sequence[int]],
        *,
        key: PRNGKeyArray,
        on_tokens: Callable[[np.ndarray, np.ndarray], np.ndarray | None] | None = None,
    ) -> Generation:
        """Writes up to ``max_new_tokens`` after every prompt.

        Args:
            view: the model and its parameters.
            prompts: token ids, each at least one long.
            key: folded with the row number and the position.
            on_tokens: called every ``stream_every`` tokens with the tokens so far ``[B, n]`` and
                the lengths; may return rows to stop, bool ``[B]``.

        Raises:
            UserError: there is no prompt, or one is empty or does not fit the model's context
                with its answer.
        """
        model, params = unrolled(cast(Transformer, view.model), view.params)
        lengths = np.asarray([len(prompt) for prompt in prompts])
        self._check(model, lengths)
        width = _bucket(int(lengths.max()))
        capacity = _bucket(width + self.max_new_tokens)
        padded = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
        static = (model, FullCache(capacity=capacity), self)
        state = _prefill(static, params, padded, lengths.astype(np.int32))
        chunk = self.max_new_tokens if on_tokens is None else self.stream_every
        count = 0
        while count < self.max_new_tokens and not bool(jnp.all(state.done)):
            count = min(count + chunk, self.max_new_tokens)
            state = _decode(static, params, state, keys, count)
            if on_tokens is not None:
                new = np.asarray(state.tokens)[:, : int(state.count)]
                stop = on_tokens(new, np.asarray(state.position) - lengths)
                if stop is not None:
                    state = state.replace(done=state.done | jnp.asarray(stop))
        return _generation(model, lengths, state)

    def _check(self, model: Transformer, lengths: np.ndarray) -> None:
        if lengths.size == 0:
            raise UserError("there is no prompt to continue; give at least one")
        if lengths.min() < 1:
            raise UserError("a prompt has no token; begin it with the tokenizer's bos_id")
        longest = int(lengths.max())
        if longest + self.max_new_tokens > model.max_length:
            raise UserError(
                f"a prompt of {longest} tokens and {self.max_new_tokens} new ones exceed the "
                f"model's context of {model.max_length}; shorten the prompt or max_new_tokens"
            )


def _generation(model: Transformer, prompts: np.ndarray, state: _State) -> Generation:
    lengths = np.asarray(state.position) - prompts
    return Generation(
        tokens=np.asarray(state.tokens),
        lengths=lengths,
        logp_model=np.asarray(state.logp_model),
        logp_behaviour=np.asarray(state.logp_behaviour),
        ledger=_ledger(model, prompts, lengths, int(state.count)),
    )


def _bucket(size: int) -> int:
    """The next power of two, at least 16: nearby sizes share a compiled function."""
    return max(16, 1 << (size - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    static: tuple[Transformer, CachePolicy, Autoregressive],
    params: PyTree,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
) -> _State:
    """Reads the prompts; the state is ready to draw the first token."""
    model, policy, decoder = static
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None], tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    out: Any = model.apply(
        {"params": params},
        tokens,
        positions=positions,
        segments=segments,
        policy=policy,
        cache=model.init_cache(policy, batch=batch),
    )
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)
    shape = (batch, decoder.max_new_tokens)
    return _State(
        cache=out.cache,
        logits=_logits(model, params, last),
        position=lengths,
        done=jnp.zeros((batch,), bool),
        processors=decoder.sampler.init(batch=batch),
        tokens=jnp.zeros(shape, jnp.int32),
        logp_model=jnp.zeros(shape, jnp.float32),
        logp_behaviour=jnp.zeros(shape, jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    static: Any, params: PyTree, state: _State, keys: RowKeys, until: Int[Array, ""]
) -> _State:
    """Draws tokens until ``until`` are written or every row has ended."""
    model, policy, decoder = static

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.count < until) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        here = jax.vmap(jax.random.fold_in)(keys, state.position)
        draw, processors = decoder.sampler(state.logits, state.processors, keys=here)
        running = ~state.done
        ended = jnp.isin(draw.token, jnp.asarray(decoder.end_ids, jnp.int32))
        out = model.apply(
            {"params": params},
            draw.token[:, None],
            positions=state.position[:, None],
            segments=running.astype(jnp.int32)[:, None],
            policy=policy,
            cache=state.cache,
        )

        def write(buffer: Array, column: Array) -> Array:
            column = jnp.where(running, column, 0).astype(buffer.dtype)[:, None]
            return jax.lax.dynamic_update_slice(buffer, column, (0, state.count))

        return _State(
            cache=out.cache,
            logits=_logits(model, params, out.hidden),
            position=state.position + running,
            done=state.done | ended,
            processors=processors,
            tokens=write(state.tokens, draw.token),
            logp_model=write(state.logp_model, draw.logp_model),
            logp_behaviour=write(state.logp_behaviour, draw.logp_behaviour),
            count=state.count + 1,
        )

    return jax.lax.while_loop(unfinished, step, state)


def _logits(model: Transformer, params: PyTree, hidden: Hidden) -> Float[Array, "B V"]:
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    return logits[:, 0]


def _ledger(model: Transformer, prompts: np.ndarray, new: np.ndarray, steps: int) -> Ledger:
    """Cost of the tokens read: every prompt and every new token went through the model once."""
    total = prompts + new
    cost = jax.device_get(_cost(model, total, _bucket(int(total.max()))))
    # The vocabulary is projected once per prompt and new token, not at every prompt position.
    unprojected = float(np.sum(prompts - 1)) * 2 * model.vocab_size * model.dim
    entries = float(total.sum())
    mixers = model.attentions()
    width = 2 * sum(mixer.num_kv_heads * mixer.width(model.dim) for mixer in mixers)
    return cost.replace(
        passes=1.0 + steps,
        slots=float(len(total) * (_bucket(int(prompts.max())) + steps)),
        flops=float(cost.flops) - unprojected,
        cache_entries=entries * len(mixers),
        cache_bytes=entries * width * jnp.dtype(model.dtype).itemsize,
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _cost(model: Transformer, lengths: Int[Array, " B"], width: int) -> Ledger:
    """Cost of reading rows of these lengths at once."""
    positions = jnp.broadcast_to(jnp.arange(width)[None], (len(lengths), width))
    valid = positions < lengths[:, None]
    trace = DepthTrace(
        depth=jnp.where(valid, model.num_layers, 0),
        active=jnp.broadcast_to(valid[None], (model.num_layers, *valid.shape)),
    )
    return model.ledger(trace, positions=positions, segments=valid.astype(jnp.int32))
