"""Every public router against a slow oracle, and what all of them promise."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlab.routing
from tokenlab import config
from tokenlab.routing import (
    ChanceRouter,
    ExpertChoiceRouter,
    LinearScores,
    MLPScores,
    NarrowScores,
    RandomRouter,
    Router,
    Scores,
    ThresholdRouter,
)
from tokenlab.routing.chance import draws

B, T, D = 3, 10, 4
SHARE = 0.625


def highest(scores, active, limit):
    best = sorted(np.flatnonzero(active), key=lambda t: (-scores[t], t))
    return sorted(best[:limit])


def expert_choice(scores, drawn, active, limit):
    return highest(scores, active, limit)


def threshold(scores, drawn, active, limit):
    return [t for t in np.flatnonzero(active) if scores[t] >= 0]


def by_chance(scores, drawn, active, limit):
    return highest(drawn, active, limit)


def share_by_chance(scores, drawn, active, limit):
    return [t for t in np.flatnonzero(active) if drawn[t] < SHARE]


ORACLES = {
    ExpertChoiceRouter: expert_choice,
    ThresholdRouter: threshold,
    RandomRouter: by_chance,
    ChanceRouter: share_by_chance,
}
every = pytest.mark.parametrize("member", ORACLES)


@pytest.mark.parametrize(
    ("family", "table"), [(Router, ORACLES), (Scores, {LinearScores, MLPScores, NarrowScores})]
)
def test_the_tables_hold_every_public_member(family, table):
    public = {
        member
        for member in vars(tokenlab.routing).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }
    assert public == set(table)


def inputs(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-3, 4, size=(B, T, D)), dtype)  # ties are common
    active = jnp.asarray(rng.random((B, T)) < 0.8)
    weight = jnp.asarray(rng.integers(-2, 3, size=D), jnp.float32)
    return x, active, {"params": {"scores": {"kernel": weight[:, None]}}}


def kernel_of(params):
    return params["params"]["scores"]["kernel"][:, 0]


def run(router, x, active, params, *, capacity=6, limit=5, share=SHARE):
    limit = jnp.full(x.shape[0], limit)
    return router.apply(params, x, active=active, capacity=capacity, limit=limit, share=share)


@every
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), limit=st.integers(1, 6))
def test_equals_the_oracle(member, seed, limit):
    router = member(alpha=0.2, temperature=0.5)
    x, active, params = inputs(seed)
    route = run(router, x, active, params, limit=limit)
    scores, drawn = np.asarray(x) @ np.asarray(kernel_of(params)) / 0.5, np.asarray(draws(x))
    for row in range(B):
        kept = ORACLES[member](scores[row], drawn[row], np.asarray(active[row]), limit)
        count = int(route.count[row])
        assert route.index[row, :count].tolist() == kept
        assert np.flatnonzero(route.kept[row]).tolist() == kept
        np.testing.assert_allclose(
            route.gate[row, :count], 0.2 / (1 + np.exp(-scores[row, kept])), rtol=1e-6
        )
    assert route.gate.dtype == jnp.float32 and route.gate.shape == route.index.shape
    assert int(route.index.min()) >= 0 and int(route.index.max()) < T


@every
def test_nothing_active_picks_nothing_and_is_finite(member):
    x, active, params = inputs(0)

    def total(params):
        route = run(member(), x, active & False, params)
        gates = jnp.where(route.valid(), route.gate, 0).sum()
        return gates + sum(one.mean() for one in route.aux.values())

    value, gradient = jax.value_and_grad(total)(params)
    assert float(value) == 0 and not np.any(kernel_of(gradient))


@every
def test_rows_may_come_in_any_order(member):
    x, active, params = inputs(1)
    order = jnp.asarray([2, 0, 1])
    straight, turned = (
        run(member(), x, active, params),
        run(member(), x[order], active[order], params),
    )
    for name in ("index", "count", "gate", "kept"):
        np.testing.assert_array_equal(getattr(straight, name)[order], getattr(turned, name))


@every
def test_bfloat16_streams_are_scored_in_float32(member):
    x, active, params = inputs(2)
    low = run(member(), x.astype(jnp.bfloat16), active, params)
    np.testing.assert_array_equal(low.gate, run(member(), x, active, params).gate)


@every
def test_the_second_call_compiles_nothing(member):
    jitted = jax.jit(lambda p, x, a: run(member(), x, a, p))
    for seed in (0, 1):
        x, active, params = inputs(seed)
        jitted(params, x, active)
    assert jitted._cache_size() == 1


@every
def test_claims_of_causality_hold_and_the_twin_takes_the_same_parameters(member):
    router = member()
    x, active, params = inputs(3)
    changed = x.at[:, 5:].add(100.0 * kernel_of(params)[None, None])  # later tokens win

    def early(router, x):
        return np.asarray(run(router, x, active, params, limit=3).kept[:, :5])

    twin = router.causal_twin()
    assert twin.causal and twin.causal_twin() == twin
    np.testing.assert_array_equal(early(twin, x), early(twin, changed))
    assert np.array_equal(early(router, x), early(router, changed)) == router.causal
    made = [
        jax.eval_shape(
            lambda r=r: r.init(
                jax.random.key(0), x, active=active, capacity=6, limit=jnp.ones(B, int), share=0.5
            )
        )
        for r in (router, twin)
    ]
    assert jax.tree.structure(nn.meta.unbox(made[0])) == jax.tree.structure(nn.meta.unbox(made[1]))


@every
def test_gates_carry_the_gradient_to_the_scores(member):
    x, active, params = inputs(4)
    x = x + 0.1  # no score is near a boundary that a step of 1e-3 would cross

    def total(weight):
        route = run(member(), x, active, {"params": {"scores": {"kernel": weight[:, None]}}})
        return jnp.where(route.valid(), route.gate, 0).sum()

    weight = kernel_of(params) + 0.37
    gradient = jax.grad(total)(weight)
    for d in range(D):
        step = jnp.zeros(D).at[d].set(1e-2)
        slope = (total(weight + step) - total(weight - step)) / 2e-2
        np.testing.assert_allclose(gradient[d], slope, rtol=2e-2, atol=1e-3)


@every
def test_the_object_is_its_own_config(member):
    router = member(alpha=0.3, head=MLPScores(widening=2))
    loaded = config.load(config.dump(router))
    assert loaded == router and hash(loaded) == hash(router)


@every
def test_names_its_paper(member):
    assert "Reference: " in inspect.getdoc(member)


# ---------------------------------------------------------------- scores, and what draws them


@pytest.mark.parametrize("part", [LinearScores(), MLPScores(), MLPScores(widening=2)], ids=repr)
def test_scores_equal_numpy_in_float32_and_train(part):
    x = jax.random.normal(jax.random.key(0), (B, T, D)).astype(jnp.bfloat16)
    params = nn.meta.unbox(part.init(jax.random.key(1), x, choices=3))
    found = part.apply(params, x, choices=3)
    wide, tree = np.asarray(x, np.float64), jax.tree.map(np.float64, params["params"])
    if isinstance(part, MLPScores):
        assert tree["hidden"].shape == (D, part.widening * D)
        inner = wide @ tree["hidden"]
        erf = np.vectorize(math.erf)
        wide = inner * (1 + erf(inner / math.sqrt(2))) / 2
    np.testing.assert_allclose(found, wide @ tree["kernel"], rtol=1e-4, atol=1e-6)
    assert found.dtype == jnp.float32
    gradient = jax.grad(lambda p: part.apply(p, x, choices=3).sum())(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert "Reference: " in inspect.getdoc(type(part))
    assert config.load(config.dump(part)) == part


@pytest.mark.parametrize("twin", [False, True])
def test_auxiliary_scores_learn_the_membership_and_leave_the_choice_alone(twin):
    x, active, params = inputs(5)
    other = -kernel_of(params)
    params["params"]["auxiliary_scores"] = {"kernel": other[:, None]}
    router = ExpertChoiceRouter(auxiliary=True)
    router = router.causal_twin() if twin else router
    route = run(router, x, active, params)
    scores = np.asarray(x @ kernel_of(params))
    told = np.asarray(x @ other)
    if twin:
        np.testing.assert_array_equal(route.kept, np.asarray(active) & (told >= 0))
        return
    for row in range(B):
        expected = highest(scores[row], np.asarray(active[row]), 5)
        assert np.flatnonzero(route.kept[row]).tolist() == expected
    surprise = np.log1p(np.exp(told)) - np.where(route.kept, told, 0)
    found = float(route.aux["membership"].mean())
    assert found == pytest.approx(surprise[np.asarray(active)].mean(), rel=1e-5)
    loss = lambda p, x: run(router, x, active, p).aux["membership"].mean()  # noqa: E731
    by_params, by_stream = jax.grad(loss, argnums=(0, 1))(params, x)
    assert not np.any(kernel_of(by_params)) and not np.any(by_stream)
    assert np.any(by_params["params"]["auxiliary_scores"]["kernel"])


def test_draws_are_uniform_and_apart():
    x = jax.random.normal(jax.random.key(3), (4, 2000, D))
    drawn = np.asarray(draws(x))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    moved = np.asarray(draws(x + 1e-3))  # of nearly the same stream
    assert abs(np.corrcoef(drawn.ravel(), moved.ravel())[0, 1]) < 0.05
