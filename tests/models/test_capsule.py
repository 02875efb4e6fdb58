"""``CapsuleTransformer``: plans in latent vectors, against the plain model called by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.models.capsules import (
    BOTH,
    NARROW,
    ONLY_PLAN,
    PLAIN,
    SLOT,
    STEPS,
    TASK,
    VOCABULARY,
    WIDTH,
    batch_of,
    capsule,
    latents_of,
    params_of,
    plain,
    run,
    value_and_gradient,
)
from tokenlab import config
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.data.tasks import WordArithmetic
from tokenlab.models import (
    llama,
)
from tokenlab.objectives import AuxiliaryTerm


def by_hand(params, batch, row, mode="parallel"):
    """z of the slots, the stream of execution and the nats of the plan, for one row."""
    wide = {name: np.asarray(params[name], np.float64) for name in ("narrow", "widen")}
    table = 2.0 * np.asarray(params["embedding"])
    size = np.sqrt(np.mean(table.astype(np.float64) ** 2))
    length = int(np.sum(batch["segments"][row]))
    tokens = np.asarray(batch["tokens"][row, :length])
    at = np.flatnonzero(tokens == SLOT)
    x = table[tokens]
    x[at] = np.asarray(params["slot_embedding"])
    latents = np.zeros((2, NARROW))
    for number in range(2):
        # All slots are planned before any capsule is read, or each after those before it.
        if mode == "autoregressive" or number == 0:
            question = plain(params, x[: at[-1] + 1])
        latents[number] = question[at[number]] @ wide["narrow"]
        if mode == "autoregressive":
            x[at[number]] = latents[number] @ wide["widen"] * size
    capsules = latents @ wide["widen"] * size
    x[at] = capsules
    stream = plain(params, x)
    plan = [int(i) for i in batch["plan"][row] if i > 0]
    read = np.concatenate([capsules, table[plan[:-1]]])
    logits = plain(params, read, logits=True)[2:]
    logits -= logits.max(axis=1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return latents, stream, -logp[np.arange(len(plan) - 1), plan[1:]]


@pytest.mark.parametrize("mode", ["parallel", "autoregressive"])
def test_plans_executes_and_reads_back_as_three_plain_passes(mode):
    model, batch = capsule(generate=mode), batch_of()
    params = params_of(model)
    out = run(model, params, batch)
    latents = latents_of(model, params, batch)
    nats = []
    for row in range(4):
        wanted, stream, read = by_hand(params, batch, row, mode)
        np.testing.assert_allclose(latents[row], wanted, atol=1e-4)
        np.testing.assert_allclose(out.hidden[row, : len(stream)], stream, atol=1e-4)
        nats.extend(read)
    aux = out.trace.aux["plan"]
    assert float(aux.weight) == len(nats)
    assert float(aux.mean()) == pytest.approx(np.mean(nats), rel=1e-5)


def test_modes_differ_and_one_slot_has_only_one():
    batch = batch_of()
    outs = [
        run(capsule(generate=mode), params_of(capsule()), batch).hidden
        for mode in ("parallel", "autoregressive")
    ]
    assert not np.allclose(*outs, atol=1e-3)
    one = WordArithmetic(plan="apart", clauses=3, slots=1)
    models = [capsule(slots=1, generate=mode) for mode in ("parallel", "autoregressive")]
    outs = [run(model, params_of(models[0]), batch_of(one)).hidden for model in models]
    np.testing.assert_allclose(*outs, atol=1e-5)


def test_gradients_reach_all_parts_and_are_slopes():
    model, batch = capsule(), batch_of()
    params = params_of(model)
    _, _, gradient = value_and_gradient(model, BOTH, params, batch)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    step = 1e-3
    ends = [
        value_and_gradient(
            model, BOTH, jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), batch
        )[0]
        for s in (step, -step)
    ]
    slope = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
        float(sum(jax.tree.leaves(slope))), rel=0.02
    )


def test_capsules_of_many_rows_have_the_rank_of_the_bottleneck():
    model, batch = capsule(bottleneck=3), batch_of(rows=64)
    params = params_of(model)
    latents = latents_of(model, params, batch)
    view = View(model=model, params=params)
    capsules = np.asarray(view(latents, method="_capsules"), np.float64)
    for slot in range(2):
        values = np.linalg.svd(capsules[:, slot], compute_uv=False)
        assert (values > 1e-5 * values[0]).sum() == 3 < WIDTH


def test_execution_does_not_depend_on_what_the_bottleneck_lets_nothing_of_through():
    batch = batch_of()
    shut = params_of(capsule()) | {"widen": jnp.zeros((NARROW, WIDTH))}
    moved = shut | {name: 3 * shut[name] + 1 for name in ("narrow", "slot_embedding")}
    np.testing.assert_array_equal(
        run(capsule(), shut, batch).hidden, run(capsule(), moved, batch).hidden
    )
    none, params = capsule(bottleneck=0), params_of(capsule(bottleneck=0))
    moved = params | {"slot_embedding": 3 * params["slot_embedding"] + 1}
    np.testing.assert_array_equal(run(none, params, batch).hidden, run(none, moved, batch).hidden)
    assert not {"narrow", "widen"} & params.keys()


def sixteen_plans():
    """Sixteen questions, each with a plan of one token."""
    rows = jnp.arange(16)
    tokens = jnp.stack([4 + rows, *2 * [jnp.full(16, SLOT)], jnp.full(16, 3)], axis=1)
    return {
        "tokens": tokens,
        "targets": tokens,
        "positions": jnp.broadcast_to(jnp.arange(4)[None], (16, 4)),
        "segments": jnp.ones((16, 4), int),
        "weights": jnp.ones((16, 4)),
        "plan": jnp.stack([jnp.full(16, 1), 20 + rows], axis=1),
    }


@pytest.mark.parametrize("bottleneck", [0, 2])
def test_a_constant_plan_costs_the_entropy_and_a_narrow_one_need_not(bottleneck):
    model, batch = capsule(bottleneck=bottleneck), sixteen_plans()
    entropy = np.log(16)
    optimizer = optax.adam(5e-3)
    ids = batch["tokens"]
    drawn = jax.jit(lambda key: model.init(key, ids, positions=ids, segments=ids))
    params = nn.meta.unbox(drawn(jax.random.key(0))["params"])

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, _, gradient = value_and_gradient(model, ONLY_PLAN, params, batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=1500)
        return values

    values = train(params)
    if bottleneck == 0:
        assert (values >= entropy - 1e-5).all(), "below what a constant can tell"
        assert float(values[-1]) == pytest.approx(2.7726, abs=2e-3)
    else:
        assert float(values[-1]) < 0.05
    # I(P; z) >= H(P) - nats is a bound by H(P) itself.
    assert (entropy - values <= entropy).all()


def test_one_number_tells_all_questions_apart():
    """So a free decoder, a table of them, would read every plan."""
    model, batch = capsule(bottleneck=1), sixteen_plans()
    latents = np.asarray(latents_of(model, params_of(model), batch))[:, 0, 0]
    assert np.diff(np.sort(latents)).min() > 1e-4


def test_without_its_coefficient_the_loss_of_plans_changes_nothing():
    model, batch = capsule(), batch_of()
    params = params_of(model)
    silent = (*STEPS, ("plan", AuxiliaryTerm(name="plan", coefficient=0.0)))
    permuted = batch | {"plan": batch["plan"][::-1]}
    _, means, gradient = value_and_gradient(model, silent, params, batch)
    _, other, same = value_and_gradient(model, silent, params, permuted)
    assert float(means["plan"]) != float(other["plan"])
    jax.tree.map(np.testing.assert_array_equal, gradient, same)
    _, _, changed = value_and_gradient(model, BOTH, params, permuted)
    assert not np.allclose(changed["narrow"], gradient["narrow"])


def test_without_slots_it_is_the_plain_model():
    none = capsule(slots=0)
    assert jax.tree.map(jnp.shape, params_of(none)) == jax.tree.map(jnp.shape, params_of(PLAIN))
    batch = batch_of(WordArithmetic(clauses=3))
    params = params_of(PLAIN)
    found, wanted = (value_and_gradient(model, STEPS, params, batch) for model in (none, PLAIN))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_padding_changes_nothing():
    model, batch = capsule(), batch_of()
    params = params_of(model)
    behind = {name: jnp.pad(x, ((0, 1), (0, 5))) for name, x in batch.items() if name != "plan"}
    behind["plan"] = jnp.pad(batch["plan"], ((0, 1), (0, 3)))
    total, means, gradient = value_and_gradient(model, BOTH, params, batch)
    padded, padded_means, padded_gradient = value_and_gradient(model, BOTH, params, behind)
    assert float(total) == pytest.approx(float(padded), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        (means, gradient), (padded_means, padded_gradient),
    )  # fmt: skip


def test_segments_of_a_row_do_not_see_each_other():
    """Two questions in one row: each is executed as it is by itself."""
    model, batch = capsule(), batch_of(rows=2)
    params = params_of(model)
    apart = run(model, params, {n: x for n, x in batch.items() if n != "plan"})
    joined = {
        name: batch[name].reshape(1, -1) for name in ("tokens", "targets", "positions", "weights")
    }
    second = jnp.array([[1], [2]])
    joined["segments"] = (batch["segments"] * second).reshape(1, -1)
    together = run(model, params, joined)
    valid = np.asarray(batch["segments"]) > 0
    np.testing.assert_allclose(
        together.hidden.reshape(apart.hidden.shape)[valid], apart.hidden[valid], atol=1e-5
    )


def test_a_plan_that_is_read_changes_the_capsule_and_cannot_be_missing():
    model, batch = capsule(plan_is_read=True), batch_of()
    params = params_of(model)
    out, other = (
        run(model, params, batch | {"plan": plan}) for plan in (batch["plan"], batch["plan"][::-1])
    )
    assert not np.allclose(out.hidden, other.hidden, atol=1e-3)
    with pytest.raises(UserError, match="plan_is_read"):
        run(model, params, {name: x for name, x in batch.items() if name != "plan"})


def test_a_reader_of_its_own_reads_the_same_capsule():
    reader = llama(
        vocab_size=VOCABULARY, dim=WIDTH, num_layers=1, num_heads=2, num_kv_heads=2, hidden_dim=8
    )
    model, batch = capsule(reader=reader), batch_of()
    params = params_of(model)
    _, means, gradient = value_and_gradient(model, BOTH, params, batch)
    assert np.isfinite(float(means["plan"]))
    assert float(jnp.abs(gradient["reader"]["embedding"]).max()) > 0
    own = run(capsule(), {n: p for n, p in params.items() if n != "reader"}, batch)
    found = run(model, params, batch)
    np.testing.assert_allclose(found.hidden, own.hidden, atol=1e-5)
    assert float(found.trace.aux["plan"].mean()) != float(own.trace.aux["plan"].mean())


def test_bfloat16_is_near_float32():
    batch = batch_of()
    params = params_of(capsule())
    exact, rounded = (
        value_and_gradient(capsule().clone(dtype=dtype), BOTH, params, batch)
        for dtype in ("float32", "bfloat16")
    )
    assert float(rounded[1]["plan"]) == pytest.approx(float(exact[1]["plan"]), rel=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded[2])} == {jnp.dtype("float32")}


def test_the_ledger_counts_planning_and_reading_back():
    model, batch = capsule(), batch_of()
    params = params_of(model)
    trace = run(model, params, batch).trace
    unplanned = run(model, params, {n: x for n, x in batch.items() if n != "plan"}).trace
    per_token = PLAIN.flops(np.ones((1, 1)), np.zeros((1, 1)))
    question = 2 * TASK.clauses + 4  # up to the last slot
    pairs = 4 * question * (question + 1) / 2
    cost = 4 * question * per_token + PLAIN.flops(np.zeros((1, 1)), np.full((1, 1), pairs))
    assert float(unplanned.flops) == pytest.approx(cost, rel=1e-5)
    assert float(trace.flops) > float(unplanned.flops) + 4 * 2 * per_token


def test_the_second_call_compiles_nothing_and_the_config_comes_back():
    model = capsule()
    run(model, params_of(model), batch_of())
    compiled = run._cache_size()
    again = config.load(config.dump(model))
    run(again, params_of(model), batch_of(seed=5))
    assert again == model and run._cache_size() == compiled


def test_a_slot_that_is_padding_is_refused():
    with pytest.raises(UserError, match="padding"):
        params_of(capsule(slot_id=0))
