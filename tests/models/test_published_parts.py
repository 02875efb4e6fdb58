"""The parts that published models have beside Llama's, each against a transcription."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.block_sparse_attention import SlidingWindow
from tokenlab import config
from tokenlab.cache import FullCache
from tokenlab.core.errors import UserError
from tokenlab.depth import MixtureOfRecursions, Recursive
from tokenlab.models import (
    Attention,
    Block,
    BlockPattern,
    GeGLU,
    Linear,
    LinearScaling,
    Llama3Scaling,
    RMSNorm,
    SwiGLU,
    llama,
    rotate,
)

FREQUENCIES = 500_000.0 ** (-np.arange(32) / 32)


def small(**changes):
    model = llama(vocab_size=23, dim=16, num_layers=4, num_heads=4, num_kv_heads=2, hidden_dim=24)
    return config.replace(model, changes)


def batch_of(width=9):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 23, (1, width)))
    positions = jnp.arange(width)[None]
    return tokens, {"positions": positions, "segments": jnp.ones_like(positions)}


def initialised(model):
    tokens, where = batch_of()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, **where))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


def hidden_of(model, params):
    tokens, where = batch_of()
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **where).hidden)(params)


def test_llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones():
    scaling = Llama3Scaling(factor=8.0, original_length=8192)
    found = np.asarray(scaling(jnp.asarray(FREQUENCIES, jnp.float32)))
    expected = []
    for frequency in FREQUENCIES:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert found[0] == 1 and found[-1] == pytest.approx(FREQUENCIES[-1] / 8)
    assert np.any((found < 0.99 * FREQUENCIES) & (found > 0.13 * FREQUENCIES))


def test_linear_scaling_is_a_change_of_positions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 8)), jnp.float32)
    scaled = rotate(
        x, positions=jnp.asarray([[0, 4, 8]]), base=100.0, scaling=LinearScaling(factor=4.0)
    )
    plain = rotate(x, positions=jnp.asarray([[0, 1, 2]]), base=100.0)
    np.testing.assert_allclose(scaled, plain, rtol=1e-5, atol=1e-6)


def test_a_bias_is_added_once_to_every_token():
    x = jnp.ones((2, 3, 4))
    layer = Linear(features=5, bias=True)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    np.testing.assert_array_equal(params["bias"], np.zeros(5))
    kernel, bias = params["kernel"], jnp.arange(5.0)
    np.testing.assert_allclose(
        layer.apply({"params": {"kernel": kernel, "bias": bias}}, x),
        np.asarray(layer.apply({"params": params}, x)) + np.arange(5.0),
        rtol=1e-6,
    )


def test_geglu_gates_by_the_tanh_form():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 6)), jnp.float32)
    layer = GeGLU(hidden_dim=10)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    gate, up, down = (np.asarray(params[name]["kernel"]) for name in ("gate", "up", "down"))
    g = np.asarray(x) @ gate
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    expected = (gelu * (np.asarray(x) @ up)) @ down
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)
    assert layer.flops(6) == SwiGLU(hidden_dim=10).flops(6) == 2 * 3 * 6 * 10


def test_a_scale_of_scores_is_a_scale_of_queries():
    plain, scaled = small(), small(**{"block.mixer.scale": 3.0 * 4**-0.5})
    params = initialised(plain)
    larger = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf if "mixer/q/" in jax.tree_util.keystr(
            path, simple=True, separator="/") else leaf, params,
    )  # fmt: skip
    np.testing.assert_allclose(
        hidden_of(scaled, params), hidden_of(plain, larger), rtol=1e-4, atol=1e-4
    )


def test_updates_are_normalised_before_they_are_added():
    model = small(**{"block.post_norm": RMSNorm(), "num_layers": 1})
    params = initialised(model)
    before = hidden_of(model, params)
    grown = jax.tree.map(lambda leaf: leaf, params)
    for part in (grown["block_0"]["mixer"]["out"], grown["block_0"]["feedforward"]["down"]):
        part["kernel"] = 50 * part["kernel"]
    np.testing.assert_allclose(hidden_of(model, grown), before, rtol=1e-3, atol=1e-3)
    assert params["block_0"]["mixer_post_norm"]["scale"].shape == (16,)


def pattern(size=3):
    local = small().block.clone(
        mixer=Attention(num_heads=4, num_kv_heads=2, rule=SlidingWindow(size=size), rope_base=100.0)
    )
    wide = Block(mixer=Attention(num_heads=2, num_kv_heads=1), feedforward=GeGLU(hidden_dim=8))
    return BlockPattern(blocks=(local, wide))


def test_layers_take_turns():
    model = small(block=pattern())
    params = initialised(model)
    widths = [params[f"block_{i}"]["feedforward"]["up"]["kernel"].shape[1] for i in range(4)]
    assert widths == [24, 8, 24, 8]
    alike = small(block=BlockPattern(blocks=(small().block, small().block.clone())))
    params = initialised(small())
    np.testing.assert_array_equal(hidden_of(alike, params), hidden_of(small(), params))


def test_a_pattern_decodes_with_a_cache_of_each_shape():
    model = small(block=pattern())
    params, (tokens, where) = initialised(model), batch_of()
    cache = model.empty_cache(FullCache(), batch=1, capacity=16)
    assert [state.k.shape for state in cache.states] == [(1, 2, 16, 4), (1, 1, 16, 8)] * 2
    found = []
    for t in range(9):
        part = slice(t, t + 1)
        out = model.apply(
            {"params": params}, tokens[:, part], positions=where["positions"][:, part],
            segments=where["segments"][:, part], cache=cache,
        )  # fmt: skip
        cache = out.cache
        found.append(out.hidden)
    np.testing.assert_allclose(
        jnp.concatenate(found, axis=1), hidden_of(model, params), rtol=1e-4, atol=1e-4
    )


def test_a_pattern_is_written_as_any_part():
    layer = "Block(mixer=Attention(num_heads=4, num_kv_heads=2), feedforward={}(hidden_dim=24))"
    text = f"BlockPattern(blocks=({layer.format('GeGLU')}, {layer.format('SwiGLU')}))"
    model = small(block=text)
    assert [type(kind.feedforward) for kind in model.block.kinds()] == [GeGLU, SwiGLU]
    assert config.load(config.dump(model)) == model


@pytest.mark.parametrize("depth", [Recursive(recursions=2), MixtureOfRecursions(recursions=2)])
def test_programs_that_share_layers_refuse_a_pattern(depth):
    model = small(block=pattern(), depth=depth)
    with pytest.raises(UserError, match="shares layers of one kind, not 2; give the model one"):
        initialised(model)


def test_a_pattern_of_one_is_refused():
    with pytest.raises(ValueError, match="at least two blocks"):
        BlockPattern(blocks=(small().block,))
