"""Tokenizers on disk: a damaged one is never returned, and a kill leaves no harm."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tokenlab.core.errors import UserError
from tokenlab.tokenizers import (
    ByteTokenizer,
    SentencePieceTrainer,
    cached_fit,
    load_tokenizer,
    save_tokenizer,
)

SOURCE = pathlib.Path(argparse.__file__).read_bytes()
RECIPE = SentencePieceTrainer(vocab_size=400, kind="bpe", max_bytes=30_000)


def refuse():
    raise AssertionError("texts were read")
    yield b""


def fit(cache, recipe=RECIPE, corpus="c", texts=None):
    return cached_fit(
        recipe,
        corpus_fingerprint=corpus,
        texts=[SOURCE] if texts is None else texts,
        cache_dir=cache,
    )


def test_second_call_reads_no_text(tmp_path):
    first = fit(tmp_path)
    assert fit(tmp_path, texts=refuse()) == first


def test_recipe_and_corpus_are_the_key(tmp_path):
    fit(tmp_path)
    with pytest.raises(AssertionError, match="texts were read"):
        fit(tmp_path, corpus="d", texts=refuse())
    with pytest.raises(AssertionError, match="texts were read"):
        fit(tmp_path, SentencePieceTrainer(vocab_size=401, kind="bpe"), texts=refuse())


def test_bytes_need_no_text(tmp_path):
    assert fit(tmp_path, ByteTokenizer(), texts=refuse()) == ByteTokenizer()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_cache_is_fitted_again_and_damaged_run_refused(tmp_path, name, damage):
    first = fit(tmp_path)
    (folder,) = tmp_path.iterdir()
    path = folder / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "flip":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "cut":
        path.write_bytes(content[:middle])
    else:
        path.unlink()
    with pytest.raises(UserError):
        load_tokenizer(folder)
    assert fit(tmp_path) == first
    assert load_tokenizer(folder) == first


def test_class_of_the_manifest_must_be_a_tokenizer(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    manifest = json.loads((tmp_path / "tokenizer.json").read_text())
    family = "tokenlab.tokenizers.sentence_piece"
    for name in (f"{family}:SentencePieceTrainer", f"{family}:Nothing", "os:system", "os", ""):
        (tmp_path / "tokenizer.json").write_text(json.dumps(manifest | {"class": name}))
        with pytest.raises(UserError, match="not a tokenizer class"):
            load_tokenizer(tmp_path)


def test_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json is missing") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


LOOP = """
import sys
from tokenlab.tokenizers import SentencePieceTrainer, save_tokenizer
source = open(sys.argv[1], "rb").read()
two = [SentencePieceTrainer(vocab_size=size, kind="bpe").fit([source]) for size in (400, 500)]
print("ready", flush=True)
while True:
    for tokenizer in two:
        save_tokenizer(tokenizer, sys.argv[2])
"""


def test_a_kill_while_saving_leaves_a_whole_tokenizer_or_a_refusal(tmp_path):
    for delay in (0.0, 0.003, 0.01, 0.021):
        folder = tmp_path / str(delay)
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, argparse.__file__, str(folder)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        )
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with contextlib.suppress(UserError):
            assert load_tokenizer(folder).vocab_size in (400, 500)
        # Whatever was left, the next save makes it whole.
        save_tokenizer(ByteTokenizer(), folder)
        assert load_tokenizer(folder) == ByteTokenizer()
        shutil.rmtree(folder)
