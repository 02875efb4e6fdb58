"""The oracle checks of VQ-Logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.core.duration import Clock
from tokenlab.models import LinearHead, Transformer, VQHead, llama
from tokenlab.models.codes import (
    code_entropy,
    frequency_codes,
    k_means,
    projection_gap,
    random_codes,
    unigram_floor,
    with_codes,
)
from tokenlab.objectives import NextToken, SmoothedNextToken
from tokenlab.train.optimizer import AdamW, Constant

V, D, B, T = 23, 8, 2, 6


LINEAR = LinearHead()


def model(head=LINEAR, dtype="float32"):
    return llama(
        vocab_size=V, dim=D, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=12, head=head,
        dtype=dtype,
    )  # fmt: skip


def batch(seed=0):
    rng = np.random.default_rng(seed)
    segments = jnp.asarray([[1] * T, [1] * 4 + [0] * 2])
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (B, T))),
        "targets": jnp.asarray(rng.integers(0, V, (B, T))),
        "positions": jnp.broadcast_to(jnp.arange(T)[None], (B, T)),
        "segments": segments,
        "weights": segments.astype(jnp.float32),
    }


@functools.partial(jax.jit, static_argnums=0)
def init(network):
    rows = batch()
    boxed = network.init(
        jax.random.key(0), rows["tokens"], positions=rows["positions"], segments=rows["segments"]
    )
    return nn.meta.unbox(boxed["params"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(network, loss, params):
    """Losses, gradients of their mean, and logits of all tokens."""

    def mean(params):
        context = Context(batch=batch(), views={"policy": View(model=network, params=params)})
        values = loss(context)
        return jnp.sum(values * batch()["weights"]), (values, context.output().hidden)

    gradients, (values, hidden) = jax.grad(mean, has_aux=True)(params)
    return values, gradients, network.apply({"params": params}, hidden, method="logits")


def with_empty_codes(token_bias=False):
    """Seven codes, two of them without a token."""
    network = model(VQHead(num_codes=7, token_bias=token_bias))
    rng = np.random.default_rng(3)
    codes = rng.choice([0, 1, 3, 4, 6], V).astype(np.int32)
    params = with_codes(init(network), codes, jnp.asarray(rng.normal(size=(7, D)), jnp.float32))
    if token_bias:
        params["head"]["bias"] = jnp.asarray(rng.normal(size=V), jnp.float32)
    return network, params, codes


def test_as_many_codes_as_tokens_are_the_full_layer():
    full, tied = model(), model(VQHead(num_codes=V, codes="contiguous"))
    params = init(full)
    other = init(tied)
    assert np.array_equal(other["head"]["codes"], np.arange(V))
    other = with_codes(params | {"head": other["head"]}, np.arange(V), params["head"]["kernel"])
    expected, ours = measure(full, NextToken(), params), measure(tied, NextToken(), other)
    for a, b in zip(ours[::2], expected[::2], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    gradients, table = ours[1], ours[1]["head"].pop("codes")
    assert not np.any(table)
    gradients["head"] = {"kernel": gradients["head"]["codebook"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradients, expected[1])


@pytest.mark.parametrize(
    ("loss", "token_bias"),
    [(NextToken(), False), (SmoothedNextToken(smoothing=0.2), True)],
    ids=["plain", "smoothed-with-biases"],
)
def test_the_loss_is_that_of_the_expanded_softmax(loss, token_bias):
    """Values and gradients, from whole logits in float64 and by autodiff of them."""
    network, params, codes = with_empty_codes(token_bias)
    values, gradients, logits = measure(network, loss, params)
    share = loss.smoothing if isinstance(loss, SmoothedNextToken) else 0.0
    wide = np.asarray(logits, np.float64)
    log_p = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    targets = np.asarray(batch()["targets"])
    own = np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(values, -(1 - share) * own - share * log_p.mean(axis=-1), atol=1e-6)

    def whole(head):
        moved = params | {"head": params["head"] | head}
        context = Context(batch=batch(), views={"policy": View(model=network, params=moved)})
        hidden = jax.lax.stop_gradient(context.output().hidden)
        expanded = jnp.einsum("btd,vd->btv", hidden, head["codebook"][codes])
        log_p = jax.nn.log_softmax(expanded + head.get("bias", jnp.zeros(V))[None, None])
        own = jnp.take_along_axis(log_p, batch()["targets"][..., None], axis=-1)[..., 0]
        mixed = (1 - share) * own + share * jnp.mean(log_p, axis=-1)
        return -jnp.sum(mixed * batch()["weights"])

    trained = {name: x for name, x in params["head"].items() if name != "codes"}
    expected = jax.grad(whole)(trained)
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients["head"][name], gradient, atol=1e-5)
    assert not np.any(gradients["head"]["codebook"][np.asarray([2, 5])])
    assert not np.any(gradients["head"]["codes"])


def test_a_loss_is_that_of_the_code_and_of_the_choice_within():
    network, params, codes = with_empty_codes()
    values, _, logits = measure(network, NextToken(), params)
    size = np.bincount(codes, minlength=7)
    some = np.asarray([np.flatnonzero(codes == k)[0] if n else -1 for k, n in enumerate(size)])
    by_code = np.asarray(logits, np.float64)[..., some] + np.where(
        size, np.log(np.maximum(size, 1)), -np.inf
    )
    log_p = by_code - np.log(np.exp(by_code).sum(axis=-1, keepdims=True))
    code = codes[np.asarray(batch()["targets"])]
    own = np.take_along_axis(log_p, code[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(values, -own + np.log(size[code]), atol=2e-6)
    for k in np.flatnonzero(size):
        same = np.asarray(logits)[..., codes == k]
        np.testing.assert_array_equal(same, same[..., :1] * np.ones(size[k], np.float32))


def test_one_code_is_uniform():
    network = model(VQHead(num_codes=1))
    values, gradients, _ = measure(network, NextToken(), init(network))
    np.testing.assert_allclose(values, np.log(V), rtol=1e-6)
    np.testing.assert_allclose(gradients["head"]["codebook"], 0.0, atol=1e-5)


def test_the_parameters_are_those_of_the_formula():
    network = Transformer(
        vocab_size=50257, dim=768, num_layers=0, block=model().block, head=VQHead(num_codes=512)
    )
    tokens = jnp.zeros((1, 1), int)
    head = jax.eval_shape(
        lambda: network.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )["params"]["head"]
    assert head["codebook"].value.size == 512 * 768 and head["codes"].value.size == 50257
    fewer = 1 - head["codebook"].value.size / (50257 * 768)
    assert round(100 * fewer, 2) == 98.98
    assert network.head.rows(50257) == 512 and model().head.rows(V) == V


@pytest.mark.parametrize("kind", ["random", "size", "mass", "head"])
def test_the_best_a_tied_model_does_on_independent_tokens(kind):
    """At ``C[k] = log(p(k) / n_k)`` the gradient is zero, and the loss is convex in it."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 200, 50)
    codes = (
        random_codes(50, 6, seed=1) if kind == "random" else frequency_codes(counts, 6, bins=kind)
    )
    p = counts / counts.sum()
    mass, size = np.bincount(codes, weights=p), np.bincount(codes)

    def loss(code_logits):
        return -jnp.sum(jnp.asarray(p) * jax.nn.log_softmax(code_logits[codes]))

    best = jnp.asarray(np.log(mass / size), jnp.float32)
    value, gradient = jax.value_and_grad(loss)(best)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    np.testing.assert_allclose(value, code_entropy(counts, codes), rtol=1e-6)
    entropy = -np.sum(p * np.log(p))
    np.testing.assert_allclose(
        unigram_floor(counts, codes), code_entropy(counts, codes) - entropy, atol=1e-9
    )
    assert unigram_floor(counts, codes) > 0


