"""Thresholds of DynaMoE on scores written by hand, and experts by layer."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.models
from tokenlab import config
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.reports import REPORTS
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.models import (
    AscendingExperts,
    BlockPattern,
    DescendingExperts,
    ExpertSchedule,
    InversePyramidExperts,
    MixtureOfExperts,
    PyramidExperts,
    UniformExperts,
    WaveExperts,
    llama,
    with_expert_schedule,
)
from tokenlab.models.expert_schedules import rescaled
from tokenlab.routing import FixedThresholdGate, PooledThresholdGate, TokenThresholdGate, TopKGate
from tokenlab.routing.thresholds import pooled_quantile

E = 8


def decided(gate, logits, *, train=True, valid=None, threshold=None):
    """The gate's choice where its logits are these."""
    experts = logits.shape[-1]
    valid = jnp.ones(logits.shape[:2], bool) if valid is None else valid
    params = {"kernel": jnp.eye(experts)}
    if isinstance(gate, PooledThresholdGate):
        params["threshold"] = jnp.full(1, 0.1 if threshold is None else threshold)
    logits = jnp.asarray(logits, jnp.float32)
    return gate.apply({"params": params}, logits, num_experts=experts, valid=valid, train=train)


def normal(tokens=64, experts=E, seed=0):
    return np.random.default_rng(seed).normal(size=(1, tokens, experts))


def test_the_lowest_threshold_mixes_all_experts_and_the_highest_takes_one_with_weight_one():
    logits = normal()
    everyone = decided(FixedThresholdGate(threshold=-math.inf), logits)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(everyone.weights, expected, atol=1e-6)
    one = decided(FixedThresholdGate(threshold=math.inf), logits)
    np.testing.assert_array_equal(one.weights, np.eye(E)[logits.argmax(axis=-1)])


@pytest.mark.parametrize(("percentile", "count"), [(50, 4), (70, 3), (75, 2), (0, 8), (100, 1)])
def test_a_percentile_of_each_token_is_top_k(percentile, count):
    assert count == E - math.ceil((E - 1) * percentile / 100)
    for logits in (normal(), 10 * normal(seed=1)):
        ours = decided(TokenThresholdGate(percentile=float(percentile)), logits)
        top = decided(TopKGate(k=count), logits)
        np.testing.assert_array_equal(ours.chosen.sum(axis=-1), count)
        np.testing.assert_array_equal(ours.chosen, top.chosen)
        np.testing.assert_allclose(ours.weights, top.weights, atol=1e-6)


def test_a_percentile_of_each_token_is_numpys():
    for experts, percentile in ((8, 75.0), (5, 75.0), (11, 70.0), (6, 33.0)):
        logits = normal(experts=experts)
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        above = p >= np.percentile(p, percentile, axis=-1, keepdims=True) - 1e-12
        ours = decided(TokenThresholdGate(percentile=percentile), logits)
        np.testing.assert_array_equal(ours.chosen, above)


def test_half_of_all_pairs_lie_above_the_pooled_median_and_tokens_differ():
    logits = normal() * np.linspace(0.1, 3, 64)[:, None]
    gate = PooledThresholdGate(percentile=50.0)
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    assert len(np.unique(p)) == p.size
    tau = float(pooled_quantile(jnp.asarray(p), valid=jnp.ones((1, 64), bool), percentile=50.0))
    assert tau == pytest.approx(np.percentile(p, 50), rel=1e-6)
    assert int((p >= tau).sum()) == 256
    chosen = np.asarray(decided(gate, logits).chosen)
    likeliest = np.eye(E, dtype=bool)[p.argmax(axis=-1)]
    np.testing.assert_array_equal(chosen, (p >= tau) | likeliest)
    assert len(np.unique(chosen.sum(axis=-1))) > 2


@pytest.mark.parametrize("percentile", [0.0, 12.5, 75.0, 99.0, 100.0])
def test_the_pool_is_of_tokens_that_are_not_padding(percentile):
    values = np.asarray(np.random.default_rng(0).random((3, 7, 5)), np.float32)
    valid = np.arange(7) < np.asarray([[7], [4], [0]])
    found = pooled_quantile(jnp.asarray(values), valid=jnp.asarray(valid), percentile=percentile)
    assert float(found) == pytest.approx(np.percentile(values[valid], percentile), rel=1e-6)


