"""Every public head against logits in NumPy, and what all of them promise."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.models
from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.models import Head, LinearHead, TiedHead, VQHead, llama
from tokenlab.objectives import NextToken

VOCABULARY, WIDTH = 23, 8


class Row(NamedTuple):
    """A member, its row of every token from the parameters, and how many rows it multiplies."""

    part: Head
    rows: Callable
    count: int
    paper: bool = True


def shared(params):
    head = params["head"]
    return np.asarray(head["codebook"])[np.asarray(head["codes"], int)]


TABLE = {
    TiedHead: Row(TiedHead(), lambda params: params["embedding"], VOCABULARY),
    LinearHead: Row(LinearHead(), lambda params: params["head"]["kernel"], VOCABULARY, paper=False),
    VQHead: Row(VQHead(num_codes=5), shared, 5),
}
every = pytest.mark.parametrize("member", TABLE)


def test_the_table_holds_every_public_member():
    assert {
        member
        for member in vars(tokenlab.models).values()
        if inspect.isclass(member) and issubclass(member, Head)
    } - {Head} == set(TABLE)


def model(part, dtype="float32"):
    return llama(
        vocab_size=VOCABULARY, dim=WIDTH, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=12,
        head=part, dtype=dtype,
    )  # fmt: skip


def batch(rows=3, width=6, seed=0):
    rng = np.random.default_rng(seed)
    positions = np.broadcast_to(np.arange(width), (rows, width))
    segments = (positions < np.linspace(width, 1, rows).astype(int)[:, None]).astype(np.int32)
    tokens, targets = rng.integers(0, VOCABULARY, (2, rows, width))
    return {
        "tokens": tokens, "targets": targets, "positions": positions, "segments": segments,
        "weights": segments.astype(np.float32),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(network, key, rows, params=None):
    """Parameters, losses, hidden states, logits, and the gradient of the weighted loss."""
    places = {name: rows[name] for name in ("positions", "segments")}
    if params is None:
        params = nn.meta.unbox(network.init(jax.random.key(key), rows["tokens"], **places))[
            "params"
        ]

    def total(params):
        context = Context(batch=rows, views={"policy": View(model=network, params=params)})
        values = NextToken()(context)
        return jnp.sum(values * rows["weights"]), (values, context.output().hidden)

    gradient, (values, hidden) = jax.grad(total, has_aux=True)(params)
    logits = network.apply({"params": params}, hidden, method="logits")
    return params, values, hidden, logits, gradient


@every
def test_logits_and_losses_equal_numpy(member):
    row = TABLE[member]
    params, values, hidden, logits, _ = run(model(row.part), 0, batch())
    expected = np.asarray(hidden, np.float64) @ np.asarray(row.rows(params), np.float64).T
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    total = np.log(np.exp(expected).sum(axis=-1))
    own = np.take_along_axis(expected, batch()["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(values, total - own, atol=1e-5)
    assert logits.dtype == values.dtype == jnp.float32
    assert row.part.rows(VOCABULARY) == row.count


@every
def test_padding_and_masks(member):
    """Wider rows change nothing, weights of zero give gradients of zero, rows go in any order."""
    network = model(TABLE[member].part)
    params, values, _, _, gradient = run(network, 0, batch())
    wider = batch(rows=4, width=9, seed=5)
    for name, rows in wider.items():
        rows = wider[name] = np.where(name in ("segments", "weights"), 0, rows).astype(rows.dtype)
        rows[:3, :6] = batch()[name]
    _, padded, _, _, same = run(network, 0, wider, params)
    real = batch()["segments"] > 0
    np.testing.assert_allclose(padded[:3, :6][real], values[real], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), same, gradient)
    order = [2, 0, 1]
    _, moved, *_ = run(network, 0, {name: rows[order] for name, rows in batch().items()}, params)
    np.testing.assert_allclose(moved, values[np.asarray(order)], atol=1e-5)
    nothing = batch() | {"weights": np.zeros((3, 6), np.float32)}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(network, 0, nothing, params)[4]))


@every
def test_bfloat16_gives_float32_losses_nearby_and_the_second_call_compiles_nothing(member):
    part = TABLE[member].part
    params, values, *_ = run(model(part), 0, batch())
    narrow = run(model(part, dtype="bfloat16"), 0, batch(), params)
    assert narrow[1].dtype == narrow[3].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow[4])} == {jnp.dtype("float32")}
    real = batch()["segments"] > 0
    np.testing.assert_allclose(narrow[1][real], values[real], atol=0.1)
    compiled = run._cache_size()
    run(model(config.load(config.dump(part))), 0, batch(seed=3))
    assert run._cache_size() == compiled


@every
def test_the_object_is_its_own_config(member):
    part = TABLE[member].part
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    doc = inspect.getdoc(member)
    assert ("Reference: " in doc and "arXiv:" in doc) == TABLE[member].paper
