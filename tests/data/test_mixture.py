"""Mixtures: exact shares of every prefix, parts left as they are, exact resume."""

import dataclasses
import itertools
import json
from collections import Counter
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import UserError
from tokenlab.data.base import Source
from tokenlab.data.mixture import Mixture, next_part
from tokenlab.tokenizers.byte import ByteTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Source):
    """Row n of a shard is all ``code + n``; the seed is kept in the positions."""

    code: int
    length: int = 4

    @property
    def tokens_per_row(self):
        return self.length

    corpora = ()

    def tokens_per_epoch(self, *, tokenizer):
        return 10**6 * self.length

    def batches(self, *, tokenizer, batch_size, seed, shard_index=0, shard_count=1):
        def row(i):
            tokens = np.full(self.length, self.code + i * shard_count + shard_index)
            return {"tokens": tokens, "positions": np.full(self.length, seed)}

        rows = grain.MapDataset.range(10**6).map(row).to_iter_dataset()
        return rows.batch(batch_size // shard_count)


def mixture(**proportions):
    parts = {name: Counting(code=10**6 * i) for i, name in enumerate(proportions)}
    return Mixture(parts=parts, proportions=proportions)


def run(source, **options):
    return source.batches(**{"tokenizer": ByteTokenizer(), "batch_size": 4, "seed": 3} | options)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.fractions(Fraction(1, 1000), 5), min_size=1, max_size=9))
def test_every_prefix_is_less_than_one_row_off(weights):
    shares = [weight / sum(weights) for weight in weights]
    bound = 1 - Fraction(1, max(2 * len(shares) - 2, 1))
    counts = [0] * len(shares)
    for row in range(1, 250):
        counts[next_part(counts, shares)] += 1
        off = max(abs(count - row * share) for count, share in zip(counts, shares, strict=True))
        assert off <= bound


def test_source_gives_the_proportions_and_leaves_each_part_in_order():
    proportions = {"books": 0.7, "code": 0.1, "speech": 0.3}
    batches = itertools.islice(run(mixture(**proportions)), 275)
    rows = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    part, index = rows // 10**6, rows % 10**6
    # 1,100 rows are a whole number of rounds of 7 + 1 + 3: no remainder is left
    assert np.bincount(part).tolist() == [700, 100, 300]
    for code in range(3):
        np.testing.assert_array_equal(index[part == code], np.arange((part == code).sum()))


def test_shards_share_nothing_and_parts_have_their_own_seeds():
    seen = Counter()
    for shard in (0, 1):
        batches = run(mixture(a=1, b=2), shard_index=shard, shard_count=2)
        for batch in itertools.islice(batches, 30):
            assert batch["tokens"].shape == (2, 4)
            seen.update(batch["tokens"][:, 0].tolist())
    assert len(seen) == 120 and set(seen.values()) == {1}
    batch = next(iter(run(mixture(a=1, b=1))))
    seeds = {batch["tokens"][i, 0] // 10**6: batch["positions"][i, 0] for i in range(4)}
    assert seeds[0] != seeds[1]


def test_restored_iterator_goes_on_exactly():
    dataset = run(mixture(a=0.61, b=0.39, c=1.7))
    straight = iter(dataset)
    for _ in range(12):
        state = json.dumps(straight.get_state())
        wanted = next(straight)
        resumed = iter(dataset)
        resumed.set_state(json.loads(state))
        np.testing.assert_array_equal(next(resumed)["tokens"], wanted["tokens"])


def test_parts_of_different_arrays_do_not_mix():
    class Longer(Counting):
        def batches(self, **options):
            return (
                super()
                .batches(**options)
                .map(lambda batch: batch | {"difficulty": batch["tokens"]})
            )

    parts = {"a": Counting(code=0), "b": Longer(code=1)}
    with pytest.raises(UserError, match=r"parts\['b'\] gives the arrays \['difficulty'"):
        next(iter(run(Mixture(parts=parts, proportions={"a": 1, "b": 1}))))


@pytest.mark.parametrize(
    ("parts", "proportions", "message"),
    [
        ({}, {}, "give each part one proportion"),
        ({"a": Counting(code=0)}, {"b": 1.0}, "give each part one proportion"),
        ({"a": Counting(code=0)}, {"a": 0.0}, r"proportions\['a'\] is 0.0"),
        ({"a": Counting(code=0)}, {"a": float("nan")}, r"proportions\['a'\] is nan"),
        (
            {"a": Counting(code=0), "b": Counting(code=1, length=5)},
            {"a": 1, "b": 1},
            "different lengths",
        ),
    ],
)
def test_user_errors(parts, proportions, message):
    with pytest.raises(UserError, match=message):
        Mixture(parts=parts, proportions=proportions)