def test_outside_training_the_threshold_is_the_one_that_was_kept():
    logits, gate = normal(), PooledThresholdGate(percentile=75.0)
    kept = decided(gate, logits, train=False, threshold=0.3).chosen
    np.testing.assert_array_equal(
        kept, decided(FixedThresholdGate(threshold=0.3), logits, train=False).chosen
    )
    assert np.any(kept != decided(gate, logits, train=True, threshold=0.3).chosen)


def test_the_kept_threshold_is_a_moving_average_of_decay_099():
    """A step of rate 0.01 against the gradient of the reported loss."""
    gate, logits = PooledThresholdGate(percentile=60.0), jnp.asarray(normal(), jnp.float32)
    params = {"kernel": jnp.eye(E), "threshold": jnp.full(1, 0.4)}

    def loss(params):
        choice = gate.apply(
            {"params": params}, logits, num_experts=E, valid=jnp.ones((1, 64), bool), train=True
        )
        return choice.aux["threshold"].mean()

    gradient = jax.jit(jax.grad(loss))(params)
    quantile = np.percentile(jax.nn.softmax(logits), 60)
    moved = 0.4 - 0.01 * float(gradient["threshold"][0])
    assert moved == pytest.approx(0.99 * 0.4 + 0.01 * quantile, rel=1e-5)
    assert not np.any(gradient["kernel"])


def test_a_cap_keeps_the_best():
    logits = normal()
    capped = decided(FixedThresholdGate(threshold=-math.inf, most=3), logits)
    np.testing.assert_array_equal(capped.chosen, decided(TopKGate(k=3), logits).chosen)
    for gate in (FixedThresholdGate(most=9), TopKGate(k=9), TopKGate(k=0)):
        with pytest.raises(UserError, match="use 1 to 8"):
            layer = MixtureOfExperts(num_experts=E, hidden_dim=4, gate=gate)
            layer.init(jax.random.key(0), jnp.zeros((1, 2, 4)))


def test_the_layer_mixes_experts_by_a_softmax_over_the_active_ones():
    gate = PooledThresholdGate(percentile=60.0)
    layer = MixtureOfExperts(num_experts=E, hidden_dim=6, gate=gate, gated=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 4)), jnp.float32)
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x)["params"])
    run = jax.jit(lambda p: layer.apply({"params": p}, x, train=True, mutable=[REPORTS]))
    out, kept = run(params)
    logits = np.asarray(x @ params["gate"]["kernel"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    active = (p >= np.percentile(p, 60)) | np.eye(E, dtype=bool)[p.argmax(axis=-1)]
    weights = np.where(active, np.exp(logits), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.zeros(x.shape)
    for e in range(E):
        hidden = np.asarray(jax.nn.gelu(x @ params["up"][e]))
        expected += weights[..., e, None] * (hidden @ np.asarray(params["down"][e]))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    reports = kept[REPORTS]
    np.testing.assert_array_equal(reports["active_experts"][0], active.sum(axis=-1))
    np.testing.assert_allclose(reports["gate_entropy"][0], -(p * np.log(p)).sum(axis=-1), rtol=1e-4)
    share, mean = active.sum(axis=(0, 1)) / active.sum(), p.mean(axis=(0, 1))
    assert float(reports["balance"][0].mean()) == pytest.approx(E * (share * mean).sum(), rel=1e-5)
    assert float(reports["flops"][0]) == active.sum() * 2 * 2 * 4 * 6


def test_what_is_decoded_does_not_depend_on_the_batch():
    """Nor on what was not read yet: tokens one by one are those of one pass over all."""
    mixture = MixtureOfExperts(num_experts=4, hidden_dim=6, gate=PooledThresholdGate())
    plain = llama(vocab_size=13, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=8)
    model = config.replace(plain, {"block.feedforward": mixture})
    ids = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), ids, positions=ids, segments=ids + 1)
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (
            jnp.full(leaf.shape, 0.25)
            if leaf.shape == (1,)
            else jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        ),
        nn.meta.unbox(shapes),
    )
    prompts = [[3, 5, 7, 9], [4], [11, 2, 6]]
    decoder = Autoregressive(max_new_tokens=5, sampler=Greedy(), end_ids=())
    view = View(model=model, params=params)
    together = decoder(view, prompts, key=jax.random.key(0)).tokens
    rows = jnp.asarray([[*prompts[0], *together[0].tolist()]])
    where = {"positions": jnp.arange(rows.shape[1])[None], "segments": jnp.ones_like(rows)}
    whole = view(rows, **where)
    logits = view(whole.hidden, method="logits")
    np.testing.assert_array_equal(jnp.argmax(logits[0, 3:-1], axis=-1), together[0])
    assert len(np.unique(whole.trace.figures["active_experts"])) > 1
    for number, prompt in enumerate(prompts):
        alone = decoder(view, [prompt], key=jax.random.key(0)).tokens
        np.testing.assert_array_equal(alone[0], together[number])


