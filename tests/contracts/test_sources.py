"""Every public source keeps the promises of ``Source``."""

import dataclasses
import importlib
import inspect
import itertools
import json
import pkgutil

import numpy as np
import pytest

import tokenlab.data
from tokenlab.core.errors import UserError
from tokenlab.data.base import Corpus, Document, Source
from tokenlab.data.mixture import Mixture
from tokenlab.data.packing import PackedText, PaddedText
from tokenlab.data.tasks.addition import Addition
from tokenlab.data.tasks.associative_recall import AssociativeRecall
from tokenlab.data.tasks.source import TaskSource
from tokenlab.tokenizers.byte import ByteTokenizer

BASE = {
    "tokens": np.int32,
    "targets": np.int32,
    "segments": np.int32,
    "positions": np.int32,
    "weights": np.float32,
    "documents": np.int32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbered(Corpus):
    """Documents of many lengths, no two alike."""

    count: int = 400

    def documents(self, split):
        texts = (f"{split} document {i} ".encode() * (1 + i % 13) for i in range(self.count))
        return [Document(text, str(i)) for i, text in enumerate(texts)]

    @property
    def fingerprint(self):
        return str(self.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A source, how to make another like it, the tokenizer it needs, arrays beyond the base."""

    make: object
    tokenizer: object = ByteTokenizer()
    extra: dict = dataclasses.field(default_factory=dict)
    changed: dict


def mixed():
    parts = {
        "packed": PackedText(corpus=Numbered(), length=48),
        "padded": PaddedText(corpus=Numbered(), length=48),
    }
    return Mixture(parts=parts, proportions={"packed": 0.7, "padded": 0.3})


TABLE = {
    PackedText: Row(
        make=lambda: PackedText(corpus=Numbered(), length=48), changed={"split": "held_out"}
    ),
    PaddedText: Row(
        make=lambda: PaddedText(corpus=Numbered(), length=48), changed={"corpus": Numbered(count=9)}
    ),
    Mixture: Row(make=mixed, changed={"proportions": {"packed": 0.5, "padded": 0.5}}),
    TaskSource: Row(
        make=lambda: TaskSource(task=AssociativeRecall()),
        tokenizer=AssociativeRecall().tokenizer,
        extra={"difficulty": np.int32},
        changed={"task": Addition()},
    ),
}


@pytest.fixture(params=TABLE, ids=lambda member: member.__name__)
def row(request):
    return TABLE[request.param]


def run(row, **options):
    given = {"tokenizer": row.tokenizer, "batch_size": 6, "seed": 2}
    return row.make().batches(**given | options)


def take(row, count, **options):
    return list(itertools.islice(run(row, **options), count))


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def row_contents(batches):
    return [row.tobytes() for batch in batches for row in batch["targets"]]


def test_every_public_source_is_in_the_table():
    found = set()
    for module in pkgutil.walk_packages(tokenlab.data.__path__, "tokenlab.data."):
        for name, member in inspect.getmembers(importlib.import_module(module.name)):
            if inspect.isclass(member) and issubclass(member, Source) and name[0] != "_":
                found.add(member)
    assert {member for member in found if not inspect.isabstract(member)} == set(TABLE)


def test_arrays_have_the_promised_names_types_and_shapes(row):
    length = row.make().tokens_per_row
    for shards in (1, 3):
        for batch in take(row, 3, shard_count=shards):
            types = {name: values.dtype.type for name, values in batch.items()}
            assert types == BASE | row.extra
            assert {values.shape for values in batch.values()} == {(6 // shards, length)}


def test_targets_are_the_next_tokens_and_padding_is_empty(row):
    for batch in take(row, 12):
        used = batch["segments"] > 0
        assert ((batch["documents"] >= 0) == used).all()
        assert (batch["weights"][~used] == 0).all() and batch["weights"].sum() > 0
        assert (batch["tokens"][~used] == row.tokenizer.pad_id).all()
        for name in ("tokens", "targets"):
            assert batch[name].min() >= 0 and batch[name].max() < row.tokenizer.vocab_size
        inner = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & used[:, 1:]
        np.testing.assert_array_equal(
            batch["targets"][:, :-1][inner], batch["tokens"][:, 1:][inner]
        )
        steps = np.diff(batch["positions"], axis=1)
        assert (steps[inner] == 1).all()
        starts = used.copy()
        starts[:, 1:] &= ~inner
        assert (batch["positions"][starts] == 0).all()


def test_the_same_seed_gives_the_same_batches_and_another_does_not(row):
    first, again, other = take(row, 6), take(row, 6), take(row, 6, seed=3)
    for left, right in zip(first, again, strict=True):
        same(left, right)
    assert row_contents(first) != row_contents(other)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_restored_iterator_goes_on_bit_for_bit(row, steps):
    dataset = run(row)
    straight, resumed = iter(dataset), iter(dataset)
    for _ in range(steps):
        next(straight)
    resumed.set_state(json.loads(json.dumps(straight.get_state())))
    for _ in range(8):
        same(next(resumed), next(straight))


def test_shards_do_not_overlap(row):
    shards = [row_contents(take(row, 10, shard_index=i, shard_count=3)) for i in range(3)]
    assert [len(set(rows)) for rows in shards] == [20, 20, 20]
    assert len(set().union(*shards)) == 60


def test_a_batch_that_does_not_divide_is_a_user_error(row):
    with pytest.raises(UserError, match="batch_size 6 does not divide among 4 processes"):
        run(row, shard_count=4)
    with pytest.raises(UserError, match="shard_index -1 is not below shard_count 1"):
        run(row, shard_index=-1)


def test_the_object_is_its_own_config(row):
    source = row.make()
    assert source == row.make()
    assert dataclasses.replace(source, **row.changed) != source
    assert type(source).__dataclass_params__.frozen
    attributes = inspect.getdoc(type(source)).split("Attributes:")[1]
    for field in dataclasses.fields(source):
        assert field.kw_only
        assert f"\n    {field.name}: " in attributes
