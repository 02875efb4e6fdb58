"""Hadamard matrices by their defining equation, and rotations that are rotations."""

import numpy as np
import pytest

from tokenlab.quantize import Rotation, hadamard_matrix, random_orthogonal

KNOWN = [1, 2, 4, 12, 20, 24, 28, 36, 44, 64, 576, 960, 1536]


@pytest.mark.parametrize("size", KNOWN)
def test_a_hadamard_matrix_is_one(size):
    made = hadamard_matrix(size)
    assert np.all(np.abs(made) == 1)
    np.testing.assert_array_equal(made @ made.T, size * np.eye(size))


def test_where_there_is_none_it_is_said():
    """Orders other than 1, 2 and multiples of 4 have none; 92 has one that is not Paley's."""
    for size in (3, 6, 9, 18, 92):
        assert hadamard_matrix(size) is None
    missing = [4 * k for k in range(1, 23) if hadamard_matrix(4 * k) is None]
    assert missing == [52]


@pytest.mark.parametrize("size", [1, 3, 9, 40, 48, 92, 576])
def test_every_size_has_a_rotation(size):
    made = random_orthogonal(size, np.random.default_rng(0))
    assert made.dtype == np.float64
    np.testing.assert_allclose(made @ made.T, np.eye(size), atol=1e-12)
    other = random_orthogonal(size, np.random.default_rng(1))
    assert size == 1 or not np.array_equal(made, other)


@pytest.mark.parametrize("size", [64, 576])
def test_one_large_channel_is_spread_evenly(size):
    row = np.zeros(size)
    row[5] = 1.0
    rotated = row @ random_orthogonal(size, np.random.default_rng(2))
    np.testing.assert_allclose(np.abs(rotated), size**-0.5)


def test_heads_of_values_and_outputs_turn_alike():
    """What ``v`` is rotated by is undone in ``out`` but for the mixing of heads, on every group."""
    bases = Rotation(seed=3).of(dim=24, num_heads=6, num_kv_heads=2, head_dim=8, hidden_dim=12)
    values, outputs = bases["mixer/v"][1], bases["mixer/out"][0]
    rng = np.random.default_rng(0)
    v = rng.normal(size=(2, 8))  # one token's values of two key heads
    heads = np.repeat(v, 3, axis=0).reshape(-1)
    turned = np.repeat((v.reshape(-1) @ values).reshape(2, 8), 3, axis=0)
    mixed = np.kron(outputs.reshape(6, 8, 6, 8)[:, 0, :, 0] / values[0, 0], np.eye(8))
    np.testing.assert_allclose(turned.reshape(-1) @ mixed, heads @ outputs, atol=1e-12)
    np.testing.assert_allclose(mixed @ mixed.T, np.eye(48), atol=1e-12)
    same = Rotation(seed=3).of(dim=24, num_heads=6, num_kv_heads=2, head_dim=8, hidden_dim=12)
    np.testing.assert_array_equal(bases["feedforward/down"][0], same["feedforward/down"][0])
