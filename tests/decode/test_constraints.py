"""No forbidden text, whatever spells it; and text of a grammar."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab import config
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import (
    Autoregressive,
    BannedStrings,
    Categorical,
    ForcedText,
    Grammar,
    History,
    Temperature,
    complete,
)
from tokenlab.decode.speculative import PromptLookup, Speculative
from tokenlab.models import llama
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.tokenizers.base import Tokenizer
from tokenlab.tokenizers.byte import join_pieces

PIECES = {
    0: b"",
    1: b"",
    2: b"",
    3: b"a",
    4: b"b",
    5: b"c",
    6: b"ab",
    7: b"ca",
    8: b"bca",
    9: b"abcab",
    10: b"\n",
}


class Few(Tokenizer):
    """Eight pieces that spell the same text in many ways."""

    vocab_size = 11
    fingerprint = "few"

    def encode(self, text):
        raise AssertionError("nothing is spelled in one way alone")

    def decode(self, ids):
        return join_pieces(PIECES, ids)


@functools.partial(jax.jit, static_argnums=0)
def process(processor, logits, history):
    return processor(logits, processor.init(batch=1), history=history)


def may_follow(constraint, written, prompt=(3, 6), tokenizer=None, vocabulary=13):
    """Tokens that are not ruled out after ``written``."""
    length = len(prompt) + len(written)
    tokens = np.asarray([*prompt, *written, *[9] * (24 - length)])[None]
    history = History(jnp.asarray(tokens), jnp.asarray([length]), jnp.asarray([len(prompt)]))
    processor = constraint.bind(tokenizer or Few())
    out, state = process(processor, jnp.zeros((1, vocabulary)), history)
    assert state == ()
    return set(np.flatnonzero(np.isfinite(np.asarray(out[0]))).tolist())


WRITTEN = st.lists(st.integers(0, 10), max_size=7)


@settings(deadline=None, max_examples=25)
@given(
    written=WRITTEN,
    texts=st.lists(st.text("abc\n", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_a_token_is_ruled_out_exactly_where_it_completes_a_string(written, texts):
    before = Few().decode(written)
    if any(text.encode() in before for text in texts):
        return
    allowed = may_follow(BannedStrings(texts=tuple(texts)), written)
    for token in range(11):
        after = before + PIECES.get(token, b"")
        assert (token in allowed) == (not any(text.encode() in after for text in texts))
    assert {11, 12} <= allowed  # the model's own tokens, which spell nothing


@settings(deadline=None, max_examples=25)
@given(data=st.data(), text=st.text("abc", min_size=1, max_size=9))
def test_forced_text_is_spelled_in_any_way_and_then_all_is_free(data, text):
    written, encoded = [], text.encode()
    while len(Few().decode(written)) < len(encoded):
        allowed = may_follow(ForcedText(text=text), written)
        before = Few().decode(written)
        fits = {
            token for token, piece in PIECES.items()
            if encoded.startswith((before + piece)[: len(encoded)]) and before + piece != before
        }  # fmt: skip
        assert allowed == fits
        written.append(data.draw(st.sampled_from(sorted(allowed))))
    assert Few().decode(written).startswith(encoded)
    assert len(may_follow(ForcedText(text=text), written)) >= 11


def test_a_grammar_leaves_what_may_follow_and_then_the_end():
    grammar = Grammar(text="(ab)+c")
    assert may_follow(grammar, []) == {3, 6}
    assert may_follow(grammar, [3]) == {4}
    assert may_follow(grammar, [6]) == {3, 5, 6}
    assert may_follow(grammar, [6, 5]) == {2}
    assert may_follow(grammar, [5]) == may_follow(grammar, [5, 3]) == set()  # no text of it
    assert may_follow(grammar, [6]) == {3, 5, 6}  # asked again
    assert may_follow(Grammar(text="a/b|c"), []) == {3, 5}
    assert may_follow(Grammar(text='start: "a" rest*\nrest: /b/', kind="lark"), [6]) == {2, 4}


def silent(vocabulary):
    """A model that has no opinion."""
    network = llama(
        vocab_size=vocabulary, dim=4, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=4,
        max_length=128,
    )  # fmt: skip
    one = jnp.zeros((1, 1), int)
    params = network.init(jax.random.key(0), one, positions=one, segments=one + 1)["params"]
    return View(model=network, params=jax.tree.map(jnp.zeros_like, params))


def test_a_model_without_opinions_writes_what_the_grammar_says():
    tokenizer = ByteTokenizer()
    decoder = Autoregressive(
        max_new_tokens=48, sampler=Categorical(processors=(Temperature(value=1.0),)), slots=2
    )
    grammar = Grammar(text="-?[0-9]{1,3}(,[a-f]{2})*;")
    found, _ = complete(
        silent(tokenizer.vocab_size), tokenizer, ["x"] * 5, decoder=decoder, constraints=(grammar,)
    )
    texts = [one.text for one in found]
    assert len(set(texts)) > 1
    ended = [text for text in texts if text.endswith(";")]
    assert ended and all(re.fullmatch(grammar.text, text) for text in ended)


def test_json_of_a_schema():
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 23]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    grammar = Grammar(text=json.dumps(schema), kind="json_schema")
    tokenizer = ByteTokenizer()
    found, generation = complete(
        silent(tokenizer.vocab_size), tokenizer, ["x"] * 3,
        decoder=Autoregressive(max_new_tokens=96), constraints=(grammar,),
    )  # fmt: skip
    for text, length in zip([one.text for one in found], generation.lengths, strict=True):
        if length < 96:
            assert json.loads(text)["n"] in (1, 23)
    assert generation.lengths.min() < 96


def test_text_is_forced_and_strings_are_banned_in_a_batch():
    tokenizer = ByteTokenizer()
    found, _ = complete(
        silent(tokenizer.vocab_size), tokenizer, ["x", "longer"],
        decoder=Autoregressive(max_new_tokens=60, end_ids=()),
        constraints=(ForcedText(text="Well: "), BannedStrings(texts=tuple("abcdfgh"))),
    )  # fmt: skip
    for one in found:
        assert one.text.startswith("Well: ")
        assert len(one.text) > 20 and not set(one.text) & set("abcdfgh")


@pytest.mark.parametrize(
    "decoder",
    [
        Autoregressive(max_new_tokens=60, end_ids=()),
        Speculative(drafter=PromptLookup(length=3), max_new_tokens=60, end_ids=()),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_a_row_ends_where_nothing_is_left(decoder):
    tokenizer = ByteTokenizer()
    found, generation = complete(
        silent(tokenizer.vocab_size), tokenizer, ["x", "longer: We We"], decoder=decoder,
        constraints=(ForcedText(text="Well: "), BannedStrings(texts=("e",))),
    )  # fmt: skip
    assert [one.text for one in found] == ["W", "W"]
    np.testing.assert_array_equal(generation.lengths, [1, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BannedStrings(texts=()), "name at least one"),
        (lambda: BannedStrings(texts=("a", "")), "none of them empty"),
        (lambda: ForcedText(text=""), "leave it out"),
        (lambda: may_follow(ForcedText(text="axc"), []), "no token of the tokenizer begins 'xc'"),
        (lambda: Grammar(text="(").bind(Few()), "the grammar is not understood: "),
        (
            lambda: Grammar(text="{", kind="json_schema").bind(Few()),
            "the grammar is not understood",
        ),
    ],
)
def test_impossible_constraints_are_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part", [BannedStrings(texts=("ab",)), ForcedText(text="ab"), Grammar(text="a+")], ids=str
)
def test_a_constraint_is_its_own_config_and_binds_equal(part):
    loaded = config.load(config.dump(part))
    assert loaded == part and dataclasses.is_dataclass(part)
    one, two = (constraint.bind(Few()) for constraint in (part, loaded))
    assert one == two and hash(one) == hash(two)
