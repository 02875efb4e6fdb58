"""Stop strings, streaming, and characters cut in two by the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.decode import (
    Autoregressive,
    Completion,
    Generation,
    Greedy,
    Processor,
    Samples,
    complete,
)
from tokenlab.models import llama
from tokenlab.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
NO_MODEL = View(model=nn.Module(), params={})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recited(Autoregressive):
    """Keeps the promise of a decoder with texts that it knows by heart.

    Attributes:
        scripts: what each row writes.
    """

    scripts: tuple[bytes, ...]

    def __call__(self, view, prompts, *, key, on_tokens=None):
        ids = [TOKENIZER.encode(script)[: self.max_new_tokens] for script in self.scripts]
        lengths = np.zeros(len(ids), int)
        done = np.zeros(len(ids), bool)
        chunk = self.max_new_tokens if on_tokens is None else self.stream_every
        for count in range(chunk, self.max_new_tokens + chunk, chunk):
            ends = np.minimum(count, [len(row) for row in ids])
            lengths = np.where(done, lengths, ends)
            tokens = np.zeros((len(ids), count), np.int32)
            for row, length in enumerate(lengths):
                tokens[row, :length] = ids[row][:length]
            if on_tokens is not None:
                done |= on_tokens(tokens, lengths)
        return Generation(
            tokens=tokens, lengths=lengths, logp_model=None, logp_behaviour=None, ledger=Ledger()
        )


def run(scripts, stop=(), every=1, bound=64):
    """The texts, the pieces streamed to each row, and the tokens written."""
    decoder = Recited(
        scripts=tuple(s if isinstance(s, bytes) else s.encode() for s in scripts),
        max_new_tokens=bound,
        stream_every=every,
    )
    pieces = [[] for _ in scripts]
    found, generation = complete(
        NO_MODEL, TOKENIZER, ["p"] * len(scripts), decoder=decoder, stop=stop,
        on_text=lambda row, piece: pieces[row].append(piece),
    )  # fmt: skip
    quiet, _ = complete(NO_MODEL, TOKENIZER, ["p"] * len(scripts), decoder=decoder, stop=stop)
    assert quiet == found  # whoever does not listen gets the same
    return [completion.text for completion in found], pieces, generation


def test_a_stop_string_is_cut_exactly_and_ends_its_row():
    texts, pieces, generation = run(["one. two. three", "none", "at the end. "], stop=[". "])
    assert texts == ["one", "none", "at the end"]
    assert ["".join(row) for row in pieces] == texts
    assert generation.lengths.tolist() == [len("one. "), 4, len("at the end. ")]


def by_definition(text, stop):
    """Cut before the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(deadline=None, max_examples=300)
@given(
    scripts=st.lists(st.text("abcé", max_size=14), min_size=1, max_size=3),
    stop=st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3),
    every=st.integers(1, 7),
)
@example(scripts=["xabcx"], stop=["b", "abc"], every=1)
@example(scripts=["xabcx"], stop=["b", "abc"], every=7)
@example(scripts=["aabab"], stop=["abab"], every=2)
def test_text_is_cut_where_the_first_stop_string_is_complete(scripts, stop, every):
    texts, pieces, _ = run(scripts, stop=stop, every=every)
    for script, text, row in zip(scripts, texts, pieces, strict=True):
        assert text == by_definition(script, stop)
        assert not any(s in text for s in stop)
        assert "".join(row) == text and "" not in row


@settings(deadline=None, max_examples=200)
@given(
    script=st.text(max_size=12),
    every=st.integers(1, 5),
    stop=st.sampled_from([(), ("zz",), ("日本",)]),
)
@example(script="a日本b", every=1, stop=("日本",))
@example(script="👩‍👩‍👧 é\u0301", every=1, stop=())
def test_no_piece_holds_half_a_character(script, every, stop):
    texts, (pieces,), _ = run([script], stop=stop, every=every)
    assert texts == [by_definition(script, stop)]
    assert "".join(pieces) == texts[0]
    if "\ufffd" not in script:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=200)
@given(script=st.binary(max_size=16), every=st.integers(1, 5))
@example(script=b"\xe2\x82(\xf0\x9f\x98", every=1)
def test_bytes_that_are_no_text_are_replaced_the_same_way_however_they_stream(script, every):
    (text,), (pieces,), _ = run([script], every=every)
    assert "".join(pieces) == text == script.decode("utf-8", errors="replace")


def test_text_appears_as_soon_as_it_can_no_longer_become_a_stop():
    _, (pieces,), _ = run(["abcdEND"], stop=["END"], every=1)
    assert pieces == ["a", "b", "c", "d"]
    _, (pieces,), _ = run(["abcd"], every=2)
    assert pieces == ["ab", "cd"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        run(["abc"], stop=["x", ""])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script(Processor):
    """Leaves one token possible at each step, whatever the model says.

    Attributes:
        ids: those tokens.
    """

    ids: tuple[int, ...]

    def init(self, *, batch):
        return jnp.zeros(batch, jnp.int32)

    def __call__(self, logits, state, *, history):
        wanted = jnp.asarray(self.ids)[state][:, None]
        return jnp.where(jnp.arange(logits.shape[-1])[None] == wanted, 0.0, -jnp.inf), state + 1


def silent():
    """A model of bytes that has no opinion: all its parameters are zero."""
    network = llama(
        vocab_size=TOKENIZER.vocab_size, dim=4, num_layers=1, num_heads=1, num_kv_heads=1,
        hidden_dim=4, max_length=64,
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nn.meta.unbox(shapes["params"]))
    return View(model=network, params=zeros)


def test_the_real_decoder_stops_streams_and_counts_the_end_token():
    text = "Häuser, STOP and more"
    ids = (*TOKENIZER.encode(text), TOKENIZER.eos_id)
    decoder = Autoregressive(
        max_new_tokens=len(ids), sampler=Greedy(processors=(Script(ids=ids),)), stream_every=2
    )
    large = silent()
    pieces = []
    found, generation = complete(
        large, TOKENIZER, ["go"], decoder=decoder, stop=["STOP"],
        on_text=lambda row, piece: pieces.append(piece),
    )  # fmt: skip
    assert found == [Completion("go", "Häuser, ")]
    assert "".join(pieces) == "Häuser, " and len(pieces) > 3
    assert generation.lengths[0] < len(ids)
    found, generation = complete(large, TOKENIZER, ["go"], decoder=decoder)
    assert found == [Completion("go", text)]
    assert generation.lengths.tolist() == [len(ids)]
    written = Samples(prompts=("go",), decoder=decoder)(large, TOKENIZER, seed=0)
    assert written == [Completion("go", text)]


def test_ids_that_the_tokenizer_has_not_are_never_written():
    """The likeliest tokens of this model are those beyond the tokenizer's."""
    model = llama(vocab_size=400, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, hidden_dim=8)
    tokens = jnp.zeros((1, 1), int)
    params = nn.meta.unbox(
        model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)["params"]
    )
    params["embedding"] = params["embedding"].at[TOKENIZER.vocab_size :].multiply(50.0)
    view = View(model=model, params=params)
    free = Autoregressive(max_new_tokens=20, end_ids=())
    assert free(view, [[1, 2]], key=jax.random.key(0)).tokens.max() >= TOKENIZER.vocab_size
    _, generation = complete(view, TOKENIZER, ["a", "b"], decoder=free)
    assert generation.tokens.max() < TOKENIZER.vocab_size
    assert np.isfinite(generation.logp_behaviour).all()
