"""Prepared TFDS data sets as corpora: threads, workers, and files with flipped bytes."""

import concurrent.futures
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tokenlab.core.errors import UserError
from tokenlab.data.corpora import TfdsCorpus

COUNT = 400


def text(i):
    """Does not compress well, so that most of the file is content."""
    words = np.random.default_rng(i).integers(0, 10**9, size=20 + i % 97)
    return f"{i}: é {' '.join(map(str, words))}\n".encode()


class NumberedTexts(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "n": tfds.features.Scalar(dtype=np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._examples(range(300)), "test": self._examples(range(300, COUNT))}

    def _generate_examples(self):
        return iter(())

    def _examples(self, numbers):
        return ((i, {"text": text(i).decode(), "n": i}) for i in numbers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    NumberedTexts(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def corpus(folder, **fields):
    return TfdsCorpus(name="numbered_texts", data_dir=str(folder), **fields)


def test_all_splits_are_read_and_split_again_by_content(folder):
    whole = corpus(folder, held_out=0.2)
    train, held_out = whole.documents("train"), whole.documents("held_out")
    everything = [d.text for d in train] + [d.text for d in held_out]
    assert sorted(everything) == sorted(text(i) for i in range(COUNT))
    assert 40 < len(held_out) < 120  # 80 +- 8
    assert train[0].name.startswith("numbered_texts/")
    assert train[-1] == train[len(train) - 1]
    with pytest.raises(IndexError):
        train[len(train)]


def test_a_tfds_split_chooses(folder):
    documents = corpus(folder, tfds_split="test", held_out=0.0).documents("train")
    assert [d.text for d in documents] == [text(i) for i in range(300, COUNT)]


def test_threads_and_copies_read_alike(folder):
    documents = corpus(folder, held_out=0.0).documents("train")
    copy = pickle.loads(pickle.dumps(documents))
    expected = [documents[i].text for i in range(COUNT)]
    assert set(expected) == {text(i) for i in range(COUNT)}
    order = [(i * 7) % COUNT for i in range(COUNT)] * 4
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for source in (documents, copy):
            found = list(pool.map(lambda i, source=source: source[i].text, order))
            assert found == [expected[i] for i in order]


def message(of):
    with pytest.raises(UserError) as caught:
        of.documents("train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_name_the_remedy(folder, tmp_path):
    assert "no feature 'txt'; did you mean 'text'?" in message(corpus(folder, text="txt"))
    assert "feature 'n' of numbered_texts is not text" in message(corpus(folder, text="n"))
    assert "Unknown split 'tset'" in message(corpus(folder, tfds_split="tset"))
    assert "is not in" in message(corpus(tmp_path))
    unknown = message(TfdsCorpus(name="english_pros", data_dir=str(folder)))
    assert "did you mean 'english_prose'?" in unknown


def storage(folder):
    """The file of the larger split."""
    return next(folder.rglob("*-train.array_record*"))


@pytest.fixture
def copy(folder, tmp_path):
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def test_flipped_bytes_are_named_or_harmless(copy):
    """Some bytes of the format are padding: then every document must be what it was."""
    path = storage(copy)
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    found = []
    for place in np.linspace(0, used - 1, 24).astype(int):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            documents = corpus(copy, held_out=0.0).documents("train")
            assert sorted(d.text for d in documents) == sorted(text(i) for i in range(COUNT))
        except UserError as error:
            found.append(str(error))
    assert len(found) > 12
    assert all("of numbered_texts is corrupt" in m and f"delete {copy}" in m for m in found)
    assert not any("\n" in m for m in found)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.9])
def test_a_file_cut_short_is_found_and_named(copy, keep):
    path = storage(copy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "of numbered_texts is corrupt" in message(corpus(copy, held_out=0.0))


@pytest.mark.parametrize("content", ["", "{", '{"name": "numb'])
def test_a_damaged_description_is_named(copy, content):
    next(copy.rglob("dataset_info.json")).write_text(content)
    assert f"{copy}/numbered_texts is damaged; delete it" in message(corpus(copy))
