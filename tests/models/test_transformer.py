"""The Transformer against a NumPy transcription, by symmetry, and by gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.block_sparse_attention import SlidingWindow
from tokenlab import config
from tokenlab.cache import FullCache
from tokenlab.depth import Sequential
from tokenlab.models import LinearHead, RMSNorm, Transformer, llama, rotate, unrolled


def small(**rest) -> Transformer:
    return llama(
        vocab_size=23, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24, **rest
    )


def packed(lengths, width, seed=0):
    """Tokens, positions and segments of documents packed into one row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 23, size=(1, width))
    positions, segments = np.zeros((1, width), int), np.zeros((1, width), int)
    at = 0
    for number, length in enumerate(lengths, start=1):
        positions[0, at : at + length] = np.arange(length)
        segments[0, at : at + length] = number
        at += length
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions, segments, **rest):
    out = model.apply({"params": params}, tokens, positions=positions, segments=segments, **rest)
    return model.apply({"params": params}, out.hidden, method="logits")


def initialised(model, seed=0):
    tokens, positions, segments = packed([4], 4)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, positions=positions, segments=segments)
    )
    rng = np.random.default_rng(seed)
    # Larger than at the start of training, so that no term hides behind another.
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )


def by_hand(params, tokens, heads=4, kv_heads=2):
    """One unpadded document, in float64 NumPy, one query at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def turned(x):
        half = x.shape[-1] // 2
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                angle = t * 10_000.0 ** (-i / half)
                a, b = x[t, :, i], x[t, :, i + half]
                out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = params["embedding"][np.asarray(tokens)]
    width = x.shape[-1] // heads
    for i in range(2):
        p = params[f"block_{i}"]
        h = norm(x, p["mixer_norm"]["scale"])
        q = turned((h @ p["mixer"]["q"]["kernel"]).reshape(len(h), heads, width))
        k = turned((h @ p["mixer"]["k"]["kernel"]).reshape(len(h), kv_heads, width))
        v = (h @ p["mixer"]["v"]["kernel"]).reshape(len(h), kv_heads, width)
        out = np.zeros((len(h), heads, width))
        for t in range(len(h)):
            for head in range(heads):
                group = head // (heads // kv_heads)
                score = np.exp(k[: t + 1, group] @ q[t, head] / np.sqrt(width))
                out[t, head] = (score / score.sum()) @ v[: t + 1, group]
        x = x + out.reshape(len(h), -1) @ p["mixer"]["out"]["kernel"]
        h = norm(x, p["feedforward_norm"]["scale"])
        gate = h @ p["feedforward"]["gate"]["kernel"]
        gated = gate / (1 + np.exp(-gate)) * (h @ p["feedforward"]["up"]["kernel"])
        x = x + gated @ p["feedforward"]["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params["embedding"].T


def test_matches_numpy():
    model = small()
    params = initialised(model)
    tokens, positions, segments = packed([9], 9)
    logits = run(model, params, tokens, positions, segments)
    np.testing.assert_allclose(logits[0], by_hand(params, tokens[0]), rtol=2e-4, atol=2e-4)


def test_packed_documents_do_not_see_each_other():
    model = small()
    params = initialised(model)
    tokens, positions, segments = packed([5, 7, 2], 17)
    together = run(model, params, tokens, positions, segments)
    at = 0
    for length in (5, 7, 2):
        part = slice(at, at + length)
        alone = run(model, params, tokens[:, part], positions[:, part], jnp.ones((1, length), int))
        np.testing.assert_allclose(together[:, part], alone, rtol=1e-4, atol=1e-4)
        at += length


def test_no_gradient_flows_from_the_future():
    model = small()
    params = initialised(model)
    _tokens, positions, segments = packed([8], 8)

    def hidden_at(embedding, t):
        out = model.apply(
            {"params": params | {"embedding": embedding}},
            jnp.arange(8)[None],
            positions=positions,
            segments=segments,
        )
        return out.hidden[0, t].sum()

    for t in (0, 3, 6):
        gradient = jax.jit(jax.grad(hidden_at), static_argnums=1)(params["embedding"], t)
        np.testing.assert_array_equal(gradient[t + 1 : 8], 0.0)
        assert np.all(np.abs(gradient[: t + 1]).max(axis=1) > 0)


def test_padding_is_finite_in_value_and_gradient():
    model = small()
    params = initialised(model)
    tokens, positions, segments = packed([3], 6)
    segments = jnp.concatenate([segments, jnp.zeros_like(segments)])
    tokens, positions = jnp.tile(tokens, (2, 1)), jnp.tile(positions, (2, 1))

    def loss(params):
        return run(model, params, tokens, positions, segments).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_equal_unrolled_ones_in_value_and_gradient(remat):
    scanned = small(depth=Sequential(scan=True, remat=remat))
    params = initialised(scanned)
    model, layers = unrolled(scanned, params)
    batch = packed([5, 4], 10)

    def loss(model, params):
        return (run(model, params, *batch) ** 2).mean()

    np.testing.assert_allclose(loss(scanned, params), loss(model, layers), rtol=1e-5)
    gradient = jax.jit(jax.grad(loss, 1), static_argnums=0)
    stacked, separate = gradient(scanned, params), gradient(model, layers)
    _, stacked = unrolled(scanned, stacked)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), stacked, separate
    )


@pytest.mark.parametrize("remat", ["dots"])
def test_remat_changes_no_gradient(remat):
    plain, saved = small(), small(depth=Sequential(remat=remat))
    params = initialised(plain)
    batch = packed([5, 4], 10)
    grads = [
        jax.jit(jax.grad(lambda p, m=m: (run(m, p, *batch) ** 2).mean()))(params)
        for m in (plain, saved)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *grads)


OPTIONS = {
    "everything": {
        "block.mixer.qk_norm": RMSNorm(),
        "block.mixer.softcap": 5.0,
        "block.mixer.head_dim": 6,
        "head": LinearHead(softcap=7.0),
        "embedding_scale": 2.0,
    },
    "window": {"block.mixer.rule": SlidingWindow(size=3)},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_cached_decoding_equals_the_full_forward(name):
    """Ragged rows, read in two chunks and then one token at a time."""
    model = config.replace(small(), OPTIONS[name])
    params = initialised(model)
    lengths, width = np.asarray([5, 9, 2]), 9
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 23, size=(3, width)))
    positions = jnp.broadcast_to(jnp.arange(width), (3, width))
    segments = (positions < lengths[:, None]).astype(int)
    full = run(model, params, tokens, positions, segments)

    cache = model.empty_cache(FullCache(), batch=3, capacity=16)
    found = []

    @jax.jit
    def chunk(tokens, positions, segments, cache):
        out = model.apply(
            {"params": params}, tokens, positions=positions, segments=segments, cache=cache,
        )  # fmt: skip
        return model.apply({"params": params}, out.hidden, method="logits"), out.cache

    for part in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 9)):
        logits, cache = chunk(tokens[:, part], positions[:, part], segments[:, part], cache)
        found.append(logits)
    tolerance = 0.15 if name == "bfloat16" else 2e-4
    valid = np.asarray(segments) > 0
    np.testing.assert_allclose(
        jnp.concatenate(found, axis=1)[valid], full[valid], rtol=tolerance, atol=tolerance
    )


def test_rotation_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(q_position, k_position):
        a = rotate(q, positions=jnp.asarray([[q_position]]), base=100.0)
        b = rotate(k, positions=jnp.asarray([[k_position]]), base=100.0)
        return float((a * b).sum())

    assert score(5, 3) == pytest.approx(score(12, 10), abs=1e-5)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_ledger_counts_what_xla_counts():
    """All pairs admitted and a wide model, so that matrix products are nearly all there is."""
    from kernels_pallas.block_sparse_attention import Bidirectional

    model = config.replace(
        llama(vocab_size=512, dim=256, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=512),
        {"block.mixer.rule": Bidirectional(), "block.mixer.impl": "ref"},
    )
    tokens = jnp.zeros((2, 128), int)
    positions = jnp.broadcast_to(jnp.arange(128), tokens.shape)
    segments = jnp.ones_like(tokens)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, positions=positions, segments=segments)
    )["params"]
    compiled = jax.jit(lambda p: run(model, p, tokens, positions, segments)).lower(params).compile()
    counted = compiled.cost_analysis()["flops"]
    trace = jax.eval_shape(
        lambda p: model.apply(
            {"params": p}, tokens, positions=positions, segments=segments
        ).trace, params,
    )  # fmt: skip
    trace = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), trace).replace(
        depth=jnp.full((2, 128), 2), flops=0.0, pairs=0.0
    )
    ledger = model.ledger(trace, positions=positions, segments=segments)
    assert float(ledger.tokens) == 256
    assert float(ledger.block_tokens) == 512
    assert float(ledger.attended_pairs) == 2 * 2 * 128 * 128
    assert 1.0 <= counted / float(ledger.flops) < 1.06


def test_attended_pairs_follow_segments():
    model = small()
    tokens, positions, segments = packed([5, 4], 12)
    out = jax.jit(model.apply)(
        {"params": initialised(model)}, tokens, positions=positions, segments=segments
    )
    ledger = model.ledger(out.trace, positions=positions, segments=segments)
    assert float(ledger.attended_pairs) == 2 * (5 * 6 / 2 + 4 * 5 / 2)
    assert float(ledger.tokens) == 9 and float(ledger.slots) == 12
    np.testing.assert_array_equal(out.trace.depth[0], [2] * 9 + [0] * 3)


def test_presets_have_the_size_they_say():
    from tokenlab.models import transformer_1m, transformer_15m, transformer_135m

    for make, low, high in (
        (transformer_1m, 0.9e6, 1.1e6),
        (transformer_15m, 10e6, 16e6),
        (transformer_135m, 134e6, 136e6),
    ):
        model = make()
        tokens = jnp.zeros((1, 8), int)
        params = jax.eval_shape(
            lambda model=model, tokens=tokens: model.init(
                jax.random.key(0), tokens, positions=tokens, segments=tokens
            )
        )["params"]
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        if make is transformer_1m:
            size -= params["embedding"].value.size
        assert low < size < high, (make.__name__, size)


def test_learned_positions_are_added_to_what_enters():
    model = small(learned_positions=True, max_length=8, embedding_scale=2.0)
    params = initialised(model)
    plain = {name: leaf for name, leaf in params.items() if name != "position_embedding"}
    assert params["position_embedding"].shape == (8, 16)
    where = packed([3, 5], 8)
    entering = 2.0 * params["embedding"][where[0]] + params["position_embedding"][where[1]]
    expected = run(small(embedding_scale=2.0), plain, *where, embeddings=entering)
    np.testing.assert_allclose(run(model, params, *where), expected, rtol=1e-4, atol=1e-5)
    assert set(plain) == set(initialised(small()))


def test_a_mixture_of_one_token_enters_as_the_token():
    model = small(embedding_scale=2.0)
    params, (tokens, *_) = initialised(model), packed([5], 5)
    even, none = jnp.full((1, 1, 23), 1 / 23), jnp.zeros((1, 1, 23))
    shares = jnp.concatenate([jax.nn.one_hot(tokens, 23), even, none], axis=1)
    written = jnp.concatenate([tokens * 0, tokens[:, :2]], axis=1)
    mixed = model.apply({"params": params}, written, mixture=shares, method="mix")
    alone = model.apply({"params": params}, tokens, method="embed")
    np.testing.assert_array_equal(mixed[:, :5], alone)
    np.testing.assert_array_equal(mixed[:, 6], alone[:, 1])  # no mixture: the token that is written
    np.testing.assert_allclose(
        mixed[0, 5], 2.0 * params["embedding"].mean(axis=0), rtol=1e-4, atol=1e-6
    )
