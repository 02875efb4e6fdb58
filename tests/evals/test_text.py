"""Every byte of every document is scored once, and the figure is what a sum by hand gives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from tokenlab.core.errors import UserError
from tokenlab.data.base import Corpus, Document
from tokenlab.depth import SkipDecode
from tokenlab.evals import HeldOutText, windows
from tokenlab.models import llama
from tokenlab.tokenizers import ByteTokenizer


@given(count=st.integers(2, 60), length=st.integers(1, 20), data=st.data())
def test_windows_score_every_target_once_with_enough_context(count, length, data):
    stride = data.draw(st.integers(1, length))
    ids = np.arange(count)
    times, context = np.zeros(count, int), {}
    for row in windows(ids, length, stride):
        valid = row["segments"] > 0
        assert set(row["weights"][~valid]) <= {0.0}
        np.testing.assert_array_equal(row["targets"][valid], row["tokens"][valid] + 1)
        for t in np.flatnonzero(row["weights"]):
            times[row["targets"][t]] += 1
            context[row["targets"][t]] = t + 1
    np.testing.assert_array_equal(times[1:], 1)
    assert times[0] == 0
    for target, seen in context.items():
        assert seen >= min(target, length - stride + 1)


class Memory(Corpus):
    fingerprint = "memory"

    def __init__(self, *texts):
        self.texts = texts

    def documents(self, split):
        return [Document(text, str(i)) for i, text in enumerate(self.texts)]


def test_bits_per_byte_is_the_sum_of_every_document_alone():
    tokenizer, texts = ByteTokenizer(), [b"hello world", b"", b"x", "\u00e9t\u00e9".encode()]
    model = llama(
        vocab_size=tokenizer.vocab_size, dim=8, num_layers=1, num_heads=2, num_kv_heads=1,
        hidden_dim=8,
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    params = nn.meta.unbox(
        model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)["params"]
    )
    bits = 0.0
    for text in texts:  # length 64 holds every document whole
        ids = jnp.asarray([[1, *tokenizer.encode(text), 2]])
        positions = jnp.arange(ids.shape[1] - 1)[None]
        out = model.apply(
            {"params": params}, ids[:, :-1], positions=positions,
            segments=jnp.ones_like(positions),
        )  # fmt: skip
        logits = model.apply({"params": params}, out.hidden, method="logits")
        logp = np.asarray(jax.nn.log_softmax(logits))[0]
        bits -= sum(logp[t, ids[0, t + 1]] for t in range(len(logp))) / math.log(2)
    evaluation = HeldOutText(corpus=Memory(*texts), length=64, stride=64, batch_size=3)
    figures = evaluation(model=model, params=params, tokenizer=tokenizer)
    size = sum(map(len, texts))
    assert figures["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert figures["bytes"] == size
    assert figures["tokens"] == size + len(texts)
    assert figures["perplexity"] == pytest.approx(2 ** (bits / (size + len(texts))), rel=1e-4)


def test_depths_are_those_of_the_scored_tokens():
    """Positions 0 and 1 of a window run three layers, the others two."""
    tokenizer, texts = ByteTokenizer(), [b"hello world", b"", b"x"]
    model = llama(
        vocab_size=tokenizer.vocab_size, dim=8, num_layers=3, num_heads=2, num_kv_heads=1,
        hidden_dim=8, depth=SkipDecode(counts=(3, 3, 2)),
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    params = nn.meta.unbox(
        model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)["params"]
    )
    options = {"model": model, "params": params, "tokenizer": tokenizer}
    found = HeldOutText(corpus=Memory(*texts), length=64, stride=64)(**options)
    targets = [len(text) + 1 for text in texts]
    deep = sum(min(2, count) for count in targets) / sum(targets)
    assert found["share_at_depth_3"] == pytest.approx(deep)
    assert found["share_at_depth_2"] == pytest.approx(1 - deep)
    nats = deep * found["nats_at_depth_3"] + (1 - deep) * found["nats_at_depth_2"]
    assert nats == pytest.approx(math.log(found["perplexity"]), rel=1e-5)
    first = HeldOutText(corpus=Memory(b"", b"x"), length=64, stride=64)(**options)
    assert not any("at_depth" in name for name in first)  # all run three
    halves = HeldOutText(corpus=Memory(*texts), length=6, stride=3)(**options)
    assert halves["share_at_depth_3"] == pytest.approx(deep)  # later windows score no position 0, 1


def test_a_corpus_without_bytes_is_refused():
    evaluation = HeldOutText(corpus=Memory(b""), length=8, stride=8)
    with pytest.raises(UserError, match="empty"):
        evaluation(model=nn.Module(), params={}, tokenizer=ByteTokenizer())
