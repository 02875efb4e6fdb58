"""Sums merge exactly where means of means do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.weighted import Weighted


def test_merged_parts_equal_the_whole_where_a_mean_of_means_does_not():
    rng = np.random.default_rng(0)
    values, weights = 1 + rng.random((6, 8)), rng.integers(0, 2, size=(6, 8)) * rng.random((6, 8))
    whole = Weighted.of(jnp.asarray(values), jnp.asarray(weights))
    rows = zip(values, weights, strict=True)
    parts = [Weighted.of(jnp.asarray(v), jnp.asarray(w)) for v, w in rows]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    expected = (values * weights).sum() / weights.sum()
    np.testing.assert_allclose(merged.mean(), expected, rtol=1e-6)
    np.testing.assert_allclose(whole.mean(), expected, rtol=1e-6)
    mean_of_means = np.mean([p.mean() for p in parts])
    assert abs(mean_of_means - expected) > 1e-3


def test_values_of_weight_zero_reach_neither_sum_nor_gradient():
    def mean(x):
        return Weighted.of(jnp.log(x), jnp.asarray([1.0, 0.0])).mean()

    x = jnp.asarray([2.0, -1.0])  # log of the second is not a number
    np.testing.assert_allclose(mean(x), np.log(2.0), rtol=1e-6)


def test_nothing_weighs_nothing():
    empty = Weighted.of(jnp.full((3,), jnp.nan), jnp.zeros(3))
    assert float(empty.mean()) == 0.0
    gradient = jax.grad(lambda x: Weighted.of(x, jnp.zeros(3)).mean())(jnp.ones(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_never_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        Weighted.of(jnp.ones((2, 3)), jnp.ones((3,)))
