"""Quantised decoders against a rotated network written in NumPy, and against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.depth import Sequential
from tokenlab.models import Attention, Block, RMSNorm, SwiGLU, Transformer, llama, unrolled
from tokenlab.quantize import (
    GPTQ,
    NVFP4,
    RSQ,
    ActivationNorm,
    AttentionConcentration,
    FirstPositions,
    Layerwise,
    QuaRot,
    Rotation,
    RoundToNearest,
    SymmetricGrid,
    expand,
    layerwise,
)

LENGTH = 16
GEOMETRY = {"dim": 12, "num_heads": 3, "num_kv_heads": 1, "head_dim": 4, "hidden_dim": 20}


def decoder(**changes):
    """Widths 12, 20 and 4, and three heads, of which there is no Hadamard matrix."""
    mixer = Attention(num_heads=3, num_kv_heads=1, qkv_bias=True)
    block = Block(mixer=mixer, feedforward=SwiGLU(hidden_dim=20))
    return Transformer(**{"vocab_size": 40, "dim": 12, "num_layers": 2, "block": block} | changes)


def initialised(model, seed=0):
    """Parameters with gains and biases that are not those of a fresh model."""
    one = jnp.ones((1, 1), jnp.int32)
    params = model.init(jax.random.key(seed), one, positions=one, segments=one)["params"]
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda p: p.value, params, is_leaf=_boxed))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    leaves = [
        leaf + (0.3 if leaf.ndim == 1 else 0.05) * n for leaf, n in zip(leaves, noise, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def _boxed(leaf):
    return hasattr(leaf, "unbox")


def rows(count=6, length=LENGTH, seed=5):
    return jax.random.randint(jax.random.key(seed), (count, length), 0, 40)


def forward(model, params, tokens, segments=None, **options):
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return model.apply(
        {"params": params}, tokens, positions=positions, segments=segments, **options
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
    hidden = forward(model, params, tokens).hidden
    return model.apply({"params": params}, hidden, method="logits")


def logits(model, params, tokens):
    return np.asarray(_logits(model, dict(params), tokens))


# ---------------------------------------------------------------- a rotated network in NumPy


def normed(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def turned(x):
    """Rotary positions of ``[T, H, E]``."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotated_logits(params, kernels, bases, row):
    """A model whose stream is rotated, with online transforms before ``out`` and ``down``.

    Kernels are rotated ones; the embedding is rotated on the way in, and the head has the gain of
    the last norm and is rotated too.
    """
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    stream, head = bases["mixer/q"][0], bases["mixer/v"][1]
    mixing = bases["mixer/out"][0] @ np.kron(np.eye(3), head).T  # of heads, online
    x = wide["embedding"][row] @ stream
    for number in range(2):
        layer, mine = wide[f"block_{number}"], lambda path, n=number: kernels[f"block_{n}/{path}"]
        read = normed(x)
        q, k, v = (read @ mine(f"mixer/{name}") for name in "qkv")
        q, k = q + layer["mixer"]["q"]["bias"], k + layer["mixer"]["k"]["bias"]
        v = v + layer["mixer"]["v"]["bias"] @ head
        q, k = turned(q.reshape(-1, 3, 4)), turned(k.reshape(-1, 1, 4))
        out = np.zeros_like(q)
        for h in range(3):
            scores = q[:, h] @ k[:, 0].T / 2
            scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, h] = chances / chances.sum(axis=1, keepdims=True) @ v
        # Heads leave turned by `head`; the mixing takes them from there.
        x = x + out.reshape(-1, 12) @ mixing @ mine("mixer/out")
        read = normed(x)
        gate, up = read @ mine("feedforward/gate"), read @ mine("feedforward/up")
        hidden = gate / (1 + np.exp(-gate)) * up
        x = x + hidden @ bases["feedforward/down"][0] @ mine("feedforward/down")
    gained = wide["embedding"] * wide["norm"]["scale"]
    return normed(x) @ (gained @ stream).T


