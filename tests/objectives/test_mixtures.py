"""Models that read mixtures in training: one-hot is a token, soft teaching is decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.data.tasks import MinimumNonNegativeSum
from tokenlab.decode import Autoregressive, Greedy, ThoughtFeed
from tokenlab.models import llama
from tokenlab.models.mixtures import MeanOfSamples
from tokenlab.objectives import (
    DistributionKL,
    MixturePolicy,
    NextToken,
    Objective,
    Term,
    group_advantages,
)

TASK = MinimumNonNegativeSum(digits=3)
MODEL = llama(
    vocab_size=TASK.tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, num_kv_heads=1,
    hidden_dim=16, embedding_scale=2.0,
)  # fmt: skip
THOUGHTS = TASK.digits - 1


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, 4), int)
    variables = jax.jit(lambda key: MODEL.init(key, ids, positions=ids, segments=ids + 1))(
        jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(variables["params"]),
    )


def batch_of(task, rows=5):
    batch = task.sample(seed=1, count=rows)._asdict()
    return {name: jnp.asarray(array) for name, array in batch.items() if array is not None}


def context(params, batch):
    return Context(batch=batch, views={"policy": View(model=MODEL, params=params)})


def values(loss, params, batch):
    return np.asarray(jax.jit(lambda p, b: loss(context(p, b)))(params, batch))


def test_one_trace_is_the_loss_of_the_next_token(params):
    batch = batch_of(dataclasses.replace(TASK, traces=1))
    tokens = {name: batch[name] for name in batch if name not in ("mixture", "distribution")}
    some = np.asarray(batch["weights"]) > 0
    found = values(DistributionKL(), params, batch)
    np.testing.assert_allclose(
        found[some], values(NextToken(), params, tokens)[some], rtol=1e-5, atol=1e-5
    )
    assert not found[~some].any()


def test_what_is_read_is_the_mean_embedding(params):
    """By hand, and other rows and earlier positions do not see it."""
    batch = batch_of(TASK)
    table = np.asarray(params["embedding"]) * 2.0
    read = table[np.asarray(batch["tokens"])]
    thought = np.asarray(batch["mixture"]).sum(axis=2) > 0
    read[thought] = np.asarray(batch["mixture"])[thought] @ table
    where = {name: batch[name] for name in ("positions", "segments")}
    run = jax.jit(lambda p, e: MODEL.apply({"params": p}, batch["tokens"], embeddings=e, **where))
    expected = run(params, jnp.asarray(read)).hidden
    found = jax.jit(lambda p, b: context(p, b).output().hidden)(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = batch | {"mixture": jnp.zeros_like(batch["mixture"])}
    tokens = jax.jit(lambda p, b: context(p, b).output().hidden)(params, plain)
    np.testing.assert_allclose(found[:, :4], tokens[:, :4], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[:, 4:], tokens[:, 4:], atol=1e-3)


def test_soft_teaching_feeds_what_the_decoder_feeds(params):
    batch = batch_of(TASK)
    view = View(model=MODEL, params=params)
    decoder = Autoregressive(
        max_new_tokens=THOUGHTS + 1, sampler=Greedy(), end_ids=(),
        feed=ThoughtFeed(count=THOUGHTS, record=True),
    )  # fmt: skip
    prompts = np.asarray(batch["tokens"])[:, : TASK.digits + 1].tolist()
    generation = decoder(view, prompts, key=jax.random.key(0))
    thoughts = jnp.asarray(generation.statistics["thoughts"], jnp.float32)
    fed = batch | {"mixture": batch["mixture"].at[:, TASK.digits + 1 :].set(thoughts)}
    expected = values(DistributionKL(), params, fed)
    found = values(DistributionKL(passes=THOUGHTS), params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # More passes change nothing, fewer leave the last thoughts to the batch.
    more = values(DistributionKL(passes=THOUGHTS + 2), params, batch)
    np.testing.assert_allclose(more, found, rtol=1e-3, atol=1e-4)
    fewer = values(DistributionKL(passes=THOUGHTS - 1), params, batch)
    assert not np.allclose(fewer, found, atol=1e-3)


def test_soft_teaching_reaches_the_parameters_through_what_is_fed(params):
    """The slope of the loss along a direction, which a stopped gradient would miss."""
    batch = batch_of(TASK)
    terms = Objective(terms={"it": Term(loss=DistributionKL(passes=THOUGHTS))})

    @jax.jit
    def mean(params):
        return terms(context(params, batch))["it"].mean()

    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    step = 1e-3
    ahead, behind = (
        float(mean(jax.tree.map(lambda x, d, s=s: x + s * d, params, direction)))
        for s in (step, -step)
    )
    gradient = jax.jit(jax.grad(mean))(params)
    products = jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction)
    slope = (ahead - behind) / (2 * step)
    assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=0.02, abs=0.02)


def test_a_batch_without_a_distribution_is_refused(params):
    batch = batch_of(TASK)
    del batch["distribution"]
    with pytest.raises(UserError, match="no distribution"):
        DistributionKL()(context(params, batch))


def test_advantages_compare_the_rollouts_of_one_prompt():
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    found = group_advantages(rewards)
    np.testing.assert_allclose(found[0], [1, -1, -1, 1], rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_allclose(found[2], np.array([-1, -1, -1, 3]) / 3**0.5, rtol=1e-5)


def test_rollouts_are_scored_by_the_policy_that_drew_them(params):
    """At the first step the ratio is 1, and the gradient that of minus advantage times density."""
    mixture = MeanOfSamples(count=3)
    rows, view = batch_of(TASK), View(model=MODEL, params=params)
    decoder = Autoregressive(
        max_new_tokens=THOUGHTS + 1, end_ids=(),
        feed=ThoughtFeed(count=THOUGHTS, mixture=mixture, record=True),
    )  # fmt: skip
    prompts = np.asarray(rows["tokens"])[:, : TASK.digits + 1].tolist()
    written = decoder(view, prompts, key=jax.random.key(0))
    thoughts = jnp.asarray(written.statistics["thoughts"], jnp.float32)
    answer = jax.nn.one_hot(written.tokens[:, -1:], TASK.tokenizer.vocab_size)
    place = TASK.digits
    batch = rows | {
        "mixture": rows["mixture"].at[:, place + 1 :].set(thoughts),
        "distribution": rows["distribution"]
        .at[:, place:]
        .set(jnp.concatenate([thoughts, answer], axis=1)),
        "thought": jnp.zeros((5, 6)).at[:, place:-1].set(1.0),
        "advantages": jnp.linspace(-1, 1, 5)[:, None] * jnp.ones((1, 6)),
    }
    batch["old_logits"] = jax.jit(lambda p, b: context(p, b).logits())(params, batch)
    term = Objective(terms={"it": Term(loss=MixturePolicy(mixture=mixture))})

    @jax.jit
    def surrogate(params):
        return term(context(params, batch))["it"].total

    @jax.jit
    def density(params):
        new, old = context(params, batch).logits(), batch["old_logits"]
        drawn = batch["distribution"]
        thought = mixture.log_ratio(mixture=drawn[:, 3:5], new=new[:, 3:5], old=old[:, 3:5])
        token = jnp.sum(drawn[:, 5] * jax.nn.log_softmax(new[:, 5]), axis=-1)
        weigh = batch["advantages"][:, 0]
        return -jnp.sum(weigh * (thought.sum(axis=1) + token))

    expected = -float((batch["advantages"] * batch["weights"]).sum())
    assert float(surrogate(params)) == pytest.approx(expected, abs=1e-4)
    left, right = (jax.jit(jax.grad(f))(params) for f in (surrogate, density))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), left, right)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(left)) > 0.01


def test_without_rollouts_there_is_no_policy_gradient(params):
    with pytest.raises(UserError, match="no thought, advantages, old_logits"):
        MixturePolicy()(context(params, batch_of(TASK)))
    with pytest.raises(ValueError, match="above 0"):
        MixturePolicy(clip=0.0)
