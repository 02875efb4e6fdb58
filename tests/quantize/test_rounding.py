"""GPTQ against brute force and float64 loops, and what its moments must and must not change."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import UserError
from tokenlab.quantize import GPTQ, RoundToNearest, SymmetricGrid, upper_factor

GRID = SymmetricGrid(bits=3)


def draw(seed, inputs=24, outputs=8, tokens=96):
    """A kernel and correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs))
    return (
        jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32),
        rng.normal(size=(tokens, inputs)) @ mix,
    )


def loss(weight, values, moment):
    error = np.asarray(weight, np.float64) - np.asarray(values, np.float64)
    return np.einsum("io,ij,jo->o", error, moment, error)


def plain_gptq(weight, moment, scale, grid, damping):
    """The definition, one output and one input at a time, with an inverse that is taken anew."""
    weight = np.array(weight, np.float64)
    damped = moment + damping * np.mean(np.diagonal(moment)) * np.eye(len(moment))
    codes = np.zeros_like(weight)
    for o in range(weight.shape[1]):
        row = weight[:, o].copy()
        for i in range(len(row)):
            codes[i, o] = np.clip(np.round(row[i] / scale[o]), grid.lowest, grid.highest)
            error = row[i] - codes[i, o] * scale[o]
            # The rest of the row that is best once this input is fixed: least squares.
            later = slice(i + 1, len(row))
            row[later] += np.linalg.solve(damped[later, later], damped[later, i]) * error
            row[i] -= error
    return codes


@pytest.mark.parametrize("block", [1, 5, 24, 128])
def test_it_is_least_squares_on_what_is_left(block):
    weight, inputs = draw(0)
    moment = inputs.T @ inputs
    found = GPTQ(grid=GRID, block=block)(weight=weight, moment=moment)
    scale = np.asarray(found.scale[0], np.float64)
    expected = plain_gptq(weight, moment, scale, GRID, 0.01)
    np.testing.assert_array_equal(found.codes, expected)
    np.testing.assert_allclose(found.values, expected * scale, rtol=1e-6)


def test_the_factor_is_the_upper_one_of_the_inverse():
    _, inputs = draw(1)
    moment = inputs.T @ inputs
    factor = upper_factor(moment, 0.01)
    assert np.array_equal(factor, np.triu(factor))
    mean = np.mean(np.diagonal(moment))
    damped = moment + 0.01 * mean * np.eye(len(moment))
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped) * mean, atol=1e-9)


