"""Corpora of files: every byte reached, in any order, by any thread; every error one line."""

import json
import pickle
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import UserError
from tokenlab.data.corpora import JsonLines, TextFiles


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content)
    return str(folder / "*.txt")


def texts(corpus):
    """All documents of both splits; an empty split counts as none."""
    found = []
    for split in ("train", "held_out"):
        try:
            found += [document.text for document in corpus.documents(split)]
        except UserError as error:
            assert "is empty" in str(error)
    return found


def message(corpus, split="train"):
    with pytest.raises(UserError) as caught:
        corpus.documents(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_file_is_a_document_in_order_of_name(tmp_path):
    pattern = write(tmp_path, b=b"two\r\n\0\xff", a=b" one\n", empty=b"", blank=b" \n\n")
    corpus = TextFiles(pattern=pattern, held_out=0.0)
    documents = corpus.documents("train")
    assert [d.text for d in documents] == [b" one\n", b"two\r\n\0\xff"]
    assert documents[1].name == f"{tmp_path}/b.txt:1"


@settings(deadline=None, max_examples=50)
@given(
    parts=st.lists(st.text("ab \n", max_size=6).map(str.encode), min_size=1, max_size=8),
    separator=st.sampled_from(["\n\n", "===", "b", "\n"]),
)
def test_separator_cuts_like_split(tmp_path_factory, parts, separator):
    content = separator.encode().join(parts)
    pattern = write(tmp_path_factory.mktemp("d"), a=content, z=b"end")
    corpus = TextFiles(pattern=pattern, separator=separator, held_out=0.0)
    expected = [part for part in content.split(separator.encode()) if part.strip()]
    documents = corpus.documents("train")
    assert [d.text for d in documents] == [*expected, b"end"]
    assert [documents[i].text for i in range(len(documents))] == [*expected, b"end"]


def test_names_point_at_lines(tmp_path):
    pattern = write(tmp_path, a=b"1\n2\n--\n4\n--\n\n--\n8")
    documents = TextFiles(pattern=pattern, separator="--\n", held_out=0.0).documents("train")
    assert [d.name.rpartition(":")[2] for d in documents] == ["1", "4", "8"]


def test_json_lines_give_the_field(tmp_path):
    rows = [{"text": "Ü\n", "n": i} for i in range(3)] + [{"text": "\ud800"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    documents = JsonLines(pattern=str(path), held_out=0.0).documents("train")
    assert [d.text for d in documents] == ["Ü\n".encode()] * 3 + [b"\xed\xa0\x80"]
    assert documents[2].name == f"{path}:3"


def test_split_is_whole_and_content_names_it(tmp_path):
    pattern = write(tmp_path, **{f"f{i}": b"%d" % (i % 150) for i in range(200)})
    corpus = TextFiles(pattern=pattern, held_out=0.2)
    train = {d.text for d in corpus.documents("train")}
    held_out = {d.text for d in corpus.documents("held_out")}
    assert not train & held_out
    assert len(texts(corpus)) == 200
    same = TextFiles(pattern=pattern, held_out=0.2).fingerprint
    assert corpus.fingerprint == same
    (tmp_path / "f7.txt").write_bytes(b"changed")
    assert TextFiles(pattern=pattern, held_out=0.2).fingerprint != same


def test_construction_touches_nothing_and_pickles(tmp_path):
    corpus = TextFiles(pattern=str(tmp_path / "absent" / "*"), held_out=0.5)
    assert pickle.loads(pickle.dumps(corpus)) == corpus
    pattern = write(tmp_path, a=b"one", b=b"two")
    documents = TextFiles(pattern=pattern, held_out=0.0).documents("train")
    assert [d.text for d in pickle.loads(pickle.dumps(documents))] == [b"one", b"two"]


def test_threads_read_what_one_reads(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(300)))
    documents = JsonLines(pattern=str(path), held_out=0.0).documents("train")
    wrong = []

    def read(offset):
        for i in range(300):
            number = (i * 7 + offset) % 300
            if documents[number].text != f"{number} ".encode() * 50:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(i * 31,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_name_the_thing_and_the_remedy(tmp_path):
    absent = str(tmp_path / "no" / "*.txt")
    assert f"no file matches {absent!r}" in message(TextFiles(pattern=absent))
    blank = write(tmp_path / "blank", a=b"", b=b"\n \n")
    assert "has no documents" in message(TextFiles(pattern=blank))
    pattern = write(tmp_path / "one", a=b"x")
    assert "did you mean 'train'?" in message(TextFiles(pattern=pattern), "trian")
    empty = message(TextFiles(pattern=pattern, held_out=0.0), "held_out")
    assert "held_out split" in empty and "is empty (1 documents in all)" in empty
    assert "held_out=2.0 is not a share" in message(TextFiles(pattern=pattern, held_out=2.0))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a', ":2: not JSON"),
        ("[1, 2]", ":2: a JSON object is needed"),
        ('{"txet": "a"}', ":2: no field 'text'; did you mean 'txet'?"),
        ('{"q": "a"}', ":2: no field 'text'; there are ['q']"),
        ('{"text": 7}', ":2: field 'text' is not a string"),
        ("\udcff", ":2: not JSON"),
    ],
)
def test_bad_json_line_is_named_by_file_and_line(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", errors="surrogateescape")
    assert f"{path}{expected}" in message(JsonLines(pattern=str(path)))


def test_file_that_shrinks_or_vanishes_is_said(tmp_path):
    pattern = write(tmp_path, a=b"some text")
    documents = TextFiles(pattern=pattern, held_out=0.0).documents("train")
    (tmp_path / "a.txt").write_bytes(b"some")
    with pytest.raises(UserError, match="became shorter"):
        documents[0]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: No such file"):
        documents[0]
