"""Published tokenizers: what sets them apart from the library that reads them."""

import json

import published
import pytest
import tokenizers

from tokenlab.core.errors import UserError
from tokenlab.tokenizers import PretrainedTokenizer

IDS = {"pad_id": 2, "bos_id": 0, "eos_id": 1}


def made(change, kind="bytes", **ids):
    spec = json.loads(published.tokenizer_json(kind))
    change(spec)
    return PretrainedTokenizer(model=json.dumps(spec).encode(), **IDS | ids)


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_plain_text_has_the_ids_that_the_library_gives(kind):
    theirs = tokenizers.Tokenizer.from_str(published.tokenizer_json(kind).decode())
    ours = published.tokenizer(kind)
    for start in range(0, 20_000, 1000):
        text = published.TEXT[start : start + 1000]
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert len(ours.encode(published.TEXT)) < 0.8 * len(published.TEXT)


def test_special_tokens_come_by_name_and_never_from_text():
    ours = published.tokenizer()
    theirs = tokenizers.Tokenizer.from_str(published.tokenizer_json().decode())
    assert theirs.encode("<eos>").ids == [1] == [ours.special_id("<eos>")]
    assert 1 not in ours.encode("<eos>") and ours.decode(ours.encode("<eos>")) == b"<eos>"
    for token in ("<none>", "a"):
        with pytest.raises(UserError, match=f"'{token}' is not a special token"):
            ours.special_id(token)


def test_normalisation_is_left_out():
    ours, text = published.tokenizer(), "e\u0301"
    assert json.loads(ours.model)["normalizer"] == {"type": "NFC"}
    assert ours.decode(ours.encode(text)) == text.encode()


def add_token(spec, number=310, content="\n\n\n"):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    token = {"id": number, "content": content, "special": False, **flags}
    spec["added_tokens"].append(token)


def test_added_tokens_that_are_not_special_keep_their_text():
    found = made(add_token)
    assert found.vocab_size == 311
    assert found.encode("a\n\n\nb")[1] == 310 and found.decode([310, 1]) == b"\n\n\n"


def test_added_runs_of_spaces_stand_for_spaces():
    """Gemma lists them as it writes them, with U+2581, though merging is what makes them."""
    run = "\u2581" * 4
    plain = published.tokenizer("fallback")
    number = json.loads(plain.model)["model"]["vocab"][run]
    found = made(lambda spec: add_token(spec, number, run), "fallback")
    assert found.encode("    ") == plain.encode("    ") == [number]
    assert found.decode([number]) == b"    "


def drop_byte(spec):
    spec["model"]["vocab"].pop("\u0100")  # byte 0


def test_a_byte_without_a_token_is_refused():
    ours = made(drop_byte)
    assert ours.decode(ours.encode("plain")) == b"plain"
    with pytest.raises(UserError, match="no token for byte 0x00; take it out of the text"):
        ours.encode(b"a\0b")


@pytest.mark.parametrize(
    ("change", "ids", "message"),
    [
        (lambda s: s.pop("model"), {}, "bytes are not a tokenizer.json file"),
        (lambda s: s["model"].update(type="Odd"), {}, "the tokenizer cannot be read: "),
        (lambda s: s.update(decoder=None), {}, "neither byte-level nor has it byte fallback"),
        (
            lambda s: s.update(normalizer={"type": "Lowercase"}),
            {},
            "does not give back what it encodes",
        ),
        (lambda s: add_token(s, 315), {}, r"added tokens do not follow the vocabulary \(310\)"),
        (lambda s: None, {"pad_id": 70}, "pad_id 70 is not a special token"),
        (lambda s: None, {"eos_id": 9999}, "eos_id 9999 is not a special token"),
    ],
)
def test_what_is_refused(change, ids, message):
    with pytest.raises(UserError, match=message) as caught:
        made(change, **ids)
    assert "\n" not in str(caught.value)
