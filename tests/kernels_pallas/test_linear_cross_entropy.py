"""Every implementation against float64 loops, finite differences and each other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices

from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig, linear_cross_entropy

B, T, D, V = 2, 5, 8, 37
# One block, blocks of which the last overlaps the one before.
IMPLS = [("ref", None), ("xla", None), ("xla", 10)]


def _arrays(dtype=jnp.float32, bias=True, length=T, vocabulary=V):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (B, length, D)).astype(dtype)
    weight = jax.random.normal(keys[1], (vocabulary, D)).astype(dtype)
    bias = jax.random.normal(keys[2], (vocabulary,)).astype(dtype) if bias else None
    targets = jax.random.randint(keys[3], (B, length), 0, vocabulary).at[0, 0].set(vocabulary - 1)
    cotangents = jax.random.normal(keys[4], (3, B, length))
    return (hidden, weight, bias), targets, cotangents


def _loop(parameters, targets, softcap):
    """target, log-sum-exp, mean in float64, one token at a time."""
    hidden, weight, bias = (None if x is None else np.asarray(x, np.float64) for x in parameters)
    out = np.zeros((3, *targets.shape))
    for b, t in np.ndindex(targets.shape):
        logits = weight @ hidden[b, t] + (0.0 if bias is None else bias)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        top = logits.max()
        log_sum_exp = top + np.log(np.sum(np.exp(logits - top)))
        out[:, b, t] = logits[targets[b, t]], log_sum_exp, logits.mean()
    return out


def _outputs(parameters, targets, softcap, impl, block):
    hidden, weight, bias = parameters
    return jnp.stack(
        linear_cross_entropy(
            hidden=hidden,
            weight=weight,
            bias=bias,
            targets=targets,
            softcap=softcap,
            impl=impl,
            config=LinearCrossEntropyConfig(block_vocabulary=block),
        )
    )


@functools.partial(jax.jit, static_argnames=("softcap", "impl", "block"))
def _both(parameters, targets, cotangents, *, softcap, impl, block):
    """The three results, and the gradients under ``cotangents``."""
    out, pull_back = jax.vjp(
        lambda parameters: _outputs(parameters, targets, softcap, impl, block), parameters
    )
    return out, pull_back(cotangents)[0]


def _slopes(parameters, targets, cotangents, softcap):
    """(parameter, index, finite difference of the loop) for a few entries of each parameter."""
    parameters = [None if x is None else np.array(x, np.float64) for x in parameters]
    cotangents, targets = np.asarray(cotangents, np.float64), np.asarray(targets)
    rng = np.random.default_rng(0)
    for which, parameter in enumerate(parameters):
        for _ in range(0 if parameter is None else 6):
            index = tuple(rng.integers(parameter.shape))
            original, ends = parameter[index], []
            for step in (1e-5, -1e-5):
                parameter[index] = original + step
                ends.append(np.sum(cotangents * _loop(parameters, targets, softcap)))
            parameter[index] = original
            yield which, index, (ends[0] - ends[1]) / 2e-5


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_of_each_output_equal_float64_loops(bias, softcap):
    parameters, targets, cotangents = _arrays(bias=bias)
    expected = _loop(parameters, targets, softcap)
    for used in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3)):
        by = jnp.zeros_like(cotangents).at[used].set(cotangents[used])
        slopes = list(_slopes(parameters, targets, by, softcap))
        results = [
            _both(parameters, targets, by, softcap=softcap, impl=impl, block=block)
            for impl, block in IMPLS
        ]
        for out, gradients in results:
            assert out.dtype == jnp.float32
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
            for which, index, slope in slopes:
                np.testing.assert_allclose(gradients[which][index], slope, atol=2e-5)
            for a, b in zip(*map(jax.tree.leaves, (gradients, results[0][1])), strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("block", [1, 36, 37, 100])
def test_every_block_size_gives_the_same(block):
    arrays = _arrays()
    expected = _both(*arrays, softcap=None, impl="ref", block=None)
    ours = _both(*arrays, softcap=None, impl="xla", block=block)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_bfloat16_inputs_lose_only_what_rounding_the_gradients_loses():
    parameters, targets, cotangents = _arrays(dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), parameters)
    expected = _both(exact, targets, cotangents, softcap=3.0, impl="ref", block=None)[1]
    for impl, block in IMPLS:
        out, gradients = _both(parameters, targets, cotangents, softcap=3.0, impl=impl, block=block)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, _loop(parameters, targets, 3.0), rtol=1e-5, atol=1e-5)
        for gradient, parameter, other in zip(gradients, parameters, expected, strict=True):
            assert gradient.dtype == parameter.dtype == jnp.bfloat16
            scale = float(jnp.max(jnp.abs(other)))
            np.testing.assert_allclose(gradient.astype(jnp.float32), other, atol=2**-7 * scale)


def test_huge_logits_neither_overflow_nor_lose_the_largest():
    (hidden, weight, bias), targets, cotangents = _arrays()
    parameters = (hidden * 1e4, weight, bias)
    out, gradients = _both(parameters, targets, cotangents, softcap=None, impl="xla", block=10)
    np.testing.assert_allclose(out, _loop(parameters, targets, None), rtol=1e-5, atol=1e-2)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradients)


@pytest.mark.parametrize(("impl", "block"), IMPLS)
def test_a_target_out_of_range_of_weight_zero_changes_nothing(impl, block):
    parameters, targets, cotangents = _arrays()
    cotangents = cotangents.at[:, 1, 2].set(0.0)
    run = functools.partial(_both, softcap=None, impl=impl, block=block)
    expected = run(parameters, targets, cotangents)[1]
    for wrong in (-1, V + 5):
        gradients = run(parameters, targets.at[1, 2].set(wrong), cotangents)[1]
        for a, b in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_permute_and_vmap_agrees():
    (hidden, weight, bias), targets, cotangents = _arrays()
    run = functools.partial(_both, softcap=None, impl="xla", block=10)
    out, _ = run((hidden, weight, bias), targets, cotangents)
    swapped, _ = run((hidden[::-1], weight, bias), targets[::-1], cotangents)
    np.testing.assert_array_equal(out[:, ::-1], swapped)

    def row(hidden, targets):
        parameters = (hidden[None], weight, bias)
        return _outputs(parameters, targets[None], None, "xla", 10)[:, 0]

    mapped = jax.jit(jax.vmap(row, out_axes=1))(hidden, targets)
    np.testing.assert_allclose(mapped, out, rtol=1e-6, atol=1e-6)


def test_the_second_call_compiles_nothing():
    parameters, targets, cotangents = _arrays()
    run = functools.partial(_both, softcap=2.0, impl=None, block=10)
    before = _both._cache_size()
    run(parameters, targets, cotangents)
    run(jax.tree.map(lambda x: x + 1, parameters), targets, cotangents + 1)
    assert _both._cache_size() == before + 1


@pytest.mark.parametrize("vocabulary", [8192, 8191])
def test_whole_logits_are_never_alive(vocabulary):
    """Forward and backward stay under a tenth of the logits; the reference does not."""
    arrays = _arrays(bias=False, length=512, vocabulary=vocabulary)
    whole = arrays[1].size * vocabulary * 4

    def temporary(function, *arrays, **static):
        compiled = function.lower(*arrays, softcap=None, **static).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    forward = jax.jit(_outputs, static_argnames=("softcap", "impl", "block"))
    assert temporary(forward, *arrays[:2], impl="xla", block=256) < 0.1 * whole
    assert temporary(_both, *arrays, impl="xla", block=256) < 0.1 * whole
    assert temporary(forward, *arrays[:2], impl="ref", block=None) > 0.9 * whole


def test_default_blocks_cover_the_vocabulary_and_stay_small():
    for tokens in (8, 4096, 2**20):
        for vocabulary in (5, 256, 32_768, 50_257, 128_256):
            block = LinearCrossEntropyConfig().block(tokens, vocabulary)
            assert 0 < block <= min(vocabulary, 4096)
            assert block * tokens <= max(2**22, 512 * tokens)


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig, linear_cross_entropy
hidden = jax.random.normal(jax.random.key(0), (16, 24, 64))
weight = jax.random.normal(jax.random.key(1), (100, 64))
targets = jax.random.randint(jax.random.key(2), (16, 24), 0, 100)
def loss(hidden, weight):
    out = linear_cross_entropy(
        hidden=hidden, weight=weight, targets=targets, impl="xla",
        config=LinearCrossEntropyConfig(block_vocabulary=30),
    )
    return jnp.sum(out.log_sum_exp - out.target + 0.1 * out.mean)
mesh = Mesh(np.array(jax.devices()), ("data",))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
step = jax.jit(
    jax.value_and_grad(loss, (0, 1)),
    in_shardings=(rows, whole), out_shardings=(whole, (rows, whole)),
)
print("DEVICES", len(jax.devices()))
print(step.lower(hidden, weight).compile().as_text())
one, (one_h, one_w) = jax.value_and_grad(loss, (0, 1))(hidden, weight)
all_, (all_h, all_w) = step(hidden, weight)
np.testing.assert_allclose(all_, one, rtol=1e-5)
np.testing.assert_allclose(all_h, one_h, atol=1e-4)
np.testing.assert_allclose(all_w, one_w, atol=1e-4)
print("EQUAL")
"""


def test_a_sharded_batch_is_not_gathered():
    printed = run_on_devices(8, _SHARDED)
    assert "DEVICES 8" in printed
    assert "EQUAL" in printed
    assert re.search(r"= \S+ all-reduce", printed)
    assert not re.search(r"all-gather|all-to-all|collective-permute", printed)
