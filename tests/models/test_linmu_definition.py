"""LinMU's block against its definition in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.mmate import (
    ATTENTION,
    BLOCK,
    DIM,
    GRID,
    HEADS,
    KV_HEADS,
    ONE,
    WINDOW,
    initialised,
    mixed,
    scan_order,
)
from tokenlab.models import (
    FlexMA,
)
from tokenlab.models.grid import AXES


@pytest.fixture(scope="module")
def params():
    return initialised(BLOCK, **ONE)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def scanned_by_hand(params, x, prompt, order, heads=HEADS, kv_heads=KV_HEADS):
    """FlexMA of one document, in float64, one token of one head at a time."""

    def project(name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    width, groups = DIM // heads, heads // kv_heads
    q = project("q").reshape(len(x), heads, width)
    k, v = (np.repeat(project(n).reshape(len(x), kv_heads, width), groups, axis=1) for n in "kv")
    decay = np.exp(-np.log1p(np.exp(project("decay"))) * np.exp(params["log_rate"]))
    gate = np.where(prompt[:, None], sigmoid(project("gate")), 1.0)
    y = np.zeros((len(x), heads, width))
    for h in range(heads):
        state = np.zeros((width, width))
        for i in order:
            state = decay[i, h] * state + np.outer(k[i, h], v[i, h])
            y[i, h] += gate[i, h] * (state.T @ q[i, h])
        state = np.zeros((width, width))
        for i in order[::-1]:
            if prompt[i]:
                state = decay[i, h] * state + np.outer(k[i, h], v[i, h])
                y[i, h] += (1 - gate[i, h]) * (state.T @ q[i, h])
    y /= np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5)
    return (y * params["norm"]["scale"]).reshape(len(x), DIM) @ params["out"]["kernel"]


def windows_by_hand(params, x, grid, window, shifted):
    """Softmax attention of one document's patches among all others of their box."""

    def project(name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    def turned(z, position):
        half = len(z) // 2
        angle = position * 10_000.0 ** (-np.arange(half) / half)
        first, second = z[:half], z[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle),
             second * np.cos(angle) + first * np.sin(angle)]
        )  # fmt: skip

    width, groups = DIM // HEADS, HEADS // KV_HEADS
    q, k, v = (project(name).reshape(len(x), -1, width) for name in "qkv")
    places = list(np.ndindex(grid.shape))

    def box(place):
        shift = [
            w // 2 if shifted and w < n else 0
            for w, n in zip(window.shape, grid.shape, strict=True)
        ]
        return tuple((p + s) // w for p, s, w in zip(place, shift, window.shape, strict=True))

    out = np.zeros((len(x), HEADS, width))
    for a, place in enumerate(places):
        near = [grid.start + b for b, other in enumerate(places) if box(other) == box(place)]
        i = grid.start + a
        for h in range(HEADS):
            query = turned(q[i, h], i)
            scores = np.asarray([query @ turned(k[j, h // groups], j) for j in near])
            weights = np.exp((scores - scores.max()) / math.sqrt(width))
            out[i, h] = weights / weights.sum() @ v[near, h // groups]
    return out.reshape(len(x), DIM) @ params["out"]["kernel"]


@pytest.mark.parametrize("fastest", AXES)
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_its_definition_in_numpy(params, fastest, shifted):
    module = BLOCK.clone(fastest=fastest, shifted=shifted)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, prompt = np.asarray(ONE["x"][0, :30], np.float64), np.asarray(ONE["prompt"][0, :30])
    flex = scanned_by_hand(wide["flex"], x, prompt, scan_order(GRID, fastest, 30))
    local = windows_by_hand(wide["local"]["softmax"], x, GRID, WINDOW, shifted)
    weights = sigmoid(x @ wide["combine"]["kernel"] + wide["combine"]["bias"])
    found = mixed(params, ONE, module)[0]
    np.testing.assert_allclose(
        found[:30], weights[:, :1] * flex + weights[:, 1:] * local, atol=5e-5
    )
    np.testing.assert_array_equal(found[30:], 0)


def test_no_decay_without_a_norm_is_unnormalised_linear_attention():
    """And with all decayed, a token reads what it wrote itself."""
    module = FlexMA(attention=ATTENTION, grid=GRID, chunk=8, normalised=False)
    arrays = {"vision": jnp.zeros((1, 34), bool)} | ONE
    params = initialised(module, **arrays)

    @jax.jit
    def out(log_rate):
        changed = params | {"log_rate": jnp.full((HEADS,), log_rate)}
        return module.apply({"params": changed}, **arrays | {"prompt": None})[0][0, :30]

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(ONE["x"][0, :30], np.float64)
    q, k, v = (x @ wide[n]["kernel"] + wide[n]["bias"] for n in "qkv")
    q, k, v = (each.reshape(30, -1, DIM // HEADS) for each in (q, k, v))
    k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
    scores = np.einsum("ihe,jhe->hij", q, k)
    for log_rate, shown in ((-1e9, np.tril(np.ones((30, 30)))), (1e9, np.eye(30))):
        y = np.einsum("hij,jhe->ihe", scores * shown, v).reshape(30, DIM)
        np.testing.assert_allclose(out(log_rate), y @ wide["out"]["kernel"], rtol=1e-4, atol=1e-4)
