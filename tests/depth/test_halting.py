"""Loops that tokens leave: chances by hand, plain loops bit for bit, dense runs, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.depth.looped import VOCABULARY, attention, params_of, ragged, read, run
from tokenlab import config
from tokenlab.cache import FullCache
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.depth import EarlyHalting, FixedHalting, HaltingLoop, OnlineHalting, Recursive
from tokenlab.depth.halting import geometric
from tokenlab.models import LinearHead, llama
from tokenlab.objectives import AuxiliaryTerm, ExpectedNextToken, NextToken, Objective, Term

POLICIES = {"early": EarlyHalting(), "online": OnlineHalting(bias=-1.0)}
both = pytest.mark.parametrize("policy", POLICIES)


def slow_ones(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# One rule where the other makes no difference that a shorter test would miss.
either = pytest.mark.parametrize("policy", [*slow_ones("early"), "online"])
LENGTHS = (14, 9, 1)


def model_of(halting, *, layers=7, recursions=4, **depth):
    """A layer before the loop, one in it, two behind it; grouped queries."""
    program = HaltingLoop(
        **({"halting": halting, "recursions": recursions, "prelude": 1, "coda": 2} | depth)
    )
    return llama(
        vocab_size=VOCABULARY, dim=16, num_layers=layers, num_heads=4, num_kv_heads=2,
        hidden_dim=16, depth=program, max_length=64, head=LinearHead(),
    )  # fmt: skip


@functools.cache
def case(policy, **depth):
    """A model and parameters under which tokens stop at every depth."""
    model = model_of(POLICIES[policy], **depth)
    params = dict(params_of(model, seed=2))
    own = dict(params["depth"])
    own["decision"] = jax.tree.map(lambda leaf: 12 * leaf, own["decision"])
    return model, params | {"depth": own}


def test_chances_are_the_worked_ones():
    def chances(stop, depths):
        stop = jnp.asarray(stop)
        return geometric(jnp.log(stop) - jnp.log1p(-stop), depths=depths)

    def expected(stop, depths):
        return jnp.sum(chances(stop, depths) * jnp.arange(1, depths + 1))

    np.testing.assert_allclose(chances([0.5, 0.5], 3), [0.5, 0.25, 0.25], rtol=1e-6)
    assert float(expected([0.5, 0.5], 3)) == pytest.approx(1.75)
    # The chance to stop behind the last recursion has nothing to decide.
    slope = jax.grad(lambda s: expected(s[:2], 3))(jnp.asarray([0.5, 0.5, 0.5]))
    np.testing.assert_allclose(slope, [-1.5, -0.5, 0], rtol=1e-5)
    np.testing.assert_allclose(chances([0.2] * 3, 4), [0.2, 0.16, 0.128, 0.512], rtol=1e-6)
    assert float(expected([0.2] * 3, 4)) == pytest.approx(2.952)
    extreme = chances([1e-30, 1 - 1e-7], 3)
    assert np.isfinite(extreme).all() and float(extreme.sum()) == pytest.approx(1)


@pytest.mark.parametrize("readout", ["mixture", "hard", "expected_loss"])
@pytest.mark.parametrize("depth", [*slow_ones(2), 4])
def test_one_depth_for_all_is_the_plain_loop_bit_for_bit(readout, depth):
    """And the last depth is the loop of fixed depth. Sums are in another order where tokens are
    compacted, or the coda runs on all depths at once."""
    forced = model_of(FixedHalting(depth=depth), readout=readout, inject="none", coda=1, layers=6)
    plain = forced.clone(
        num_layers=2 + depth, depth=Recursive(recursions=depth, sharing="middle_cycle")
    )
    params, batch = params_of(plain), ragged(LENGTHS, 14)
    (ours, out), (theirs, _) = run(forced, params, *batch), run(plain, params, *batch)
    real = np.asarray(batch[2]) > 0
    tolerance = 0 if readout == "mixture" else 1e-6
    np.testing.assert_allclose(
        np.asarray(ours)[real], np.asarray(theirs)[real], rtol=0, atol=tolerance
    )
    ran = 2 + (depth if readout == "hard" else 4)
    np.testing.assert_array_equal(out.trace.depth, ran * real)


def projected(block, own, normed, heads):
    shape = (*normed.shape[:2], heads.num_kv_heads, -1)
    return tuple((normed @ own["mixer"][name]["kernel"]).reshape(shape) for name in "kv")


def dense(model, params, batch):
    """All through all recursions; ``h_d = where(d <= d_t, R(.), h_{d-1})``, keys likewise."""
    tokens, positions, segments = batch
    block, depth, heads = model.block, model.depth, model.block.mixer.heads(model.dim)
    shown = (positions[:, :, None] >= positions[:, None]) & (segments[:, None] > 0)
    shown &= segments[:, :, None] == segments[:, None]

    def layer(name, x, keys):
        own = params[name]
        normed = block.norm.apply({"params": own["mixer_norm"]}, x)
        mine = keys(projected(block, own, normed, heads))
        x = x + attention(own["mixer"], heads, normed, mine, positions, shown)
        normed = block.norm.apply({"params": own["feedforward_norm"]}, x)
        return x + block.feedforward.apply({"params": own["feedforward"]}, normed)

    start = layer("block_first", params["embedding"][tokens], lambda own: own)
    decision = {"params": params["depth"]["decision"]}
    states, going, left = [start], segments > 0, None
    depths = np.zeros(tokens.shape, int)
    for d in range(1, depth.recursions + 1):
        there, entering = going[..., None], states[-1]
        if depth.inject == "add":
            entering = entering + start
        if depth.inject == "concat":
            entering = jnp.concatenate([entering, start], axis=-1) @ params["depth"]["inject"]

        def keys(own, going=going):
            nonlocal left
            if left is not None:
                own = tuple(
                    jnp.where(going[..., None, None], a, b) for a, b in zip(own, left, strict=True)
                )
            left = own
            return own

        states.append(jnp.where(there, layer("block_0", entering, keys), states[-1]))
        depths = depths + np.asarray(going)
        chances = depth.halting.apply(decision, states, depths=depth.recursions)
        going = going & ~depth.halting.stopped(chances, depth=d)
    x = states[-1]
    for i in range(depth.coda):
        x = layer(f"block_last_{i}", x, lambda own: own)
    return model.norm.apply({"params": params["norm"]}, x), depths


@both
@pytest.mark.parametrize("inject", ["none", *slow_ones("add", "concat")])
def test_compacted_tokens_equal_the_masked_dense_run(policy, inject):
    model, params = case(policy, inject=inject)
    model, batch = model.causal_twin(), ragged(LENGTHS, 14)
    _, out = run(model, params, *batch)
    hidden, depths = dense(model, params, batch)
    real = np.asarray(batch[2]) > 0
    assert len(set(depths[real])) >= 3
    np.testing.assert_array_equal(out.trace.figures["recursions"][0], depths)
    np.testing.assert_allclose(np.asarray(out.hidden)[real], np.asarray(hidden)[real], atol=1e-5)


@either
def test_a_row_is_read_the_same_however_it_is_cut(policy):
    model, params = case(policy)
    model, batch = model.causal_twin(), ragged(LENGTHS, 14)
    whole, out = run(model, params, *batch)
    found, _ = read(model, params, FullCache(), batch, (6, 4, 1, 1, 1, 1))
    real = np.asarray(batch[2]) > 0
    np.testing.assert_allclose(found[real], np.asarray(whole)[real], atol=1e-4)
    entered = np.asarray(out.trace.active)[1:5].sum(axis=2)
    assert (np.diff(entered[:, 0]) < 0).any() and (np.diff(entered, axis=0) <= 0).all()


@either
def test_decoding_writes_what_one_pass_says_and_counts_what_was_entered(policy):
    model, params = case(policy)
    prompts = [[1, 4, 9, 2, 7], [3], [5, 5, 6]]
    decoder = Autoregressive(sampler=Greedy(), max_new_tokens=6, end_ids=(), prefill_chunk=4)
    found = decoder(View(model=model, params=params), prompts, key=jax.random.key(0))
    texts = [[*p, *row] for p, row in zip(prompts, found.tokens.tolist(), strict=True)]
    tokens, positions, segments = ragged([len(text) for text in texts], 11)
    tokens = np.zeros(tokens.shape, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    logits, out = run(model.causal_twin(), params, tokens, positions, segments)
    for i, prompt in enumerate(prompts):
        best = np.asarray(logits)[i, len(prompt) - 1 : len(prompt) + 5].argmax(axis=1)
        np.testing.assert_array_equal(found.tokens[i], best)
    ran = int(np.asarray(out.trace.active).sum())
    assert found.ledger.block_tokens == ran < 7 * sum(len(text) for text in texts)
    where = {"positions": positions, "segments": segments}
    assert model.causal_twin().ledger(out.trace, **where).block_tokens == ran


def context_of(model, params, *, train=False, seed=0):
    tokens, positions, segments = ragged(LENGTHS, 14)
    batch = {
        "tokens": tokens, "positions": positions, "segments": segments,
        "targets": jnp.roll(tokens, -1, axis=1), "weights": (segments > 0).astype(jnp.float32),
    }  # fmt: skip
    views = {"policy": View(model=model, params=params)}
    return Context(batch=batch, views=views, key=jax.random.key(seed), train=train)


@either
def test_the_mixture_and_its_price_are_sums_over_plain_loops(policy):
    """Each state by the layers in turn; chances from the trace."""
    model, params = case(policy, inject="none", coda=0, layers=5)
    context = context_of(model, params)
    out, real = context.output(), np.asarray(context.batch["segments"]) > 0
    chances = np.asarray(out.trace.figures["halting"])
    assert chances.shape == (4, *real.shape)
    np.testing.assert_allclose(chances.sum(axis=0)[real], 1, rtol=1e-5)
    names = ("positions", "segments")
    where = {name: context.batch[name] for name in names}
    tokens, block, x = context.batch["tokens"], model.block, 0.0
    state = block.apply({"params": params["block_first"]}, params["embedding"][tokens], **where)[0]
    for d in range(1, 5):
        state = block.apply({"params": params["block_0"]}, state, **where)[0]
        x += chances[d - 1][..., None] * state
    hidden = model.norm.apply({"params": params["norm"]}, x)
    np.testing.assert_allclose(out.hidden[real], np.asarray(hidden)[real], atol=1e-5)
    term = AuxiliaryTerm(name="depth", coefficient=0.1)
    price = float(Objective(terms={"depth": term})(context)["depth"].mean())
    steps = np.einsum("mbt,m->bt", chances, np.arange(1, 5))
    assert price == pytest.approx(steps[real].mean() / 4, rel=1e-5)
    np.testing.assert_allclose(out.trace.figures["recursions"][0][real], steps[real], rtol=1e-5)


@either
def test_the_expected_loss_is_the_sum_of_the_losses_of_plain_loops(policy):
    model, params = case(policy, readout="expected_loss")
    context = context_of(model, params)
    chances = np.asarray(context.output().trace.figures["halting"])
    found, expected = ExpectedNextToken()(context), 0.0
    for d in range(1, 5):
        fixed = config.replace(model, {"depth.halting": FixedHalting(depth=d)})
        expected += chances[d - 1] * np.asarray(NextToken()(context_of(fixed, params)))
    real = np.asarray(context.batch["segments"]) > 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=1e-5)
    objective = Objective(terms={"x": Term(loss=ExpectedNextToken())})
    slope = jax.jit(jax.grad(lambda p: objective(context_of(model, p))["x"].mean()))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slope["depth"]))
    with pytest.raises(UserError, match="leaves one stream, not one for each depth"):
        ExpectedNextToken()(context_of(model.causal_twin(), params))


@pytest.mark.parametrize("policy", ["online", pytest.param("early", marks=pytest.mark.slow)])
def test_drawn_depths_freeze_tokens_and_pass_the_gradient_of_the_mixture(policy):
    model, params = case(policy, readout="straight_through")
    drawn = [context_of(model, params, train=True, seed=s).output() for s in range(2)]
    depths = [np.asarray(out.trace.figures["recursions"][0]) for out in drawn]
    assert (depths[0] != depths[1]).any() and len(set(depths[0][0])) > 1
    still = [context_of(m, params).output().hidden for m in (model, model.causal_twin())]
    np.testing.assert_array_equal(*still)

    def total(params):
        return (context_of(model, params, train=True).output().hidden ** 2).mean()

    slope = jax.jit(jax.grad(total))(params)["depth"]["decision"]
    assert all(np.any(leaf) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="prelude 1 and coda 2 leaves 5 layers"):
        params_of(model_of(EarlyHalting(), layers=8))


def test_parameters_do_not_grow_with_recursions_beside_the_early_head():
    def size(halting, recursions):
        params = params_of(model_of(halting, layers=3 + recursions, recursions=recursions))
        return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(params)))

    assert size(OnlineHalting(), 2) == size(OnlineHalting(), 4)
    assert size(EarlyHalting(), 4) - size(EarlyHalting(), 2) == 2 * 16
