"""Streams are independent of each other and equal to themselves."""

import jax
import numpy as np

from tokenlab.core.rng import stream


def test_streams_are_named_and_reproducible():
    draws = {
        name: jax.random.normal(stream(0, name, 3), (64,)) for name in ("dropout", "init", "data")
    }
    for name, values in draws.items():
        np.testing.assert_array_equal(values, jax.random.normal(stream(0, name, 3), (64,)))
    flat = np.stack(list(draws.values()))
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.5
    assert not np.array_equal(draws["init"], jax.random.normal(stream(1, "init", 3), (64,)))
    assert not np.array_equal(draws["init"], jax.random.normal(stream(0, "init", 4), (64,)))
