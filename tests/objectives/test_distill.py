"""Distillation: errors by hand, no gradient to the teacher, stages that train what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.data import TaskSource
from tokenlab.data.tasks import GridQuestions
from tokenlab.depth import Sequential
from tokenlab.experiment import Experiment
from tokenlab.models import Grid, LowRank, Window, linmu, llama, with_teacher
from tokenlab.objectives import Objective, StreamError, TeacherKL, Term
from tokenlab.train.optimizer import AdamW, Constant
from tokenlab.train.run import Run

TASK = GridQuestions(height=4, width=4, landmarks=1, colours=4, most_red=2)
SOURCE = TaskSource(task=TASK, prompts=True)
TEACHER = llama(
    vocab_size=TASK.tokenizer.vocab_size, dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
    hidden_dim=24,
)  # fmt: skip
STUDENT = linmu(
    TEACHER, grid=Grid(height=4, width=4), window=Window(frames=1, height=2, width=2),
    adapter=LowRank(rank=2),
)  # fmt: skip
LOSSES = Objective(terms={"streams": StreamError(), "teacher": Term(loss=TeacherKL())})


def batch(rows=4):
    found = next(iter(SOURCE.batches(tokenizer=TASK.tokenizer, batch_size=rows, seed=0)))
    return {name: jnp.asarray(array) for name, array in found.items()}


def started(model, seed=0):
    ids = jnp.zeros((1, 8), int)
    init = jax.jit(lambda key: model.init(key, ids, positions=ids, segments=ids + 1))
    return nn.meta.unbox(init(jax.random.key(seed))["params"])


@pytest.fixture(scope="module")
def views():
    theirs = started(TEACHER)
    student = View(model=STUDENT, params=with_teacher(started(STUDENT, seed=1), theirs))
    return {"policy": student, "teacher": View(model=TEACHER, params=theirs)}


def test_errors_of_streams_equal_a_pass_layer_by_layer(views):
    """Each block is run by itself; padding does not count, other tokens do whatever they weigh."""
    rows = batch()
    rows["segments"] = rows["segments"].at[1, -3:].set(0)
    rows["weights"] = jnp.zeros_like(rows["weights"])
    found = jax.jit(lambda rows: StreamError()(Context(batch=rows, views=views)))(rows)
    where = {name: rows[name] for name in ("positions", "segments", "prompt")}
    streams = {}
    for name, view in views.items():
        kinds = view.model.block.kinds()
        x = jnp.take(view.params["embedding"], rows["tokens"], axis=0)
        streams[name] = []
        for i in range(2):
            layer = {"params": view.params[f"block_{i}"]}
            x, _ = jax.jit(kinds[i % len(kinds)].apply)(layer, x, **where)
            streams[name].append(np.asarray(x, np.float64))
    error = np.mean(
        [
            ((ours - theirs) ** 2).sum(axis=-1) / (theirs**2).sum(axis=-1)
            for ours, theirs in zip(streams["policy"], streams["teacher"], strict=True)
        ],
        axis=0,
    )
    real = np.asarray(rows["segments"]) > 0
    np.testing.assert_allclose(found.total, error[real].sum(), rtol=1e-4)
    assert float(found.weight) == real.sum() == rows["tokens"].size - 3


def test_a_model_is_no_distance_from_itself_and_the_teacher_gets_no_gradient(views):
    rows, student = batch(), views["policy"]

    def total(params, teacher):
        both = {
            "policy": View(model=STUDENT, params=params),
            "teacher": View(model=TEACHER, params=teacher),
        }
        sums = LOSSES(Context(batch=rows, views=both))
        return LOSSES.value(sums)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(student.params, views["teacher"].params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(slopes[0]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes[1]))
    same = {"policy": views["teacher"], "teacher": views["teacher"]}
    sums = jax.jit(lambda rows: LOSSES(Context(batch=rows, views=same)))(rows)
    np.testing.assert_allclose([float(part.mean()) for part in sums.values()], 0, atol=1e-6)


def test_what_cannot_be_compared_is_refused(views):
    other = llama(
        vocab_size=TASK.tokenizer.vocab_size, dim=8, num_layers=2, num_heads=2, num_kv_heads=1,
        hidden_dim=24,
    )  # fmt: skip
    scanned = TEACHER.clone(depth=Sequential(scan=True))

    def compared(model):
        def total(rows):
            policy = View(model=model, params=started(model))
            return StreamError()(Context(batch=rows, views=views | {"policy": policy}))

        return jax.eval_shape(total, batch())

    with pytest.raises(UserError, match="compares equal ones"):
        compared(other)
    with pytest.raises(UserError, match=r"set model\.depth\.scan=False"):
        compared(scanned)


def test_a_stage_trains_what_it_names_and_nothing_else(views):
    teacher = TEACHER.clone(num_layers=1)
    theirs = {name: views["teacher"].params[name] for name in ("embedding", "block_0", "norm")}
    student = linmu(
        teacher, grid=Grid(height=4, width=4), window=Window(frames=1, height=2, width=2),
        adapter=LowRank(rank=2),
    )  # fmt: skip
    experiment = Experiment(
        name="stage",
        tokenizer=TASK.tokenizer,
        data=SOURCE,
        batch_size=4,
        model=student,
        objective=LOSSES,
        optimizer=AdamW(learning_rate=Constant(peak=1e-2), trained=("*/flex/*", "*/combine/*")),
        steps=8,
    )
    run = Run.of(experiment, views={"teacher": View(model=teacher, params=theirs)})
    params = with_teacher(started(student), theirs)
    before = jax.device_get(params)
    state, losses = run.trainer.init(params), []
    for _ in range(8):
        state, metrics = run.trainer.step(state, run.trainer.put(batch()))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
    after = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    for (path, leaf), old in zip(after, jax.tree.leaves(before), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        trained = "/flex/" in name or "/combine/" in name
        assert np.array_equal(leaf, old) != trained, name
    assert run.trainer.jitted._cache_size() == 1
