"""Accumulation, devices and recompilation: the step is the same function however it is cut."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax

from tokenlab import config
from tokenlab.data import PaddedText
from tokenlab.train.run import Run


def steps(experiment, count):
    run = Run.of(experiment)
    state, data = run.trainer.init(), run.batches()
    losses = []
    for _ in range(count):
        batch = {name: rows for name, rows in next(data).items() if name != "documents"}
        state, metrics = run.trainer.step(state, run.trainer.put(batch))
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
    assert run.trainer.step.cache_size() == 1


def test_losses_fall_and_averaged_parameters_follow(tiny):
    _, state, losses, _ = steps(config.replace(tiny, {"ema_decay": 0.5, "steps": 60}), 60)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
    distance = optax.tree.norm(optax.tree.sub(state.params, state.ema))
    assert 0 < distance < 0.1 * optax.tree.norm(state.params)
    assert state.best_params is state.ema


DEVICES = """
import json, pathlib, sys
import jax, numpy as np
sys.path.insert(0, {checkout!r})
from tokenlab import config
from tokenlab.files import load_module
from tests.train.test_step import steps
tiny = load_module(pathlib.Path({checkout!r}) / "tests/tiny.py").config()
tiny = config.replace(tiny, {overrides!r})
run, state, losses, _ = steps(tiny, 20)
kernel = state.params["block_0"]["feedforward"]["gate"]["kernel"]
print(json.dumps({{
    "devices": jax.device_count(),
    "shards": len({{str(s.index) for s in kernel.addressable_shards}}),
    "losses": losses,
    "params": [np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.params)],
}}))
"""


def test_one_device_and_eight_agree(corpus_folder, request):
    """Data 4 x fsdp 2, in a process of its own, since devices are fixed when JAX starts."""
    checkout = str(request.config.rootpath)
    pattern = str(corpus_folder / "corpus/*.txt")
    results = []
    for devices, mesh in ((1, {}), (8, {"mesh": "MeshShape(data=4, fsdp=2)"})):
        overrides = {"data.corpus.pattern": pattern} | mesh
        script = DEVICES.format(checkout=checkout, overrides=overrides)
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(devices),
            capture_output=True,
            text=True,
            cwd=checkout,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    one, eight = results
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert (one["shards"], eight["shards"]) == (1, 2)
    np.testing.assert_allclose(one["losses"], eight["losses"], rtol=1e-4)
    for a, b in zip(one["params"], eight["params"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-4)


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
