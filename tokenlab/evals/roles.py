"""Which strategy a model of the role grammar has: by context, by its weights, or both."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.context import View
from tokenlab.data.tasks import RoleGrammar, TaskBatch
from tokenlab.data.tasks.role_grammar import ANSWER, QUERY, SETS
from tokenlab.evals.base import Evaluation
from tokenlab.tokenizers.base import Tokenizer

_STREAM = zlib.crc32(b"roles")  # no source draws its rows from this seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleAccuracy(Evaluation):
    """Share of rows whose three masked tokens are all right, for each evaluation set.

    The figure of a set takes the likelier of the row's two words; ``NAME_full`` takes the likeliest
    of all tokens. ``holdout`` shows whether words without a meaning of their own are understood
    (structural in-context learning), ``switch`` which strategy is preferred: high is by context,
    low is by weights. ``class_probe`` is how well the embedding tells nouns from adjectives.

    Words that are never trained are read with new embeddings, for a tied output trains theirs.

    Reference: Anand, Lepori, Merullo, Pavlick, "Dual Process Learning: Controlling Use of
    In-Context vs. In-Weights Strategies with Weight Forgetting", 2024, arXiv:2406.00053.

    Differences from the paper: those embeddings are drawn anew from the distribution that they
    were initialised from, instead of being kept.

    Attributes:
        task: the task that is trained.
        rows: of each set.
        deviation: standard deviation of new embeddings.
        seed: of rows and new embeddings.
    """

    task: RoleGrammar
    rows: int = 512
    deviation: float = 0.02
    seed: int = 0

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Both accuracies of every set, and the probe."""
        embedding = np.array(params["embedding"])
        unseen = np.asarray(self.task.unseen_ids())
        rng = np.random.default_rng((_STREAM, self.seed))
        new = rng.normal(scale=self.deviation, size=(len(unseen), embedding.shape[1]))
        probe = class_probe(embedding, self.task.class_ids(), seed=self.seed)
        embedding[unseen] = new
        restored = params | {"embedding": jax.numpy.asarray(embedding)}
        figures = {"class_probe": probe}
        for number, name in enumerate(SETS):
            task = self.task.evaluation(name)
            batch = task.sample(seed=(_STREAM, self.seed, number), count=self.rows)
            scores = _scores(model, restored, batch.tokens, batch.positions, batch.segments)
            of_two, of_all = right(np.asarray(scores), batch)
            figures[name] = float(of_two.mean())
            figures[f"{name}_full"] = float(of_all.mean())
        return figures


def right(
    scores: Float[np.ndarray, "B 7 V"], batch: TaskBatch
) -> tuple[Bool[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
    """Which rows have all three masked tokens right, of their two words and of all tokens."""
    scores, wanted = scores[:, ANSWER:], batch.targets[:, ANSWER:]
    context = batch.tokens[:, :QUERY]
    words = np.sort(context, axis=1)[:, :2]  # IS has the highest number
    of_two = np.take_along_axis(
        words, np.argmax(np.take_along_axis(scores, words[:, None], axis=2), axis=2), axis=1
    )
    return (of_two == wanted).all(axis=1), (scores.argmax(axis=2) == wanted).all(axis=1)


def class_probe(
    embedding: Float[np.ndarray, "V D"],
    classes: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    seed: int = 0,
    ridge: float = 1.0,
) -> float:
    """How well a linear probe of word embeddings tells two classes apart, on words it has not seen.

    Ridge regression of the class (-1 or 1) on standardised embeddings of half of the words; the
    share of the other half on the right side. 0.5 is chance.

    Args:
        embedding: of all tokens.
        classes: token ids of each class.
        seed: of the halves.
        ridge: weight of the penalty.
    """
    ids = np.concatenate([np.asarray(each) for each in classes])
    sides = np.repeat([-1.0, 1.0], [len(each) for each in classes])
    order = np.random.default_rng(seed).permutation(len(ids))
    x = np.asarray(embedding, np.float64)[ids[order]]
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-12)
    y, half = sides[order], len(ids) // 2
    gram = x[:half].T @ x[:half] + ridge * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, x[:half].T @ y[:half])
    return float(np.mean(np.sign(x[half:] @ weight) == y[half:]))


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    model: nn.Module,
    params: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T V"]:
    view = View(model=model, params=params)
    out: Any = view(tokens, positions=positions, segments=segments)
    scores: Any = view(out.hidden, method="logits")
    return scores
