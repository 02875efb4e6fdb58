"""The dual by which expert biases move: identities in float64, brute force, and the real step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import linen as nn

from tokenlab import config
from tokenlab.core.duration import Clock
from tokenlab.core.reports import REPORTS
from tokenlab.models import MixtureOfExperts, llama
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.routing import BiasedTopKGate, TopKGate
from tokenlab.routing.balance import (
    dual_value,
    expert_loads,
    lagrangian,
    maximum_violation,
    regret,
    switches,
    switching_benefit,
)
from tokenlab.routing.experts import best
from tokenlab.train.mesh import MeshShape
from tokenlab.train.optimizer import SGD, AdamW, Constant, Group
from tokenlab.train.step import Trainer

T, E, K = 64, 8, 2
TARGET = K * T / E


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def scores_of(seed, tokens=T, experts=E):
    """Sigmoid scores of an uneven gate; no two are equal."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) + np.linspace(-1.5, 1.5, experts)
    return jnp.asarray(1 / (1 + np.exp(-logits)))


def choice(scores, bias, k=K):
    return best((scores + bias[None])[None], k)[0]


@jax.jit
def step(scores, bias, rate):
    """One step on the dual, and what is said of it."""
    before = choice(scores, bias)
    loads = expert_loads(before).astype(scores.dtype)
    moved = bias + rate * (TARGET - loads)
    after = choice(scores, moved)
    benefit = switching_benefit(scores, bias=moved, before=before, after=after)
    values = [dual_value(scores, bias=p, k=K) for p in (bias, moved)]
    return moved, loads, values, benefit, switches(before, after)


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2])
def test_the_dual_changes_by_the_squared_imbalance_and_the_switching_benefit(double, rate):
    scores, bias = scores_of(0), jnp.zeros(E)
    switched = 0
    for _ in range(400):
        bias, loads, (before, after), benefit, moves = step(scores, bias, rate)
        drop = -rate * float(((loads - TARGET) ** 2).sum())
        assert abs(float(after - before) - drop - float(benefit)) < 1e-12
        assert float(benefit) >= -1e-12
        dropped, taken = np.nonzero(np.asarray(moves))
        switched += len(dropped)
        assert np.all(np.asarray(loads)[taken] < np.asarray(loads)[dropped])
    assert switched > 50


def test_under_the_sign_rule_tokens_move_to_a_larger_sign(double):
    scores, bias, switched = scores_of(1), jnp.zeros(E), 0

    @jax.jit
    def step(bias):
        before = choice(scores, bias)
        way = jnp.sign(TARGET - expert_loads(before))
        moved = bias + 1e-3 * way
        return moved, way, switches(before, choice(scores, moved))

    for _ in range(400):
        bias, way, moves = step(bias)
        dropped, taken = np.nonzero(np.asarray(moves))
        switched += len(dropped)
        assert np.all(np.asarray(way)[taken] > np.asarray(way)[dropped])
    assert switched > 50


