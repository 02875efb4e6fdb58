"""TokenFormer: attention over learned tokens by hand, and growth that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.models import Pattention, PattentionAttention, llama, token_former
from tokenlab.models.token_former import (
    GeluNormed,
    NormedGelu,
    ParameterWeights,
    PlainGelu,
    PlainScores,
    ScaledSoftmax,
    grown,
)

TOKENS, WIDTH, FEATURES = 6, 5, 7


def gelu(x):
    return 0.5 * x * (1 + np.asarray(jax.lax.erf(jnp.asarray(x / np.sqrt(2), jnp.float32))))


def normed(x, count):
    return x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(count)


def softmax(x):
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


TABLE = {
    NormedGelu: lambda a, n: gelu(normed(a, n)),
    GeluNormed: lambda a, n: normed(gelu(a), n),
    ScaledSoftmax: lambda a, n: n * softmax(a),
    PlainGelu: lambda a, n: gelu(a),
    PlainScores: lambda a, n: a,
}
every = pytest.mark.parametrize("member", TABLE)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def learned(seed=1, tokens=TOKENS):
    return {
        "keys": normal(tokens, WIDTH, seed=seed),
        "values": normal(tokens, FEATURES, seed=seed + 1),
    }


def run(part, params, x):
    return part.apply({"params": params}, x, features=FEATURES)


def test_the_table_holds_every_member():
    assert set(ParameterWeights.__subclasses__()) == set(TABLE)


@every
def test_equals_numpy_and_is_its_own_config(member):
    part, params, x = Pattention(tokens=TOKENS, weights=member()), learned(), normal(2, 4, WIDTH)
    keys, values = (np.asarray(params[name], np.float64) for name in ("keys", "values"))
    expected = TABLE[member](np.asarray(x, np.float64) @ keys.T, TOKENS) @ values
    np.testing.assert_allclose(run(part, params, x), expected, atol=1e-5)
    assert config.load(config.dump(part)) == part
    assert run(part, params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@every
def test_scores_of_zero_are_finite_with_their_gradient(member):
    part, params, x = Pattention(tokens=TOKENS, weights=member()), learned(), jnp.zeros((1, 2, 5))
    out, gradient = jax.value_and_grad(lambda p: jnp.sum(run(part, p, x)))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((out, gradient)))


def test_without_norm_it_is_a_linear_map_or_a_perceptron():
    params, x = learned(), normal(2, 4, WIDTH)
    linear = x @ (params["keys"].T @ params["values"])
    ours = run(Pattention(tokens=TOKENS, weights=PlainScores()), params, x)
    np.testing.assert_allclose(ours, linear, atol=1e-5, rtol=1e-6)
    few = {name: leaf[:2] for name, leaf in params.items()}
    out = run(Pattention(tokens=2, weights=PlainScores()), few, normal(1, 20, WIDTH))
    assert np.linalg.matrix_rank(np.asarray(out[0]), tol=1e-4) == 2
    perceptron = nn.gelu(x @ params["keys"].T, approximate=False) @ params["values"]
    ours = run(Pattention(tokens=TOKENS, weights=PlainGelu()), params, x)
    np.testing.assert_allclose(ours, perceptron, atol=1e-5, rtol=1e-6)


def test_the_row_by_hand():
    weights = NormedGelu()(jnp.asarray([[[3.0, 4.0]]]), count=2)
    np.testing.assert_allclose(weights[0, 0], [0.680459, 0.985481], atol=2e-6)


def test_a_common_factor_of_the_scores_changes_nothing():
    part, params, x = Pattention(tokens=TOKENS), learned(), normal(2, 4, WIDTH)
    out = run(part, params, x)
    for factor in (1e-3, 0.5, 40.0):
        scaled = params | {"keys": factor * params["keys"]}
        np.testing.assert_allclose(run(part, scaled, x), out, atol=1e-5)


# ---------------------------------------------------------------- growth

MODEL = token_former(vocab_size=13, dim=16, num_layers=2, num_heads=2, tokens=8, hidden_tokens=16)
IDS = jnp.arange(12).reshape(2, 6)
WHERE = {"positions": jnp.tile(jnp.arange(6)[None], (2, 1)), "segments": jnp.ones((2, 6), int)}


@pytest.fixture(scope="module")
def params():
    made = nn.meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), IDS, **WHERE)["params"])
    return jax.tree.map(lambda leaf: 8 * leaf, made)


def hidden(model, params):
    return jax.jit(lambda p: model.apply({"params": p}, IDS, **WHERE).hidden)(params)


def test_growth_with_the_scale_kept_is_exact_and_without_it_is_not(params):
    """To rounding: longer sums may be taken in another order; one projection below is exact."""
    before = np.asarray(hidden(MODEL, params))
    bigger, more = grown(MODEL, params, key=jax.random.key(1))
    layer = more["block_0"]["feedforward"]["pattention"]
    assert layer["keys"].shape == (32, 16) and np.any(layer["values"][16:])
    assert not np.any(layer["keys"][16:])
    np.testing.assert_allclose(hidden(bigger, more), before, atol=1e-5 * np.abs(before).max())
    twice, again = grown(bigger, more, key=jax.random.key(2))
    assert twice.block.mixer.pattention == MODEL.block.mixer.pattention.clone(
        tokens=32, scaled_as=8
    )
    np.testing.assert_allclose(hidden(twice, again), before, atol=1e-5 * np.abs(before).max())
    rescaled, more = grown(MODEL, params, key=jax.random.key(1), keep_scale=False)
    change = np.linalg.norm(np.asarray(hidden(rescaled, more)) - before) / np.linalg.norm(before)
    assert change > 0.05


def test_one_projection_grows_exactly_or_by_half():
    part, params, x = Pattention(tokens=32), learned(tokens=32), normal(2, 4, WIDTH)
    more = {
        "keys": jnp.concatenate([params["keys"], jnp.zeros((32, WIDTH))]),
        "values": jnp.concatenate([params["values"], normal(32, FEATURES, seed=9)]),
    }
    before = np.asarray(run(part, params, x))
    kept = run(Pattention(tokens=64, scaled_as=32), more, x)
    assert np.abs(np.asarray(kept) - before).max() == 0
    changed = np.asarray(run(Pattention(tokens=64), more, x))
    assert np.linalg.norm(changed - before) / np.linalg.norm(before) > 0.3


@pytest.mark.parametrize("dead", [False, True])
def test_new_keys_learn_where_new_values_are_not_zero_and_new_values_do_not(dead):
    params, x = learned(), normal(2, 4, WIDTH)
    new = jnp.zeros((3, FEATURES)) if dead else normal(3, FEATURES, seed=9)
    more = {
        "keys": jnp.concatenate([params["keys"], jnp.zeros((3, WIDTH))]),
        "values": jnp.concatenate([params["values"], new]),
    }
    part = Pattention(tokens=TOKENS + 3, scaled_as=TOKENS)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(run(part, p, x))))(more)
    assert not np.any(gradient["values"][TOKENS:])
    assert np.any(gradient["keys"][TOKENS:]) != dead
    assert np.any(gradient["keys"][:TOKENS]) and np.any(gradient["values"][:TOKENS])


def test_refusals():
    plain = llama(vocab_size=9, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=8)
    with pytest.raises(UserError, match="token_former"):
        grown(plain, {}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no biases"):
        PattentionAttention(num_heads=2, num_kv_heads=2, qkv_bias=True)
