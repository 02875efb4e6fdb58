"""Rollouts within the step: what they draw, what they are worth, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.data.tasks import MinimumNonNegativeSum, PointerChase, TaskSource
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.models.mixtures import DirichletDraw, MeanOfSamples
from tokenlab.objectives import MixturePolicy, Objective, Term, ThoughtRollouts, group_advantages
from tokenlab.train.optimizer import AdamW, Constant
from tokenlab.train.run import Run

TASK = MinimumNonNegativeSum(digits=3, high=3)
PLACE, THOUGHTS = TASK.digits, TASK.digits - 1
SOURCE = TaskSource(task=TASK)
MODEL = llama(
    vocab_size=TASK.tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, num_kv_heads=1,
    hidden_dim=16, max_length=TASK.length,
)  # fmt: skip


@pytest.fixture(scope="module")
def view():
    ids = jnp.zeros((1, 4), int)
    params = MODEL.init(jax.random.key(0), ids, positions=ids, segments=ids + 1)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32),
        nn.meta.unbox(params),
    )
    return View(model=MODEL, params=params)


def batch_of(rows):
    batch = TASK.sample(seed=1, count=rows)._asdict()
    return {name: jnp.asarray(array) for name, array in batch.items() if array is not None}


def rolled(view, source, batch, seed=0):
    def roll(params, batch, key):
        policy = View(model=view.model, params=params)
        return source.rolled(batch, policy=policy, key=key)

    return jax.jit(roll)(view.params, batch, jax.random.key(seed))


@pytest.mark.parametrize("mixture", [MeanOfSamples(count=2), DirichletDraw(scale=5.0)], ids=str)
def test_rows_say_what_was_thought_and_what_it_was_worth(view, mixture):
    source = ThoughtRollouts(source=SOURCE, mixture=mixture, thoughts=THOUGHTS, group=4)
    batch = batch_of(6)
    rows, ledger = rolled(view, source, batch)
    for name in ("tokens", "targets", "positions", "segments", "weights"):
        np.testing.assert_array_equal(rows[name], np.repeat(batch[name], 4, axis=0))
    drawn, mixed = np.asarray(rows["distribution"]), np.asarray(rows["mixture"])
    assert rows["thought"].tolist() == [[0, 0, 0, 1, 1, 0]] * 24
    np.testing.assert_array_equal(drawn[:, PLACE:-1], mixed[:, PLACE + 1 :])
    np.testing.assert_allclose(mixed[:, PLACE + 1 :].sum(axis=2), 1, rtol=1e-5)
    assert not mixed[:, : PLACE + 1].any() and not drawn[:, :PLACE].any()
    # One token is the answer; its reward is compared with those of the row's other rollouts.
    assert set(np.unique(drawn[:, -1])) == {0, 1} and (drawn[:, -1].sum(axis=1) == 1).all()
    right = drawn[:, -1].argmax(axis=1) == rows["targets"][:, -1]
    expected = group_advantages(jnp.asarray(right.reshape(6, 4), jnp.float32)).reshape(-1)
    np.testing.assert_array_equal(rows["advantages"], np.repeat(expected[:, None], 6, axis=1))
    # What drew them is what the objective finds where all of it is read.
    context = Context(batch=rows, views={"policy": view})
    np.testing.assert_allclose(rows["old_logits"], context.logits(), rtol=1e-4, atol=1e-4)
    # And each thought hangs on those before it: another first thought, other logits behind it.
    plain = Context(batch=rows | {"mixture": jnp.zeros_like(mixed)}, views={"policy": view})
    assert not np.allclose(plain.logits()[:, -1], rows["old_logits"][:, -1], atol=1e-3)
    assert float(ledger.passes) == THOUGHTS + 1
    assert float(ledger.tokens) == (THOUGHTS + 1) * 24 * TASK.length
    again, _ = rolled(view, source, batch)
    np.testing.assert_array_equal(again["mixture"], mixed)
    other, _ = rolled(view, source, batch, seed=1)
    assert not np.array_equal(other["mixture"], mixed)


def test_thoughts_and_answers_are_drawn_as_often_as_the_policy_says(view):
    """Of one row, many times: the first thought, and the answers behind each pair of thoughts."""
    count = 4096
    source = ThoughtRollouts(
        source=SOURCE, mixture=MeanOfSamples(count=1), thoughts=THOUGHTS, group=count
    )
    rows, _ = rolled(view, source, batch_of(1))
    chances = np.asarray(jax.nn.softmax(rows["old_logits"], axis=-1))
    drawn = np.asarray(rows["distribution"])
    np.testing.assert_allclose(chances[:, PLACE], chances[:1, PLACE].repeat(count, 0), rtol=1e-4)
    for place in range(PLACE, TASK.length):
        found, expected = drawn[:, place].mean(axis=0), chances[:, place].mean(axis=0)
        # Five standard errors of a share.
        bound = 5 * np.sqrt(expected * (1 - expected) / count) + 1e-4
        assert (np.abs(found - expected) <= bound).all()


def test_a_row_is_thought_through_as_far_as_it_is_told(view):
    source = ThoughtRollouts(source=SOURCE, thoughts=1, group=2)
    rows, ledger = rolled(view, source, batch_of(2))
    assert rows["thought"].tolist() == [[0, 0, 0, 1, 0, 0]] * 4
    assert not np.asarray(rows["mixture"])[:, -1].any() and float(ledger.passes) == 2


def test_an_experiment_of_rollouts_trains_compiles_once_and_repeats():
    mixture = MeanOfSamples(count=2)
    experiment = Experiment(
        name="rollouts",
        tokenizer=TASK.tokenizer,
        data=ThoughtRollouts(source=SOURCE, mixture=mixture, thoughts=THOUGHTS, group=4),
        batch_size=8,
        model=MODEL,
        objective=Objective(terms={"policy": Term(loss=MixturePolicy(mixture=mixture))}),
        optimizer=AdamW(learning_rate=Constant(peak=1e-2), weight_decay=0.0),
        steps=4,
    )

    def course():
        run = Run.of(config.load(config.dump(experiment)))
        *_, (state, metrics) = run.steps(run.trainer.init())
        assert run.trainer.jitted._cache_size() == 1
        return state, metrics

    state, metrics = course()
    again, _ = course()
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert float(metrics.ledger.passes) == THOUGHTS + 2  # rollouts, and the pass that is learned of
    assert float(metrics.ledger.tokens) == (THOUGHTS + 2) * 8 * 4 * TASK.length
    assert float(metrics.grad_norm) > 0


def test_what_cannot_be_thought_through_is_refused(view):
    with pytest.raises(UserError, match="3 thoughts and groups of 1; use"):
        ThoughtRollouts(source=SOURCE, group=1)
    batch = {name: array for name, array in batch_of(1).items() if name != "mixture"}
    with pytest.raises(UserError, match="the batch has no mixture; ThoughtRollouts needs"):
        rolled(view, ThoughtRollouts(source=SOURCE), batch)
    with pytest.raises(UserError, match="a task has no epochs"):
        ThoughtRollouts(source=TaskSource(task=PointerChase())).tokens_per_epoch(
            tokenizer=TASK.tokenizer
        )
