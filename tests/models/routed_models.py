"""Models with stand-ins that are small enough to try everything, and ways to run them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.depth.looped import VOCABULARY, params_of, ragged
from tokenlab.core.context import View
from tokenlab.models import Forecaster, LinearHead, SwiGLU, llama, with_stand_ins
from tokenlab.routing import LearnedOption, NarrowScores

__all__ = ["VOCABULARY", "params_of", "ragged"]
LAYERS, RANK = 2, 3  # of models with forecasters
SEES = LearnedOption(head=NarrowScores(divisor=2), mixing="drawn", with_forecast=True)
KEY = jax.random.key(0)


def base(layers=3, **rest):
    """Grouped queries."""
    return llama(
        vocab_size=VOCABULARY, dim=16, num_layers=layers, num_heads=4, num_kv_heads=2,
        hidden_dim=24, max_length=64, head=LinearHead(), **rest,
    )  # fmt: skip


def duo(router=None, layers=3, small=4, *, skip=False, **rest):
    """Big and small feed-forward layers, or none at all."""
    stand_ins = (SwiGLU(hidden_dim=small), *((None,) if skip else ()))
    return with_stand_ins(base(layers), feedforward=stand_ins, router=router, **rest)


def informed(router=SEES, *, forecast=True, rank=RANK, layers=LAYERS, **rest):
    """Attention and feed-forward layers with forecasters, or with nothing."""
    stand_in = Forecaster(rank=rank) if forecast else None
    return with_stand_ins(
        base(layers), mixer=(stand_in,), feedforward=(stand_in,), router=router, **rest
    )


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, given, tokens, positions, segments, cache):
    view = View(model=model, params=params, given=given)
    out = view(tokens, positions=positions, segments=segments, cache=cache)
    return view(out.hidden, method="logits"), out


def logits_of(model, params, batch, *, given=None, cache=None):
    """Logits, and what a pass gives, its reports included."""
    return _run(model, params, given or {}, *batch, cache)


def passes(model, params, policy, batch, sizes):
    """Logits of all tokens, read in passes of ``sizes`` over a cache, and the last pass."""
    cache = model.empty_cache(policy, batch=len(batch[0]), capacity=batch[0].shape[1])
    start, found = 0, []
    for size in sizes:
        part = tuple(x[:, start : start + size] for x in batch)
        logits, out = logits_of(model, params, part, cache=cache)
        found.append(np.asarray(logits))
        cache, start = out.cache, start + size
    return np.concatenate(found, axis=1), out


def targets(batch, seed=1):
    """A batch of a context, with targets drawn for every token."""
    tokens, positions, segments = batch
    drawn = np.random.default_rng(seed).integers(0, VOCABULARY, tokens.shape)
    return {
        "tokens": tokens, "positions": positions, "segments": segments,
        "targets": jnp.asarray(drawn, jnp.int32),
        "weights": (segments > 0).astype(jnp.float32),
    }  # fmt: skip


def whole_rows(rows):
    """Rows of one document each, without padding."""
    tokens = jnp.asarray(rows, jnp.int32)
    return tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), tokens * 0 + 1


def errors(model, params, rows):
    """What units report of their forecasters, and how many ran."""
    _, out = logits_of(model, params, whole_rows(rows))
    return {name: np.asarray(each.total / each.weight) for name, each in out.trace.aux.items()}
