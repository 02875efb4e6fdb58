"""LeMo: dropped tokens, pruned backward passes and predictors, each against what it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import Causal
from tokenlab.cache import FullCache
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import saved_bytes
from tokenlab.core.parameters import taken_over
from tokenlab.models import (
    Attention,
    KeptAbove,
    KeptShare,
    LowRank,
    PooledScores,
    PredictedScores,
    PrunedSwiGLU,
    SwiGLU,
    TokenDroppingAttention,
    lemo,
    llama,
    shrunk,
    with_adapter,
)
from tokenlab.models.adapters import drawn
from tokenlab.models.informativeness import tile_scores
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term

BLOCK = 8
ADAPTER = LowRank(rank=2, targets=("q", "k", "v", "out"))
MODEL = with_adapter(
    llama(vocab_size=23, dim=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=24), ADAPTER
)
LOSS = Objective(terms={"next_token": Term(loss=NextToken())})


def moved(tree, scale=0.2, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), tree)


@functools.cache
def parameters():
    """Of the dense model; adapters do something."""
    return moved(drawn(MODEL, jax.random.key(0)))


def batch(lengths=(48, 37), width=48, seed=0):
    """Rows of two documents each, padded."""
    rng = np.random.default_rng(seed)
    place = np.broadcast_to(np.arange(width), (len(lengths), width))
    ends = np.asarray(lengths)[:, None]
    segments = np.where(place < ends, 1 + (place >= ends // 3), 0).astype(np.int32)
    positions = np.where(segments == 2, place - ends // 3, place)
    arrays = {
        "tokens": rng.integers(23, size=place.shape),
        "targets": rng.integers(23, size=place.shape),
        "positions": positions,
        "segments": segments,
    }
    arrays = {name: jnp.asarray(rows, jnp.int32) for name, rows in arrays.items()}
    return arrays | {"weights": (arrays["segments"] > 0).astype(jnp.float32)}


def loss(model, objective=LOSS):
    """The objective of a batch, and the forward pass, by parameters."""

    def of(params, rows):
        context = Context(
            batch=rows, views={"policy": View(model=model, params=params)}, key=jax.random.key(0)
        )
        return objective.value(objective(context)), context.output()

    return of


def gradient(model, objective=LOSS):
    return jax.jit(jax.value_and_grad(loss(model, objective), has_aux=True))


def close(left, right, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), left, right)


def test_all_blocks_and_no_pruning_give_loss_and_gradients_of_the_dense_model():
    whole = lemo(
        MODEL, layers=(0, 1), kept=KeptShare(share=1.0), informativeness=PooledScores(),
        block=BLOCK, pruned=0.0,
    )  # fmt: skip
    (value, _), by = gradient(MODEL)(parameters(), batch())
    (same, _), too = gradient(whole)(parameters(), batch())
    np.testing.assert_allclose(same, value, rtol=1e-6)
    close(too, by, rtol=1e-4, atol=1e-6)


def test_the_unsegmented_loss_is_the_same_as_a_mean_over_targets():
    """Logits are never whole in training; here they are, of S - 1 targets."""
    model, params = MODEL, parameters()
    rows = batch(lengths=(48, 48))
    last = jnp.arange(48)[None] < 47
    rows["weights"] = jnp.broadcast_to(last, (2, 48)).astype(jnp.float32)

    def whole(params):
        view = View(model=model, params=params)
        where = {name: rows[name] for name in ("positions", "segments")}
        logits = view(view(rows["tokens"], **where).hidden, method="logits")
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], 2)
        return -jnp.sum(logp[:, :47]) / (2 * 47)

    value, by = jax.jit(jax.value_and_grad(whole))(params)
    (same, _), too = gradient(model)(params, rows)
    np.testing.assert_allclose(same, value, atol=1e-5)
    close(too, by, atol=1e-5)


def attention(**options):
    options = {"informativeness": PooledScores(), "kept": KeptShare(share=0.5)} | options
    return TokenDroppingAttention(num_heads=4, num_kv_heads=2, block=BLOCK, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_kept_tokens_is_dense_attention_without_the_others(dtype):
    part, rows = attention(), batch(lengths=(48, 37, 5))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 48, 16)), dtype)
    where = {name: rows[name] for name in ("positions", "segments")}
    params = moved(drawn_part(part, x, where))
    kept = np.asarray(reported(part, params, x, where)["kept"])
    assert [int(row.sum()) for row in kept] == [24, 16, 5] or kept.sum(1).tolist() == [24, 13, 5]
    assert (kept[0] != kept[1]).any()  # each row has its own

    def total(part, segments, params, x):
        out, _ = part.apply({"params": params}, x, positions=rows["positions"], segments=segments)
        out = jnp.where(kept[..., None] > 0, out, 0) if part is twin else out
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    twin = part.causal_twin()
    assert type(twin) is Attention
    shown = jnp.where(kept > 0, rows["segments"], 0)
    run = jax.jit(jax.grad(total, argnums=(2, 3), has_aux=True), static_argnums=0)
    by, out = run(part, rows["segments"], params, x)
    same, dense = run(twin, shown, params, x)
    assert out.dtype == x.dtype and not np.any(np.asarray(out)[kept == 0])
    assert np.all(np.any(np.asarray(out)[kept > 0], axis=-1))
    atol = 1e-5 if dtype == "float32" else 0.05
    close(np.asarray(out, np.float32), np.asarray(dense, np.float32), atol=atol)
    close(by, same, atol=20 * atol, rtol=0.02)


def drawn_part(part, x, where):
    return jax.tree.map(
        lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf,
        part.init(jax.random.key(0), x, **where)["params"],
        is_leaf=lambda leaf: hasattr(leaf, "unbox"),
    )


def reported(part, params, x, where):
    _, found = part.apply({"params": params}, x, **where, mutable=["reports"])
    return {name: value[0] for name, value in found["reports"].items() if name != "informativeness"}


def test_a_row_keeps_the_same_whatever_comes_behind_it():
    model = lemo(
        MODEL, layers=(0,), kept=KeptShare(share=0.5), informativeness=PooledScores(), block=BLOCK
    )
    run = jax.jit(lambda rows: loss(model)(parameters(), rows)[1].trace.figures["kept"][0])
    rows = batch(lengths=(37,), width=37)
    wider = {name: jnp.pad(x, ((0, 0), (0, 30))) for name, x in rows.items()}
    np.testing.assert_array_equal(run(wider)[:, :37], run(rows))


def brute_force(q, k, block):
    """Every pair of every tile, causal."""
    length, heads, width = q.shape
    n = length // block
    tiles = np.zeros((n, n))
    for t in range(length):
        for s in range(t + 1):
            score = sum(max(0.0, float(q[t, h] @ k[s, h]) / np.sqrt(width)) for h in range(heads))
            tiles[t // block, s // block] = max(tiles[t // block, s // block], score)
    return tiles + np.triu(tiles.T, 1)


def test_tile_scores_equal_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 128, 2, 4))
    where = {"positions": jnp.arange(128)[None], "segments": jnp.ones((1, 128), jnp.int32)}
    options = {"rule": Causal(), "scale": 0.5, "block": 64}
    run = jax.jit(lambda q, k: tile_scores(q=q, k=k, **where, **options))
    found = run(jnp.asarray(q[None], jnp.float32), jnp.asarray(k[None], jnp.float32))
    np.testing.assert_allclose(found[0], brute_force(q, k, 64), rtol=1e-5)
    assert not np.any(run(jnp.zeros((1, 128, 2, 4)), jnp.asarray(k[None], jnp.float32)))


def test_the_scores_of_a_layer_are_those_of_its_turned_queries_and_keys():
    part = attention()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 16)), jnp.float32)
    where = {"positions": jnp.arange(32)[None], "segments": jnp.ones((1, 32), jnp.int32)}
    params = moved(drawn_part(part, x, where))
    heads = part.heads(16)
    q, k = (
        heads.rotate(
            (x @ params[name]["kernel"]).reshape(1, 32, -1, 4), positions=where["positions"]
        )
        for name in "qk"
    )
    scores = brute_force(np.asarray(q[0]), np.repeat(np.asarray(k[0]), 2, axis=1), BLOCK).sum(
        axis=0
    )
    best = np.sort(np.argsort(-scores)[:2])
    found = reported(part, params, x, where)
    kept, pooled = (np.asarray(found[name])[0] for name in ("kept", "pooled"))
    assert np.flatnonzero(kept[::BLOCK]).tolist() == best.tolist()
    np.testing.assert_allclose(pooled, np.repeat(scores, BLOCK), rtol=1e-5)


def gated(part, params, x):
    return jnp.sum(jnp.sin(part.apply({"params": params}, x)))


@pytest.mark.parametrize("adapter", [None, LowRank(rank=2, alpha=2.0)])
def test_the_pruned_backward_pass(adapter):
    plain = SwiGLU(hidden_dim=10, adapter=adapter)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6)), jnp.float32)
    params = moved(drawn_part(plain, x, {}), scale=0.5)
    by = jax.jit(jax.grad(gated, argnums=(1, 2)), static_argnums=0)
    exact = PrunedSwiGLU(hidden_dim=10, adapter=adapter, pruned=0.0)
    close(by(exact, params, x), by(plain, params, x), rtol=1e-4, atol=1e-5)
    for share in (0.0, 0.3, 0.8, 0.95):
        part = PrunedSwiGLU(hidden_dim=10, adapter=adapter, pruned=share)
        run = jax.jit(lambda x, part=part: part.apply({"params": params}, x))
        close(run(x), plain.apply({"params": params}, x), rtol=1e-5, atol=1e-5)


def test_the_pruned_backward_pass_is_that_of_the_columns_with_the_largest_norms():
    plain, part = SwiGLU(hidden_dim=10), PrunedSwiGLU(hidden_dim=10, pruned=0.7)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6)), jnp.float32)
    params = moved(drawn_part(plain, x, {}), scale=0.5)
    gate, up = (np.asarray(x @ params[name]["kernel"]).reshape(14, 10) for name in ("gate", "up"))
    norms = np.linalg.norm(gate / (1 + np.exp(-gate)), axis=0) + np.linalg.norm(up, axis=0)
    best = np.sort(np.argsort(-norms)[:3])
    cut = {
        "gate": {"kernel": params["gate"]["kernel"][:, best]},
        "up": {"kernel": params["up"]["kernel"][:, best]},
        "down": {"kernel": params["down"]["kernel"][best]},
    }
    incoming = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def pulled(part, params):
        return jax.vjp(lambda p, x: part.apply({"params": p}, x), params, x)[1](incoming)

    by_params, by_x = pulled(part, params)
    by_cut, same = pulled(SwiGLU(hidden_dim=3), cut)
    close(by_x, same, rtol=1e-4, atol=1e-5)
    close(by_params["gate"]["kernel"][:, best], by_cut["gate"]["kernel"], rtol=1e-4, atol=1e-5)
    close(by_params["down"]["kernel"][best], by_cut["down"]["kernel"], rtol=1e-4, atol=1e-5)
    others = np.setdiff1d(np.arange(10), best)
    assert not np.any(by_params["up"]["kernel"][:, others])


def test_the_predictor_alone_learns_and_comes_to_know_the_blocks():
    model = lemo(
        MODEL, layers=(1,), kept=KeptShare(share=0.5), informativeness=PredictedScores(hidden=16),
        block=BLOCK,
    )  # fmt: skip
    params = taken_over(drawn(model, jax.random.key(3)), parameters())
    fit = Objective(terms={"predictor": AuxiliaryTerm(name="predictor")})
    (_, output), by = gradient(model, fit)(params, batch())
    tiles = 6 * 6 + 5 * 5  # of 48 and 37 tokens
    assert float(output.trace.aux["predictor"].weight[0]) == tiles
    learned = by["block_1"]["mixer"].pop("informativeness")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(learned))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by))
    (_, _), by = gradient(model)(params, batch())
    by = by["block_1"]["mixer"]["informativeness"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by))


def test_removing_idle_units_changes_nothing_where_they_never_speak():
    model = lemo(
        MODEL, layers=(1,), kept=KeptShare(share=0.5), informativeness=PredictedScores(hidden=16),
        block=BLOCK,
    )  # fmt: skip
    params = taken_over(drawn(model, jax.random.key(3)), parameters())
    predictor = params["block_1"]["mixer"]["informativeness"]
    # Units 3 and 5 read nothing; a rectified 0 is idle.
    predictor["q_1"]["kernel"] = predictor["q_1"]["kernel"].at[:, jnp.array([3, 5])].set(0)
    smaller, less = shrunk(model, params, [batch(), batch(seed=1)], share=1.0)
    units = smaller.block.kinds()[1].mixer.informativeness.units
    kernel = less["block_1"]["mixer"]["informativeness"]["q_2"]["kernel"]
    assert units[0] <= 14 and kernel.shape == units[:2]
    losses = [
        jax.jit(loss(one))(given, batch())[1].trace.aux["predictor"].total
        for one, given in ((model, params), (smaller, less))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    with pytest.raises(UserError, match="PredictedScores"):
        shrunk(MODEL, parameters(), [batch()])


def test_thresholds_keep_ragged_counts_in_room_for_the_most():
    wide, narrow = (attention(kept=KeptAbove(threshold=0.5, most=most)) for most in (1.0, 0.4))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 48, 16)), jnp.float32)
    rows = batch(lengths=(48,) * 4)
    where = {name: rows[name] for name in ("positions", "segments")}
    params = moved(drawn_part(wide, x, where))
    counts = np.asarray(reported(wide, params, x, where)["kept"]).sum(axis=1) / BLOCK
    assert len(set(counts.tolist())) > 1
    fewer = np.asarray(reported(narrow, params, x, where)["kept"]).sum(axis=1) / BLOCK
    np.testing.assert_array_equal(fewer, np.minimum(counts, 2))


def test_the_ledger_counts_the_tokens_that_were_kept():
    model = lemo(
        MODEL, layers=(0, 1), kept=KeptShare(share=0.5), informativeness=PooledScores(), block=BLOCK
    )
    rows = batch(lengths=(48,), width=48)
    rows["segments"] = jnp.ones_like(rows["segments"])
    rows["positions"] = jnp.arange(48)[None]
    where = {name: rows[name] for name in ("positions", "segments")}
    ours, dense = (
        one.ledger(jax.jit(loss(one))(parameters(), rows)[1].trace, **where)
        for one in (model, MODEL)
    )
    pairs = [48 * 49 / 2, 24 * 25 / 2]  # causal, of 48 and of 24 tokens
    assert float(dense.attended_pairs - ours.attended_pairs) == 2 * (pairs[0] - pairs[1])
    projections = MODEL.attentions()[0].flops(16)
    assert projections == 2 * 16 * (16 + 16 + 8 + 8) + 2 * 2 * ((16 + 16) * 2 + (16 + 8) * 2)
    saved = 2 * (24 * projections + (pairs[0] - pairs[1]) * 2 * 2 * 16)
    scoring = 2 * (6 * 7 / 2 * BLOCK**2) * 2 * 16
    assert float(dense.flops - ours.flops) == saved - scoring


def test_saved_bytes_are_those_of_a_pass_by_hand_and_shrink_with_what_is_dropped():
    x = jnp.ones((3, 5))
    _, pullback = jax.vjp(lambda x: jnp.sum(jnp.sin(x)), x)
    assert saved_bytes(pullback, x) == 4 * 15  # the cosines
    rows = batch(lengths=(128,), width=128)

    def cost(model):
        def of(params):
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf if "adapter" in str(path) else jax.lax.stop_gradient(leaf),
                params,
            )
            return loss(model)(params, rows)[0]

        counted = []

        def step(params):
            value, pullback = jax.vjp(of, params)
            counted.append(saved_bytes(pullback, params, rows))
            return pullback(jnp.ones_like(value))[0]

        compiled = jax.jit(step).lower(parameters()).compile()
        return counted[0], compiled.memory_analysis().temp_size_in_bytes

    options = {"informativeness": PooledScores(), "block": BLOCK}
    full = cost(MODEL)
    fewer = cost(lemo(MODEL, layers=(0, 1), kept=KeptShare(share=0.25), **options))
    both = cost(lemo(MODEL, layers=(0, 1), kept=KeptShare(share=0.25), pruned=0.8, **options))
    # Of a dropped token: queries, keys, values, what attention gives, and the normed stream.
    assert full[0] - fewer[0] > 2 * 96 * 4 * (16 + 2 * 8 + 16 + 16)
    assert both[0] < 0.6 * full[0]
    assert both[1] < fewer[1] < full[1]


def test_what_cannot_be_done_is_said_in_one_line():
    for layers, message in (((3,), "0 to 2"), ((1,), "SwiGLU")):
        model = (
            MODEL
            if message != "SwiGLU"
            else lemo(
                MODEL, layers=(), kept=KeptShare(), informativeness=PooledScores(), pruned=0.5
            )
        )
        with pytest.raises(UserError, match=message):
            lemo(model, layers=layers, kept=KeptShare(), informativeness=PooledScores(), pruned=0.5)
    model = lemo(MODEL, layers=(1,), kept=KeptShare(), informativeness=PooledScores(), block=BLOCK)
    rows = batch()
    where = {name: rows[name] for name in ("positions", "segments")}
    cache = model.empty_cache(FullCache(), batch=2, capacity=64)
    with pytest.raises(UserError, match="causal_twin"):
        model.apply({"params": parameters()}, rows["tokens"], **where, cache=cache)
    twin = model.causal_twin()
    out = twin.apply({"params": parameters()}, rows["tokens"], **where).hidden
    dense = MODEL.apply({"params": parameters()}, rows["tokens"], **where).hidden
    np.testing.assert_array_equal(out, dense)
    with pytest.raises(UserError, match="share"):
        KeptShare(share=0.0)
    with pytest.raises(UserError, match="pruned"):
        PrunedSwiGLU(hidden_dim=3, pruned=1.0)
