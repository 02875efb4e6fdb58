"""Forgetting touches what it names and nothing else, to the last bit, and resumes exactly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import run_on_devices
from rich.console import Console

from tokenlab import config
from tokenlab.core.duration import Clock, Fraction
from tokenlab.core.errors import UserError
from tokenlab.train.forgetting import Forgetting
from tokenlab.train.loop import train
from tokenlab.train.optimizer import SGD, AdamW, Constant, Cosine, Group, Muon

CLOCK = Clock(tokens_per_step=10, tokens_per_epoch=lambda: 250, total_steps=20)
NEVER = 10**6
BASE = AdamW(learning_rate=Cosine(peak=0.1), b2=0.99, weight_decay=0.1)


def tree(rng, rows=400):
    return {
        "block_0": {"out": {"kernel": jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)}},
        "embedding": jnp.asarray(rng.normal(size=(rows, 6)), jnp.float32),
        "head": {"bias": jnp.asarray(rng.normal(size=(6,)), jnp.float32)},
    }


def run(part, steps=9, seed=0, compiled=False):
    """Parameters and optimiser states after each step; gradients do not depend on them.

    Operation by operation, for a compiler rounds a product and a sum that it fuses only once, and
    fuses others where there is a branch; the compiled step is compared below.
    """
    rng = np.random.default_rng(seed)
    transform = part.build(CLOCK)
    update = jax.jit(transform.update) if compiled else transform.update
    params = tree(rng)
    state = transform.init(params)
    course = [(params, state)]
    for _ in range(steps):
        updates, state = update(tree(rng), state, params)
        params = optax.apply_updates(params, updates)
        course.append((params, state))
    return course


def forgetful(part=BASE, **fields):
    return dataclasses.replace(part, forgetting=Forgetting(**fields))


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def kept(params):
    return {name: leaf for name, leaf in params.items() if name != "embedding"}


def adam(state, label):
    """The moments and the count of one part of the optimiser."""
    part = state.inner[1].inner_states[label]
    (found,) = [
        leaf
        for leaf in jax.tree.leaves(
            part, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByAdamState)
        )
        if isinstance(leaf, optax.ScaleByAdamState)
    ]
    return found


@pytest.mark.parametrize("member", [AdamW, Muon, SGD])
def test_without_a_draw_it_is_ordinary_training(member):
    """To the last bit where the embedding is a group of its own, as a draw needs it.

    In one group with others its quotients by a shared number become products, which the compiler
    rounds otherwise.
    """
    part = member(learning_rate=Cosine(peak=0.1), clip_norm=None)
    apart = dataclasses.replace(
        part, trained=("block_*", "head/*"), groups=(Group(parameters=("emb*",), optimizer=part),)
    )
    vanilla = [params for params, _ in run(apart, steps=6)]
    clipped = dataclasses.replace(part, clip_norm=1.0)
    plain = run(clipped, steps=6)[-1][0]
    for fields in ({"every": NEVER}, {"every": 2, "until": 0}):
        same([params for params, _ in run(forgetful(part, **fields), steps=6)], vanilla)
        found = run(forgetful(clipped, **fields), steps=6)[-1][0]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain
        )


def test_the_compiled_step_is_the_same_up_to_rounding():
    for part in (forgetful(every=NEVER), forgetful(every=3)):
        left, right = (run(part, steps=7, compiled=compiled)[-1] for compiled in (True, False))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), left, right
        )


def test_temporary_forgetting_without_an_end_is_active_forgetting():
    active = run(forgetful(every=3))
    same(run(forgetful(every=3, until=NEVER)), active)
    ended = run(forgetful(every=3, until=6))
    same(ended[:7], active[:7])  # the draw of step 6 makes the state after 7 steps
    assert (ended[7][0]["embedding"] != active[7][0]["embedding"]).all()


def test_a_draw_clears_what_is_named_and_nothing_else():
    vanilla, active = run(forgetful(every=NEVER)), run(forgetful(every=3))
    for step in range(10):
        same(kept(active[step][0]), kept(vanilla[step][0]))
    # The draw is in the place of the update of step 3, so a measurement after 3 steps is before it.
    same(active[3][0], vanilla[3][0])
    params, state = active[4]
    embedding = np.asarray(params["embedding"])
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    assert abs(embedding.mean()) < 0.002
    forgotten, others = adam(state, "forgotten"), adam(state, "kept")
    assert int(forgotten.count) == 0 and int(others.count) == 4
    assert not forgotten.mu["embedding"].any() and not forgotten.nu["embedding"].any()
    same(others, adam(vanilla[4][1], "kept"))
    assert int(active[5][1].step) == 5
    again = np.asarray(active[7][0]["embedding"])
    assert again.std() == pytest.approx(0.02, rel=0.05)
    assert abs(np.corrcoef(again.ravel(), embedding.ravel())[0, 1]) < 0.1


def test_after_a_draw_the_embedding_moves_as_under_a_new_optimizer():
    """With bias correction from one again, but the rate of the whole run."""
    part = dataclasses.replace(BASE, clip_norm=None)
    course = run(forgetful(part, every=3))
    rate = part.learning_rate.build(CLOCK)
    later = dataclasses.replace(part, learning_rate=Constant(peak=1.0))
    transform = later.build(CLOCK)
    value = {"embedding": course[4][0]["embedding"]}
    state = transform.init(value)
    rng = np.random.default_rng(0)
    gradients = [tree(rng)["embedding"] for _ in range(10)][1:]
    for step in (4, 5):
        updates, state = transform.update({"embedding": gradients[step]}, state, value)
        value = jax.tree.map(lambda v, u, s=step: v + rate(s) * u, value, updates)
        np.testing.assert_allclose(
            course[step + 1][0]["embedding"], value["embedding"], rtol=1e-4, atol=1e-6
        )


def test_the_released_code_clears_all_moments():
    everything = run(forgetful(every=3, reset_scope="all"))
    params, state = everything[4]
    same(params, run(forgetful(every=3))[4][0])
    for label in ("forgotten", "kept"):
        found = adam(state, label)
        assert int(found.count) == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves((found.mu, found.nu)))


def test_draws_follow_the_seed_the_pattern_and_the_deviation():
    first, second = (run(forgetful(every=2, seed=seed))[3][0] for seed in (0, 1))
    same(first, run(forgetful(every=2, seed=0))[3][0])
    assert (first["embedding"] != second["embedding"]).all()
    other = run(forgetful(every=2, parameters=("block_*",), deviation=3.0))[3][0]
    assert np.std(other["block_0"]["out"]["kernel"]) == pytest.approx(3.0, rel=0.4)
    np.testing.assert_allclose(
        other["embedding"], run(BASE)[3][0]["embedding"], rtol=1e-5, atol=1e-6
    )
    within = dataclasses.replace(forgetful(every=2), trained=("embedding", "block_*"))
    frozen, unfrozen = run(within)[3][0], run(BASE)[0][0]
    same(frozen["head"], unfrozen["head"])
    assert frozen["embedding"].std() == pytest.approx(0.02, rel=0.05)


def test_impossible_forgetting_is_one_line():
    with pytest.raises(UserError, match="names no parameter by nothing"):
        forgetful(every=2, parameters=("nothing",)).build(CLOCK).init(
            tree(np.random.default_rng(0))
        )
    with pytest.raises(UserError, match="use 1 or more"):
        forgetful(every=0).build(CLOCK)
    part = forgetful(every=Fraction(of_run=0.1), until=Fraction(of_run=0.5), reset_scope="all")
    assert config.load(config.dump(part)) == part and hash(part) == hash(config.replace(part, {}))


def test_a_run_that_forgets_resumes_exactly(tiny, tmp_path):
    experiment = config.replace(
        tiny,
        {
            "optimizer": AdamW(learning_rate=Constant(peak=1e-2), forgetting=Forgetting(every=3)),
            "steps": 8, "evals": {}, "checkpoint.best_metric": None,
        },
    )  # fmt: skip
    quiet = Console(quiet=True)
    straight = train(experiment, tmp_path / "straight", console=quiet)
    train(config.replace(experiment, {"steps": 5}), tmp_path / "cut", console=quiet)
    resumed = train(experiment, tmp_path / "cut", console=quiet)
    same(resumed.state, straight.state)


ON_DEVICES = """
import json
import numpy as np
import tiny
from tokenlab import config
from train.test_step import steps
for overrides in {changes!r}:
    _, state, losses, _ = steps(config.replace(tiny.config(), overrides), 4)
    print(json.dumps([losses, np.asarray(state.params["embedding"]).tolist()]))
"""


@pytest.mark.slow
def test_split_parameters_are_drawn_as_whole_ones_are(corpus_folder):
    forgets = "AdamW(learning_rate=Constant(peak=1e-2), forgetting=Forgetting(every=3))"
    data = {"data.corpus.pattern": str(corpus_folder / "corpus/*.txt"), "optimizer": forgets}
    meshes = [data | {"mesh": f"MeshShape(data=1, fsdp={n})"} for n in (1, 2)]
    found = [
        json.loads(run_on_devices(n + 1, ON_DEVICES.format(changes=[meshes[n]]))) for n in range(2)
    ]
    (losses, whole), (others, split) = found
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-6)
    assert np.std(whole) == pytest.approx(0.02, rel=0.05)