@pytest.mark.parametrize("bits", [3, 8])
def test_the_parameters_compute_what_the_rotated_network_does(bits):
    """Codes times scales, in the rotated bases, run as they would be deployed."""
    model, tokens = decoder(), rows(3)
    params = initialised(model)
    method = Layerwise(
        quantizer=RoundToNearest(grid=SymmetricGrid(bits=bits)), rotation=Rotation(seed=1)
    )
    made = method(model, params)
    kernels = {
        path: np.asarray(one.codes, np.float64) * np.asarray(one.scale, np.float64)
        for path, one in made.projections.items()
    }
    bases = Rotation(seed=1).of(**GEOMETRY)
    ours = logits(model, made.params, tokens)
    for row, found in zip(np.asarray(tokens), ours, strict=True):
        expected = rotated_logits(params, kernels, bases, row)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    error = np.abs(ours - logits(model, params, tokens)).max() / np.abs(ours).max()
    assert error < 0.05 if bits == 8 else error > 0.1


def test_a_rotation_keeps_logits():
    """Exact kernels in the rotated network: 1e-4 of the model itself."""
    model, tokens = decoder(), rows(2)
    params = initialised(model)
    bases = Rotation().of(**GEOMETRY)
    kernels = {}
    for number in range(2):
        folded = layerwise._folded(params[f"block_{number}"])
        for path, (left, right) in bases.items():
            exact = np.asarray(layerwise._at(folded, path)["kernel"], np.float64)
            exact = left.T @ exact if right is None else left.T @ exact @ right
            kernels[f"block_{number}/{path}"] = exact
    ours = logits(model, params, tokens)
    for row, found in zip(np.asarray(tokens), ours, strict=True):
        expected = rotated_logits(params, kernels, bases, row)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_rotation_spreads_a_planted_outlier():
    model = decoder()
    params = initialised(model)
    gate = params["block_0"]["feedforward"]["gate"]["kernel"]
    params["block_0"]["feedforward"]["gate"]["kernel"] = gate.at[4].mul(30.0)
    fine = RoundToNearest(grid=SymmetricGrid(bits=8))

    def peak(rotation):
        made = Layerwise(quantizer=fine, rotation=rotation)(model, params).projections
        one = made["block_0/feedforward/gate"]
        values = np.asarray(one.values)
        return np.abs(values).max() / np.sqrt(np.mean(values**2))

    assert peak(Rotation()) < 0.7 * peak(None)


# ---------------------------------------------------------------- moments and weights


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_each_projection_is_quantised_on_what_the_quantised_model_feeds_it(power):
    """The finished model shows what every projection reads; its moments give the same codes."""
    model, tokens = decoder(), rows(8)
    params = initialised(model)
    importance = ActivationNorm(lowest=0.1)
    method = Layerwise(quantizer=GPTQ(), importance=importance, power=power, batch_size=3)
    made = method(model, params, tokens=tokens)
    seen = forward(model, made.params, tokens, mutable=["intermediates"])[1]["intermediates"]
    stream = made.params["embedding"][tokens]
    for number in range(2):
        name = f"block_{number}"
        # The stream that the layer reads, by what earlier layers of the finished model make.
        norm = jnp.linalg.norm(stream, axis=-1)
        low, high = norm.min(axis=1, keepdims=True), norm.max(axis=1, keepdims=True)
        r = 0.1 + 0.9 * (norm - low) / (high - low)
        r = np.asarray(r / r.mean(axis=1, keepdims=True), np.float64) ** (2 * power)
        for path in (path for group in layerwise.GROUPS for path in group):
            (x,) = layerwise._at(seen[name], path)["inputs"]
            x = np.asarray(x, np.float64)
            moment = np.einsum("nt,nti,ntj->ij", r, x, x)
            kernel = layerwise._at(params[name], path)["kernel"]
            expected = GPTQ()(weight=kernel, moment=moment).codes
            assert np.mean(made.projections[f"{name}/{path}"].codes == expected) > 0.995, path
        block = model.block.clone(parent=None)
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens.shape)
        stream = block.apply(
            {"params": made.params[name]}, stream, positions=positions, segments=tokens * 0 + 1
        )[0]


def codes(made):
    return {path: np.asarray(one.codes) for path, one in made.projections.items()}


def assert_same(left, right, share=1.0):
    left, right = codes(left), codes(right)
    same = np.concatenate([(left[path] == right[path]).reshape(-1) for path in left])
    assert same.mean() >= share


def test_importance_of_equal_ends_is_quarot_bit_for_bit():
    model, tokens = decoder(), rows()
    params = initialised(model)
    plain = QuaRot()(model, params, tokens=tokens)
    for flat in (1.0, 0.3):
        flat = AttentionConcentration(lowest=flat, highest=flat)
        other = RSQ(importance=flat)(model, params, tokens=tokens)
        jax.tree.map(np.testing.assert_array_equal, plain, other)
    weighted = codes(RSQ()(model, params, tokens=tokens))
    assert any(np.any(weighted[path] != found) for path, found in codes(plain).items())


