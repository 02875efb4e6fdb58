"""Gates by hand, sizes, a dense twin, the ledger, shared parameters, causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.depth import MixtureOfRecursions, Recursive
from tokenlab.models import llama
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term


class Identity(nn.Module):
    """A block that changes nothing."""

    @nn.nowrap
    def kinds(self):
        return (self,)

    @nn.compact
    def __call__(self, x, *, positions, segments, cache=None, train=False):
        return x, cache


class Host(nn.Module):
    """Owns a depth program and its block, as a model does."""

    depth: MixtureOfRecursions
    block: nn.Module
    layers: int

    @nn.compact
    def __call__(self, x, *, segments):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        return self.depth(
            x, self.block, num_layers=self.layers, positions=positions, segments=segments
        )


def zero_routers(length, recursions=3):
    depth = MixtureOfRecursions(recursions=recursions, sharing="cycle")
    host = Host(depth=depth, block=Identity(), layers=recursions)
    x = jax.random.normal(jax.random.key(0), (2, length, 8))
    segments = jnp.ones((2, length), jnp.int32)
    params = nn.meta.unbox(host.init(jax.random.key(1), x, segments=segments))
    params = jax.tree.map(jnp.zeros_like, params)
    return x, *host.apply(params, x, segments=segments)


def test_gates_of_one_half_multiply_once_per_recursion():
    x, out, trace, _ = zero_routers(12)
    times = np.asarray(trace.depth)
    assert sorted(set(times.ravel())) == [1, 2, 3]
    np.testing.assert_allclose(out, np.asarray(x) * 1.05 ** times[:, :, None], rtol=1e-6)


@pytest.mark.parametrize(
    ("length", "sizes"), [(12, (12, 8, 4)), (64, (64, 42, 21)), (2, (2, 1, 1))]
)
def test_each_recursion_keeps_its_share_of_those_before(length, sizes):
    _, _, trace, _ = zero_routers(length)
    np.testing.assert_array_equal(trace.active.sum(axis=2), [[size] * 2 for size in sizes])
    for before, after in zip(trace.active, trace.active[1:], strict=False):
        assert not np.any(after & ~before)


def small(recursions=3, layers=5, **depth):
    return llama(
        vocab_size=29, dim=16, num_layers=layers, num_heads=2, num_kv_heads=1, hidden_dim=24,
        depth=MixtureOfRecursions(recursions=recursions, **depth),
    )  # fmt: skip


def packed(lengths=((9, 8), (12,)), width=18, seed=0):
    """Rows of documents; what is left of a row is padding."""
    tokens = np.random.default_rng(seed).integers(0, 29, (len(lengths), width))
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, row_lengths in enumerate(lengths):
        at = 0
        for number, length in enumerate(row_lengths, start=1):
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = number
            at += length
    return {"tokens": tokens, "positions": positions, "segments": segments}


def initialised(model, seed=0):
    """Random parameters, large enough that routers differ from each other."""
    batch = packed()
    shapes = jax.eval_shape(lambda: call(model, None, batch))
    leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes["params"]))
    rng = np.random.default_rng(seed)
    made = [jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, made)


def call(model, params, batch):
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    return _call(model, params, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _call(model, params, arrays):
    arrays = dict(arrays)
    tokens = arrays.pop("tokens")
    if params is None:
        return model.init(jax.random.key(0), tokens, **arrays)
    return model.apply({"params": params}, tokens, **arrays)


def dense(model, params, batch, active):
    """Runs the block on every row, with keys masked to those kept, and takes what was kept."""
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    block, positions = model.block, arrays["positions"]

    def layer(name, x, kept):
        segments = jnp.where(kept, arrays["segments"], 0)
        options = {"positions": positions, "segments": segments}
        return block.apply({"params": params[name]}, x, **options)[0]

    valid = arrays["segments"] > 0
    x = layer("block_first", params["embedding"][arrays["tokens"]], valid)
    for r in range(model.depth.recursions):
        kept = active[1 + r]
        score = x @ params["depth"][f"router_{r}"]["scores"]["kernel"][:, 0]
        gate = 0.1 / (1 + jnp.exp(-score))
        update = gate[:, :, None] * layer("block_0", x, kept)
        x = jnp.where(kept[:, :, None], x + update, x)
    x = layer("block_last", x, valid)
    return model.norm.apply({"params": params["norm"]}, x)


def test_gathered_tokens_equal_the_dense_run_in_value_and_gradient():
    model, batch = small(), packed()
    params = initialised(model)
    valid = jnp.asarray(batch["segments"] > 0)[:, :, None]
    active = call(model, params, batch).trace.active
    weights = jax.random.normal(jax.random.key(3), (2, 18, 16))

    def loss(run):
        return lambda p: jnp.sum(jnp.where(valid, run(p) * weights, 0))

    ours = jax.jit(jax.value_and_grad(loss(lambda p: call(model, p, batch).hidden)))(params)
    twin = jax.jit(jax.value_and_grad(loss(lambda p: dense(model, p, batch, active))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), ours, twin)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(ours[1]["depth"]))


@pytest.mark.parametrize(
    "recursions",
    [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_the_ledger_is_what_the_card_says(recursions):
    length = 12 * 20
    mixture = small(recursions, layers=recursions, sharing="cycle")
    fixed = mixture.clone(depth=Recursive(recursions=recursions, sharing="cycle"))
    batch = packed(lengths=((length,),), width=length)
    where = {name: jnp.asarray(batch[name]) for name in ("positions", "segments")}
    params = initialised(mixture)
    ours, full = (
        model.ledger(call(model, params, batch).trace, **where) for model in (mixture, fixed)
    )
    assert float(ours.block_tokens / full.block_tokens) == pytest.approx(
        (recursions + 1) / (2 * recursions)
    )
    quadratic = sum((r / recursions) ** 2 for r in range(1, recursions + 1)) / recursions
    ratio = float(ours.attended_pairs / full.attended_pairs)
    assert ratio == pytest.approx(quadratic, abs=2 / length)
    if recursions == 3:
        assert ratio == pytest.approx(14 / 27, abs=2 / length)


@pytest.mark.parametrize("program", [Recursive, MixtureOfRecursions])
def test_parameters_do_not_grow_with_recursions(program):
    def size(recursions):
        model = small(recursions, layers=2 + recursions).clone(depth=program(recursions=recursions))
        params = initialised(model)
        routers = params.pop("depth", {})
        assert len(routers) == (recursions if program is MixtureOfRecursions else 0)
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert size(2) == size(3) == size(4)


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="leaves 4 layers, which are not a multiple of"):
        initialised(small(recursions=3, layers=6))


def moved(model, params, at=6):
    """Largest change of what comes before token ``at`` when that token and all later change."""
    batch = packed(lengths=((18,),))
    other = dict(batch, tokens=batch["tokens"].copy())
    other["tokens"][:, at:] = (other["tokens"][:, at:] + 7) % 29
    before, after = (call(model, params, b).hidden[:, :at] for b in (batch, other))
    return float(jnp.abs(before - after).max())


def test_the_causal_twin_never_looks_ahead_and_the_choice_of_experts_does():
    model = small()
    seen = {"causal": [], "choice": []}
    for seed in range(5):
        params = initialised(model, seed)
        seen["choice"].append(moved(model, params))
        seen["causal"].append(moved(model.causal_twin(), params))
    assert max(seen["causal"]) == 0
    assert max(seen["choice"]) > 1e-3
    assert not model.depth.router.causal and model.causal_twin().depth.router.causal
    assert model.causal_twin().causal_twin() == model.causal_twin()


def test_padding_and_neighbours_change_nothing():
    """Also the choice of tokens: a padded row keeps the share of its own tokens."""
    model = small()
    params = initialised(model)
    together = call(model, params, packed())
    alone = packed(lengths=((12,),), width=12)
    alone["tokens"] = packed()["tokens"][1:, :12]
    single = call(model, params, alone)
    np.testing.assert_allclose(together.hidden[1:, :12], single.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together.trace.depth[1:, :12], single.trace.depth)
    assert not np.any(together.trace.depth[1:, 12:])


def test_the_objective_adds_the_mean_membership_loss_of_every_recursion():
    model, batch = small(), packed()
    params = initialised(model)
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    arrays |= {"targets": arrays["tokens"], "weights": (arrays["segments"] > 0).astype("float32")}
    term = AuxiliaryTerm(name="membership", coefficient=0.25)
    objective = Objective(terms={"next_token": Term(loss=NextToken()), "router": term})
    context = Context(batch=arrays, views={"policy": View(model=model, params=params)})
    sums = objective(context)
    trace = context.output().trace
    before = jnp.concatenate([(arrays["segments"] > 0)[None], trace.active[1:3]])
    expected = 0.0
    aux = trace.aux["membership"]
    np.testing.assert_array_equal(aux.weight, before.sum(axis=(1, 2)))
    expected = float(np.sum(np.asarray(aux.total) / np.asarray(aux.weight)))
    assert float(sums["router"].mean()) == pytest.approx(expected, rel=1e-6)
    value = float(sums["next_token"].mean()) + 0.25 * expected
    assert float(objective.value(sums)) == pytest.approx(value, rel=1e-6)
    with pytest.raises(UserError, match="no loss 'balance'; it has membership"):
        Objective(terms={"x": config.replace(term, {"name": "balance"})})(context)
