"""Every form on shapes and blocks that nobody chose."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig, vocabulary_statistics

SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.integers(1, 70),
        "width": st.integers(1, 33),
        "vocabulary": st.integers(1, 300),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, 5.0]),
        "scale": st.sampled_from([0.1, 3.0]),
    }
)


def _parameters(sizes):
    keys = jax.random.split(jax.random.key(sizes["width"]), 3)
    vocabulary, width = sizes["vocabulary"], sizes["width"]
    hidden = jax.random.normal(keys[0], (sizes["batch"], sizes["length"], width))
    weight = jax.random.normal(keys[1], (vocabulary, width))
    bias = jax.random.normal(keys[2], (vocabulary,)) if sizes["bias"] else None
    return sizes["scale"] * hidden, weight, bias


def _both(parameters, softcap, impl, config):
    """Values and gradients of all results under fixed cotangents."""
    hidden, weight, _ = parameters
    keys, rows = jax.random.split(jax.random.key(hidden.shape[-1]), 2), hidden.shape[:2]
    targets = jax.random.randint(keys[0], rows, 0, len(weight))

    def outputs(parameters):
        hidden, weight, bias = parameters
        out = vocabulary_statistics(
            hidden=hidden, weight=weight, bias=bias, targets=targets, softcap=softcap,
            impl=impl, config=config,
        )  # fmt: skip
        return jnp.stack(out[:4]), out

    @jax.jit
    def both(parameters, cotangents):
        _, pull_back, out = jax.vjp(outputs, parameters, has_aux=True)
        return out, pull_back(cotangents)[0]

    return both(parameters, jax.random.normal(keys[1], (4, *rows)))


def _agree(sizes, impl, config):
    parameters, softcap = _parameters(sizes), sizes["softcap"]
    ours, gradients = _both(parameters, softcap, impl, config)
    expected = _both(parameters, softcap, "ref", LinearCrossEntropyConfig())
    # Of entries that differ by a rounding, as those at the soft-cap, any may be the arg-max.
    best, ours = ours.best, ours._replace(best=expected[0].best)
    for a, b in zip(jax.tree.leaves((ours, gradients)), jax.tree.leaves(expected), strict=True):
        largest = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, atol=3e-5 * largest)
    hidden, weight, bias = parameters
    logits = hidden @ weight.T + (0 if bias is None else bias[None, None])
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    chosen = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, logits.max(-1), atol=3e-5 * float(jnp.abs(logits).max()))


@settings(deadline=None, max_examples=5)
@given(sizes=SIZES, block=st.integers(1, 300))
def test_blocks_agree_with_whole_logits(sizes, block):
    _agree(sizes, "xla", LinearCrossEntropyConfig(block_vocabulary=block))


@settings(deadline=None, max_examples=5)
@given(sizes=SIZES, tokens=st.sampled_from([128, 256]), block=st.sampled_from([128, 256]))
def test_kernels_agree_with_whole_logits(sizes, tokens, block):
    config = LinearCrossEntropyConfig(block_tokens=tokens, block_vocabulary=block, interpret=True)
    _agree(sizes, "tpu", config)
