"""The TPU kernels: interpreted against the reference, compiled for every generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generations import every_generation
from interpreting import STRICT
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from kernels_pallas.common import aot
from kernels_pallas.common.schedule import schedules
from kernels_pallas.linear_cross_entropy import (
    LinearCrossEntropyConfig,
    linear_cross_entropy,
    tpu,
    vocabulary_statistics,
)
from kernels_pallas.linear_cross_entropy.specs import SHAPES

SMALL = LinearCrossEntropyConfig(block_tokens=128, block_vocabulary=128, interpret=True)
BFLOAT16_EPSILON = 2.0**-12


def _arrays(tokens=252, width=123, vocabulary=507, dtype=jnp.float32, bias=True, outputs=4):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (2, tokens // 2, width)).astype(dtype)
    weight = (0.3 * jax.random.normal(keys[1], (vocabulary, width))).astype(dtype)
    bias = jax.random.normal(keys[2], (vocabulary,)).astype(dtype) if bias else None
    targets = jax.random.randint(keys[3], hidden.shape[:2], 0, vocabulary)
    targets = targets.at[0, 0].set(vocabulary - 1)
    return (hidden, weight, bias), targets, jax.random.normal(keys[4], (outputs, *targets.shape))


@functools.partial(jax.jit, static_argnames=("softcap", "impl", "config"))
def _both(parameters, targets, cotangents, *, softcap=None, impl="tpu", config=SMALL):
    """The float results, the gradients under ``cotangents``, and the last result.

    Four cotangents ask for the statistics, three for the loss.
    """
    operation = vocabulary_statistics if cotangents.shape[0] == 4 else linear_cross_entropy

    def outputs(parameters):
        hidden, weight, bias = parameters
        out = operation(
            hidden=hidden,
            weight=weight,
            bias=bias,
            targets=targets,
            softcap=softcap,
            impl=impl,
            config=config,
        )
        return jnp.stack(out[: cotangents.shape[0]]), out[-1]

    out, pull_back, last = jax.vjp(outputs, parameters, has_aux=True)
    return out, pull_back(cotangents)[0], last


def _close(ours, expected, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * scale)


@pytest.mark.parametrize("outputs", [3, 4])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("bias", [False, True])
def test_ragged_tiles_equal_the_reference(bias, softcap, outputs):
    arrays = _arrays(bias=bias, outputs=outputs)
    expected = _both(*arrays, softcap=softcap, impl="ref")
    for impl in ("tpu", "xla"):
        _close(_both(*arrays, softcap=softcap, impl=impl), expected, 1e-5)


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(2, 8, 1), (6, 128, 128), (256, 1, 9)])
def test_small_and_even_shapes_equal_the_reference(tokens, width, vocabulary):
    arrays = _arrays(tokens, width, vocabulary)
    config = LinearCrossEntropyConfig(interpret=True)
    _close(_both(*arrays, config=config), _both(*arrays, impl="ref"), 1e-5)


def test_bfloat16_loses_only_what_rounding_the_gradients_loses():
    parameters, targets, cotangents = _arrays(dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), parameters)
    expected = _both(exact, targets, cotangents, impl="ref")
    out, gradients, best = _both(parameters, targets, cotangents)
    _close((out, best), (expected[0], expected[2]), 1e-5)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)
    _close(gradients, expected[1], 2**-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_race_no_uninitialised_read_none_out_of_bounds(dtype):
    arrays = _arrays(dtype=dtype)
    config = LinearCrossEntropyConfig(block_tokens=128, block_vocabulary=128, interpret=STRICT)
    result = jax.block_until_ready(_both(*arrays, softcap=20.0, config=config))
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found
    _close(result, _both(*arrays, softcap=20.0), 1e-6)


@pytest.mark.parametrize("impl", ["ref", "xla", "tpu"])
def test_entropy_and_its_gradient_equal_float64(impl):
    parameters, targets, cotangents = _arrays(tokens=4, width=6, vocabulary=150)
    by_entropy = jnp.zeros_like(cotangents).at[3].set(cotangents[3])
    out, gradients, best = _both(parameters, targets, by_entropy, impl=impl)
    hidden, weight, bias = (np.asarray(x, np.float64) for x in parameters)
    upstream = np.asarray(cotangents[3], np.float64)

    def entropy(hidden):
        logits = hidden @ weight.T + bias
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        return -np.sum(share * np.log(share), axis=-1)

    np.testing.assert_allclose(out[3], entropy(hidden), rtol=1e-5)
    np.testing.assert_array_equal(best, np.argmax(hidden @ weight.T + bias, axis=-1))
    for index in np.ndindex(hidden.shape):
        step = np.zeros_like(hidden)
        step[index] = 1e-5
        ends = [np.sum(upstream * entropy(hidden + sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(gradients[0][index], (ends[0] - ends[1]) / 2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["ref", "xla", "tpu"])
def test_the_first_of_equal_logits_is_the_best(impl):
    (hidden, weight, _), targets, cotangents = _arrays(tokens=4, vocabulary=300)
    parameters = (hidden, jnp.zeros_like(weight), jnp.zeros(300).at[jnp.array([140, 290])].set(1.0))
    assert jnp.all(_both(parameters, targets, cotangents, impl=impl)[2] == 140)


@pytest.mark.parametrize("impl", ["ref", "xla", "tpu"])
def test_a_zero_classifier_and_a_vocabulary_of_one(impl):
    (hidden, weight, _), targets, cotangents = _arrays(bias=False, outputs=3)
    cross_entropy = jnp.zeros_like(cotangents).at[0].set(-1.0).at[1].set(1.0)
    zero = (hidden, jnp.zeros_like(weight), None)
    out, gradients, _ = _both(zero, targets, cross_entropy, impl=impl)
    np.testing.assert_allclose(out[1] - out[0], np.log(507), rtol=1e-6)
    assert not jnp.any(gradients[0])
    out, gradients, _ = _both((hidden, weight[:1], None), 0 * targets, cross_entropy, impl=impl)
    np.testing.assert_allclose(out[1] - out[0], 0.0, atol=1e-5)
    _close(gradients[:2], (jnp.zeros_like(hidden), jnp.zeros_like(weight[:1])), 1e-5)


def test_gradients_of_the_cross_entropy_sum_to_zero_over_the_vocabulary():
    parameters, targets, cotangents = _arrays(outputs=3)
    cross_entropy = jnp.zeros_like(cotangents).at[0].set(-1.0).at[1].set(1.0)
    by_bias = _both(parameters, targets, cross_entropy)[1][2]
    assert float(jnp.sum(jnp.abs(by_bias))) > 1.0
    np.testing.assert_allclose(jnp.sum(by_bias), 0.0, atol=1e-3)


@pytest.mark.parametrize("wrong", [-1, 507, 2**30])
def test_ignored_tokens_of_any_id_change_nothing(wrong):
    parameters, targets, cotangents = _arrays(outputs=3)
    ignored = jax.random.bernoulli(jax.random.key(9), 0.2, targets.shape)
    cotangents = jnp.where(ignored[None], 0.0, cotangents)
    expected = _both(parameters, targets, cotangents)[1]
    gradients = _both(parameters, jnp.where(ignored, wrong, targets), cotangents)[1]
    _close(gradients, expected, 0.0)


def _skewed(scale=1.0):
    """A Zipf-like bias: from some entry on, all softmax shares are under the threshold."""
    (hidden, weight, _), targets, cotangents = _arrays(vocabulary=1024, outputs=3)
    parameters = (hidden, 0.1 * weight, -3.0 * jnp.log1p(jnp.arange(1024.0)))
    cross_entropy = jnp.zeros_like(cotangents).at[0].set(-scale).at[1].set(scale)
    return parameters, targets % 128, cross_entropy


# A loss that is a mean over tokens comes with gradients far under the threshold itself.
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_what_the_skip_drops_is_within_the_bound(scale):
    arrays = _skewed(scale)
    skipping = LinearCrossEntropyConfig(
        block_tokens=128, block_vocabulary=128, interpret=True, skip_below=BFLOAT16_EPSILON
    )
    exact, ours = _both(*arrays)[1], _both(*arrays, config=skipping)[1]
    error = jnp.abs(ours[0] - exact[0])
    bound = BFLOAT16_EPSILON * scale * jnp.sum(jnp.abs(arrays[0][1]), axis=0)
    assert bool(jnp.all(error <= bound[None, None]))
    # Not vacuous: whole tiles are gone, and what stays is nearly all of the gradient.
    assert not jnp.any(ours[1][512:])
    assert jnp.all(jnp.any(exact[1][512:] != 0.0, axis=1))
    assert jnp.any(error > 0.0)
    assert float(jnp.max(error)) < 0.01 * float(jnp.max(jnp.abs(exact[0])))


def _shuffled(arrays):
    """The same vocabulary in an order that leaves no tile without a heavy entry."""
    (hidden, weight, bias), targets, cotangents = arrays
    order = jax.random.permutation(jax.random.key(5), weight.shape[0])
    place = jnp.argsort(order)
    return ((hidden, weight[order], bias[order]), place[targets], cotangents), place


def test_sorting_gathers_what_the_skip_can_drop():
    arrays, place = _shuffled(_skewed())
    natural, ordered = (
        LinearCrossEntropyConfig(
            block_tokens=128,
            block_vocabulary=128,
            interpret=True,
            skip_below=BFLOAT16_EPSILON,
            sort_vocabulary=sort,
        )
        for sort in (False, True)
    )
    exact, plain = _both(*arrays)[1], _both(*arrays, config=natural)[1]
    _close(plain, exact, 1e-6)
    ours = _both(*arrays, config=ordered)[1]
    assert not jnp.any(ours[1][place[512:]]) and not jnp.any(ours[2][place[512:]])
    assert jnp.all(jnp.any(ours[1][place[:64]] != 0.0, axis=1))
    bound = BFLOAT16_EPSILON * jnp.sum(jnp.abs(arrays[0][1]), axis=0)
    error = jnp.abs(ours[0] - exact[0])
    assert bool(jnp.all(error <= bound[None, None])) and jnp.any(error > 0.0)
    kept = jnp.any(ours[1] != 0.0, axis=1)
    _close(ours[1][kept], exact[1][kept], 1e-3)


@pytest.mark.parametrize("sort", [False, True])
def test_the_weight_may_be_spared_the_skip(sort):
    arrays = _skewed()
    config = LinearCrossEntropyConfig(
        block_tokens=128,
        block_vocabulary=128,
        interpret=True,
        skip_below=BFLOAT16_EPSILON,
        skip_weight=False,
        sort_vocabulary=sort,
    )
    exact, ours = _both(*arrays)[1], _both(*arrays, config=config)[1]
    _close(ours[1:], exact[1:], 1e-6)
    assert jnp.any(ours[0] != exact[0])


def test_the_skip_is_decided_on_all_gradients_together():
    """Logits (20, 0, 0, 0): softmax minus one-hot is under 1e-8, yet d(lse²) is about 40."""
    parameters = (jnp.ones((1, 2, 1)), jnp.array([[20.0], [0.0], [0.0], [0.0]]), None)
    targets = jnp.zeros((1, 2), jnp.int32)
    skipping = LinearCrossEntropyConfig(interpret=True, skip_below=BFLOAT16_EPSILON)
    plain = jnp.array([-1.0, 1.0, 0.0])[:, None, None] * jnp.ones((3, 1, 2))
    assert not jnp.any(_both(parameters, targets, plain, config=skipping)[1][1])
    z_loss = plain.at[1].add(2 * 20.0 * 1e-4)
    for cotangents in (z_loss, plain.at[1].add(40.0), plain.at[2].set(0.1)):
        ours = _both(parameters, targets, cotangents, config=skipping)[1]
        _close(ours, _both(parameters, targets, cotangents, impl="ref")[1], 1e-6)
        assert jnp.any(ours[1] != 0.0)


def test_the_skip_keeps_entropy_gradients():
    parameters, targets, cotangents = _skewed()
    cotangents = jnp.concatenate([0.0 * cotangents, jnp.ones((1, *targets.shape))])
    skipping = LinearCrossEntropyConfig(
        block_tokens=128, block_vocabulary=128, interpret=True, skip_below=BFLOAT16_EPSILON
    )
    exact = _both(parameters, targets, cotangents)[1]
    ours = _both(parameters, targets, cotangents, config=skipping)[1]
    error = jnp.abs(ours[0] - exact[0])
    bound = BFLOAT16_EPSILON * jnp.sum(jnp.abs(parameters[1]), axis=0)
    assert bool(jnp.all(error <= bound[None, None]))
    assert float(jnp.max(error)) < 0.05 * float(jnp.max(jnp.abs(exact[0])))


def _compiled(shape, dtype, topology, *, statistics, softcap=30.0, bias=True):
    rows, array = (shape.batch, shape.length), jax.ShapeDtypeStruct
    parameters = (
        array((*rows, shape.width), dtype),
        array((shape.vocabulary, shape.width), dtype),
        array((shape.vocabulary,), dtype) if bias else None,
    )
    cotangents = array((4 if statistics else 3, *rows), jnp.float32)
    step = functools.partial(_both, softcap=softcap, impl=None, config=LinearCrossEntropyConfig())
    return aot.compile_tpu(
        step, parameters, array(rows, jnp.int32), cotangents, topology=aot.TPUS[topology]
    )


@every_generation("bfloat16", "float32")
def test_a_vocabulary_of_256k_compiles_with_next_to_no_temporary_memory(topology, dtype):
    compiled = _compiled(SHAPES["gemma-2-2b"], dtype, topology, statistics=True)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


def test_a_narrow_model_compiles_as_well():
    compiled = _compiled(SHAPES["laptop-128k"], jnp.bfloat16, "v5e", statistics=False, bias=False)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


def test_the_skip_and_ragged_shapes_compile():
    arrays = _arrays(dtype=jnp.bfloat16)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    config = LinearCrossEntropyConfig(skip_below=2**-12, sort_vocabulary=True)
    step = functools.partial(_both, impl=None, config=config)
    assert "tpu_custom_call" in aot.compile_tpu(step, *shapes).as_text()


def test_what_cannot_run_says_why():
    (hidden, weight, _), targets, _ = _arrays()

    def refused(hidden=hidden, weight=weight, **config):
        config = LinearCrossEntropyConfig(**{"interpret": True, **config})
        return tpu.supports(hidden=hidden, weight=weight, targets=targets, config=config)

    assert refused() is None
    assert "needs a TPU" in refused(interpret=False)
    assert "float16" in refused(hidden=hidden.astype(jnp.float16))
    assert "block_tokens=100 is not a multiple of 128" in refused(block_tokens=100)
    assert "empty" in refused(weight=weight[:0])
    wide = jax.ShapeDtypeStruct((2, 126, 2**17), jnp.float32)
    assert "no tile of width 131072" in refused(
        hidden=wide, weight=jax.ShapeDtypeStruct((507, 2**17), jnp.float32)
    )
    with pytest.raises(ValueError, match="needs a TPU"):
        linear_cross_entropy(hidden=hidden, weight=weight, targets=targets, impl="tpu")


def test_the_kernels_cost_what_their_matrix_products_do():
    """On a v5e, four units of 128 x 128 multiply-adds a cycle; asked for are 10 per cent above."""
    shape = SHAPES["gemma-2-2b"]
    found = schedules(
        "kernels_pallas.linear_cross_entropy.specs:program",
        shape="gemma-2-2b",
        dtype="bfloat16",
        backward=True,
    )
    product = shape.batch * shape.length * shape.width * shape.vocabulary / (4 * 128 * 128)
    # The logits once, and twice more with a product of the gradient each.
    for one, products in zip(found, (1, 2, 2), strict=True):
        steps = one.steps - 2
        assert 0.8 * products * product < one.cycles * steps < 1.1 * products * product, one.kernel
