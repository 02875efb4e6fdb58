"""Several sources in exact proportions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import grain

from tokenlab.core.errors import UserError
from tokenlab.data.base import Batch, Corpus, Source
from tokenlab.data.pipeline import batched, rows_per_shard, stream_seed
from tokenlab.tokenizers.base import Tokenizer


def next_part(counts: Sequence[int], shares: Sequence[Fraction]) -> int:
    """The part that gives the next row, so that no part is ever a whole row off its share.

    Of the ``k`` parts that may take row ``n`` without running ahead, those with
    ``n * share_i - count_i >= 1 / (2k - 2)``, the one whose turn expires first, at row
    ``(count_i + 1 - 1 / (2k - 2)) / share_i``.

    Args:
        counts: rows taken so far, per part.
        shares: shares of the parts, summing to 1.

    Reference: Robert Tijdeman, "The chairman assignment problem", 1980, Discrete Mathematics 32.
    Every prefix stays within ``1 - 1 / (2k - 2)`` rows of the shares.
    """
    if len(shares) == 1:
        return 0
    slack = 1 - Fraction(1, 2 * len(shares) - 2)
    row = sum(counts) + 1
    ready = [i for i, share in enumerate(shares) if row * share - counts[i] >= 1 - slack]
    return min(ready, key=lambda i: ((counts[i] + slack) / shares[i], i))


class _MixedIterator(grain.DatasetIterator[Batch]):
    def __init__(
        self,
        parents: Sequence[grain.DatasetIterator[Batch]],
        *,
        names: Sequence[str],
        shares: Sequence[Fraction],
    ):
        super().__init__(parents)
        self._names = names
        self._shares = shares
        self._counts = [0] * len(names)
        self._arrays: list[str] = []

    def __next__(self) -> Batch:
        part = next_part(self._counts, self._shares)
        row = {name: values[0] for name, values in next(self._parents[part]).items()}
        self._arrays = self._arrays or sorted(row)
        if sorted(row) != self._arrays:
            raise UserError(
                f"Mixture.parts[{self._names[part]!r}] gives the arrays {sorted(row)}, "
                f"another part {self._arrays}; mix sources of one kind"
            )
        self._counts[part] += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {
            name: {"count": count, "source": parent.get_state()}
            for name, count, parent in zip(self._names, self._counts, self._parents, strict=True)
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for part, name in enumerate(self._names):
            self._counts[part] = state[name]["count"]
            self._parents[part].set_state(state[name]["source"])


class _MixedDataset(grain.IterDataset[Batch]):
    def __init__(self, parents: Mapping[str, grain.IterDataset[Batch]], shares: list[Fraction]):
        super().__init__(list(parents.values()))
        self._named = parents
        self._shares = shares

    def __iter__(self) -> _MixedIterator:
        iterators = [iter(parent) for parent in self._named.values()]
        return _MixedIterator(iterators, names=list(self._named), shares=self._shares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Source):
    """Rows of several sources, each in its exact share of the positions.

    Whole rows are mixed, and all have the same length: after ``n`` rows of a process each part has
    given ``n`` times its share, to less than one row. Document numbers are those of the part.

    Attributes:
        parts: sources by name, all with the same row length and the same arrays, none finite.
        proportions: share of the positions per name; they need not sum to 1.
    """

    parts: Mapping[str, Source]
    proportions: Mapping[str, float]

    def __post_init__(self):
        if not self.parts or self.parts.keys() != self.proportions.keys():
            raise UserError(
                f"Mixture has parts {sorted(self.parts)} but proportions for "
                f"{sorted(self.proportions)}; give each part one proportion"
            )
        for name, share in self.proportions.items():
            if not 0 < share < float("inf"):
                raise UserError(
                    f"Mixture.proportions[{name!r}] is {share}; use a positive number or "
                    "remove the part"
                )
        lengths = {name: part.tokens_per_row for name, part in self.parts.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"Mixture has rows of different lengths {lengths}; make them equal")

    @property
    def tokens_per_row(self) -> int:
        """Positions of a row, padding included."""
        return next(iter(self.parts.values())).tokens_per_row

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """Those of all parts."""
        return tuple(corpus for part in self.parts.values() for corpus in part.corpora)

    def tokens_per_epoch(self, *, tokenizer: Tokenizer) -> int:
        """Refused: the parts come round at different times."""
        raise UserError("a Mixture has no epochs; give durations in steps or Tokens")

    def batches(
        self,
        *,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> grain.IterDataset[Batch]:
        """Batches of mixed rows; see ``Source.batches``. Every part has a seed of its own."""
        count = rows_per_shard(
            batch_size=batch_size, shard_index=shard_index, shard_count=shard_count
        )
        rows = {
            name: part.batches(
                tokenizer=tokenizer,
                batch_size=shard_count,
                seed=stream_seed(seed, name),
                shard_index=shard_index,
                shard_count=shard_count,
            )
            for name, part in self.parts.items()
        }
        # the decimal a user wrote, not the binary fraction nearest to it
        weights = [Fraction(str(self.proportions[name])) for name in rows]
        shares = [weight / sum(weights) for weight in weights]
        return batched(_MixedDataset(rows, shares), count=count)