def test_counts_of_switches_are_of_tokens():
    before = jnp.asarray([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    after = jnp.asarray([[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]], bool)
    np.testing.assert_array_equal(switches(before, after), [[0, 1, 1], [0, 0, 1], [0, 0, 0]])


def least_dual(scores, k):
    """``min_p G`` as a linear programme: ``Σ_i (k u_i + Σ_e v_ie) - L Σ p``, all in p, u, v."""
    tokens, experts = scores.shape
    pairs = tokens * experts
    cost = [*[-k * tokens / experts] * experts, *[k] * tokens, *[1] * pairs]
    rows = np.zeros((pairs, experts + tokens + pairs))
    for i, e in itertools.product(range(tokens), range(experts)):
        row = rows[i * experts + e]
        row[e], row[experts + i], row[experts + tokens + i * experts + e] = 1, -1, -1
    free, positive = (None, None), (0, None)
    bounds = [free] * (experts + tokens) + [positive] * pairs
    found = scipy.optimize.linprog(cost, A_ub=rows, b_ub=-np.asarray(scores).ravel(), bounds=bounds)
    return found.fun, jnp.asarray(found.x[:experts])


def test_the_least_dual_is_the_best_balanced_choice(double):
    rng = np.random.default_rng(0)
    for _ in range(5):
        scores = rng.random((6, 3))
        balanced = max(
            sum(scores[i, e] for i, e in enumerate(way))
            for way in itertools.product(range(3), repeat=6)
            if all(way.count(e) == 2 for e in range(3))
        )
        least, bias = least_dual(scores, 1)
        assert least == pytest.approx(balanced, abs=1e-6)
        assert float(dual_value(jnp.asarray(scores), bias=bias, k=1)) == pytest.approx(
            balanced, abs=1e-6
        )
        other = bias + jnp.asarray(rng.normal(size=3))
        assert float(dual_value(jnp.asarray(scores), bias=other, k=1)) >= balanced - 1e-9


def test_biases_that_move_together_change_nothing(double):
    scores, bias = scores_of(2), jnp.asarray(np.random.default_rng(2).normal(size=E))
    value, moved = (dual_value(scores, bias=p, k=K) for p in (bias, bias + 3.7))
    assert float(moved) == pytest.approx(float(value), abs=1e-10)
    assert not np.array_equal(choice(scores, bias), choice(scores, bias * 0))


@pytest.mark.parametrize("seed", range(3))
def test_small_steps_of_the_sign_rule_end_near_balance(seed):
    scores = scores_of(seed)

    def body(bias, _):
        loads = expert_loads(choice(scores, bias))
        return bias + 1e-3 * jnp.sign(TARGET - loads), jnp.max(jnp.abs(loads - TARGET))

    _, worst = jax.jit(lambda: jax.lax.scan(body, jnp.zeros(E), None, length=3000))()
    assert float(worst[0]) > E - 1 >= float(worst[-300:].max())


def test_the_lagrangian_of_the_best_choice_is_the_dual_and_its_gradient_the_imbalance(double):
    scores = scores_of(3)
    bias = jnp.asarray(np.random.default_rng(3).normal(size=E)) * 0.1
    chosen = choice(scores, bias)
    of = dual_value(scores, bias=bias, k=K)
    assert float(lagrangian(scores, bias=bias, chosen=chosen)) == pytest.approx(float(of), abs=1e-9)
    for one in (
        jax.grad(lambda p: lagrangian(scores, bias=p, chosen=chosen))(bias),
        jax.grad(lambda p: dual_value(scores, bias=p, k=K))(bias),
    ):
        np.testing.assert_allclose(one, expert_loads(chosen) - TARGET, atol=1e-9)


def test_violation_and_regret_by_hand():
    assert float(maximum_violation(jnp.asarray([1.0, 2.0, 3.0]))) == pytest.approx(0.5)
    assert float(maximum_violation(jnp.zeros(4))) == 0
    values, least = jnp.asarray([3.0, 2.0, 2.5]), jnp.asarray([1.0, 1.0, 2.5])
    np.testing.assert_array_equal(regret(values, best=least), [2.0, 3.0, 3.0])


# ---------------------------------------------------------------- in a layer, and in training

WIDTH = 8
LAYER = MixtureOfExperts(num_experts=4, hidden_dim=6, gate=BiasedTopKGate(k=2))


def layer_inputs(seed=0):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 10, WIDTH)), jnp.float32)
    return x, jnp.asarray(np.arange(10) < np.asarray([[10], [7], [2]]))


@jax.jit
def dual_of(params, x, valid):
    out, kept = LAYER.apply({"params": params}, x, valid=valid, mutable=[REPORTS])
    dual = kept[REPORTS]["dual"][0]
    return dual.total, (out, dual.weight)


def started(seed=0):
    x, valid = layer_inputs()
    params = nn.meta.unbox(LAYER.init(jax.random.key(seed), x, valid=valid)["params"])
    params["gate"]["bias"] = jnp.asarray([0.3, -0.2, 0.1, 0.0])
    return params


