"""Attention that reads prompts block by block, inside a model that decodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.attention import CountBudget, MassBudget, PermutedBlocks, WindowBlocks
from tokenlab.cache import FullCache
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.data.corpora import TextFiles
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.evals import Continuation
from tokenlab.models import llama
from tokenlab.tokenizers import ByteTokenizer

DENSE = llama(
    vocab_size=264, dim=16, num_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=24, max_length=128
)
EVERYTHING = PermutedBlocks(block=4, span=8, budget=MassBudget(threshold=1.0))
SPARSE = PermutedBlocks(block=4, span=8, budget=CountBudget(blocks=1))
LENGTHS, WIDTH = (40, 27, 3), 40


def reading(part):
    return config.replace(DENSE, {"block.mixer.prefill": part})


@functools.cache
def params():
    tokens = jnp.zeros((1, 8), int)
    made = reading(EVERYTHING).init(
        jax.random.key(0), tokens, positions=tokens, segments=tokens + 1
    )
    # Larger than a fresh model's, so that attention matters.
    return jax.tree.map(lambda x: 3 * x, nn.meta.unbox(made["params"]))


def prompts(model, tokens):
    return _prompts(model, params(), tokens)


@functools.partial(jax.jit, static_argnums=0)
def _prompts(model, params, tokens):
    """The pass over ragged prompts: hidden states, and pairs of all layers."""
    positions = jnp.broadcast_to(jnp.arange(WIDTH)[None], tokens.shape)
    segments = (positions < jnp.asarray(LENGTHS)[:, None]).astype(jnp.int32)
    cache = model.empty_cache(FullCache(), batch=3, capacity=64)
    out = model.apply(
        {"params": params}, tokens, positions=positions, segments=segments, cache=cache
    )
    return jnp.where(segments[..., None] > 0, out.hidden, 0), out.cache


TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 264, (3, WIDTH)))


def test_all_blocks_are_the_dense_model_and_fewer_are_not():
    dense, _ = prompts(DENSE, TOKENS)
    np.testing.assert_allclose(prompts(reading(EVERYTHING), TOKENS)[0], dense, atol=1e-4)
    sparse, cache = prompts(reading(SPARSE), TOKENS)
    assert np.abs(sparse - dense).max() > 1e-2
    np.testing.assert_allclose(sparse[2], dense[2], atol=1e-4)  # shorter than a span
    pairs = [n * (n + 1) / 2 for n in LENGTHS]
    np.testing.assert_allclose(prompts(DENSE, TOKENS)[1].pairs, [pairs])
    assert np.all(np.asarray(cache.pairs)[:, :2] < pairs[:2]) and np.all(cache.pairs[:, 2] == 6)


def test_decoding_goes_on_over_the_keys_in_the_order_of_the_text():
    prompt = [TOKENS[0, :n].tolist() for n in (40, 21)]
    decoder = Autoregressive(max_new_tokens=8, sampler=Greedy(), end_ids=())
    written = [
        decoder(View(model=model, params=params()), prompt, key=jax.random.key(0))
        for model in (DENSE, reading(EVERYTHING))
    ]
    np.testing.assert_array_equal(written[0].tokens, written[1].tokens)
    np.testing.assert_allclose(written[0].logp_model, written[1].logp_model, atol=1e-4)


def test_only_what_reads_no_older_cache_is_sparse():
    """A prompt in two parts: the second one reads everything."""
    model = reading(SPARSE)

    @jax.jit
    def second(params, first, rest):
        cache = model.empty_cache(FullCache(), batch=1, capacity=64)
        for start, part in ((0, first), (first.shape[1], rest)):
            positions = start + jnp.arange(part.shape[1])[None]
            out = model.apply(
                {"params": params}, part, positions=positions,
                segments=jnp.ones_like(part), cache=cache,
            )  # fmt: skip
            cache = out.cache
        return cache.pairs[:, 0]

    # One span is dense either way, so that what is missing would be missing from the second part.
    np.testing.assert_array_equal(second(params(), TOKENS[:1, :8], TOKENS[:1, 8:]), 40 * 41 / 2)


def test_no_loss_is_read_from_what_looks_ahead():
    rows = {"positions": jnp.arange(WIDTH)[None], "segments": jnp.ones((1, WIDTH), int)}
    with pytest.raises(UserError, match=r"PermutedBlocks looks at later queries.*set prefill=None"):
        reading(SPARSE).apply({"params": params()}, TOKENS[:1], **rows)
    window = WindowBlocks(block=4, span=8, budget=CountBudget(blocks=1))
    whole = reading(window).apply({"params": params()}, TOKENS[:1], **rows).hidden
    again = prompts(reading(window), TOKENS)[0][:1]
    np.testing.assert_allclose(whole, again, atol=1e-4)


def test_a_continuation_is_scored_as_it_is_decoded(corpus_folder):
    """Of the dense model it is what a whole forward pass says; of the sparse one it is not."""
    text = TextFiles(pattern=str(corpus_folder / "corpus/*.txt"), held_out=0.3)
    part = Continuation(corpus=text, prompt=40, length=16, max_documents=2)
    options = {"params": params(), "tokenizer": ByteTokenizer()}
    found = part(model=DENSE, **options)
    ids = jnp.asarray(np.stack(part.rows(ByteTokenizer())))
    assert ids.shape == (2, 56) and found["tokens"] == 32 and found["density"] == 1.0
    positions = jnp.broadcast_to(jnp.arange(55)[None], (2, 55))
    out = DENSE.apply(
        {"params": params()}, ids[:, :-1], positions=positions, segments=jnp.ones((2, 55), int)
    )
    logits = DENSE.apply({"params": params()}, out.hidden, method="logits")
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["nats"], -jnp.mean(logp[:, 39:]), rtol=1e-5)
    sparse = part(model=reading(SPARSE), **options)
    assert 0 < sparse["density"] < 1 and sparse["nats"] != found["nats"]
    whole = part(model=reading(EVERYTHING), **options)
    np.testing.assert_allclose(whole["nats"], found["nats"], rtol=1e-4)
    assert whole["density"] == 1.0
    with pytest.raises(UserError, match="no document of split 'held_out' has 100040 tokens"):
        config.replace(part, {"length": 100_000})(model=DENSE, **options)
