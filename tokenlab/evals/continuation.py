"""What follows a prompt, scored over the cache that the prompt was read into."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.cache import CachePolicy, FullCache
from tokenlab.core.arrays import Int
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.data.base import Corpus
from tokenlab.decode import score_continuation
from tokenlab.evals.base import Evaluation
from tokenlab.models import Transformer
from tokenlab.tokenizers.base import Tokenizer


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
        view = View(model=cast(Transformer, model).causal_twin(), params=params)
        found = [
            score_continuation(
                view, self.cache, [row[: self.prompt].tolist()], [row[self.prompt :].tolist()],
                chunk=self.length,
            )
            for row in rows
        ]  # fmt: skip
        nats = -float(np.mean([one.logp for one in found], dtype=np.float64))
        dense = np.ones(1)
        density = [one.statistics.get("prefill_density", dense)[0] for one in found]
        return {
            "perplexity": math.exp(nats),
            "nats": nats,
            "density": float(np.mean(density)),
            "tokens": len(rows) * self.length,
        }