def test_weight_zero_is_deletion():
    """First tokens of a causal model do not know of those that follow."""
    model, tokens = decoder(), rows(12)
    params = initialised(model)
    half = Layerwise(importance=FirstPositions(count=8))(model, params, tokens=tokens)
    cut = Layerwise()(model, params, tokens=tokens[:, :8])
    assert_same(half, cut, 0.995)


@pytest.mark.parametrize("method", [Layerwise(), RSQ()], ids=["plain", "rsq"])
def test_padding_and_batches_change_nothing(method):
    model, tokens = decoder(), rows(5)
    params = initialised(model)
    plain = method(model, params, tokens=tokens)
    padded = jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=7)
    segments = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 5)))
    assert_same(plain, method(model, params, tokens=padded, segments=segments), 0.995)
    other = config.replace(method, {"batch_size": 2})
    assert_same(plain, other(model, params, tokens=tokens), 0.995)


def test_copies_are_rolled():
    tokens = jnp.arange(8)[None]
    made = np.asarray(expand(tokens, copies=4))
    np.testing.assert_array_equal(made[1], [6, 7, 0, 1, 2, 3, 4, 5])
    assert made.shape == (4, 8) and len({tuple(row) for row in made}) == 4
    model, params = decoder(), initialised(decoder())
    more = Layerwise(copies=2)(model, params, tokens=rows(4))
    whole = Layerwise()(model, params, tokens=expand(rows(4), copies=2))
    assert_same(more, whole)


# ---------------------------------------------------------------- what is promised


def test_everything_else_stays_and_no_layer_compiles_anew():
    model = decoder(num_layers=3)
    params = initialised(model)
    method = Layerwise()
    layerwise._moment.clear_cache()
    made = method(model, params, tokens=rows()).params
    assert layerwise._moment._cache_size() == 4
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, dict(made))
    for name in ("block_0", "block_1", "block_2"):
        kernels = [changed[name]["mixer"][part].pop("kernel") for part in ("q", "k", "v", "out")]
        kernels += [
            changed[name]["feedforward"][part].pop("kernel") for part in ("gate", "up", "down")
        ]
        assert all(kernels)
    assert not any(jax.tree.leaves(changed))


def test_bfloat16_models_keep_their_dtypes():
    model = decoder(dtype="bfloat16")
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16 if leaf.ndim > 1 else jnp.float32), initialised(model)
    )
    made = RSQ()(model, params, tokens=rows()).params
    assert jax.tree.map(lambda leaf: leaf.dtype, made) == jax.tree.map(
        lambda leaf: leaf.dtype, params
    )
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(made))


def test_what_cannot_be_quantised_is_said():
    model = decoder()
    params = initialised(model)
    with pytest.raises(UserError, match="GPTQ needs calibration tokens; give tokens="):
        Layerwise()(model, params)
    scanned = decoder(depth=Sequential(scan=True))
    stacked = initialised(scanned)
    with pytest.raises(UserError, match=r"quantise models\.unrolled"):
        RSQ()(scanned, stacked, tokens=rows())
    assert RSQ()(*unrolled(scanned, stacked), tokens=rows()).params.keys() == params.keys()
    other = {name: leaf for name, leaf in params["block_1"].items() if name != "feedforward"}
    with pytest.raises(UserError, match="block_1 has no feedforward/gate"):
        RSQ()(model, params | {"block_1": other}, tokens=rows())
    post = model.clone(block=model.block.clone(post_norm=RMSNorm()))
    with pytest.raises(UserError, match="does not turn with it; leave out the rotation"):
        RSQ()(post, initialised(post), tokens=rows())
    with pytest.raises(UserError, match="12 inputs do not fill"):
        Layerwise(quantizer=NVFP4())(model, params)


@pytest.mark.slow
def test_calibration_helps_on_its_own_inputs():
    """The error of the logits on the rows that were read, of two models."""
    wide = llama(vocab_size=40, dim=32, num_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=64)
    tokens = rows(32)
    for seed in range(2):
        params = initialised(wide, seed)
        exact = logits(wide, params, tokens)
        nearest, calibrated = (
            np.mean((logits(wide, method(wide, params, tokens=tokens).params, tokens) - exact) ** 2)
            for method in (Layerwise(quantizer=RoundToNearest()), Layerwise())
        )
        assert calibrated < 0.8 * nearest
