"""The held-out split: by content, complete, stable, and of the size asked for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.data.base import Document
from tokenlab.data.split import Records, Subset, index_documents, is_held_out


@settings(deadline=None)
@given(texts=st.lists(st.binary(max_size=4)), fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_splits_partition_and_do_not_depend_on_order_or_company(texts, fraction, seed):
    numbers = index_documents(texts, fraction).numbers
    assert sorted([*numbers["train"], *numbers["held_out"]]) == list(range(len(texts)))
    held_out = {texts[i] for i in numbers["held_out"]}
    assert not held_out & {texts[i] for i in numbers["train"]}  # copies stay together

    order = np.random.default_rng(seed).permutation(len(texts))
    fewer = [texts[i] for i in order[: len(texts) // 2]]
    again = index_documents(fewer, fraction).numbers["held_out"]
    assert {fewer[i] for i in again} == held_out & set(fewer)


def test_share_is_the_one_asked_for():
    # 20,000 draws at 0.02: 400 +- 20, five standard deviations.
    share = sum(is_held_out(b"%d" % i, 0.02) for i in range(20_000))
    assert abs(share - 400) < 100


def test_larger_share_only_adds():
    texts = [b"%d" % i for i in range(500)]
    small, large = ({t for t in texts if is_held_out(t, f)} for f in (0.05, 0.2))
    assert small < large


def test_extremes():
    texts = [b"%d" % i for i in range(50)]
    assert len(index_documents(texts, 0.0).numbers["held_out"]) == 0
    assert len(index_documents(texts, 1.0).numbers["train"]) == 0


def test_assignment_never_changes_between_releases():
    """A run of last year must not train on what this year's run holds out."""
    chosen = b"".join(b"%d" % i for i in range(1000) if is_held_out(b"%d" % i, 0.1))
    assert hashlib.sha256(chosen).hexdigest()[:16] == "157f6ee6bfeb6040"


def test_fingerprint_is_of_content_order_and_split():
    def of(texts, fraction=0.1):
        return index_documents(texts, fraction).fingerprint

    assert of([b"a", b"b"]) == of([b"a", b"b"])
    others = [of([b"b", b"a"]), of([b"ab"]), of([b"a"]), of([b"a", b"b"], 1.0)]
    assert of([b"a", b"b"]) not in others


def test_subset_reads_only_what_is_asked_for():
    class Hundred(Records):
        def __len__(self):
            return 100

        def read(self, number):
            seen.append(number)
            return Document(b"%d" % number, str(number))

    seen = []
    subset = Subset(Hundred(), np.array([3, 50, 99]))
    assert len(subset) == 3
    assert subset[1].text == b"50"
    assert subset[-1].text == b"99"
    assert [d.text for d in subset[1:]] == [b"50", b"99"]
    assert [d.text for d in subset] == [b"3", b"50", b"99"]
    assert seen == [50, 99, 50, 99, 3, 50, 99]
    assert subset[np.int64(0)].text == Hundred()[-97].text == b"3"
    for outside in (3, -4):
        with pytest.raises(IndexError):
            subset[outside]
