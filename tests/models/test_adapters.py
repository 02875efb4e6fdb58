"""Low-rank adapters: unchanged at the start, frozen below, merged back, saved and resumed."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from flax import linen as nn
from rich.console import Console

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import taken_over
from tokenlab.depth import Sequential
from tokenlab.interop import load_pretrained, save_pretrained
from tokenlab.models import (
    ADAPTERS,
    Forecaster,
    LowRank,
    adapted,
    llama,
    merged,
    unrolled,
    with_adapter,
    with_stand_ins,
)
from tokenlab.models.adapters import drawn
from tokenlab.models.layers import Linear
from tokenlab.train.loop import train
from tokenlab.train.optimizer import Constant
from tokenlab.train.run import Run, open_run

TOKENS = jnp.arange(10)[None]
WHERE = {"positions": TOKENS, "segments": TOKENS * 0 + 1}


def model(scan=False):
    return llama(
        vocab_size=23, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24,
        depth=Sequential(scan=scan),
    )  # fmt: skip


def hidden(network, params):
    return jax.jit(lambda params: network.apply({"params": params}, TOKENS, **WHERE).hidden)(params)


def named(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def moved(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params)


class Holder(nn.Module):
    """A layer that has one projection."""

    adapter: LowRank

    @nn.compact
    def __call__(self, x):
        return Linear(5, adapter=self.adapter, name="layer")(x)


def test_gradients_and_values_are_those_of_the_formula():
    layer = Holder(adapter=LowRank(rank=2, alpha=3.0))
    rng = np.random.default_rng(0)
    w, a, b, x, dy = (
        rng.normal(size=shape) for shape in ((4, 5), (4, 2), (2, 5), (1, 7, 4), (1, 7, 5))
    )
    params = {"layer": {"kernel": w, "adapter": {"a": {"kernel": a}, "b": {"kernel": b}}}}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    y, pullback = jax.vjp(
        lambda params: layer.apply({"params": params}, jnp.asarray(x, jnp.float32)), params
    )
    np.testing.assert_allclose(y[0], x[0] @ (w + 1.5 * a @ b), rtol=1e-4, atol=1e-5)
    by = pullback(jnp.asarray(dy, jnp.float32))[0]["layer"]["adapter"]
    np.testing.assert_allclose(by["a"]["kernel"], 1.5 * x[0].T @ dy[0] @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by["b"]["kernel"], 1.5 * a.T @ x[0].T @ dy[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_the_function_is_the_same_at_the_start_and_after_merging(scan):
    base = model(scan)
    params = drawn(base, jax.random.key(0))
    network, first = adapted(base, params, LowRank(rank=3), key=jax.random.key(1))
    np.testing.assert_array_equal(hidden(network, first), hidden(base, params))
    trained = moved(first)
    plain, weights = merged(network, trained)
    assert plain == base and named(weights).keys() == named(params).keys()
    ours = hidden(network, trained)
    np.testing.assert_allclose(hidden(plain, weights), ours, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - hidden(base, params)).max() > 0.1
    if scan:
        flat, layers = unrolled(network, trained)
        np.testing.assert_allclose(hidden(flat, layers), ours, rtol=1e-4, atol=1e-4)
        merged_flat = merged(flat, layers)[1]
        again = unrolled(plain, weights)[1]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged_flat, again)


def test_units_that_have_stand_ins_are_adapted_themselves_and_merged():
    base = with_stand_ins(model(), mixer=(None,), feedforward=(Forecaster(rank=2),))
    params = drawn(base, jax.random.key(0))
    network, first = adapted(base, params, LowRank(rank=3), key=jax.random.key(1))
    np.testing.assert_array_equal(hidden(network, first), hidden(base, params))
    names = {name for name in named(first) if "/adapter/" in name}
    assert len(names) == 2 * 2 * 7 and all("/unit/" in name for name in names)
    trained = moved(first)
    plain, weights = merged(network, trained)
    assert plain == base and named(weights).keys() == named(params).keys()
    np.testing.assert_allclose(
        hidden(plain, weights), hidden(network, trained), rtol=1e-4, atol=1e-4
    )


def test_targets_say_which_projections_have_adapters_and_what_they_cost():
    network = with_adapter(model(), LowRank(rank=3, targets=("q", "v", "down")))
    names = {
        name.split("/adapter")[0].removeprefix("block_1/")
        for name in named(drawn(network, jax.random.key(0)))
        if "/adapter/" in name and name.startswith("block_1/")
    }
    assert names == {"mixer/q", "mixer/v", "feedforward/down"}
    for part, entries in (("mixer", 3 * (16 + 16) + 3 * (16 + 8)), ("feedforward", 3 * (24 + 16))):
        ours, plain = (getattr(one.block, part).flops(16) for one in (network, model()))
        assert ours - plain == 2 * entries
    with pytest.raises(UserError, match="'gates'"):
        with_adapter(model(), LowRank(targets=("q", "gates")))
    with pytest.raises(UserError, match="same geometry"):
        taken_over({"a": jnp.ones(3)}, {"a": jnp.ones(4)})


@pytest.fixture
def tuned(tiny):
    """A run that trains the adapters of a frozen model alone."""
    adapter = LowRank(rank=2, targets=("q", "k", "v", "out"))
    changes = {
        "model": with_adapter(tiny.model, adapter), "optimizer.trained": ADAPTERS, "steps": 4,
        "checkpoint.every": 2, "evals": {}, "optimizer.learning_rate": Constant(peak=1e-2),
    }  # fmt: skip
    return config.replace(tiny, changes)


def test_training_moves_adapters_alone_and_resumes(tiny, tuned, tmp_path):
    quiet = Console(file=io.StringIO())
    tokenizer = Run.of(tiny).tokenizer
    base = drawn(tiny.model, jax.random.key(7))
    _, first = adapted(tiny.model, base, tuned.model.block.mixer.adapter, key=jax.random.key(8))
    options = {"params": first, "console": quiet}
    outcome = train(tuned, tmp_path / "whole", tokenizer=tokenizer, **options)
    before, after = named(first), named(outcome.state.params)
    for name, leaf in after.items():
        changed = not np.array_equal(leaf, before[name])
        assert changed == ("/adapter/" in name), name
    train(config.replace(tuned, {"steps": 2}), tmp_path / "halves", **options)
    halves = train(tuned, tmp_path / "halves", console=quiet)
    jax.tree.map(np.testing.assert_array_equal, halves.state.params, outcome.state.params)
    run, state = open_run(tmp_path / "whole")
    plain, weights = merged(run.experiment.model, state.params)
    assert plain == tiny.model
    moments = sum(leaf.size for leaf in jax.tree.leaves(outcome.state.opt_state))
    adapters = sum(leaf.size for name, leaf in after.items() if "/adapter/" in name)
    assert moments < 2 * adapters + 10 and outcome.ledger["saved_bytes"] > 0
    assert named(weights).keys() == named(base).keys()


def test_no_gradient_is_computed_of_what_is_frozen(tuned):
    run = Run.of(tuned)
    batch = run.trainer.put(next(run.batches()))
    state = run.trainer.init()
    key = jax.random.key(0)
    grads, _, ledger = jax.jit(lambda p, b: run.trainer._gradient(p, b, key, {}, {}))(
        state.params, batch
    )
    assert all(np.any(leaf) == ("/b/" in name) for name, leaf in named(grads).items())
    whole = Run.of(config.replace(tuned, {"optimizer.trained": ("*",)}))
    _, _, more = jax.jit(lambda p, b: whole.trainer._gradient(p, b, key, {}, {}))(
        state.params, batch
    )
    assert float(ledger.saved_bytes) < 0.9 * float(more.saved_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_published_model_is_adapted_merged_and_saved(dtype, tmp_path):
    source = published.folder("llama", tmp_path / "llama")
    base, params, tokenizer = load_pretrained(source, dtype=dtype)
    network, first = adapted(base, params, LowRank(rank=2), key=jax.random.key(0))
    np.testing.assert_array_equal(hidden(network, first), hidden(base, params))
    trained = moved(first)
    with pytest.raises(UserError, match="merged"):
        save_pretrained(tmp_path / "out", network, trained)
    plain, weights = merged(network, trained)
    save_pretrained(tmp_path / "out", plain, weights, tokenizer)
    again = load_pretrained(tmp_path / "out", dtype=dtype)
    assert again.model == base
    jax.tree.map(np.testing.assert_array_equal, again.params, weights)
    ours = np.asarray(hidden(network, trained), np.float32)
    atol = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(
        np.asarray(hidden(again.model, again.params), np.float32), ours, atol=atol
    )
