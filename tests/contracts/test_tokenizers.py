"""Every tokenizer keeps every byte, and the table below holds every tokenizer."""

import argparse
import functools
import importlib
import inspect
import pathlib
import pickle
import pkgutil
from typing import NamedTuple

import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlab.tokenizers
from tokenlab.core.errors import UserError
from tokenlab.tokenizers import (
    ByteTokenizer,
    PretrainedTokenizer,
    SentencePieceTokenizer,
    SentencePieceTrainer,
    Tokenizer,
    TokenizerTrainer,
    load_tokenizer,
    save_tokenizer,
)


def texts() -> list[bytes]:
    """Two modules of the standard library and a little that is not English."""
    sources = [pathlib.Path(m.__file__).read_bytes() for m in (argparse, inspect)]
    return [*sources, "Ünïcode  žluťoučký\tkůň 12345\n日本語\n".encode() * 20]


class Published(NamedTuple):
    """Stands for a trainer of what others trained."""

    kind: str

    def fit(self, texts) -> PretrainedTokenizer:
        return published.tokenizer(self.kind)


# name -> (class, recipe)
TABLE: dict[str, tuple[type[Tokenizer], TokenizerTrainer | Published]] = {
    "byte": (ByteTokenizer, ByteTokenizer()),
    "unigram": (SentencePieceTokenizer, SentencePieceTrainer(vocab_size=500, kind="unigram")),
    "bpe": (SentencePieceTokenizer, SentencePieceTrainer(vocab_size=500, kind="bpe")),
    "published bytes": (PretrainedTokenizer, Published("bytes")),
    "published fallback": (PretrainedTokenizer, Published("fallback")),
}
every = pytest.mark.parametrize("name", TABLE)


@functools.cache
def fitted(name: str) -> Tokenizer:
    return TABLE[name][1].fit(texts())


def test_table_holds_every_public_member():
    modules = [
        importlib.import_module(f"tokenlab.tokenizers.{module.name}")
        for module in pkgutil.iter_modules(tokenlab.tokenizers.__path__)
    ]
    public = {
        member
        for module in modules
        for name, member in vars(module).items()
        if not name.startswith("_") and inspect.isclass(member) and not inspect.isabstract(member)
    }
    assert {m for m in public if issubclass(m, Tokenizer)} == {c for c, _ in TABLE.values()}
    trainers = {m for m in public if issubclass(m, TokenizerTrainer)}
    assert trainers == {type(trainer) for _, trainer in TABLE.values()} - {Published}


@every
@settings(deadline=None, max_examples=150)
@given(data=st.binary(max_size=200))
def test_bytes_round_trip(name, data):
    tokenizer = fitted(name)
    assert tokenizer.decode(tokenizer.encode(data)) == data


@every
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=200))
def test_text_round_trips_and_equals_its_utf8(name, text):
    tokenizer = fitted(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.encode(text.encode()) == ids


# What a subword model is most likely to lose or to take for its own notation.
MARKS = [
    *"\u2581 \n\t\0\r\u2585\u2047\ufffd\ufffe\U0010ffff\ufeff\ufb01\u03017",
    *("<unk>", "<s>", "</s>", "<pad>", "<bos>", "<0x41>"),
]
BROKEN = [m.encode() for m in MARKS] + [b"\xff", b"\xe2\x96", b"\xed\xb2\x80", b"\xc0\x80", b"\xf5"]


@every
@settings(deadline=None, max_examples=150)
@given(parts=st.lists(st.sampled_from(BROKEN) | st.binary(max_size=3), max_size=12))
def test_marks_and_broken_utf8_round_trip(name, parts):
    tokenizer = fitted(name)
    data = b"".join(parts)
    ids = tokenizer.encode(data)
    assert tokenizer.decode(ids) == data
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@every
@settings(deadline=None, max_examples=100)
@given(left=st.binary(max_size=40), right=st.binary(max_size=40))
def test_decoding_is_a_homomorphism(name, left, right):
    tokenizer = fitted(name)
    ids = tokenizer.encode(left) + tokenizer.encode(right)
    assert tokenizer.decode(ids) == left + right


@every
def test_lone_surrogate_of_text_is_kept(name):
    tokenizer = fitted(name)
    text = "a\ud800\udc80b"
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", "surrogatepass")


@every
def test_special_ids_stand_for_nothing(name):
    tokenizer = fitted(name)
    special = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    assert special == ([2, 0, 1] if name.startswith("published") else [0, 1, 2])
    pad, bos, eos = special
    assert tokenizer.decode([bos, *tokenizer.encode("x y"), eos, pad, pad]) == b"x y"
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == b""


@every
def test_every_id_decodes(name):
    tokenizer = fitted(name)
    every_id = list(range(tokenizer.vocab_size))
    parts = [tokenizer.decode([i]) for i in every_id]
    assert tokenizer.decode(every_id) == b"".join(parts)
    assert {bytes([b]) for b in range(256)} <= set(parts)


@every
@pytest.mark.parametrize("offset", [-1, 0])
def test_id_outside_the_vocabulary_is_a_user_error(name, offset):
    tokenizer = fitted(name)
    wrong = -1 if offset else tokenizer.vocab_size
    with pytest.raises(UserError, match=f"token id {wrong} is outside the vocabulary"):
        tokenizer.decode([wrong])


@every
def test_fitting_again_gives_the_same_tokenizer(name):
    again = TABLE[name][1].fit(iter(texts()))
    assert again == fitted(name)
    assert again.fingerprint == fitted(name).fingerprint


def test_fingerprints_differ_between_members():
    assert len({fitted(name).fingerprint for name in TABLE}) == len(TABLE)


@every
def test_save_load_and_pickle_keep_the_tokenizer(name, tmp_path):
    tokenizer = fitted(name)
    save_tokenizer(tokenizer, tmp_path / "run")
    for copy in (load_tokenizer(tmp_path / "run"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(texts()[0]) == tokenizer.encode(texts()[0])