def test_floors_of_a_zipf_vocabulary():
    counts = 1 / np.arange(1, 10_001)
    factor = {
        (kind, k): np.exp(unigram_floor(counts, codes))
        for k in (1000, 100)
        for kind, codes in {
            "random": random_codes(10_000, k, seed=0),
            "size": frequency_codes(counts, k, bins="size"),
            "head": frequency_codes(counts, k, bins="head"),
        }.items()
    }
    assert factor["random", 1000] == pytest.approx(3.97, rel=0.05)
    assert factor["random", 100] == pytest.approx(9.2, rel=0.1)
    for key, card in {
        ("size", 1000): 1.10,
        ("head", 1000): 1.05,
        ("size", 100): 1.64,
        ("head", 100): 1.44,
    }.items():
        assert factor[key] == pytest.approx(card, abs=0.006), key
    assert np.exp(unigram_floor(counts, frequency_codes(counts, 80, bins="mass"))) < 1.005


@pytest.mark.parametrize("bins", ["size", "mass", "head"])
def test_frequency_bins_use_every_code_and_keep_the_order(bins):
    counts = np.random.default_rng(0).zipf(1.5, 200).clip(max=10**6)
    codes = frequency_codes(counts, 30, bins=bins)
    assert np.array_equal(np.unique(codes), np.arange(30))
    order = np.argsort(-counts, kind="stable")
    assert np.all(np.diff(codes[order]) >= 0)
    assert np.array_equal(frequency_codes(counts, 200, bins=bins)[order], np.arange(200))


