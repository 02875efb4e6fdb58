"""Rows that the policy itself has written: what reinforcement learning learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import grain
import jax
import jax.numpy as jnp
from jaxtyping import Key

from tokenlab.core.arrays import Array, Bool, Float, Int, Logits, PRNGKeyArray
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.data.base import Batch, Corpus, OnPolicy, Source
from tokenlab.models.mixtures import MeanOfSamples, RandomMixture
from tokenlab.objectives.mixtures import group_advantages
from tokenlab.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtRollouts(OnPolicy):
    """Rows in which the policy thinks in mixtures of its own and answers with a token, in groups.

    Each row of ``source`` is thought through ``group`` times. At every position before one that
    reads a thought a mixture is drawn, one pass over all rows per thought; then the answer, where
    the row has a ``distribution`` and no thought follows, a token of its own at each such position.
    A rollout whose answer is the row's target has reward 1, another 0, and its advantage is that
    reward against those of its group. ``MixturePolicy`` learns from these rows; as they are drawn
    anew for every step, the policy that draws is the one that learns.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.

    Attributes:
        source: rows with ``mixture`` and ``distribution``, such as those of a task that thinks.
        mixture: how thoughts are drawn; that of the objective's ``MixturePolicy``.
        thoughts: of a row, at most; what a row has more is read as its tokens say.
        group: rollouts of a row, at least 2.
    """

    source: Source
    mixture: RandomMixture = MeanOfSamples()
    thoughts: int = 3
    group: int = 8

    def __post_init__(self) -> None:
        if self.thoughts < 0 or self.group < 2:
            raise UserError(
                f"ThoughtRollouts has {self.thoughts} thoughts and groups of {self.group}; "
                "use 0 or more thoughts, and 2 or more rollouts"
            )

    @property
    def tokens_per_row(self) -> int:
        """Positions of a row, each of which is thought through ``group`` times."""
        return self.source.tokens_per_row

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """Those of the source."""
        return self.source.corpora

    def tokens_per_epoch(self, *, tokenizer: Tokenizer) -> int:
        """Those of the source."""
        return self.source.tokens_per_epoch(tokenizer=tokenizer)

    def batches(
        self,
        *,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> grain.IterDataset[Batch]:
        """Rows to be thought through; see ``Source.batches``."""
        return self.source.batches(
            tokenizer=tokenizer,
            batch_size=batch_size,
            seed=seed,
            shard_index=shard_index,
            shard_count=shard_count,
        )

    def rolled(
        self, batch: Mapping[str, Array], *, policy: View, key: PRNGKeyArray
    ) -> tuple[dict[str, Array], Ledger]:
        """``group`` rollouts of each row, next to each other; see the class.

        Raises:
            UserError: the rows have nothing to think or to answer.
        """
        if absent := [name for name in ("mixture", "distribution") if name not in batch]:
            raise UserError(
                f"the batch has no {' and no '.join(absent)}; ThoughtRollouts needs a source of "
                "thoughts, such as TaskSource(task=MinimumNonNegativeSum())"
            )
        rows = {name: jnp.repeat(each, self.group, axis=0) for name, each in batch.items()}
        reads = jnp.sum(rows["mixture"], axis=-1) > 0.5
        reads &= jnp.cumsum(reads, axis=1) <= self.thoughts
        draws = jnp.pad(reads[:, 1:], ((0, 0), (0, 1)))
        answers = (jnp.sum(rows["distribution"], axis=-1) > 0) & ~draws
        keys = jax.random.split(key, reads.shape)
        mixture, logits, ledger = self._thought(rows, reads, policy=policy, keys=keys)
        token = jax.vmap(jax.vmap(jax.random.categorical))(keys, logits)
        right = jnp.all((token == rows["targets"]) | ~answers, axis=1)
        advantages = group_advantages(right.reshape(-1, self.group).astype(jnp.float32))
        drawn = jnp.where(
            draws[..., None],
            jnp.roll(mixture, -1, axis=1),
            answers[..., None] * jax.nn.one_hot(token, logits.shape[-1]),
        )
        return rows | {
            "mixture": mixture,
            "distribution": drawn,
            "thought": draws.astype(jnp.float32),
            "advantages": jnp.broadcast_to(advantages.reshape(-1, 1), reads.shape),
            "old_logits": logits,
        }, ledger

    def _thought(
        self,
        rows: Mapping[str, Array],
        reads: Bool[Array, "B T"],
        *,
        policy: View,
        keys: Key[Array, "B T"],
    ) -> tuple[Float[Array, "B T V"], Logits, Ledger]:
        """What is read of each thought, the logits where all are read, and what it took."""
        number: Int[Array, "B T"] = jnp.cumsum(reads, axis=1)
        draw = jax.vmap(lambda row, own: self.mixture(logits=row, keys=own))
        mixture = jnp.zeros_like(rows["mixture"])
        logits, ledger = _passed(rows, mixture, policy=policy)
        for thought in range(1, self.thoughts + 1):
            here = (reads & (number == thought))[..., None]
            mixture = jnp.where(here, jnp.roll(draw(logits, keys), 1, axis=1), mixture)
            logits, spent = _passed(rows, mixture, policy=policy)
            ledger = ledger.merge(spent)
        return mixture, logits, ledger


def _passed(
    rows: Mapping[str, Array], mixture: Float[Array, "B T V"], *, policy: View
) -> tuple[Logits, Ledger]:
    """Logits of a pass that reads ``mixture``, and what it costs."""
    context = Context(batch={**rows, "mixture": mixture}, views={"policy": policy})
    where = {name: rows[name] for name in ("positions", "segments")}
    return context.logits(), policy.model.ledger(context.output().trace, **where)
