"""Small models that think, and what one thought is when it is read alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokenlab.core.context import View
from tokenlab.models import Attention, Block, SwiGLU, ThinkingTransformer, Transformer, llama

VOCABULARY, WIDTH, LENGTH = 19, 16, 9
LOUD = 100.0


def thinker(**fields):
    """Grouped keys; what ``fields`` say."""
    block = Block(mixer=Attention(num_heads=4, num_kv_heads=2), feedforward=SwiGLU(hidden_dim=24))
    options = {"vocab_size": VOCABULARY, "dim": WIDTH, "num_layers": 2, "block": block}
    return ThinkingTransformer(**(options | fields))


def plain(**fields):
    return llama(
        vocab_size=VOCABULARY, dim=WIDTH, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24,
        **fields,
    )  # fmt: skip


def params_of(model, seed=0):
    """First parameters; the last layer of the mixing head is not zero."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    key = jax.random.key(seed)
    params = model.init(key, tokens, positions=tokens, segments=tokens + 1)["params"]
    params = nn.meta.unbox(params)
    # Large embeddings, so that logits differ.
    params = params | {"embedding": jax.random.normal(key, params["embedding"].shape)}
    if isinstance(model, ThinkingTransformer):
        params["marks"] = jax.random.normal(jax.random.key(seed + 1), (2, WIDTH)) / LOUD
    if isinstance(model, ThinkingTransformer):
        last = jax.random.normal(jax.random.key(seed + 2), (WIDTH, 1))
        params["mix_last"] = {"kernel": last}
    return params


def batch_of(seed=0, rows=2, lengths=None):
    """Rows of documents of those lengths, padding behind; targets are the next tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCABULARY, (rows, LENGTH))
    lengths = [[LENGTH]] * rows if lengths is None else lengths
    segments, positions = np.zeros((2, rows, LENGTH), int)
    for row, counts in enumerate(lengths):
        filled = np.concatenate([np.full(n, i) for i, n in enumerate(counts, 1)])
        segments[row, : len(filled)] = filled
        positions[row, : len(filled)] = np.concatenate([np.arange(n) for n in counts])
    targets = rng.integers(3, VOCABULARY, (rows, LENGTH))
    same = segments[:, 1:] == segments[:, :-1]
    targets[:, :-1] = np.where(same, tokens[:, 1:], targets[:, :-1])
    return {
        "tokens": jnp.asarray(tokens, jnp.int32), "targets": jnp.asarray(targets, jnp.int32),
        "positions": jnp.asarray(positions, jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
        "weights": jnp.asarray(segments > 0, jnp.float32),
    }  # fmt: skip


def inputs(batch):
    return {name: batch[name] for name in ("positions", "segments")}


@functools.partial(jax.jit, static_argnames=("model", "method"))
def run(model, params, batch, key=None, method="__call__"):
    rngs = {} if key is None else {"thoughts": key}
    return View(model=model, params=params)(
        batch["tokens"], **inputs(batch), rngs=rngs, method=method
    )


def chain(model, params, row, drawn, said):
    """The stream of one row read alone: tokens, a mark, what was drawn, a mark, what is said.

    Plain causal attention over one sequence, by the plain Transformer.
    """
    ids = [*np.asarray(row), VOCABULARY, *np.asarray(drawn), VOCABULARY + 1, *np.asarray(said)]
    padded = np.zeros(2 * LENGTH, int)
    padded[: len(ids)] = ids
    return np.asarray(_chained(model, params, padded, len(ids)))[: len(ids)]


@functools.partial(jax.jit, static_argnames="model")
def _chained(model, params, ids, count):
    table = jnp.concatenate([params["embedding"], LOUD * params["marks"]])
    place = jnp.arange(len(ids))[None]
    bare = Transformer(
        vocab_size=VOCABULARY, dim=WIDTH, num_layers=model.num_layers, block=model.block,
        depth=model.depth,
    )  # fmt: skip
    where = {"positions": place, "segments": (place < count).astype(jnp.int32)}
    return bare.apply({"params": params}, place * 0, **where, embeddings=table[ids][None]).hidden[0]


def mixed(params, before, after):
    """``(1 - w) h + w h'`` and w, by hand."""
    x = np.concatenate([before, after])
    for name in ("mix_first", "mix_second"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    share = float((x @ params["mix_last"]["kernel"])[0])
    return (1 - share) * before + share * after, share
