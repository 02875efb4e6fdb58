"""Accumulation, devices and recompilation: the step is the same function however it is cut."""

import itertools
import json

import jax
import numpy as np
import optax
import pytest
from devices import run_on_devices

from tokenlab import config
from tokenlab.data import PaddedText
from tokenlab.train.run import Run


def steps(experiment, count):
    run = Run.of(experiment)
    state, losses = run.trainer.init(), []
    for after, metrics in run.steps(state, last=count):
        state = after
        losses.append(float(metrics.loss))
    return run, state, losses, metrics


def test_accumulated_micro_batches_equal_the_full_batch(tiny):
    # Padding makes the micro-batches weigh differently, which is where mean-of-means goes wrong.
    padded = config.replace(tiny, {"data": padded_source(tiny)})
    _, whole, losses, metrics = steps(padded, 20)
    _, parts, losses_of_parts, metrics_of_parts = steps(
        config.replace(padded, {"accumulation": 4}), 20
    )
    np.testing.assert_allclose(losses, losses_of_parts, rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        whole.params,
        parts.params,
    )
    # The two count every forward pass alike, but for the number of passes.
    one, four = metrics.ledger, metrics_of_parts.ledger
    assert float(four.passes) == 4 and float(one.passes) == 1
    np.testing.assert_allclose(four.flops, one.flops, rtol=1e-6)
    np.testing.assert_allclose(four.tokens, one.tokens)
    weights = [float(rows.weight) for rows in metrics.sums.values()]
    assert weights == [float(rows.weight) for rows in metrics_of_parts.sums.values()]


def test_sums_per_recursion_accumulate_one_by_one(tiny):
    """A router reports one sum for each recursion; micro-batches must not add those up."""
    mixture = config.replace(
        tiny,
        {
            "data": padded_source(tiny),
            "model.num_layers": 5,
            "model.depth": "MixtureOfRecursions(recursions=3)",
            "objective.terms.router": "AuxiliaryTerm(name='membership', coefficient=0.5)",
        },
    )
    _, whole, losses, metrics = steps(mixture, 3)
    _, parts, losses_of_parts, metrics_of_parts = steps(
        config.replace(mixture, {"accumulation": 4}), 3
    )
    np.testing.assert_allclose(losses, losses_of_parts, rtol=2e-5)
    for name in ("total", "weight"):
        one, four = (getattr(m.sums["router"], name) for m in (metrics, metrics_of_parts))
        assert one.shape == four.shape == (3,)
        np.testing.assert_allclose(one, four, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        whole.params,
        parts.params,
    )


def padded_source(experiment):
    return PaddedText(corpus=experiment.data.corpus, length=32)


def test_the_second_step_compiles_nothing(tiny):
    run, *_ = steps(tiny, 3)
    assert run.trainer.jitted._cache_size() == 1


def test_steps_of_given_rows_are_those_of_the_run_and_leave_the_rest(tiny):
    run = Run.of(tiny)
    rows = iter(list(itertools.islice(run.batches(), 5)))

    def losses(**options):
        return [float(metrics.loss) for _, metrics in run.steps(run.trainer.init(), **options)]

    assert losses(last=3, batches=rows) == losses(last=3)
    assert len(list(rows)) == 2


def test_losses_fall_and_averaged_parameters_follow(tiny):
    _, state, losses, _ = steps(config.replace(tiny, {"ema_decay": 0.5, "steps": 60}), 60)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    distance = optax.tree.norm(optax.tree.sub(state.params, state.ema))
    assert 0 < distance < 0.1 * optax.tree.norm(state.params)
    assert state.best_params is state.ema


DEVICES = """
import json
import jax, numpy as np
import tiny
from tokenlab import config
from train.test_step import steps
for overrides in {changes!r}:
    run, state, losses, _ = steps(config.replace(tiny.config(), overrides), 20)
    kernel = state.params["block_0"]["feedforward"]["gate"]["kernel"]
    print(json.dumps({{
        "devices": jax.device_count(),
        "shards": len({{str(s.index) for s in kernel.addressable_shards}}),
        "losses": losses,
        "params": [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.params)],
    }}))
"""
ALL_AXES = {"MeshShape(fsdp=2, data=1, tensor=2, sequence=2)": 4}
MESHES = {"MeshShape(data=4, fsdp=2)": 2, "MeshShape(data=4, tensor=2)": 2, **ALL_AXES}


@pytest.mark.parametrize(
    ("depth", "arrangements"),
    [
        ("Sequential()", MESHES),
        ("MixtureOfRecursions(recursions=2, sharing='cycle')", ALL_AXES),
        pytest.param(
            "MixtureOfRecursions(recursions=2, sharing='cycle')", MESHES, marks=pytest.mark.slow
        ),
        pytest.param(
            "MixtureOfRecursions(recursions=2, sharing='cycle', warmup=Fraction(of_run=0.1))",
            ALL_AXES,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_device_and_eight_agree(corpus_folder, depth, arrangements):
    """However they are arranged; heads, vocabulary, rows and positions are each split once."""
    data = {
        "data.corpus.pattern": str(corpus_folder / "corpus/*.txt"),
        "model.block.mixer": "Attention(num_heads=4, num_kv_heads=2)",
        "model.depth": depth,
    }
    meshes = [data | {"mesh": mesh} for mesh in arrangements]
    (one,) = map(json.loads, run_on_devices(1, DEVICES.format(changes=[data])).splitlines())
    eight = list(map(json.loads, run_on_devices(8, DEVICES.format(changes=meshes)).splitlines()))
    assert (one["devices"], one["shards"]) == (1, 1)
    for other, shards in zip(eight, arrangements.values(), strict=True):
        assert (other["devices"], other["shards"]) == (8, shards)
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-4)
        for a, b in zip(one["params"], other["params"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-4)
