"""What SentencePiece adds to the contract: training, its errors, and what it refuses."""

import argparse
import io
import pathlib

import pytest
import sentencepiece

from tokenlab.core.errors import UserError
from tokenlab.tokenizers import SentencePieceTokenizer, SentencePieceTrainer
from tokenlab.tokenizers.sentence_piece import _sample

SOURCE = pathlib.Path(argparse.__file__).read_bytes()


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTrainer(vocab_size=500).fit([SOURCE])


def test_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == 500


def test_it_compresses(tokenizer):
    assert len(tokenizer.encode(SOURCE)) < 0.5 * len(SOURCE)


def test_digits_stand_alone_and_are_pieces(tokenizer):
    ids = tokenizer.encode("1234567890")
    assert len(ids) == 10
    assert [tokenizer.decode([i]) for i in ids] == [b"%d" % d for d in [*range(1, 10), 0]]
    assert min(ids) >= 4 + 256  # after the byte tokens: not a fallback


def test_newline_and_tab_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("\n\n\n")) == 3
    assert len(tokenizer.encode("\t")) == 1
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("a\nb\n")]
    assert pieces.count(b"\n") == 2


def test_indentation_is_learnt(tokenizer):
    assert len(tokenizer.encode(" " * 8)) < 8


def test_null_bytes_broken_utf8_and_long_lines_do_not_stop_training():
    dirty = [b"\0\xff\xfe word" * 3000, "\u2581 word".encode(), SOURCE]
    tokenizer = SentencePieceTrainer(vocab_size=400, kind="bpe").fit(dirty)
    assert tokenizer.decode(tokenizer.encode(dirty[0])) == dirty[0]
    assert len(tokenizer.encode(" word")) == 1  # learnt from the line of 30 kB


def test_seed_and_texts_change_the_fingerprint():
    def fit(seed, texts):
        recipe = SentencePieceTrainer(vocab_size=400, kind="bpe", max_bytes=20_000, seed=seed)
        return recipe.fit(texts).fingerprint

    first = fit(0, [SOURCE])
    assert first == fit(0, [SOURCE])
    assert first != fit(1, [SOURCE])
    assert first != fit(0, [SOURCE.replace(b"parser", b"reader")])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_vocabulary_too_large_or_too_small_names_the_limit(kind):
    with pytest.raises(UserError, match=r"vocab_size=90000 is more than this corpus.*at most \d+"):
        SentencePieceTrainer(vocab_size=90_000, kind=kind).fit([b"one two three\n"])
    with pytest.raises(UserError, match=r"vocab_size=100 has no room .* take more than \d+"):
        SentencePieceTrainer(vocab_size=100, kind=kind).fit([SOURCE])


@pytest.mark.parametrize("texts", [[], [b""], [b"\xff\xff"]])
def test_corpus_without_text_is_a_user_error(texts):
    with pytest.raises(UserError, match="has no text"):
        SentencePieceTrainer().fit(texts)


@pytest.mark.parametrize("model", [b"", b"not a model", SOURCE])
def test_bytes_that_are_no_model_are_a_user_error(model):
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTokenizer(model=model)


@pytest.mark.parametrize(
    "change",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": True},
        {"byte_fallback": False},
    ],
)
def test_a_model_that_loses_text_is_refused(change):
    lossless = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.decode().splitlines()),
        model_writer=model,
        vocab_size=400,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=3,
        **(lossless | change),
    )
    with pytest.raises(UserError, match="does not give back"):
        SentencePieceTokenizer(model=model.getvalue())


def test_sample_is_in_order_of_the_size_asked_for_and_uniform():
    lines = [f"{i:09d}\n" for i in range(2000)]
    counts = [0, 0]
    for seed in range(40):
        kept = _sample(lines, max_bytes=1000, seed=seed)
        assert kept == sorted(kept)
        assert sum(map(len, kept)) == 1000
        for line in kept:
            counts[int(line) >= 1000] += 1
    # 4000 draws, each half expected 2000 +- 31: seven standard deviations.
    assert abs(counts[0] - 2000) < 220
    assert _sample(lines, max_bytes=10**9, seed=0) == lines