def test_two_inputs_lie_between_brute_force_and_rounding():
    """200 draws of one output with two inputs: all 64 pairs of codes are tried."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        weight = jnp.asarray(rng.normal(size=(2, 1)), jnp.float32)
        inputs = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 2))
        moment = inputs.T @ inputs
        found = GPTQ(grid=GRID)(weight=weight, moment=moment)
        nearest = RoundToNearest(grid=GRID)(weight=weight)
        np.testing.assert_array_equal(found.scale, nearest.scale)
        pairs = itertools.product(range(GRID.lowest, GRID.highest + 1), repeat=2)
        scale = float(found.scale[0, 0])
        best = min(loss(weight, scale * np.array(pair)[:, None], moment)[0] for pair in pairs)
        exact = (scale * np.asarray(one.codes, np.float64) for one in (found, nearest))
        ours, rounded = (loss(weight, one, moment)[0] for one in exact)
        assert best <= ours <= rounded * (1 + 1e-9)


def test_uncorrelated_inputs_are_rounded():
    weight, inputs = draw(3)
    found = GPTQ(grid=GRID)(weight=weight, moment=np.diag(np.sum(inputs**2, axis=0)))
    nearest = RoundToNearest(grid=GRID)(weight=weight)
    np.testing.assert_array_equal(found.codes, nearest.codes)
    np.testing.assert_array_equal(found.values, nearest.values)


@pytest.mark.parametrize("factor", [0.25, 3.7, 1e6])
def test_a_factor_of_the_moment_changes_nothing(factor):
    weight, inputs = draw(4)
    moment = inputs.T @ inputs
    for left, right in zip(
        GPTQ()(weight=weight, moment=moment),
        GPTQ()(weight=weight, moment=factor * moment),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_weight_zero_is_deletion_and_weight_two_is_duplication():
    weight, inputs = draw(5)
    codes = {}
    rows = np.ones(len(inputs))
    for name, change in {"none": None, "deleted": 0.0, "doubled": 2.0}.items():
        r = rows.copy()
        if change is not None:
            r[7] = change
        codes[name] = GPTQ()(weight=weight, moment=(inputs * r[:, None]).T @ inputs).codes
    less, more = np.delete(inputs, 7, axis=0), np.concatenate([inputs, inputs[7:8]])
    np.testing.assert_array_equal(
        codes["deleted"], GPTQ()(weight=weight, moment=less.T @ less).codes
    )
    np.testing.assert_array_equal(
        codes["doubled"], GPTQ()(weight=weight, moment=more.T @ more).codes
    )
    assert not np.array_equal(codes["deleted"], codes["none"])  # so it could fail


def test_dead_inputs_and_singular_moments():
    weight, inputs = draw(6, tokens=5)  # rank 5 of 24
    inputs[:, [2, 20]] = 0.0
    found = GPTQ()(weight=weight, moment=inputs.T @ inputs)
    assert not np.any(found.codes[jnp.array([2, 20])])
    assert np.isfinite(found.values).all()
    nothing = GPTQ()(weight=weight, moment=np.zeros((24, 24)))
    assert not np.any(nothing.codes)
    # Slightly indefinite by rounding: damped until it has a factor.
    moment = inputs.T @ inputs
    worse = moment - 0.025 * np.mean(np.diagonal(moment)) * np.eye(24)
    assert np.isfinite(GPTQ()(weight=weight, moment=worse).values).all()


def test_what_cannot_be_quantised_is_said():
    weight, _ = draw(7)
    with pytest.raises(UserError, match="needs second moments"):
        GPTQ()(weight=weight)
    with pytest.raises(UserError, match="not finite"):
        GPTQ()(weight=weight, moment=np.full((24, 24), np.nan))
    with pytest.raises(ValueError, match=r"bits 1 must be in 2\.\.8"):
        SymmetricGrid(bits=1)
    with pytest.raises(ValueError, match="do not stay above 0"):
        SymmetricGrid(factors=101)
    with pytest.raises(ValueError, match="damping 0"):
        GPTQ(damping=0.0)


@settings(deadline=None, max_examples=25)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3))
def test_the_scale_is_the_best_of_the_factors(bits, seed, size):
    grid = SymmetricGrid(bits=bits)
    weight = (size * np.random.default_rng(seed).standard_t(3, size=(33, 1))).astype(np.float32)
    found = RoundToNearest(grid=grid)(weight=jnp.asarray(weight))
    wide, peak = weight.astype(np.float64), np.abs(weight).max() / grid.highest
    errors = []
    for number in range(80):
        scale = peak * (1 - 0.01 * number)
        rounded = scale * np.clip(np.round(wide / scale), grid.lowest, grid.highest)
        errors.append(np.sum(np.abs(wide - rounded) ** 2.4))
    ours = np.sum(np.abs(wide - np.asarray(found.values, np.float64)) ** 2.4)
    assert ours <= min(errors) * (1 + 1e-3)
    shrunk = 1 - float(found.scale[0, 0]) / peak
    assert -1e-5 < shrunk < 0.79 + 1e-5
    assert grid.lowest <= np.min(found.codes) and np.max(found.codes) <= grid.highest


def test_an_output_of_zeros_stays():
    found = RoundToNearest()(weight=jnp.zeros((4, 3)))
    assert not np.any(found.values) and np.all(found.scale == 1.0)
