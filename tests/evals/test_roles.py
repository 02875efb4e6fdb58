"""Scores of planted strategies, untrained words read anew, and the probe on planted classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.block_sparse_attention import Bidirectional
from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.data.tasks import RoleGrammar, TaskSource
from tokenlab.evals import ObjectiveValue, RoleAccuracy, class_probe
from tokenlab.evals.roles import right
from tokenlab.models import Attention, Block, SwiGLU, Transformer
from tokenlab.objectives import NextToken, Objective, Term

TASK = RoleGrammar(words=100)
MODEL = Transformer(
    vocab_size=TASK.tokenizer.vocab_size, dim=8, num_layers=1,
    block=Block(
        mixer=Attention(num_heads=1, num_kv_heads=1, rule=Bidirectional()),
        feedforward=SwiGLU(hidden_dim=8),
    ),
)  # fmt: skip


@functools.cache
def params():
    ids = jnp.zeros((1, 7), int)
    init = jax.jit(lambda key: MODEL.init(key, ids, positions=ids, segments=ids + 1))
    return nn.meta.unbox(init(jax.random.key(0))["params"])


def planted(batch, answers):
    """Scores that prefer ``answers``, and of all tokens the mask, which is no word."""
    scores = np.zeros((*batch.tokens.shape, TASK.tokenizer.vocab_size))
    scores[..., -1] = 2.0
    np.put_along_axis(scores[:, 4:], answers[..., None], 1.0, axis=2)
    return scores


@pytest.mark.parametrize("name", ["val", "switch", "holdout"])
def test_of_two_words_the_better_one_counts_and_all_three_have_to_be_right(name):
    batch = TASK.evaluation(name).sample(seed=0, count=200)
    scores = planted(batch, batch.targets[:, 4:])
    of_two, of_all = right(scores, batch)
    assert of_two.all() and not of_all.any()
    scores[..., -1] = 0.0
    assert right(scores, batch)[1].all()
    one = batch.targets[:, 4:].copy()
    words = np.sort(batch.tokens[:, :3], axis=1)[:, :2]
    one[:, 1] = np.where(one[:, 1] == words[:, 0], words[:, 1], words[:, 0])
    different = words[:, 0] != words[:, 1]
    of_two, _ = right(planted(batch, one), batch)
    np.testing.assert_array_equal(of_two, ~different)


def test_a_model_reads_both_ways_and_untrained_words_are_read_anew():
    evaluation = RoleAccuracy(task=TASK, rows=64)
    run = functools.partial(evaluation, model=MODEL, tokenizer=TASK.tokenizer)
    figures = run(params=params())
    assert set(figures) == {"class_probe"} | {
        name + full
        for name in ("val", "switch", "head", "head_switch", "tail", "tail_switch", "holdout")
        for full in ("", "_full")
    }
    spoiled = params() | {
        "embedding": params()["embedding"].at[jnp.asarray(TASK.unseen_ids())].set(jnp.nan)
    }
    assert run(params=spoiled) == figures
    batch = TASK.sample(seed=0, count=4)
    where = {name: jnp.asarray(getattr(batch, name)) for name in ("positions", "segments")}
    apply = jax.jit(lambda tokens: MODEL.apply({"params": params()}, tokens, **where).hidden)
    other = batch.tokens.copy()
    other[:, 3] = TASK.class_ids()[0][7]
    changed = np.abs(np.asarray(apply(batch.tokens) - apply(other))).max(axis=2)
    assert (changed[:, 0] > 0).all()
    assert config.load(config.dump(evaluation)) == evaluation


def test_targets_that_are_not_masked_do_not_count():
    batch = TASK.sample(seed=0, count=8)._asdict()
    batch = {name: jnp.asarray(rows) for name, rows in batch.items() if rows is not None}
    term = Objective(terms={"masked": Term(loss=NextToken())})

    @jax.jit
    def value(batch):
        views = {"policy": View(model=MODEL, params=params())}
        return term(Context(batch=batch, views=views))["masked"].mean()

    other = batch | {"targets": batch["targets"].at[:, :4].set(5)}
    assert float(value(batch)) == float(value(other))


def test_the_probe_finds_planted_classes_and_nothing_else():
    rng = np.random.default_rng(0)
    embedding, classes = rng.normal(size=(403, 16)), (tuple(range(3, 203)), tuple(range(203, 403)))
    assert class_probe(embedding, classes) == pytest.approx(0.5, abs=0.12)
    embedding[203:, 5] += 8.0
    assert class_probe(embedding, classes) > 0.99


def test_the_value_of_an_objective_is_its_mean_over_all_rows():
    objective = Objective(terms={"masked": Term(loss=NextToken())})
    parts = {"objective": objective, "data": TaskSource(task=TASK, split="held_out")}
    run = {"model": MODEL, "params": params(), "tokenizer": TASK.tokenizer}
    small = ObjectiveValue(batches=4, batch_size=8, **parts)(**run)
    whole = ObjectiveValue(batches=1, batch_size=32, **parts)(**run)
    assert small["masked"] == pytest.approx(whole["masked"], rel=1e-5)
    assert small["masked"] == pytest.approx(np.log(TASK.tokenizer.vocab_size), rel=0.1)
