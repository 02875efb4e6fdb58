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


def _both(sizes, impl, config):
    """Values and gradients of all results under fixed cotangents."""
    keys = jax.random.split(jax.random.key(sizes["width"]), 5)
    rows, vocabulary = (sizes["batch"], sizes["length"]), sizes["vocabulary"]
    hidden = sizes["scale"] * jax.random.normal(keys[0], (*rows, sizes["width"]))
    weight = jax.random.normal(keys[1], (vocabulary, sizes["width"]))
    bias = jax.random.normal(keys[2], (vocabulary,)) if sizes["bias"] else None
    targets = jax.random.randint(keys[3], rows, 0, vocabulary)

    def outputs(parameters):
        hidden, weight, bias = parameters
        out = vocabulary_statistics(
            hidden=hidden, weight=weight, bias=bias, targets=targets, softcap=sizes["softcap"],
            impl=impl, config=config,
        )  # fmt: skip
        return jnp.stack(out[:4]), out

    @jax.jit
    def both(parameters, cotangents):
        _, pull_back, out = jax.vjp(outputs, parameters, has_aux=True)
        return out, pull_back(cotangents)[0]

    return both((hidden, weight, bias), jax.random.normal(keys[4], (4, *rows)))


def _agree(sizes, impl, config):
    ours, expected = _both(sizes, impl, config), _both(sizes, "ref", LinearCrossEntropyConfig())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        largest = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, atol=3e-5 * largest)


@settings(deadline=None, max_examples=8)
@given(sizes=SIZES, block=st.integers(1, 300))
def test_blocks_agree_with_whole_logits(sizes, block):
    _agree(sizes, "xla", LinearCrossEntropyConfig(block_vocabulary=block))


@settings(deadline=None, max_examples=5)
@given(sizes=SIZES, tokens=st.sampled_from([128, 256]), block=st.sampled_from([128, 256]))
def test_kernels_agree_with_whole_logits(sizes, tokens, block):
    config = LinearCrossEntropyConfig(block_tokens=tokens, block_vocabulary=block, interpret=True)
    _agree(sizes, "tpu", config)
