"""LouisKV's boundaries and clusters on planted topics: what is found, and how often is looked.

1024 prompt tokens of 32 topics lie in any order. Decoding asks twelve times twenty tokens long for
one topic each; queries of one run are alike, those of two runs are not.

Paper:    Wu et al., "LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences", 2025,
          arXiv:2510.11292.
Command:  python -m tokenlab study experiments/cache/louiskv.py
Hardware: one CPU core, one minute.
Expected: 0.98 of the attention at one step in twenty, as at every step; pages find 0.36 of it.
          The paper's check on a trained model is in ``recall.py``: at an eighth of the text it
          keeps the answers of the full cache with clusters of 4 tokens, not with 16 (0.79).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.cache import CachePolicy, Entries, Heads, LouisKV, PageTopK, Room
from tokenlab.cache.recalled import attention_recalled
from tokenlab.study import Bound, Claim, Measured, Study, Trial

HEADS, KV_HEADS, WIDTH = 8, 4, 32


def still(x, *, positions):
    """No rotation: what matters here is content."""
    return x


LAYER = Heads(HEADS, KV_HEADS, WIDTH, WIDTH**-0.5, None, still)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedTopics(Trial):
    """Attention mass on what is read, and the share of steps that retrieve anew.

    Attributes:
        policy: the policy.
        tokens: of the prompt.
        topics: directions of keys.
        runs: topics asked for in turn.
        steps: tokens of a run.
        noise: length of what keys and queries have beside their topic, in lengths of the topic.
    """

    policy: CachePolicy
    tokens: int = 1024
    topics: int = 32
    runs: int = 12
    steps: int = 20
    noise: float = 0.5

    def measure(self, *, seed: int) -> Measured:
        """One prompt and all runs."""
        rng = np.random.default_rng(seed)
        topics = rng.normal(size=(self.topics, KV_HEADS, WIDTH))
        topics /= np.linalg.norm(topics, axis=-1, keepdims=True)
        of_key = rng.permutation(np.arange(self.tokens) % self.topics)
        of_query = np.repeat(rng.permutation(self.topics)[: self.runs], self.steps)
        k = topics[of_key] + self._beside(rng, (self.tokens, KV_HEADS))
        q = np.repeat(topics[of_query], HEADS // KV_HEADS, axis=1)
        q = q + self._beside(rng, (len(of_query), HEADS))
        # Keys of usual length; a query's score at its own topic is about eight.
        k, q = k * np.sqrt(WIDTH), q * 8
        written = rng.normal(size=(len(q), KV_HEADS, WIDTH))
        arrays = (jnp.asarray(x[None], jnp.float32) for x in (q, k, written))
        recalled, counted, pairs = _decoded(self.policy, *arrays)
        return Measured(
            figures={
                "mass/recalled": float(recalled),
                "retrievals/share": float(counted["cache_selections"][0]) / len(q),
                "retrievals/tokens_moved": float(counted["cache_tokens_moved"][0]),
            },
            costs={"read_tokens": float(pairs)},
        )

    def _beside(self, rng, shape):
        noise = rng.normal(size=(*shape, WIDTH))
        return self.noise * noise / np.linalg.norm(noise, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(policy, q, k, written):
    tokens, steps = k.shape[1], q.shape[1]

    def entries(q, k, start):
        positions = start + jnp.arange(k.shape[1])[None]
        return Entries(q, k, k, positions, jnp.ones_like(positions))

    state = policy.init(Room(1, tokens + steps, "float32"), LAYER)
    none = jnp.zeros((1, tokens, HEADS, WIDTH))
    state = policy.append(state, entries(none, k, 0), heads=LAYER)
    every = jnp.concatenate([k, written], axis=1)

    def step(state, at):
        query, key = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1) for x in (q, written))
        new = entries(query, key, tokens + at)
        reading = policy.read(state, new, heads=LAYER)
        earlier = jnp.reshape(tokens + at, 1)  # without the token itself
        recalled = attention_recalled(reading, new, every, heads=LAYER, lengths=earlier)
        (view,) = reading.views
        read = jnp.sum(view.selected >= 0, axis=2).mean()
        return policy.append(reading.state, new, heads=LAYER), (recalled.mean(), read)

    state, (recalled, read) = jax.lax.scan(step, state, jnp.arange(steps))
    return recalled.mean(), policy.counters(state), read.mean()


def study() -> Study:
    """128 tokens are read of all; pages are those of Quest."""
    louis = {"budget": 128, "sinks": 0, "window": 0}
    arms = {
        "clusters at boundaries": LouisKV(**louis, jump=0.7),
        "clusters at every step": LouisKV(**louis, jump=2.0),
        "pages at every step": PageTopK(budget=128, page=16, window=0),
    }
    mass = functools.partial(Claim, metric="mass/recalled", better="higher")
    return Study(
        name="louiskv",
        question="Do rare retrievals of clusters find what retrieval at every step finds?",
        arms={name: PlantedTopics(policy=policy) for name, policy in arms.items()},
        matched="read_tokens",
        claims=(
            mass(arm="clusters at boundaries", than="clusters at every step", margin=-0.02),
            mass(arm="clusters at boundaries", than="pages at every step", margin=0.3),
            Bound(
                arm="clusters at boundaries", metric="retrievals/share", limit=1 / 3, side="below"
            ),
        ),
        seeds=(0, 1, 2),
    )
