"""Losses of thoughts: the bias of the estimator by enumeration, rewards by hand, gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.thoughts import batch_of, params_of, plain, thinker
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.objectives import (
    AfterThought,
    BeforeThought,
    NextToken,
    Objective,
    Term,
    ThoughtPolicy,
    thought_rewards,
)

KEY = jax.random.key(3)


def context_of(model, params, batch, key=KEY):
    return Context(batch=batch, views={"policy": View(model=model, params=params)}, key=key)


@pytest.mark.parametrize(
    ("clamp", "expected"),
    [(False, (0.175, -0.045, -0.13)), (True, (0.0725, -0.0315, -0.041))],
)
def test_two_thoughts_give_half_the_gradient_and_clamping_bends_it(clamp, expected):
    """One token of chances p with rewards r: p (r - p r) is the gradient by logits."""
    chances, rewards = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0.0, -1.0])
    true = chances * (rewards - chances @ rewards)
    np.testing.assert_allclose(true, (0.35, -0.09, -0.26), atol=1e-12)
    policy, mean = ThoughtPolicy(clamp=clamp), np.zeros(3)
    for pair in itertools.product(range(3), repeat=2):
        drawn = list(pair)
        advantages = policy.advantages(jnp.asarray(rewards[drawn])[:, None, None])[:, 0, 0]
        slopes = np.eye(3)[drawn] - chances  # of log p(z) by the logits
        mean += chances[drawn].prod() * (np.asarray(advantages)[:, None] * slopes).mean(axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    if not clamp:
        np.testing.assert_allclose(mean, true / 2, atol=1e-6)


def test_advantages_sum_to_zero_over_the_thoughts_of_a_position_unless_clamped():
    rewards = jax.random.normal(KEY, (4, 3, 5))
    free, clamped = (ThoughtPolicy(clamp=clamp).advantages(rewards) for clamp in (False, True))
    np.testing.assert_allclose(free.sum(axis=0), 0, atol=1e-5)
    np.testing.assert_array_equal(clamped, np.maximum(free, 0))
    np.testing.assert_array_equal(ThoughtPolicy().advantages(jnp.ones((4, 3, 5))), 0)


def test_rewards_are_what_a_thought_gains_for_what_is_said_behind_it():
    model, batch = thinker(talk=3, samples=2), batch_of(lengths=[[9], [4, 3]])
    batch["weights"] = batch["weights"] * jnp.linspace(0.5, 2, 9)[None]
    context = context_of(model, params_of(model), batch)
    thoughts, rewards = context.thoughts(), thought_rewards(context)
    table = np.asarray(params_of(model)["embedding"])

    def nats(hidden, row, at):
        logits = np.asarray(hidden[row, at]) @ table.T
        return np.log(np.exp(logits).sum()) - logits[int(batch["targets"][row, at])]

    for sample, row, at in itertools.product(range(2), range(2), range(9)):
        expected, segment = 0.0, int(batch["segments"][row, at])
        for ahead in range(3):
            here = at + ahead
            if here < 9 and segment and int(batch["segments"][row, here]) == segment:
                gain = nats(thoughts.before, row, here)
                gain -= nats(thoughts.after[sample, ahead], row, here)
                expected += float(batch["weights"][row, here]) * gain
        np.testing.assert_allclose(rewards[sample, row, at], expected, atol=2e-4)


def test_each_loss_trains_what_it_should():
    model, batch = thinker(thought=2), batch_of()
    params = params_of(model)

    def slope(loss):
        def mean(params):
            context = context_of(model, params, batch)
            return Objective(terms={"it": Term(loss=loss)})(context)["it"].mean()

        gradient = jax.jit(jax.grad(mean))(params)
        return {name: float(optax.tree.norm(part)) for name, part in gradient.items()}

    before, after, policy = (slope(loss()) for loss in (BeforeThought, AfterThought, ThoughtPolicy))
    assert before["marks"] == before["mix_last"] == 0 and before["block_0"] > 0
    assert min(after[name] for name in ("marks", "mix_first", "mix_last", "block_1")) > 0
    # The choice of a token depends on the first mark, not on how thoughts are mixed in.
    assert policy["mix_first"] == policy["mix_last"] == 0
    assert min(policy["marks"], policy["block_0"], policy["embedding"]) > 0


def test_before_a_thought_is_the_plain_model_and_one_pass_serves_all_losses():
    model, batch = thinker(), batch_of()
    params = params_of(model)
    context = context_of(model, params, batch)
    losses = {"a": BeforeThought(), "b": AfterThought(), "c": ThoughtPolicy()}
    sums = Objective(terms={name: Term(loss=loss) for name, loss in losses.items()})(context)
    bare = context_of(plain(), params, batch)
    np.testing.assert_allclose(sums["a"].mean(), Term(loss=NextToken())(bare).mean(), rtol=1e-5)
    assert context.output() is context.thoughts().output


def test_what_leaves_nothing_to_choose_is_refused():
    batch = batch_of()
    for fields in ({"samples": 1}, {"kind": "pauses"}, {"thought": 0}):
        model = thinker(**fields)
        with pytest.raises(UserError, match="nothing to choose"):
            ThoughtPolicy()(context_of(model, params_of(model), batch))
    with pytest.raises(UserError, match="no ThinkingTransformer"):
        AfterThought()(context_of(plain(), params_of(plain()), batch))
    with pytest.raises(ValueError, match="temperature"):
        ThoughtPolicy(temperature=0.0)
