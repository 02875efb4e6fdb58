"""Every public quantiser, token importance and layer-wise method, and what all of them promise."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import tokenlab.quantize
from kernels_pallas.block_sparse_attention import Causal
from tokenlab import config
from tokenlab.models import llama
from tokenlab.quantize import (
    GPTQ,
    NVFP4,
    RSQ,
    ActivationNorm,
    ActivationQuantizer,
    AttentionConcentration,
    FirstAndLastPositions,
    FirstPositions,
    LayerView,
    Layerwise,
    NVFP4Activations,
    Quantizer,
    QuaRot,
    RoundToNearest,
    SymmetricGrid,
    TokenImportance,
    TokenRarity,
    Uniform,
    rounding,
)

INPUTS, OUTPUTS = 32, 6


def nearest(weight, moment):
    """The best of all shrink factors, by loops."""
    del moment
    out = np.zeros_like(weight)
    for o in range(weight.shape[1]):
        tries = []
        for number in range(80):
            scale = np.abs(weight[:, o]).max() / 3 * (1 - 0.01 * number)
            tries.append(scale * np.clip(np.round(weight[:, o] / scale), -4, 3))
        errors = [np.sum(np.abs(one - weight[:, o]) ** 2.4) for one in tries]
        out[:, o] = tries[int(np.argmin(errors))]
    return out


def compensated(weight, moment):
    """GPTQ by the inverse of what is left, anew at every input."""
    wanted = nearest(weight, None)
    damped = moment + 0.01 * np.mean(np.diagonal(moment)) * np.eye(INPUTS)
    out = np.zeros_like(weight)
    for o in range(OUTPUTS):
        values = np.unique(np.abs(wanted[:, o][wanted[:, o] != 0]))
        scale, row = values.min(), weight[:, o].copy()
        for i in range(INPUTS):
            out[i, o] = scale * np.clip(np.round(row[i] / scale), -4, 3)
            later = slice(i + 1, INPUTS)
            step = np.linalg.solve(damped[later, later], damped[later, i])
            row[later] += step * (row[i] - out[i, o])
    return out


def four_bit_floats(weight, moment):
    del moment
    scale = np.abs(weight).max() / (6 * 448)
    blocks = weight.reshape(-1, 16, OUTPUTS)
    step = (np.abs(blocks).max(axis=1) / (6 * scale)).astype(ml_dtypes.float8_e4m3fn)
    step = step.astype(np.float64)[:, None] * scale
    codes = np.clip(blocks / step, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (codes.astype(np.float64) * step).reshape(weight.shape)


class Row(NamedTuple):
    """A quantiser, what it makes of a matrix by loops, and the most bits of a code."""

    part: Quantizer
    oracle: Callable
    bits: int
    paper: bool = True


QUANTIZERS = {
    RoundToNearest: Row(RoundToNearest(), nearest, 3, paper=False),
    GPTQ: Row(GPTQ(), compensated, 3),
    NVFP4: Row(NVFP4(), four_bit_floats, 4),
}
# Whether weights are 0 and 1 only, and whether a paper has it.
IMPORTANCES = {
    Uniform: (Uniform(), True, False),
    FirstPositions: (FirstPositions(count=4), True, False),
    FirstAndLastPositions: (FirstAndLastPositions(first=2, last=2), True, False),
    AttentionConcentration: (AttentionConcentration(), False, True),
    TokenRarity: (TokenRarity(), False, False),
    ActivationNorm: (ActivationNorm(), False, False),
}
METHODS = {Layerwise: Layerwise(), QuaRot: QuaRot(), RSQ: RSQ()}


def four_bits(row, largest):
    """NVFP4 of a row by ml_dtypes' own rounding."""
    scale = np.float32(largest) / np.float32(6 * 448)
    out = np.zeros_like(row)
    for start in range(0, len(row), 16):
        block = row[start : start + 16]
        step = np.minimum(np.abs(block).max() / (6 * scale), 448).astype(ml_dtypes.float8_e4m3fn)
        step = np.float32(step) * scale
        codes = np.clip(block / step, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        out[start : start + 16] = codes.astype(np.float32) * step
    return out


# The part, and its oracle on one token.
ACTIVATIONS = {NVFP4Activations: (NVFP4Activations(), four_bits)}


def public(family):
    return {
        member
        for member in vars(tokenlab.quantize).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }


def test_the_tables_hold_every_public_member():
    assert public(Quantizer) == set(QUANTIZERS)
    assert public(TokenImportance) == set(IMPORTANCES)
    assert public(Layerwise) == set(METHODS)
    assert public(ActivationQuantizer) == set(ACTIVATIONS)


PARTS = {
    **{member: row.part for member, row in QUANTIZERS.items()},
    **{member: row[0] for member, row in IMPORTANCES.items()},
    **{member: row[0] for member, row in ACTIVATIONS.items()},
    **METHODS,
}


@pytest.mark.parametrize("member", PARTS, ids=lambda member: member.__name__)
def test_the_object_is_its_own_config(member):
    loaded = config.load(config.dump(PARTS[member]))
    assert loaded == PARTS[member] and hash(loaded) == hash(PARTS[member])


def test_methods_from_papers_name_them():
    papers = {member: row.paper for member, row in QUANTIZERS.items()}
    papers |= {member: row[2] for member, row in IMPORTANCES.items()}
    papers |= {Layerwise: False, QuaRot: True, RSQ: True, NVFP4Activations: True}
    for member, paper in papers.items():
        doc = inspect.getdoc(member) or ""
        assert ("Reference: " in doc and "arXiv:" in doc) == paper, member


# ---------------------------------------------------------------- quantisers

every = pytest.mark.parametrize("row", QUANTIZERS.values(), ids=lambda row: type(row.part).__name__)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, INPUTS)) @ rng.normal(size=(INPUTS, INPUTS))
    return jnp.asarray(rng.normal(size=(INPUTS, OUTPUTS)), jnp.float32), inputs.T @ inputs


