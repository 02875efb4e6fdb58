"""TokenSelect's soft vote against other ways to pick the same number of tokens, on planted heads.

Eight heads read 1024 keys. Seven of them look for the same twelve tokens among noise, each with
keys of its own; the eighth looks elsewhere with queries six times as long. A vote by softmax gives
it one voice of eight; a sum of logits lets it decide alone.

Paper:    Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for
          LLMs via Dynamic Token-Level KV Cache Selection", 2024, arXiv:2411.02886.
Command:  python -m tokenlab study experiments/cache/token_select.py
Hardware: one CPU core, half a minute.
Expected: the usual heads keep 0.41 of their attention by vote, 0.18 by the sum of logits, 0.12 by
          pages, and 0.06 by sinks and a window. On a trained model (``recall.py``) 0.99 of the
          facts are recalled at four times the trained length, where the full cache has 0.68.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.cache import CachePolicy, Entries, Heads, PageTopK, Room, SinkCache, TokenSelect
from tokenlab.cache.recalled import attention_recalled
from tokenlab.study import Claim, Measured, Study, Trial


class LogitSum(TokenSelect):
    """Selects by the plain sum of the heads' logits."""

    def votes(self, probe, keys, candidates, heads):
        """``Σ_h q[h] · k[h]``."""
        grouped = probe.reshape(len(probe), heads.num_kv_heads, -1, heads.width)
        return jnp.einsum("bkge,bkse->bs", grouped, keys)


def still(x, *, positions):
    """No rotation: what matters here is content."""
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedHeads(Trial):
    """Attention mass that the heads of usual size find on what a policy reads.

    Attributes:
        policy: the policy.
        tokens: keys.
        needles: tokens that the usual heads look for.
        pull: how far their queries lean to the needles' keys.
        loudness: length of the last head's query in lengths of the others'.
    """

    policy: CachePolicy
    tokens: int = 1024
    needles: int = 12
    pull: float = 1.0
    loudness: float = 6.0

    def measure(self, *, seed: int) -> Measured:
        """Mass of 32 rows, each with keys and queries of its own."""
        rng = np.random.default_rng(seed)
        rows, heads, width = 32, 8, 32
        k = rng.normal(size=(rows, self.tokens, heads, width))
        q = rng.normal(size=(rows, 1, heads, width))
        at = rng.permuted(np.tile(np.arange(16, self.tokens - 16), (rows, 1)), axis=1)
        sought = np.take_along_axis(k, at[:, : self.needles, None, None], axis=1).sum(axis=1)
        q[:, 0, :-1] += self.pull * sought[:, :-1]
        q *= np.sqrt(width) / np.linalg.norm(q, axis=-1, keepdims=True) * 2
        q[:, :, -1] *= self.loudness
        layer = Heads(heads, heads, width, width**-0.5, None, still)
        recalled, read = _measured(
            self.policy, layer, *(jnp.asarray(x, jnp.float32) for x in (q, k))
        )
        return Measured(
            figures={"mass/usual_heads": float(recalled[:, 0, :-1].mean())},
            costs={"read_tokens": float(read)},
        )


@jax.jit
def _entries(q, k, start):
    positions = start + jnp.broadcast_to(jnp.arange(k.shape[1])[None], k.shape[:2])
    return Entries(q, k, k, positions, jnp.ones_like(positions))


def _measured(policy, layer, q, k):
    rows, tokens = k.shape[:2]
    state = policy.init(Room(rows, tokens + 1, "float32"), layer)
    state = policy.append(state, _entries(jnp.zeros_like(k), k, 0), heads=layer)
    new = _entries(q, jnp.zeros_like(q), tokens)
    reading = policy.read(state, new, heads=layer)
    (view,) = reading.views
    shown = view.segments.sum(-1) if view.selected is None else (view.selected >= 0).sum(-1)
    return attention_recalled(reading, new, k, heads=layer), shown.mean()


def study() -> Study:
    """Every arm reads 64 earlier tokens, the newest 16 among them."""
    # The budget of TokenSelect has the token itself in it.
    vote = {"budget": 65, "sinks": 0, "window": 17}
    arms = {
        "soft vote": TokenSelect(**vote),
        "sum of logits": LogitSum(**vote),
        "pages of 16": PageTopK(budget=64, page=16, window=16),
        "sink and recent": SinkCache(budget=64, sinks=4),
    }
    order = list(arms)
    return Study(
        name="token_select",
        question="Does a soft vote keep more of the usual heads' attention in 64 tokens of 1024?",
        arms={name: PlantedHeads(policy=policy) for name, policy in arms.items()},
        matched="read_tokens",
        claims=tuple(
            Claim(arm=arm, than=than, metric="mass/usual_heads", better="higher")
            for arm, than in itertools.pairwise(order)
        ),
        seeds=(0, 1, 2),
    )
