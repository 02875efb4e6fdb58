"""Capacities that fall from 1: counts by hand, dense twins, one program, and its end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.depth.test_mixture_of_recursions import call, dense, initialised, packed, small
from tokenlab import config
from tokenlab.core.context import View
from tokenlab.core.duration import Fraction
from tokenlab.core.errors import UserError
from tokenlab.core.progress import given_progress
from tokenlab.data import PaddedText
from tokenlab.depth import MixtureOfRecursions
from tokenlab.routing import RandomRouter
from tokenlab.train.run import Run

OF_RUN = 0.5
WARMED = Fraction(of_run=OF_RUN)


@functools.partial(jax.jit, static_argnums=0)
def in_training(model, params, arrays, done):
    """A pass that is told how far training has come."""
    view = View(model=model, params=params, given=given_progress(jnp.float32(done)))
    arrays = {name: jnp.asarray(each) for name, each in arrays.items()}
    return view(arrays.pop("tokens"), train=True, **arrays)


def counts(length, done, recursions=3):
    """Tokens of each recursion, in float64."""
    ends = [max(1, length * (recursions - r) // recursions) for r in range(recursions)]
    left = 0.5 * (1 + np.cos(np.pi * min(1, done / OF_RUN)))
    return [end + int((length - end) * left) for end in ends]


@pytest.mark.parametrize("router", [None, pytest.param(RandomRouter(), marks=pytest.mark.slow)])
def test_chosen_counts_follow_the_cosine_and_end_at_the_capacities(router):
    model = small(warmup=WARMED, **({} if router is None else {"router": router}))
    batch = packed(lengths=((9, 9), (12,)), width=18)
    params = initialised(model)
    for done in (0.0, 0.07, 0.2, 0.31, 0.49, 0.5, 1.0):
        trace = in_training(model, params, batch, done).trace
        found = np.asarray(trace.active[1:4]).sum(axis=2).T
        np.testing.assert_array_equal(found, [counts(18, done), counts(12, done)])
        assert not np.any(trace.active[2:4] & ~trace.active[1:3])
        assert not np.any(trace.active & (batch["segments"] == 0)[None])
        where = {name: jnp.asarray(batch[name]) for name in ("positions", "segments")}
        ledger = model.ledger(trace, **where)
        assert float(ledger.block_tokens) == found.sum() + 2 * 30
    assert counts(18, 0.0) == [18] * 3 and counts(18, 0.2) == [18, 15, 13]
    assert counts(18, 0.5) == [18, 12, 6]


@pytest.mark.parametrize("done", [0.0, 0.23])
def test_while_warming_the_model_is_its_dense_twin_in_value_and_gradient(done):
    """At the very beginning that is the loop at full depth, with gates."""
    model, batch = small(warmup=WARMED), packed()
    params = initialised(model)
    valid = jnp.asarray(batch["segments"] > 0)
    active = in_training(model, params, batch, done).trace.active
    assert bool(jnp.all(active == valid[None])) == (done == 0.0)
    weights = jax.random.normal(jax.random.key(3), (2, 18, 16))

    def loss(run):
        return lambda p: jnp.sum(jnp.where(valid[..., None], run(p) * weights, 0))

    def ours(p):
        return in_training(model, p, batch, done).hidden

    found = jax.jit(jax.value_and_grad(loss(ours)))(params)
    twin = jax.jit(jax.value_and_grad(loss(lambda p: dense(model, p, batch, active))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, twin)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found[1]["depth"]))


@pytest.mark.parametrize(
    "keys", ["recursion_wise", pytest.param("shared", marks=pytest.mark.slow),
             pytest.param("hybrid", marks=pytest.mark.slow)]
)  # fmt: skip
def test_behind_it_nothing_differs_and_outside_training_nothing_ever_does(keys):
    warmed, plain = small(warmup=WARMED, keys=keys), small(keys=keys)
    batch, params = packed(), initialised(plain)

    def loss(run):
        def total(p):
            out = run(p)
            return jnp.sum(out.hidden**2) + jnp.sum(out.trace.aux["membership"].total)

        return jax.jit(jax.value_and_grad(total))(params)

    after, before = (
        loss(lambda p, d=done: in_training(warmed, p, batch, d)) for done in (OF_RUN, 0.1)
    )
    expected = loss(lambda p: call(plain, p, batch))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, expected
    )
    assert abs(before[0] - expected[0]) > 1e-3 * abs(expected[0])
    for twin in (lambda model: model, lambda model: model.causal_twin()):
        ours, theirs = (call(twin(model), params, batch) for model in (warmed, plain))
        np.testing.assert_array_equal(ours.hidden, theirs.hidden)
        np.testing.assert_array_equal(ours.trace.active, theirs.trace.active)


def test_one_program_trains_through_the_whole_of_it(tiny):
    length, steps = 32, 10
    mixture = config.replace(
        tiny,
        {
            "data": PaddedText(corpus=tiny.data.corpus, length=length),
            "model.num_layers": 3,
            "model.depth": MixtureOfRecursions(recursions=3, sharing="cycle", warmup=WARMED),
            "objective.terms.router": "AuxiliaryTerm(name='membership', coefficient=0.5)",
            "steps": steps,
        },
    )
    run = Run.of(mixture)
    rows = list(run.batches().__next__() for _ in range(steps))  # of different lengths
    expected = [
        sum(sum(counts(int(n), step / steps)) for n in (row["segments"] > 0).sum(axis=1))
        for step, row in enumerate(rows)
    ]
    found = [
        float(metrics.ledger.block_tokens)
        for _, metrics in run.steps(run.trainer.init(), batches=iter(rows))
    ]
    assert found == expected and run.trainer.jitted._cache_size() == 1


def test_a_warm_up_of_no_length_is_refused():
    with pytest.raises(UserError, match="warmup=None is without"):
        MixtureOfRecursions(warmup=Fraction(of_run=0.0))