@every
def test_equals_the_oracle(row):
    weight, moment = draw()
    found = row.part(weight=weight, moment=moment)
    expected = row.oracle(np.asarray(weight, np.float64), moment)
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.values.dtype == jnp.float32 and found.values.shape == weight.shape
    assert len(np.unique(found.codes)) <= 2**row.bits and found.codes.dtype.itemsize == 1


@every
def test_outputs_are_quantised_each_by_itself(row):
    weight, moment = draw(1)
    order = np.random.default_rng(0).permutation(OUTPUTS)
    whole = row.part(weight=weight, moment=moment)
    moved = row.part(weight=weight[:, order], moment=moment)
    for left, right in zip(whole, moved, strict=True):
        np.testing.assert_array_equal(left[:, order], right)


@every
def test_what_is_on_the_grid_stays(row):
    weight, moment = draw(2)
    if row.part.calibrated:
        moment = np.eye(INPUTS)
    once = row.part(weight=weight, moment=moment).values
    # The largest of an output on the largest code, so that the grid of its own is the same.
    again = row.part(weight=once, moment=moment).values
    error = np.abs(np.asarray(again) - np.asarray(once))
    assert error.max() < 0.2 * np.abs(np.asarray(once) - np.asarray(weight)).max()


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_and_narrow_dtypes(row, dtype):
    weight, moment = draw(3)
    assert not np.any(row.part(weight=jnp.zeros_like(weight, dtype), moment=moment).values)
    wide = row.part(weight=weight.astype(dtype).astype(jnp.float32), moment=moment)
    np.testing.assert_array_equal(
        row.part(weight=weight.astype(dtype), moment=moment).values, wide.values
    )


def test_the_second_matrix_compiles_nothing():
    rounding._compensated.clear_cache()
    for seed in (4, 5):
        weight, moment = draw(seed)
        GPTQ(grid=SymmetricGrid(bits=4))(weight=weight, moment=moment)
    assert rounding._compensated._cache_size() == 1


# ---------------------------------------------------------------- activations

every_activation = pytest.mark.parametrize(
    "row", ACTIVATIONS.values(), ids=lambda row: type(row[0]).__name__
)


def tokens_read(seed=0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=(2, 3, 32)) * np.exp(rng.normal(size=(2, 3, 32))))


@every_activation
@pytest.mark.parametrize("largest", [None, 1.5], ids=["dynamic", "calibrated"])
def test_activations_equal_the_oracle(row, largest):
    part, oracle = row
    x = tokens_read()
    found = part(jnp.asarray(x), largest=largest)
    seen = np.abs(x).max() if largest is None else largest
    expected = [oracle(token, seen) for token in x.reshape(-1, 32)]
    np.testing.assert_allclose(found.reshape(-1, 32), expected, rtol=1e-6)


