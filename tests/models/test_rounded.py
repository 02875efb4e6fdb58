"""W4A4: a decoder whose projections are products of NVFP4 codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nvfp4_matmul import nvfp4_matmul, packed
from tokenlab.cache import FullCache
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import named
from tokenlab.depth import Sequential
from tokenlab.models import Linear, llama, rounded, unrolled
from tokenlab.quantize import NVFP4, ActivationQuantizer, Layerwise, nvfp4, tensor_scale

TOKENS = jax.random.randint(jax.random.key(1), (3, 8), 0, 20)


def of(tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return {"positions": positions, "segments": jnp.ones_like(tokens)}


@functools.cache
def make():
    model = llama(vocab_size=20, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=48)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS, **of(TOKENS))["params"]
    params = jax.tree.map(lambda x: x.unbox(), params, is_leaf=lambda x: hasattr(x, "unbox"))
    return unrolled(model, params)


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, cache=None, **where):
    """The hidden states, and the cache."""
    out = model.apply({"params": params}, tokens, **(where or of(tokens)), cache=cache)
    return out.hidden, out.cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(ActivationQuantizer):
    """Rounds nothing."""

    def __call__(self, x, *, largest=None):
        del largest
        return x


def test_every_projection_is_a_product_of_codes():
    """Of 4 bits on both sides, by the kernel's reference."""
    model, params = make()
    params = Layerwise(quantizer=NVFP4())(model, params).params
    four = rounded(model, params, tokens=TOKENS)

    @jax.jit
    def seen_by(params):
        return four.apply(
            {"params": params}, TOKENS, **of(TOKENS), mutable=["intermediates"],
            capture_intermediates=lambda module, name: isinstance(module, Linear),
        )[1]  # fmt: skip

    seen = seen_by(params)
    seen, kernels = named(seen["intermediates"]), named(params)
    assert len(four.largest) == 14
    for path, largest in four.largest:
        x = seen[f"{path}/inputs/0"].reshape(TOKENS.size, -1)
        left = nvfp4(x.T, scale=tensor_scale(jnp.float32(largest)))
        right = nvfp4(kernels[f"{path}/kernel"])
        product = nvfp4_matmul(
            x=packed(left.codes).T, x_scales=left.scales.T,
            weight=packed(right.codes), weight_scales=right.scales,
            alpha=left.tensor_scale * right.tensor_scale, impl="ref",
        )  # fmt: skip
        out = seen[f"{path}/__call__/0"].reshape(product.shape)
        np.testing.assert_allclose(out, product, atol=1e-5 * np.abs(product).max())


def test_with_nothing_rounded_it_is_the_model():
    model, params = make()
    same = rounded(model, params, tokens=TOKENS, rounding=Nothing())
    ours, plain = (run(one, params, TOKENS)[0] for one in (same, model))
    np.testing.assert_array_equal(ours, plain)
    four = rounded(model, params, tokens=TOKENS)
    error = run(four, params, TOKENS)[0] - plain
    assert 0.01 < float(jnp.std(error) / jnp.std(plain)) < 0.5


def test_a_row_is_the_same_alone_and_token_by_token():
    model, params = make()
    four = rounded(model, params, tokens=TOKENS[:2, :5])  # what lies beyond saturates
    whole = run(four, params, TOKENS)[0]
    alone = run(four, params, TOKENS[1:2])[0]
    np.testing.assert_allclose(alone[0], whole[1], atol=1e-5)
    cache = four.empty_cache(FullCache(), batch=3, capacity=8)
    for t in range(8):
        where = {name: x[:, t : t + 1] for name, x in of(TOKENS).items()}
        hidden, cache = run(four, params, TOKENS[:, t : t + 1], cache, **where)
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], atol=1e-4)


def test_calibration_sees_the_largest_and_no_padding():
    model, params = make()
    segments = jnp.ones_like(TOKENS).at[:, 5:].set(0)
    padded = rounded(model, params, tokens=TOKENS, segments=segments).largest
    short = rounded(model, params, tokens=TOKENS[:, :5]).largest
    for (path, one), (other, two) in zip(padded, short, strict=True):
        assert path == other and one == pytest.approx(two, rel=1e-5)
    longer = dict(rounded(model, params, tokens=TOKENS).largest)
    assert all(longer[path] >= one * (1 - 1e-6) for path, one in short)
    assert any(longer[path] > one for path, one in short)


def test_what_cannot_be_rounded_is_said():
    model, params = make()
    four = rounded(model, params, tokens=TOKENS).clone(largest=())
    with pytest.raises(UserError, match="block_0/mixer/q was not calibrated"):
        four.apply({"params": params}, TOKENS, **of(TOKENS))
    layers = jax.tree.map(lambda *x: jnp.stack(x), *(params[f"block_{i}"] for i in range(2)))
    made = {name: x for name, x in params.items() if "block_" not in name} | {"block": layers}
    with pytest.raises(UserError, match=r"models\.unrolled takes them apart"):
        rounded(model.clone(depth=Sequential(scan=True)), made, tokens=TOKENS)
