"""Models that plan in latent vectors, small enough to run by hand, and rows for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokenlab.core.context import Context, View
from tokenlab.data.tasks import WordArithmetic
from tokenlab.models import (
    Attention,
    Block,
    CapsuleTransformer,
    SwiGLU,
    Transformer,
)
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term

TASK = WordArithmetic(plan="apart", clauses=3)
VOCABULARY, WIDTH, NARROW = TASK.tokenizer.vocab_size, 16, 4
SLOT = TASK.mark("<slot>")
SIZES = {
    "vocab_size": VOCABULARY,
    "dim": WIDTH,
    "num_layers": 1,
    "block": Block(mixer=Attention(num_heads=2, num_kv_heads=1), feedforward=SwiGLU(hidden_dim=16)),
    "max_length": 64,
    "embedding_scale": 2.0,
}
PLAIN = Transformer(**SIZES)
STEPS = (("steps", Term(loss=NextToken())),)
ONLY_PLAN = (("plan", AuxiliaryTerm(name="plan")),)
BOTH = STEPS + ONLY_PLAN


def capsule(**changes):
    fields = {"slot_id": SLOT, "bottleneck": NARROW} | changes
    return CapsuleTransformer(**SIZES, **fields)


@functools.cache
def params_of(model, seed=0):
    ids = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), ids, positions=ids, segments=ids + 1)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )


def batch_of(task=TASK, rows=4, seed=1):
    rows = task.sample(seed=seed, count=rows)._asdict()
    return {name: jnp.asarray(x) for name, x in rows.items() if x is not None}


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, batch):
    context = Context(batch=batch, views={"policy": View(model=model, params=params)})
    return context.output()


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradient(model, terms, params, batch):
    objective = Objective(terms=dict(terms))

    def value(params):
        context = Context(
            batch=batch, views={"policy": View(model=model, params=params)},
            key=jax.random.key(0), train=True,
        )  # fmt: skip
        sums = objective(context)
        return objective.value(sums), {name: part.mean() for name, part in sums.items()}

    (total, means), gradient = jax.value_and_grad(value, has_aux=True)(params)
    return total, means, gradient


@jax.jit
def padded_pass(params, x, segments):
    view = View(model=PLAIN, params=params)
    places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    tokens = jnp.zeros(x.shape[:2], int)
    out = view(tokens, positions=places, segments=segments, embeddings=x)
    return out.hidden, view(out.hidden, method="logits")


def plain(params, x, logits=False):
    """The plain model on the embeddings of one row."""
    padded = np.zeros((1, 24, WIDTH), np.float32)
    padded[0, : len(x)] = x
    segments = (np.arange(24)[None] < len(x)).astype(np.int32)
    out = padded_pass(params, jnp.asarray(padded), jnp.asarray(segments))[logits]
    return np.asarray(out, np.float64)[0, : len(x)]


@functools.partial(jax.jit, static_argnums=0)
def latents_of(model, params, batch):
    view = View(model=model, params=params)
    where = {name: batch[name] for name in ("positions", "segments")}
    return view(batch["tokens"], **where, method="latents")