def test_the_dual_moves_the_bias_alone_by_the_loads_of_real_tokens():
    params, (x, valid) = started(), layer_inputs()
    (_, (_, weight)), gradient = jax.value_and_grad(dual_of, has_aux=True)(params, x, valid)
    scores = jax.nn.sigmoid(x @ params["gate"]["kernel"])
    chosen = best(scores + params["gate"]["bias"][None, None], 2) & valid[..., None]
    loads = np.asarray(expert_loads(chosen))
    assert loads.sum() == 2 * 19 and float(weight) == 19
    np.testing.assert_allclose(gradient["gate"]["bias"], loads - 2 * 19 / 4, atol=1e-5)
    gradient["gate"]["bias"] = jnp.zeros(4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_bias_decides_who_runs_and_not_how_much():
    """Where it changes no choice it changes nothing; the weights are those of the scores."""
    params, (x, valid) = started(), layer_inputs()
    even = params | {"gate": params["gate"] | {"bias": jnp.full(4, 0.8)}}
    none = params | {"gate": params["gate"] | {"bias": jnp.zeros(4)}}
    np.testing.assert_array_equal(dual_of(even, x, valid)[1][0], dual_of(none, x, valid)[1][0])
    lean = params | {"gate": params["gate"] | {"bias": jnp.asarray([9.0, 9.0, 0.0, 0.0])}}
    out = dual_of(lean, x, valid)[1][0]
    first_two = {name: params[name][:2] for name in ("up", "up_gate", "down")}
    first_two["gate"] = {"kernel": params["gate"]["kernel"][:, :2]}
    plain = LAYER.clone(num_experts=2, gate=TopKGate(k=2, score="sigmoid"))
    expected = plain.apply({"params": first_two}, x, valid=valid)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_training_step_in_micro_batches_is_the_published_rule():
    """``p += u sign(L - A)`` by the loads of the whole batch, and no other rule touches p."""
    network = config.replace(
        llama(vocab_size=13, dim=WIDTH, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=8),
        {"block.feedforward": LAYER},
    )
    rng = np.random.default_rng(0)
    segments = jnp.asarray(np.arange(12) < np.asarray([[12], [12], [9], [4]]), jnp.int32)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 13, (4, 12))),
        "targets": jnp.asarray(rng.integers(0, 13, (4, 12))),
        "positions": jnp.tile(jnp.arange(12)[None], (4, 1)),
        "segments": segments,
        "weights": segments.astype(jnp.float32),
    }
    rule = SGD(learning_rate=Constant(peak=1e-3), sign=True)
    optimizer = AdamW(
        learning_rate=Constant(peak=1e-2),
        groups=(Group(parameters=("*/gate/bias",), optimizer=rule),),
    )
    terms = {"next_token": Term(loss=NextToken()), "dual": AuxiliaryTerm(name="dual")}
    clock = Clock(tokens_per_step=48, tokens_per_epoch=lambda: 480, total_steps=10)
    trainer = Trainer(
        model=network,
        objective=Objective(terms=terms),
        optimizer=optimizer.build(clock),
        schedule=optimizer.learning_rate.build(clock),
        mesh=MeshShape().build(jax.devices()[:1]),
        accumulation=2,
    )
    state = trainer.init()
    before = jax.tree.map(np.asarray, state.params)
    _, kept = network.apply(
        {"params": jax.tree.map(jnp.asarray, before)},
        batch["tokens"], positions=batch["positions"], segments=segments,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, BiasedTopKGate),
    )  # fmt: skip
    state, metrics = trainer.step(state, trainer.put(jax.tree.map(np.asarray, batch)))
    assert float(metrics.sums["dual"].weight.sum()) == 2 * 37
    for name, layer in kept["intermediates"].items():
        loads = expert_loads(layer["feedforward"]["gate"]["__call__"][0].chosen)
        moved = state.params[name]["feedforward"]["gate"]["bias"]
        np.testing.assert_allclose(moved, 1e-3 * np.sign(2 * 37 / 4 - loads), atol=1e-9)
        assert np.any(moved)
