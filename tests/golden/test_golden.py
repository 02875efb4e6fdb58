"""What each experiment resolves to, kept as text so that a change shows as a diff.

``UPDATE_GOLDEN=1 python -m pytest tests/golden`` writes the files anew; read their diff.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.files import experiment_of
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.mesh import placed_on
from tokenlab.train.run import Run

HERE = pathlib.Path(__file__).resolve().parent
EXPERIMENTS = HERE.parents[1] / "experiments"
FILES = {
    str(path.relative_to(EXPERIMENTS).with_suffix("")).replace(os.sep, "-"): path
    for path in sorted(EXPERIMENTS.rglob("*.py"))
    if "def config(" in path.read_text()
}
every = pytest.mark.parametrize("name", FILES)
MEANING = """{name} changed. A changed field is another experiment: its run folders do not resume
and its recorded results are of the old one. A changed parameter line means that checkpoints of
this model no longer load, or lie on other devices. If that is meant, run
UPDATE_GOLDEN=1 python -m pytest tests/golden
and say in the changelog what became of old runs."""


def parameter_lines(model):
    """``path  shape  dtype  logical axes`` of every parameter."""
    tokens = jnp.zeros((1, 8), int)
    boxed = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )["params"]
    axes = nn.get_partition_spec(boxed)
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed))
    for (path, leaf), names in zip(leaves, jax.tree.leaves(axes), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield f"{name}  {leaf.shape}  {leaf.dtype}  {tuple(names)}"


def resolved(experiment):
    lines = sorted(parameter_lines(experiment.model))
    return "\n".join([json.dumps(config.dump(experiment), indent=1), "", *lines, ""])


def test_there_are_experiments():
    assert "quickstart" in FILES


@every
def test_resolves_to_what_is_on_record(name):
    path, found = HERE / f"{name}.txt", resolved(experiment_of(FILES[name]))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert path.exists() and found == path.read_text(), MEANING.format(name=path.name)


def test_no_record_is_left_of_an_experiment_that_is_gone():
    assert {path.stem for path in HERE.glob("*.txt")} == set(FILES)


@every
def test_the_record_of_the_config_loads_back(name):
    text = (HERE / f"{name}.txt").read_text().partition("\n\n")[0]
    assert config.load(json.loads(text)) == experiment_of(FILES[name])


@every
def test_the_real_step_takes_its_batches_and_gives_back_its_state(name):
    """By shape alone; the byte tokenizer stands in for one that would read a corpus.

    Tasks make their rows, and may have arrays of their own.
    """
    experiment = experiment_of(FILES[name])
    corpora = experiment.data.corpora
    run = Run.of(experiment, tokenizer=ByteTokenizer() if corpora else None)
    trainer = run.trainer
    shape = (experiment.batch_size, experiment.data.tokens_per_row)
    integers = {name: jnp.int32 for name in ("tokens", "targets", "positions", "segments")}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, dtype in (integers | {"weights": jnp.float32}).items()
    }
    if not corpora:
        rows = {name: rows for name, rows in next(run.batches()).items() if name != "documents"}
        assert {name: shape_of(rows[name]) for name in batch} == {
            name: shape_of(each) for name, each in batch.items()
        }
        batch = {name: jax.ShapeDtypeStruct(*shape_of(each)) for name, each in rows.items()}
    before = trainer.abstract_state()
    with placed_on(trainer.mesh):
        after, metrics = jax.eval_shape(trainer._step, before, batch, trainer.frozen)
    assert jax.tree.map(shape_of, after) == jax.tree.map(shape_of, before)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert shape_of(metrics.loss) == ((), jnp.dtype("float32"))
    assert set(metrics.sums) == set(experiment.objective.terms)
    assert metrics.ledger.flops.shape == ()


def shape_of(leaf):
    return leaf.shape, leaf.dtype