@every_activation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_activations_stay_and_their_gradient_goes_through(row, dtype):
    x = jnp.asarray(tokens_read(1), dtype)
    once, pull_back = jax.vjp(row[0], x)
    assert once.dtype == x.dtype and once.shape == x.shape
    cotangent = jnp.asarray(tokens_read(2), dtype)
    np.testing.assert_array_equal(pull_back(cotangent)[0], cotangent)
    if dtype == "float32":  # the largest is on the grid, so that this is the same one
        np.testing.assert_allclose(row[0](once), once, rtol=1e-6)
    assert not np.any(row[0](jnp.zeros_like(x)))


@every_activation
def test_with_calibration_no_token_sees_another(row):
    x = jnp.asarray(tokens_read(3))
    whole = row[0](x, largest=2.0)
    for b, t in np.ndindex(2, 3):
        np.testing.assert_array_equal(row[0](x[b, t], largest=2.0), whole[b, t])


# ---------------------------------------------------------------- importance

every_importance = pytest.mark.parametrize(
    "row", IMPORTANCES.values(), ids=lambda row: type(row[0]).__name__
)
B, T = 3, 9


def layer(padding=0, seed=0):
    """Rows of 9 tokens, the second of 6, and more padding behind all."""
    rng = np.random.default_rng(seed)

    def put(array, value=0):
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
        return jnp.pad(jnp.asarray(array), widths, constant_values=value)

    segments = np.ones((B, T), np.int32)
    segments[1, 6:] = 0
    positions = np.broadcast_to(np.arange(T), (B, T))
    normal = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    return LayerView(
        tokens=put(rng.integers(0, 5, (B, T)).astype(np.int32)),
        counts=put(rng.integers(1, 9, (B, T)).astype(np.int32)),
        positions=put(positions.astype(np.int32), 3),
        segments=put(segments),
        hidden=put(normal(B, T, 4), np.nan),
        queries=put(normal(B, T, 4, 2), 7.0),
        keys=put(normal(B, T, 2, 2), 7.0),
        rule=Causal(),
        scale=1.0,
    )


@every_importance
def test_real_tokens_have_a_mean_of_one_and_padding_nothing(row):
    part, binary, _ = row
    view = layer()
    weights, real = np.asarray(part(view)), np.asarray(view.segments) > 0
    assert weights.dtype == np.float32 and np.all(weights >= 0) and not weights[~real].any()
    np.testing.assert_allclose(weights.sum(axis=1), real.sum(axis=1), rtol=1e-6)
    kinds = {len(np.unique(weights[r][real[r]])) for r in range(B)}
    assert (max(kinds) <= 2) == binary


@every_importance
def test_padding_changes_nothing(row):
    part = row[0]
    np.testing.assert_allclose(part(layer(padding=4))[:, :T], part(layer()), rtol=1e-5)


@every_importance
def test_a_row_of_padding_weighs_nothing_and_is_finite(row):
    view = layer()
    weights = row[0](view.replace(segments=view.segments.at[2].set(0)))
    assert np.isfinite(weights).all() and not np.any(weights[2])


@every_importance
def test_the_second_call_compiles_nothing(row):
    run = jax.jit(lambda part, view: part(view), static_argnums=0)
    for seed in (0, 1):
        run(row[0], layer(seed=seed))
    assert run._cache_size() == 1


# ---------------------------------------------------------------- whole decoders


@pytest.mark.parametrize("member", METHODS, ids=lambda member: member.__name__)
def test_a_model_is_quantised_and_the_second_one_compiles_nothing(member):
    model = llama(vocab_size=20, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=32)
    one = jnp.ones((1, 1), jnp.int32)
    sizes = []
    for seed in (0, 1):
        params = model.init(jax.random.key(seed), one, positions=one, segments=one)["params"]
        params = jax.tree.map(
            lambda leaf: leaf.value, params, is_leaf=lambda x: hasattr(x, "unbox")
        )
        tokens = jax.random.randint(jax.random.key(seed), (4, 12), 0, 20)
        made = METHODS[member](model, params, tokens=tokens)
        assert jax.tree.map(jnp.shape, dict(made.params)) == jax.tree.map(jnp.shape, params)
        assert len(made.projections) == 7
        sizes.append(rounding._compensated._cache_size())
    assert sizes[0] == sizes[1]
