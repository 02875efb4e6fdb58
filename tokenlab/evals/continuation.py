"""What follows a prompt, scored over the cache that the prompt was read into."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.cache import CachePolicy, FullCache
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.errors import UserError
from tokenlab.data.base import Corpus
from tokenlab.decode.passes import logits_of, read
from tokenlab.evals.base import Evaluation
from tokenlab.models import Transformer, unrolled
from tokenlab.tokenizers.base import Tokenizer


class Continued(NamedTuple):
    """What a model made of the tokens behind a prompt.

    Attributes:
        nats: negative log-likelihood of each.
        hidden: last hidden state at each.
        density: of the prompt, as ``attention.Prefilled`` has it, a mean over layers and heads;
            1 where it was read densely.
        visited: likewise.
    """

    nats: Float[Array, "B N"]
    hidden: Float[Array, "B N D"]
    density: Float[Array, " B"]
    visited: Float[Array, " B"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def read_on(
    model: Transformer,
    policy: CachePolicy,
    params: PyTree,
    prompt: Int[Array, "B T"],
    rest: Int[Array, "B N"],
) -> Continued:
    """Reads prompts at once, as a decoder does, and then what follows them in one pass."""
    batch, length = prompt.shape
    room = length + rest.shape[1]
    cache = model.empty_cache(policy, batch=batch, capacity=room)
    places = jnp.broadcast_to(jnp.arange(room)[None], (batch, room))
    out, seen = cast(
        Any,
        model.apply(
            {"params": params}, prompt, positions=places[:, :length],
            segments=jnp.ones_like(prompt), cache=cache, mutable="prefill",
        ),
    )  # fmt: skip
    after = read(
        model, params, out.cache, rest, positions=places[:, length:], segments=jnp.ones_like(rest)
    )
    ahead = jnp.concatenate([out.hidden[:, -1:], after.hidden[:, :-1]], axis=1)
    logp = jax.nn.log_softmax(logits_of(model, params, ahead))
    nats = -jnp.take_along_axis(logp, rest[..., None], axis=-1)[..., 0]
    found = {"density": [], "visited": []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen):
        found[path[-2].key].append(jnp.mean(leaf, axis=1))
    shares = (jnp.mean(jnp.stack(x or [jnp.ones(batch)]), axis=0) for x in found.values())
    return Continued(nats, after.hidden, *shares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation(Evaluation):
    """Likelihood of what follows the beginnings of held-out documents.

    A model whose attention looks ahead within a prompt, or whose cache forgets, is scored as it
    decodes: the prompt is read as a whole, and only tokens behind it count.

    Attributes:
        corpus: where the documents come from.
        split: which part of the corpus.
        prompt: tokens that are read first, the begin symbol among them.
        length: tokens that are scored.
        cache: what is remembered of the prompt.
        max_documents: leading documents that are long enough, or None for all.
    """

    corpus: Corpus
    split: str = "held_out"
    prompt: int = 512
    length: int = 128
    cache: CachePolicy = FullCache()
    max_documents: int | None = None

    def rows(self, tokenizer: Tokenizer) -> list[Int[np.ndarray, " N"]]:
        """Beginnings of the documents, ``prompt + length`` tokens each."""
        documents, found = self.corpus.documents(self.split), []
        for i in range(len(documents)):
            ids = [tokenizer.bos_id, *tokenizer.encode(documents[i].text)]
            if len(ids) >= self.prompt + self.length:
                found.append(np.asarray(ids[: self.prompt + self.length], np.int32))
            if len(found) == self.max_documents:
                break
        return found

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Perplexity, and the density of the prompts.

        Raises:
            UserError: no document is long enough.
        """
        rows = self.rows(tokenizer)
        if not rows:
            raise UserError(
                f"no document of split {self.split!r} has {self.prompt + self.length} tokens;"
                " lower prompt or length"
            )
        plain, params = unrolled(cast(Transformer, model).causal_twin(), params)
        found = [
            read_on(plain, self.cache, params, row[None, : self.prompt], row[None, self.prompt :])
            for row in rows
        ]
        nats = float(np.mean([np.asarray(one.nats, np.float64) for one in found]))
        return {
            "perplexity": math.exp(nats),
            "nats": nats,
            "density": float(np.mean([one.density for one in found])),
            "tokens": len(rows) * self.length,
        }