# ---------------------------------------------------------------- experts by layer

SCHEDULES = {
    UniformExperts: (5, 5, 5, 5, 5),
    DescendingExperts: (8, 7, 5, 4, 2),
    AscendingExperts: (2, 4, 5, 7, 8),
    PyramidExperts: (2, 5, 8, 5, 2),
    InversePyramidExperts: (8, 5, 2, 5, 8),
    WaveExperts: (5, 8, 5, 2, 5),
}
every = pytest.mark.parametrize("member", SCHEDULES)


def test_the_table_holds_every_public_schedule():
    assert {
        member
        for member in vars(tokenlab.models).values()
        if inspect.isclass(member) and issubclass(member, ExpertSchedule)
    } - {ExpertSchedule} == set(SCHEDULES)


@every
def test_schedules_of_five_layers_between_two_and_eight(member):
    schedule = member(fewest=2, most=8)
    assert schedule(5) == SCHEDULES[member]
    assert len(schedule(1)) == 1 and 2 <= schedule(1)[0] <= 8
    assert member(fewest=3, most=3)(7) == (3,) * 7
    assert config.load(config.dump(schedule)) == schedule
    assert "arXiv:2603.01697" in inspect.getdoc(ExpertSchedule)


@every
def test_rescaled_schedules_have_the_total_and_keep_their_order(member):
    counts = member(fewest=2, most=8)(5)
    for total in (5, 11, 20, 25, 60):
        scaled = rescaled(counts, total)
        assert sum(scaled) == total and min(scaled) >= 1
        for (a, b), (c, d) in zip(
            itertools.pairwise(counts), itertools.pairwise(scaled), strict=True
        ):
            assert (a - b) * (c - d) >= 0 or abs(c - d) <= 1
    assert rescaled(counts, sum(counts)) == counts


def test_a_model_follows_a_schedule():
    mixture = MixtureOfExperts(num_experts=4, hidden_dim=6, gate=PooledThresholdGate())
    plain = llama(vocab_size=13, dim=8, num_layers=5, num_heads=2, num_kv_heads=1, hidden_dim=8)
    model = config.replace(plain, {"block.feedforward": mixture})
    ours = with_expert_schedule(model, DescendingExperts(fewest=2, most=8), total=20)
    assert isinstance(ours.block, BlockPattern)
    tokens = jnp.zeros((1, 4), int)
    params = jax.eval_shape(
        lambda: ours.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )["params"]
    sizes = [params[f"block_{i}"]["feedforward"]["up"].value.shape[0] for i in range(5)]
    assert sizes == list(rescaled((8, 7, 5, 4, 2), 20)) and sum(sizes) == 20
    for unfit in (plain, ours):
        with pytest.raises(UserError, match="needs one Block"):
            with_expert_schedule(unfit, UniformExperts())
    with pytest.raises(UserError, match="do not suffice"):
        with_expert_schedule(model, UniformExperts(), total=4)
    with pytest.raises(UserError, match="use 1 <= fewest <= most"):
        UniformExperts(fewest=9)
