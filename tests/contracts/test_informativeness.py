"""Every public score of blocks, and every rule of how many stay, against NumPy; their promises."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.models
from tokenlab import config
from tokenlab.models import (
    Attention,
    Informativeness,
    KeptAbove,
    KeptBlocks,
    KeptShare,
    PooledScores,
    PredictedScores,
    RandomScores,
)

HEADS = Attention(num_heads=2, num_kv_heads=1, head_dim=3).heads(8)
BLOCK, DIM = 4, 8


def pooled(params, x, tiles):
    return tiles.sum(axis=1)


def predicted(params, x, tiles):
    """One block of one half of the stream at a time."""
    rows, length, _ = x.shape
    out = np.zeros((rows, length // BLOCK))
    for b in range(rows):
        for half in (slice(0, 4), slice(4, 8)):
            ends = {}
            for side in "qk":
                entries = [x[b, i : i + BLOCK, half].reshape(-1) for i in range(0, length, BLOCK)]
                for layer in (1, 2, 3):
                    entries = [e @ params[f"{side}_{layer}"]["kernel"] for e in entries]
                    if layer < 3:
                        entries = [np.maximum(e, 0) for e in entries]
                ends[side] = entries
            for key, k in enumerate(ends["k"]):
                out[b, key] += sum(q @ k for q in ends["q"])
    return out


SCORES = {
    PooledScores: (PooledScores(), pooled),
    PredictedScores: (PredictedScores(hidden=5), predicted),
    RandomScores: (RandomScores(), None),
}
RULES = {
    KeptShare: (KeptShare(share=0.5), lambda s: max(1, len(s) // 2)),
    KeptAbove: (
        KeptAbove(threshold=0.8, most=0.75),
        lambda s: max(1, min((s >= 0.8 * s.max()).sum(), int(0.75 * len(s)))),
    ),
}
every = pytest.mark.parametrize("member", SCORES)
every_rule = pytest.mark.parametrize("member", RULES)


def test_the_tables_hold_every_public_member():
    for family, table in ((Informativeness, SCORES), (KeptBlocks, RULES)):
        assert {
            member
            for member in vars(tokenlab.models).values()
            if inspect.isclass(member) and issubclass(member, family)
        } - {family} == set(table)


def inputs(blocks=5, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, blocks * BLOCK, DIM)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.random((rows, blocks, blocks)), jnp.float32)


@functools.cache
def parameters(part):
    x, tiles = inputs()
    there = jnp.ones(tiles.shape[:2], bool)
    found = part.init(
        jax.random.key(0), x, block=BLOCK, there=there, heads=HEADS, tiles=lambda: tiles
    )
    return nn.meta.unbox(found.get("params", {}))


@functools.partial(jax.jit, static_argnums=0)
def scored(part, params, x, tiles, there):
    def total(params, x):
        scores = part.apply(
            {"params": params}, x, block=BLOCK, there=there, heads=HEADS, tiles=lambda: tiles,
            rngs={"routes": jax.random.key(1)},
        )  # fmt: skip
        return jnp.sum(jnp.where(there, scores, 0)), scores

    gradients, scores = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return scores, gradients


@every
def test_scores_equal_numpy_and_carry_no_gradient(member):
    part, oracle = SCORES[member]
    x, tiles = inputs()
    scores, gradients = scored(part, parameters(part), x, tiles, jnp.ones((3, 5), bool))
    assert scores.shape == (3, 5) and scores.dtype == jnp.float32
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    if oracle is not None:
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters(part))
        expected = oracle(params, np.asarray(x, np.float64), np.asarray(tiles, np.float64))
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@every
def test_padding_and_other_rows_change_no_score(member):
    part, oracle = SCORES[member]
    x, tiles = inputs()
    scores, _ = scored(part, parameters(part), x, tiles, jnp.ones((3, 5), bool))
    if oracle is None:  # chance differs from row to row
        assert len(np.unique(scores)) == scores.size
        return
    wider = jnp.pad(x, ((0, 0), (0, 2 * BLOCK), (0, 0)))[::-1]
    more = jnp.pad(tiles, ((0, 0), (0, 2), (0, 2)))[::-1]
    there = jnp.pad(jnp.ones((3, 5), bool), ((0, 0), (0, 2)))
    same, _ = scored(part, parameters(part), wider, more, there)
    np.testing.assert_allclose(same[::-1, :5], scores, rtol=1e-5, atol=1e-5)


@every
def test_the_second_call_compiles_nothing_and_the_object_is_its_own_config(member):
    part, _ = SCORES[member]
    x, tiles = inputs()
    scored(part, parameters(part), x, tiles, jnp.ones((3, 5), bool))
    compiled = scored._cache_size()
    loaded = config.load(config.dump(part))
    assert loaded == part
    scored(loaded, parameters(part), *inputs(seed=1), jnp.ones((3, 5), bool))
    assert scored._cache_size() == compiled


@every_rule
def test_the_kept_are_the_most_informative_of_what_is_there(member):
    rule, count = RULES[member]
    rng = np.random.default_rng(0)
    scores = rng.random((40, 9)).astype(np.float32)
    sizes = rng.integers(0, 10, size=40)
    there = np.arange(9) < sizes[:, None]
    kept = np.asarray(rule(jnp.asarray(scores), there=jnp.asarray(there)))
    assert not np.any(kept & ~there) and kept.sum(axis=1).max() <= rule.slots(9)
    for row, size, mine in zip(scores, sizes, kept, strict=True):
        if size:
            most = np.argsort(-row[:size], kind="stable")[: count(row[:size])]
            assert set(np.flatnonzero(mine)) == set(most)


@every_rule
def test_of_equal_scores_the_earlier_are_kept(member):
    rule, _ = RULES[member]
    kept = np.asarray(rule(jnp.ones((1, 8)), there=jnp.ones((1, 8), bool)))[0]
    assert np.array_equal(np.sort(kept)[::-1], kept) and 0 < kept.sum() < 8


def test_shares_are_counted_without_rounding_errors():
    assert KeptShare(share=0.29).slots(100) == 29 and KeptShare(share=0.5).slots(1) == 1


@pytest.mark.parametrize("member", [*SCORES, *RULES])
def test_the_paper_is_named(member):
    assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)