def test_k_means_finds_planted_clusters_and_leaves_no_centre_dead():
    rng = np.random.default_rng(0)
    planted = rng.integers(0, 5, 120)
    vectors = 10 * np.eye(5, 8)[planted] + rng.normal(size=(120, 8)) * 0.1
    # One far vector, so that a start among the crowd loses centres.
    codes, centres = k_means(jnp.asarray(vectors), 5, key=jax.random.key(4), steps=20)
    assert len(np.unique(codes)) == 5
    assert all(len(np.unique(planted[np.asarray(codes) == k])) == 1 for k in range(5))
    means = np.stack([vectors[np.asarray(codes) == k].mean(axis=0) for k in range(5)])
    np.testing.assert_allclose(centres, means, atol=1e-4)


def test_the_projection_gap_is_a_loop_and_the_floor_where_there_is_no_context():
    rng = np.random.default_rng(0)
    codes = random_codes(V, 5, seed=0)
    p = rng.dirichlet(np.ones(V), 4)
    targets = rng.integers(0, V, 4)
    found = projection_gap(jnp.asarray(np.log(p)), jnp.asarray(targets), jnp.asarray(codes))
    for n, y in enumerate(targets):
        same = codes == codes[y]
        np.testing.assert_allclose(
            found[n], np.log(same.sum() * p[n, y] / p[n, same].sum()), atol=1e-5
        )
    log_p = jnp.broadcast_to(jnp.log(jnp.asarray(p[:1])), (V, V))
    every = projection_gap(log_p, jnp.arange(V), jnp.asarray(codes))
    np.testing.assert_allclose(np.sum(p[0] * every), unigram_floor(p[0], codes), atol=1e-5)


def test_training_moves_the_codebook_and_leaves_the_map():
    optimizer = AdamW(learning_rate=Constant(peak=0.1), weight_decay=0.5)
    network, params, codes = with_empty_codes()
    transform = optimizer.build(Clock(tokens_per_step=1, tokens_per_epoch=lambda: 1))
    state, moved = transform.init(params), params
    for _ in range(3):
        _, gradients, _ = measure(network, NextToken(), moved)
        updates, state = transform.update(gradients, state, moved)
        moved = jax.tree.map(jnp.add, moved, updates)
    np.testing.assert_array_equal(moved["head"]["codes"], codes)
    assert np.all(
        np.any(np.asarray(moved["head"]["codebook"] != params["head"]["codebook"]), axis=1)
    )


def test_cached_decoding_and_a_bfloat16_model_have_its_logits():
    network, params, codes = with_empty_codes(token_bias=True)
    rows = batch()
    out = network.apply(
        {"params": params}, rows["tokens"], positions=rows["positions"], segments=rows["segments"]
    )
    logits = network.apply({"params": params}, out.hidden, method="logits")
    by_hand = out.hidden @ params["head"]["codebook"][codes].T + params["head"]["bias"][None, None]
    np.testing.assert_allclose(logits, by_hand, atol=1e-5)
    narrow = model(network.head, dtype="bfloat16")
    values = measure(narrow, NextToken(), params)[0]
    np.testing.assert_allclose(values, measure(network, NextToken(), params)[0], atol=0.15)
    assert values.dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    network = model(VQHead(num_codes=7))
    with pytest.raises(ValueError, match="do not fit a head of 23 tokens and 7 codes"):
        with_codes(init(network), np.arange(V))
    with pytest.raises(ValueError, match="takes no softcap"):
        VQHead(num_codes=7, softcap=5.0)
    with pytest.raises(Exception, match="num_codes=24 exceeds the 23 tokens"):
        init(model(VQHead(num_codes=24)))
    assert config.load(config.dump(network)) == network
