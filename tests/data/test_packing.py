"""Packed and padded rows: nothing lost, nothing twice, the same after a resume."""

import dataclasses
import functools
import itertools
import json
from collections import Counter, defaultdict

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import UserError
from tokenlab.data.base import Corpus, Document
from tokenlab.data.packing import PackedText, PaddedText
from tokenlab.tokenizers.base import Tokenizer

SOURCES = (PackedText, PaddedText)


class Bytes(Tokenizer):
    pad_id, bos_id, eos_id = 7, 8, 9
    vocab_size = 266
    fingerprint = "bytes"

    def encode(self, text):
        return [byte + 10 for byte in text]

    def decode(self, ids):
        return bytes(i - 10 for i in ids if i >= 10)


@functools.cache
def random_documents(lengths, split):
    rng = np.random.default_rng(len(split))
    return [Document(rng.bytes(n), f"{split}/{i}") for i, n in enumerate(lengths)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths(Corpus):
    """Random bytes, one document per length."""

    lengths: tuple[int, ...]

    def documents(self, split):
        return random_documents(self.lengths, split)

    @property
    def fingerprint(self):
        return str(self.lengths)


def realistic() -> Lengths:
    rng = np.random.default_rng(0)
    short = rng.lognormal(4.5, 1.0, 500).astype(int)
    return Lengths(lengths=(*(int(n) for n in short), 0, 1, 255, 256, 257, 6_000, 10_011))


def small() -> Lengths:
    return Lengths(lengths=(0, 1, 14, 15, 16, 17, 3, 5, 40, 2, 100))


def run(source, **options):
    options = {"tokenizer": Bytes(), "batch_size": 4, "seed": 0} | options
    return source.batches(**options)


def pieces(batches):
    """Every segment as (document, tokens, targets), in the order of the stream."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            segments = batch["segments"][row]
            count = segments.max()
            kept = segments > 0
            # used positions come first, and segments count up without a gap
            assert not kept[kept.argmin() :].any() or kept.all()
            np.testing.assert_array_equal(np.unique(segments[kept]), np.arange(1, count + 1))
            assert (np.diff(segments[kept]) >= 0).all()
            for name, empty in {"weights": 0, "documents": -1, "tokens": 7, "targets": 7}.items():
                assert (batch[name][row][~kept] == empty).all()
            for segment in range(1, count + 1):
                inside = segments == segment
                (document,) = set(batch["documents"][row][inside].tolist())
                positions = batch["positions"][row][inside]
                np.testing.assert_array_equal(positions, np.arange(len(positions)))
                assert (batch["weights"][row][inside] == 1).all()
                yield document, batch["tokens"][row][inside], batch["targets"][row][inside]


def expected(corpus, index, split="train"):
    ids = [8, *Bytes().encode(corpus.documents(split)[index].text), 9]
    return ids[:-1], ids[1:]


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("source_type", SOURCES)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_one_epoch_holds_every_target_once_and_in_order(source_type, split):
    corpus = realistic()
    source = source_type(corpus=corpus, length=256, split=split, epochs=1, shuffle_rows=1)
    tokens, targets = defaultdict(list), defaultdict(list)
    for document, inputs, outputs in pieces(run(source)):
        tokens[document] += inputs.tolist()
        targets[document] += outputs.tolist()
    assert sorted(tokens) == list(range(len(corpus.lengths)))
    for document in tokens:
        assert (tokens[document], targets[document]) == expected(corpus, document, split)


@pytest.mark.parametrize("source_type", SOURCES)
def test_shuffled_rows_lose_and_repeat_nothing(source_type):
    corpus = realistic()
    source = source_type(corpus=corpus, length=256, epochs=1, shuffle_rows=50)
    seen, wanted = Counter(), Counter()
    for document, _, outputs in pieces(run(source)):
        seen.update((document, target) for target in outputs.tolist())
    for document in range(len(corpus.lengths)):
        wanted.update((document, target) for target in expected(corpus, document)[1])
    assert seen == wanted


def test_packing_pads_less_than_one_percent_and_padding_does_not():
    source = PackedText(corpus=realistic(), length=256, epochs=1, shuffle_rows=1)
    batches = list(run(source))
    used = np.mean([batch["segments"] > 0 for batch in batches])
    assert used > 0.99
    assert all((batch["segments"] > 0).all() for batch in batches[:-1])
    padded = run(PaddedText(corpus=realistic(), length=256, epochs=1))
    assert np.mean([batch["segments"] > 0 for batch in padded]) < 0.7


def test_padded_rows_hold_one_segment_each():
    for batch in run(PaddedText(corpus=realistic(), length=256, epochs=1)):
        assert batch["segments"].max() == 1


def test_row_windows_spread_the_rows_of_a_long_document():
    corpus = Lengths(lengths=(20 * 16 - 1, *[15] * 300))
    batches_with_it = {}
    for window in (1, 64):
        source = PackedText(corpus=corpus, length=16, epochs=1, shuffle_rows=window)
        batches_with_it[window] = sum((batch["documents"] == 0).any() for batch in run(source))
    assert batches_with_it[1] <= 6
    assert batches_with_it[64] >= 10


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    length=st.integers(1, 20),
    batch_size=st.integers(1, 4),
    window=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_conserve_targets(lengths, length, batch_size, window, seed):
    corpus = Lengths(lengths=tuple(lengths))
    source = PackedText(corpus=corpus, length=length, epochs=2, shuffle_rows=window)
    batches = list(run(source, batch_size=batch_size, seed=seed))
    total = 2 * sum(n + 1 for n in lengths)
    assert sum(int(batch["weights"].sum()) for batch in batches) == total
    rows = -(-total // length)
    assert len(batches) == -(-rows // batch_size)
    counts = Counter()
    for document, _, outputs in pieces(batches):
        counts[document] += len(outputs)
    assert counts == {i: 2 * (n + 1) for i, n in enumerate(lengths)}


def document_order(source, count, **options):
    order = (document for document, _, _ in pieces(run(source, **options)))
    runs = (document for document, _ in itertools.groupby(order))
    return list(itertools.islice(runs, count))


def test_each_epoch_is_a_new_order_and_each_seed_another():
    source = PackedText(corpus=Lengths(lengths=(3,) * 40), length=16, shuffle_rows=1)
    order = document_order(source, 120)
    epochs = [tuple(order[i : i + 40]) for i in (0, 40, 80)]
    other = document_order(source, 120, seed=1)
    epochs += [tuple(other[i : i + 40]) for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len(set(epochs)) == 6
    assert document_order(source, 120) == order


@pytest.mark.parametrize("source_type", SOURCES)
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_part_every_epoch_without_overlap(source_type, shards):
    corpus = Lengths(lengths=realistic().lengths[::4])
    for epochs in (1, 2):
        seen = Counter()
        for shard in range(shards):
            source = source_type(corpus=corpus, length=64, epochs=epochs)
            part = run(source, batch_size=6, shard_index=shard, shard_count=shards)
            mine = Counter()
            for document, _, outputs in pieces(part):
                mine[document] += len(outputs)
            assert len(next(iter(part))["tokens"]) == 6 // shards
            if epochs == 1:
                assert not mine.keys() & seen.keys()
            seen += mine
        assert seen == {i: epochs * (n + 1) for i, n in enumerate(corpus.lengths)}


@pytest.mark.parametrize("source_type", SOURCES)
@pytest.mark.parametrize("window", [1, 20])
def test_restored_iterator_goes_on_bit_for_bit(source_type, window):
    dataset = run(source_type(corpus=small(), length=16, shuffle_rows=window), batch_size=2)
    straight = iter(dataset)
    states, batches = [], []
    for _ in range(7):
        states.append(json.dumps(straight.get_state()))
        batches.append(next(straight))
    for step, state in enumerate(states):
        resumed = iter(dataset)
        resumed.set_state(json.loads(state))
        assert resumed.get_state() == json.loads(state)
        for batch in batches[step : step + 3]:
            same(next(resumed), batch)


def test_orbax_restores_the_position(tmp_path):
    dataset = run(PackedText(corpus=realistic(), length=64))
    iterator = iter(dataset)
    for _ in range(7):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        wanted = [next(iterator) for _ in range(5)]
        fresh = iter(dataset)
        next(fresh)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    for batch in wanted:
        same(next(fresh), batch)


def test_thread_counts_do_not_change_the_batches():
    corpus = realistic()
    one = run(PackedText(corpus=corpus, length=128, threads=1, documents_ahead=1))
    many = run(PackedText(corpus=corpus, length=128, threads=5, documents_ahead=40))
    for left, right in itertools.islice(zip(one, many, strict=False), 40):
        same(left, right)


def test_user_errors_name_the_remedy():
    with pytest.raises(UserError, match=r"PackedText.length is 0"):
        PackedText(corpus=small(), length=0)
    with pytest.raises(UserError, match=r"PaddedText.epochs is -1"):
        PaddedText(corpus=small(), epochs=-1)
    source = PackedText(corpus=small())
    with pytest.raises(UserError, match="batch_size 4 does not divide among 3"):
        run(source, shard_count=3)
    with pytest.raises(UserError, match="shard_index 2 is not below shard_count 2"):
        run(source, shard_index=2, shard_count=2)
    with pytest.raises(UserError, match="0 documents in split 'train'"):
        run(PackedText(corpus=Lengths(lengths=())))


def test_a_failing_document_fails_the_batch():
    class Refuses(Bytes):
        def encode(self, text):
            raise UserError("document cannot be encoded")

    batches = run(PackedText(corpus=small()), tokenizer=Refuses())
    with pytest.raises(UserError, match="cannot be encoded"):
        next(iter(batches))


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_has_the_positions_it_says(source):
    rows = source(corpus=Lengths(lengths=(1, 5, 16, 33, 0, 7)), length=8, epochs=1)
    batches = list(rows.batches(tokenizer=Bytes(), batch_size=1, seed=0))
    counted = sum(
        batch["weights"].sum() if source is PackedText else batch["tokens"].size
        for batch in batches
        if batch["weights"].any()
    )
    assert rows.tokens_per_epoch(tokenizer=Bytes()) == counted
