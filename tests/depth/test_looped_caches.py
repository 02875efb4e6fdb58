"""Looped models over caches: one function however a row is cut, against dense attention by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import SlidingWindow
from tests.depth.looped import VOCABULARY, attention, each, model_of, params_of, ragged, read, run
from tokenlab.attention import PermutedBlocks
from tokenlab.cache import FullCache, RingCache
from tokenlab.core.errors import UserError

LENGTHS, SEED = (22, 13, 1), 5
slow = pytest.mark.slow
RUNS = [("routed", "recursion_wise"), ("routed", "hybrid"), ("all", "shared")]
RUNS += [
    pytest.param(*one, marks=slow)
    for one in [("routed", "shared"), ("all", "recursion_wise"), ("all", "hybrid")]
]
every = pytest.mark.parametrize(("program", "keys"), RUNS)


def causal(program, keys, **rest):
    """What decodes, and parameters under which every recursion has holes."""
    trained = model_of(program, keys, **rest)
    return trained.causal_twin(), params_of(trained, seed=SEED)


def real(logits, batch):
    return np.asarray(logits)[np.asarray(batch[2]) > 0]


def has_holes(active, batch):
    """Whether the tokens of every recursion are some of those before it, and not the first ones."""
    loop = np.asarray(active)[1:-1]
    counts = loop.sum(axis=(1, 2))
    assert (np.diff(np.concatenate([[np.sum(batch[2])], counts])) < 0).all() and counts[-1] > 1
    return all(np.any(~kept[0, :-1] & kept[0, 1:]) for kept in loop)


@every
def test_a_row_is_read_the_same_however_it_is_cut(program, keys):
    """A prompt in two parts, then token by token."""
    model, params = causal(program, keys)
    batch = ragged(LENGTHS, 22)
    whole, out = run(model, params, *batch)
    if program == "routed":
        assert has_holes(out.trace.active, batch)
    found, _ = read(model, params, FullCache(), batch, (8, 8, *[1] * 6))
    np.testing.assert_allclose(real(found, batch), real(whole, batch), atol=1e-4)


def dense(model, params, batch, active):
    """All tokens through everything: keys masked, what is not kept thrown away."""
    tokens, positions, segments = batch
    block, depth, heads = model.block, model.depth, model.block.mixer.heads(model.dim)

    def norm(x, own):
        return block.norm.apply({"params": own}, x)

    def layer(name, x, keys, shown):
        own = params[name]
        normed = norm(x, own["mixer_norm"])
        x = x + attention(own["mixer"], heads, normed, keys(own["mixer"], normed), positions, shown)
        feed = block.feedforward.apply(
            {"params": own["feedforward"]}, norm(x, own["feedforward_norm"])
        )
        return x + feed

    def projected(own, normed):
        shape = (*normed.shape[:2], heads.num_kv_heads, -1)
        return tuple((normed @ own[name]["kernel"]).reshape(shape) for name in "kv")

    def shown_of(kept):
        of = jnp.where(kept, segments, 0)
        shown = (positions[:, :, None] >= positions[:, None]) & (of[:, None] > 0)
        return shown & (segments[:, :, None] == of[:, None])

    valid, left = segments > 0, None
    x = layer("block_first", params["embedding"][tokens], projected, shown_of(valid))
    for r in range(depth.recursions):
        kept = active[1 + r]
        read = kept if depth.keys == "recursion_wise" else active[1]

        def keys(own, normed, r=r, kept=kept):
            nonlocal left
            mine = projected(own, normed)
            if r and depth.keys == "shared":
                mine = left
            elif r and depth.keys == "hybrid":
                there = kept[..., None, None]
                mine = tuple(jnp.where(there, a, b) for a, b in zip(mine, left, strict=True))
            left = mine
            return mine

        y = layer("block_0", x, keys, shown_of(read))
        if "depth" in params:
            gate = 0.1 * jax.nn.sigmoid(
                x @ params["depth"][f"router_{r}"]["scores"]["kernel"][:, 0]
            )
            y = x + gate[..., None] * y
        x = jnp.where(kept[..., None], y, x)
    x = layer("block_last", x, projected, shown_of(valid))
    return model.norm.apply({"params": params["norm"]}, x)


def packed(width=150, at=81, end=103):
    """Two documents in one row; one, and padding, in the other. Attention has two blocks of it."""
    first = np.arange(width) < at
    positions = np.stack(
        [np.where(first, np.arange(width), np.arange(width) - at), np.arange(width)]
    )
    segments = np.stack([np.where(first, 1, 2), np.arange(width) < end])
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, width))
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))


@pytest.mark.parametrize(
    ("program", "keys", "twin"),
    [
        ("routed", "hybrid", False),
        pytest.param("routed", "shared", False, marks=slow),
        *[
            pytest.param(*one, marks=slow)
            for one in [
                ("routed", "recursion_wise", False),
                ("routed", "shared", True),
                ("routed", "hybrid", True),
                ("all", "shared", False),
                ("all", "hybrid", False),
            ]
        ],
    ],
)
def test_gathered_tokens_equal_the_dense_run_in_value_and_gradient(program, keys, twin):
    """In training, and as the causal twin, whose first recursion leaves out tokens too."""
    model = model_of(program, keys, max_length=256)
    model, params = model.causal_twin() if twin else model, params_of(model, seed=SEED)
    batch = packed()
    valid = (batch[2] > 0)[..., None]
    active = run(model, params, *batch)[1].trace.active
    weights = jax.random.normal(jax.random.key(3), (*batch[0].shape, model.dim))

    def ours(params):
        tokens, positions, segments = batch
        out = model.apply({"params": params}, tokens, positions=positions, segments=segments)
        return jnp.sum(jnp.where(valid, out.hidden * weights, 0))

    def oracle(params):
        return jnp.sum(jnp.where(valid, dense(model, params, batch, active) * weights, 0))

    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, oracle))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-4), found, expected
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found[1]["block_0"]))


@each
def test_a_tree_of_drafts_is_read_by_its_branches(keys):
    """Two branches after a prompt: what is accepted of one is as if the other had not been."""
    model, params = causal("routed", keys)
    tokens, positions, _ = ragged((22, 16, 9), 22, seed=11)
    lengths = jnp.asarray([9, 5, 2])
    inside = (positions < lengths[:, None]).astype(jnp.int32)
    cache = model.empty_cache(FullCache(), batch=3, capacity=32)
    _, out = run(model, params, tokens[:, :9], positions[:, :9], inside[:, :9], cache)
    parents, branches = [-1, 0, 0, 2, 1, 3, 4, 5], ([0, 2, 3, 5, 7], [0, 1, 4, 6])
    seen = np.eye(8, dtype=bool)
    for node, parent in enumerate(parents[1:], start=1):
        seen[node] |= seen[parent]
    nodes = tokens[:, -8:]
    at = lengths[:, None] + jnp.asarray(seen.sum(axis=1) - 1, jnp.int32)[None]
    draft = out.cache.draft(jnp.asarray(np.tile(seen, (3, 1, 1))))
    tree, drafted = run(model, params, nodes, at, jnp.ones_like(at), draft)
    # A recursion keeps several nodes that are not the first ones: their numbers in it differ.
    kept = np.asarray(drafted.trace.active)[1]
    assert any(not row[0] and row.sum() > 3 for row in kept)
    # The same tokens in a row of their own.
    where = lengths[:, None] + jnp.arange(5)[None]
    for branch in reversed(branches):
        path = jnp.asarray([[*branch, 0][:5]] * 3)
        real_ones = jnp.tile(jnp.arange(5) < len(branch), (3, 1)).astype(jnp.int32)
        straight = jnp.take_along_axis(nodes, path, axis=1)
        logits, after = run(model, params, straight, where, real_ones, out.cache)
        n = len(branch)
        np.testing.assert_allclose(np.asarray(tree)[:, branch], logits[:, :n], atol=1e-4)
    cache = drafted.cache.accept(path, jnp.asarray([4, 2, 0]))
    count = np.asarray([4, 2, 0])
    np.testing.assert_array_equal(
        cache.held(), after.cache.truncate(lengths + jnp.asarray(count)).held()
    )
    found, expected = (
        run(
            model, params, nodes[:, :1], lengths[:, None] + count[:, None], jnp.ones((3, 1), int), c
        )
        for c in (cache, after.cache.truncate(lengths + count))
    )
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)


@each
def test_rows_are_cut_and_forked_where_recursions_have_holes(keys):
    """As if the later tokens had never been read, in the rows that go on."""
    model, params = causal("routed", keys)
    batch = ragged((22, 22, 22), 22)
    whole, out = read(model, params, FullCache(), batch, (14,), capacity=22)
    shorter = jnp.asarray([11, 9, 14])
    cut = out.cache.truncate(shorter)
    active = np.asarray(out.trace.active)
    inside = np.arange(14)[None] < np.asarray(shorter)[:, None]
    layers = [0, 1, -1] if keys == "shared" else range(5)
    expected = [(inside if keys == "hybrid" and 0 < i < 4 else active[i]) & inside for i in layers]
    if keys == "hybrid":  # every recursion keeps the tokens of the first
        expected[1:4] = [active[1] & inside] * 3
    np.testing.assert_array_equal(cut.held(), np.stack(expected).sum(axis=2))
    rows = jnp.asarray([2, 0, 0])
    forked = cut.fork(rows)
    tokens, at = batch[0][rows], np.asarray(shorter)[np.asarray(rows)][:, None]
    new = jnp.take_along_axis(tokens, jnp.asarray(at), axis=1)
    found, _ = run(model, params, new, jnp.asarray(at), jnp.ones((3, 1), int), forked)
    straight, _ = run(model, params, *batch)
    del whole
    np.testing.assert_allclose(
        found[:, 0], np.asarray(straight)[np.asarray(rows), at[:, 0]], atol=1e-4
    )


@pytest.mark.parametrize(
    ("recursions", "ratios"), [(2, (3 / 4, 1 / 2)), (3, (2 / 3, 1 / 3)), (4, (5 / 8, 1 / 4))]
)
def test_caches_hold_the_shares_of_fixed_depth_that_the_paper_says(recursions, ratios):
    """Read whole with expert choice, whose shares are exact where they divide the row."""
    batch = ragged((24, 12), 24)

    def held(keys):
        model = model_of("routed", keys, recursions=recursions, layers=recursions + 2)
        _, out = read(model, params_of(model, seed=SEED), FullCache(), batch, (24,))
        return np.asarray(out.cache.held())[1:-1].sum(axis=0), out.trace.active[1:-1]

    fixed = recursions * np.asarray([24, 12])  # every token in every recursion
    (own, active), (shared, _) = held("recursion_wise"), held("shared")
    np.testing.assert_allclose(own / fixed, ratios[0])
    np.testing.assert_allclose(shared / fixed, ratios[1])
    np.testing.assert_array_equal(own, active.sum(axis=(0, 2)))


def test_shared_keys_are_read_by_all_and_projected_once():
    """The ledger of one pass: pairs by hand, and what is not computed of a layer."""
    batch = ragged((24, 12), 24)
    where = dict(zip(("positions", "segments"), batch[1:], strict=True))
    model = model_of("routed", "shared")
    params = params_of(model, seed=SEED)
    trace = run(model, params, *batch)[1].trace
    cost = model.ledger(trace, **where)
    at = np.asarray(batch[1])
    pairs = sum(np.sum(np.where(kept, at + 1, 0)) for kept in np.asarray(trace.active))
    assert float(cost.attended_pairs) == pairs
    other = model_of("routed", "recursion_wise").ledger(trace, **where)
    keys = 2 * 2 * 16 * 4 * 2  # a product for keys and one for values, 2 heads of width 4
    later = float(trace.active[2:4].sum())
    assert float(other.flops - cost.flops) == pytest.approx(later * keys, rel=1e-6)
    # What the projections were given: keys once, queries of those that a recursion keeps.
    _, kept = model.apply({"params": params}, batch[0], **where, mutable=["intermediates"])
    inputs = {name: kept["intermediates"]["block_0"]["mixer"][name]["inputs"] for name in "qkv"}
    assert [x.shape[1] for x in inputs["q"]] == [24, 16, 8]
    assert [x.shape[1] for x in inputs["k"]] == [x.shape[1] for x in inputs["v"]] == [24]


def test_a_window_is_of_positions_in_every_recursion():
    """With the rule that says so, a ring of its size forgets nothing that is seen."""
    rule = {"mixer": {"rule": SlidingWindow(size=6)}}
    model, params = causal("routed", "recursion_wise", **rule)
    batch = ragged(LENGTHS, 22)
    whole, _ = run(model, params, *batch)
    found, out = read(model, params, RingCache(budget=6), batch, (8, 8, *[1] * 6))
    np.testing.assert_allclose(real(found, batch), real(whole, batch), atol=1e-4)
    assert np.asarray(out.cache.held()).max() == 6


@pytest.mark.parametrize(("program", "keys"), [("routed", "hybrid"), ("all", "shared")])
def test_bfloat16_goes_through_the_loop_and_its_caches(program, keys):
    """Where nothing is routed it stays near float32; a token near a threshold may change sides."""
    wide, params = causal(program, keys)
    model, batch = wide.clone(dtype="bfloat16"), ragged(LENGTHS, 22)
    found, out = read(model, params, FullCache(), batch, (16, 6))
    assert out.hidden.dtype == out.cache.states[1].k.dtype == jnp.bfloat16
    assert np.isfinite(real(found, batch)).all()
    if program == "all":
        expected = real(run(wide, params, *batch)[0], batch)
        assert np.abs(real(found, batch) - expected).max() < 0.1 * np.abs(expected).max()


def test_a_selector_of_keys_is_refused_where_keys_are_shared():
    part = PermutedBlocks(block=4, span=8)
    with pytest.raises(UserError, match="set prefill=None, or keys='recursion_wise'"):
        model = model_of("routed", "shared", mixer={"prefill": part})
        params_of(model)
