"""Every public prefill attention against loops in NumPy, and what all of them promise."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenlab.attention
from tokenlab import config
from tokenlab.attention import (
    BlockBudget,
    CountBudget,
    MassBudget,
    MeanPooledBlocks,
    PermutedBlocks,
    PrefillAttention,
    ShareBudget,
    VerticalSlash,
    WindowBlocks,
)

LENGTH, HEADS, KV_HEADS, WIDTH, BLOCK, SPAN = 51, 4, 2, 8, 4, 8
SCALE = 1.3  # of scores peaked enough for a threshold to leave blocks out
ROWS = (51, 34, 5)  # tokens of each row


class Row(NamedTuple):
    """A member, and its float64 oracle: order of the keys of one head, logits of the blocks."""

    part: PrefillAttention
    order: Callable
    logits: Callable


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def text_order(q, k):
    return np.arange(len(k))


def sorted_order(q, k):
    complete = len(k) // SPAN * SPAN
    order = np.arange(len(k))
    if complete:
        weight = softmax(SCALE * q[-BLOCK:] @ k[:complete].T).mean(axis=0)
        for start in range(0, complete, SPAN):
            inside = np.argsort(-weight[start : start + SPAN], kind="stable")
            order[start : start + SPAN] = start + inside
    return order


def blocks_of(x):
    return [x[start : start + BLOCK] for start in range(0, len(x), BLOCK)]


def pooled_logits(q, k):
    means = [np.stack([b.mean(axis=0) for b in blocks_of(x)]) for x in (q, k)]
    return SCALE * means[0] @ means[1].T


def near_logits(q, k):
    index = np.arange(len(blocks_of(q)))
    return -1.0 * (index[:, None] - index[None])


def line_logits(q, k):
    """Loops over the pairs of a last query and a key it sees."""
    length, count = len(q), len(blocks_of(q))
    column, diagonal = np.zeros(count), np.zeros(count)
    for t in range(max(0, length - BLOCK), length):
        for s, weight in enumerate(softmax(SCALE * k[: t + 1] @ q[t])):
            column[s // BLOCK] += weight
            diagonal[(t - s) // BLOCK] += weight
    mass = [[column[j] + diagonal[max(i - j, 0)] for j in range(count)] for i in range(count)]
    return np.log(np.maximum(mass, 1e-37))


SIZES = {"block": BLOCK, "span": SPAN}
TABLE = {
    WindowBlocks: Row(WindowBlocks(budget=CountBudget(blocks=2), **SIZES), text_order, near_logits),
    MeanPooledBlocks: Row(
        MeanPooledBlocks(budget=MassBudget(threshold=0.6), **SIZES), text_order, pooled_logits
    ),
    PermutedBlocks: Row(
        PermutedBlocks(budget=MassBudget(threshold=0.6), **SIZES), sorted_order, pooled_logits
    ),
    VerticalSlash: Row(
        VerticalSlash(budget=ShareBudget(share=0.3), **SIZES), text_order, line_logits
    ),
}
every = pytest.mark.parametrize("member", TABLE)


def public(family):
    return {
        member
        for member in vars(tokenlab.attention).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }


def test_the_tables_hold_every_public_member():
    assert public(PrefillAttention) == set(TABLE)
    assert public(BlockBudget) == set(BUDGETS)


def arrays(dtype="float32", seed=0, length=LENGTH, rows=ROWS):
    """Queries that look at few keys; NaN in the padding, which nobody may read."""
    rng = np.random.default_rng(seed)
    shapes = [(len(rows), length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    segments = (np.arange(length)[None] < np.asarray(rows)[:, None]).astype(np.int32)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    positions = jnp.broadcast_to(jnp.arange(length)[None], segments.shape)
    return {"q": q, "k": k, "v": v, "positions": positions, "segments": jnp.asarray(segments)}


@functools.partial(jax.jit, static_argnums=0)
def run(part, inputs):
    return part(**inputs, scale=SCALE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(part, impl, inputs, cotangent):
    def of(q, k, v):
        return part(**(inputs | {"q": q, "k": k, "v": v}), scale=SCALE, impl=impl).out

    return jax.vjp(of, inputs["q"], inputs["k"], inputs["v"])[1](cotangent)


def kept_by(budget, mass):
    """Indices of the candidates that a budget keeps, one at a time, the heaviest first."""
    kept, total = [], 0.0
    for j in sorted(range(len(mass)), key=lambda j: -mass[j]):
        if isinstance(budget, MassBudget) and total >= budget.threshold:
            break
        if isinstance(budget, ShareBudget) and len(kept) >= np.ceil(budget.share * len(mass)):
            break
        if isinstance(budget, CountBudget) and len(kept) >= budget.blocks:
            break
        kept.append(j)
        total += mass[j]
    return kept


def oracle(row, q, k, v):
    """One head of one row: the result, density, blocks computed over causal ones, and pairs."""
    order = row.order(q, k)
    moved = row.order is sorted_order
    logits = row.logits(q, k[order])
    count, per_span = len(blocks_of(q)), SPAN // BLOCK
    sink = int(np.flatnonzero(order == 0)[0]) // BLOCK
    out, chosen, computed, pairs = np.zeros(v[: len(q)].shape), 0, 0, 0
    for i in range(count):
        earlier = list(range(i // per_span * per_span))
        kept = set(kept_by(row.part.budget, softmax(logits[i, earlier]))) if earlier else set()
        own = range(len(earlier), count if moved else i + 1)
        kept |= {j for j in own if j // per_span == i // per_span}
        kept |= {sink} if sink <= i or (moved and not earlier) else set()
        chosen += len(kept & set(earlier))
        computed += len(kept)
        for t in range(i * BLOCK, min(len(q), (i + 1) * BLOCK)):
            slots = [s for s in range(len(k)) if s // BLOCK in kept and order[s] <= t]
            pairs += len(slots)
            out[t] = softmax(SCALE * k[order[slots]] @ q[t]) @ v[order[slots]]
    allowed = sum(i // per_span * per_span for i in range(count))
    density = chosen / allowed if allowed else 1.0
    return out, density, computed / (count * (count + 1) / 2), pairs


@every
def test_equals_the_oracle(member):
    row, inputs = TABLE[member], arrays()
    out, *statistics = run(row.part, inputs)
    assert out.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in statistics)
    q, k, v = (np.asarray(inputs[name], np.float64) for name in "qkv")
    found = []
    for b, length in enumerate(ROWS):
        for h in range(HEADS):
            head = h // (HEADS // KV_HEADS)
            expected = oracle(row, q[b, :length, h], k[b, :length, head], v[b, :length, head])
            np.testing.assert_allclose(out[b, :length, h], expected[0], atol=1e-5)
            np.testing.assert_allclose([x[b, h] for x in statistics], expected[1:], rtol=1e-6)
            found.append(expected[1])
        assert not np.any(out[b, length:])
    assert 0.05 < np.mean(found[: 2 * HEADS]) < 0.95  # of rows that have something to leave out


@every
def test_padding_changes_nothing(member):
    part, inputs = TABLE[member].part, arrays()
    wider = arrays(seed=9, length=LENGTH + 13, rows=(*ROWS, 0))
    for name, value in inputs.items():
        wider[name] = wider[name].at[:3, :LENGTH].set(value)
    left, right = run(part, inputs), run(part, wider)
    np.testing.assert_allclose(right.out[:3, :LENGTH], left.out, atol=2e-6)
    np.testing.assert_allclose(right.density[:3], left.density)
    assert not np.any(right.out[3])


@every
def test_gradients_are_those_of_the_reference(member):
    """The choice of blocks has no slope: it is held while the attention is differentiated."""
    part, inputs = TABLE[member].part, arrays()
    cotangent = jax.random.normal(jax.random.key(1), inputs["q"].shape)
    ours, expected = (gradients(part, impl, inputs, cotangent) for impl in ("xla", "ref"))
    for a, b in zip(ours, expected, strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, atol=2e-5)


@every
def test_fully_masked_is_zero_and_finite(member):
    part, inputs = TABLE[member].part, arrays(rows=(0, 0, 0))
    out, density, visited, pairs = run(part, inputs)
    assert not np.any(out) and np.all(density == 1) and np.all(visited == 1) and not np.any(pairs)
    for gradient in gradients(part, "xla", inputs, jnp.ones_like(inputs["q"])):
        assert not np.any(gradient)


@every
def test_rows_may_come_in_any_order(member):
    part, inputs, order = TABLE[member].part, arrays(), np.asarray([2, 0, 1])
    whole = run(part, inputs)
    moved = run(part, {name: x[order] for name, x in inputs.items()})
    for a, b in zip(moved, whole, strict=True):
        np.testing.assert_allclose(a, b[order], atol=2e-6)


@every
def test_bfloat16_stays_bfloat16_and_near(member):
    """With all blocks kept, so that the choice is the same."""
    part = config.replace(TABLE[member].part, {"budget": MassBudget(threshold=1.0)})
    inputs = arrays("bfloat16")
    out = run(part, inputs).out
    assert out.dtype == jnp.bfloat16
    exact = run(part, {n: x.astype(jnp.float32) if n in "qkv" else x for n, x in inputs.items()})
    np.testing.assert_allclose(np.asarray(out, np.float32), exact.out, atol=0.05)


@every
def test_a_member_is_causal_as_it_says(member):
    """The last token changes; earlier results change where the member admits it, and only there."""
    part = TABLE[member].part
    changed = False
    for seed in range(4):
        inputs = arrays(seed=seed, rows=(LENGTH, LENGTH, LENGTH))
        other = inputs | {name: inputs[name].at[:, -1].multiply(-3.0) for name in "qkv"}
        before, after = (run(part, x).out[:, :-1] for x in (inputs, other))
        changed |= bool(np.abs(before - after).max() > 1e-3)
    assert changed != member.causal


@every
def test_all_blocks_are_dense_attention(member):
    part = config.replace(TABLE[member].part, {"budget": MassBudget(threshold=1.0)})
    inputs = arrays()
    out, density, _, _ = run(part, inputs)
    assert np.all(density == 1)
    grouped = inputs["q"].reshape(3, LENGTH, KV_HEADS, -1, WIDTH)
    scores = jnp.einsum("btkge,bske->bkgts", grouped, inputs["k"])
    shown = (
        np.tril(np.ones((LENGTH, LENGTH), bool))[None] & np.asarray(inputs["segments"] > 0)[:, None]
    )
    weights = jax.nn.softmax(jnp.where(shown[:, None, None], SCALE * scores, -1e30))
    dense = jnp.einsum("bkgts,bske->btkge", weights, inputs["v"]).reshape(out.shape)
    real = np.asarray(inputs["segments"]) > 0
    np.testing.assert_allclose(out[real], dense[real], atol=1e-5)


@every
def test_the_second_call_compiles_nothing(member):
    run(TABLE[member].part, arrays())
    compiled = run._cache_size()
    run(config.load(config.dump(TABLE[member].part)), arrays(seed=5, rows=(9, 51, 0)))
    assert run._cache_size() == compiled


@every
def test_the_object_is_its_own_config(member):
    part = TABLE[member].part
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    doc = inspect.getdoc(member)
    assert "Reference: " in doc and "arXiv:" in doc and "Differences from the paper" in doc


def test_a_span_is_whole_blocks():
    with pytest.raises(ValueError, match="span 100 is not a multiple of block 64"):
        PermutedBlocks(block=64, span=100)


BUDGETS = {
    MassBudget: MassBudget(threshold=0.7),
    ShareBudget: ShareBudget(share=0.3),
    CountBudget: CountBudget(blocks=3),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=str)
def test_budgets_equal_loops(budget):
    rng = np.random.default_rng(0)
    candidates = rng.random((50, 10)) < 0.7
    candidates[0] = False
    mass = np.where(candidates, rng.dirichlet(np.full(10, 0.5), 50), 0)
    mass /= np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)
    kept = np.asarray(budget(jnp.asarray(mass, jnp.float32), candidates=jnp.asarray(candidates)))
    for row, allowed, found in zip(mass, candidates, kept, strict=True):
        where = np.flatnonzero(allowed)
        assert sorted(where[kept_by(budget, row[where])]) == list(np.flatnonzero(found))
    assert config.load(config.dump(budget)) == budget
