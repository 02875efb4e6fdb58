"""Bits per byte of whole held-out documents."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.data.base import Batch, Corpus
from tokenlab.evals.base import Evaluation
from tokenlab.evals.depth import DepthHistogram, token_depth
from tokenlab.models import Transformer
from tokenlab.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutText(Evaluation):
    """Likelihood of held-out documents, every byte scored exactly once.

    Documents are cut into overlapping windows. A window scores only the targets that no earlier
    window scored, so all but the first ``length`` targets of a document have at least
    ``length - stride`` tokens of context. The end of each document is a target too: the figures
    are those of a complete code for the documents.

    ``bits_per_byte = -sum log2 p(target) / bytes`` does not depend on the tokenizer;
    ``perplexity = exp(-mean log p(target))`` is per token. Where the depth of tokens varies, there
    are also the share of tokens at each depth and the loss of their targets, as
    :class:`DepthHistogram` names them.

    Attributes:
        corpus: where the documents come from.
        split: which part of the corpus.
        length: window size in tokens; the context a model was trained on.
        stride: targets that each window after the first scores.
        batch_size: windows scored at a time.
        max_documents: leading documents evaluated, or None for all.
    """

    corpus: Corpus
    split: str = "held_out"
    length: int = 512
    stride: int = 256
    batch_size: int = 16
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.length:
            raise ValueError(f"stride {self.stride} must be in 1..length ({self.length})")

    def documents(self) -> list[bytes]:
        """The bytes that are scored."""
        documents = self.corpus.documents(self.split)
        count = len(documents) if self.max_documents is None else self.max_documents
        return [documents[i].text for i in range(min(count, len(documents)))]

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Bits per byte, perplexity, counts and depths, of the model's causal twin.

        Raises:
            UserError: there is not one byte to score.
        """
        texts = self.documents()
        size = sum(map(len, texts))
        if size == 0:
            raise UserError(
                f"split {self.split!r} of the corpus is empty; raise its held_out share"
            )
        model = cast(Transformer, model).causal_twin()
        found = []
        for batch in self._batches(texts, tokenizer):
            scored = batch["weights"] > 0
            found.append([np.asarray(each)[scored] for each in token_nats(model, params, batch)])
        nats, depth = (np.concatenate(each) for each in zip(*found, strict=True))
        total = float(nats.sum(dtype=np.float64))
        return {
            "bits_per_byte": total / math.log(2) / size,
            "perplexity": math.exp(total / len(nats)),
            "bytes": size,
            "tokens": len(nats),
            **DepthHistogram.of(depth, nats).figures(),
        }

    def _batches(self, texts: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[Batch]:
        rows: list[Batch] = []
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            rows.extend(windows(np.asarray(ids, np.int32), self.length, self.stride))
            while len(rows) >= self.batch_size:
                yield _stack(rows[: self.batch_size])
                rows = rows[self.batch_size :]
        if rows:
            empty = jax.tree.map(np.zeros_like, rows[0])
            yield _stack(rows + [empty] * (self.batch_size - len(rows)))


def windows(ids: np.ndarray, length: int, stride: int) -> Iterator[Batch]:
    """Windows of one document in which every target has weight 1 exactly once.

    Args:
        ids: the document's tokens from begin to end symbol; ``ids[1:]`` are the targets.
        length: window size.
        stride: distance between windows.
    """
    inputs, targets = ids[:-1], ids[1:]
    scored = 0
    for start in range(0, len(inputs), stride):
        stop = min(start + length, len(inputs))
        if stop <= scored:
            return
        row: Batch = {
            name: np.zeros(length, np.int32)
            for name in ("tokens", "targets", "segments", "positions")
        }
        row["weights"] = np.zeros(length, np.float32)
        size = stop - start
        row["tokens"][:size] = inputs[start:stop]
        row["targets"][:size] = targets[start:stop]
        row["segments"][:size] = 1
        row["positions"][:size] = np.arange(size)
        row["weights"][scored - start : size] = 1.0
        scored = stop
        yield row


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@functools.partial(jax.jit, static_argnums=0)
def token_nats(
    model: nn.Module, params: PyTree, batch: dict[str, Any]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The loss of each target in nats, and the depth that its token was given."""
    context = Context(batch=batch, views={"policy": View(model=model, params=params)})
    return -context.token_logp(), token_depth(context.output())
