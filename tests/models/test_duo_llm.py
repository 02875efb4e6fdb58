"""Duo-LLM: routes by hand, oracles by brute force, and what a router is trained to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.routed_models import base, duo, logits_of, params_of, passes, ragged, targets
from tokenlab.cache import FullCache
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.core.weighted import Weighted
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.evals import (
    all_patterns,
    best_by_budget,
    difficulty,
    executed,
    pattern_nats,
    random_routes,
)
from tokenlab.models import RoutedFeedForward, SwiGLU, given_options, with_base, with_stand_ins
from tokenlab.objectives import BudgetPenalty
from tokenlab.objectives.budget import mean_share
from tokenlab.routing import FixedOption, LearnedOption, RandomOption

LAYERS = 3
BATCH = ragged((11, 6, 1), 11)
REAL = np.asarray(BATCH[2]) > 0


def test_numbers_of_patterns():
    six = all_patterns([2] * 6)
    assert len(six) == 64 == len(np.unique(six, axis=0))
    assert np.sum(executed(six) == 2) == math.comb(6, 2) == 15
    assert len(all_patterns([3] * 4)) == 81
    twelve = all_patterns([2] * 12)
    assert len(twelve) == 4096 and np.sum(executed(twelve) <= 1) == 13


@pytest.mark.parametrize("skip", [False, True])
def test_a_pattern_is_what_its_layers_say(skip):
    """Each of 2^3 or 3^3 patterns, with the layers put together by hand."""
    model = duo(skip=skip)
    assert isinstance(model.block.feedforward, RoutedFeedForward)
    params, (tokens, positions, segments) = params_of(model), BATCH
    where = {"positions": positions, "segments": segments}

    def by_hand(pattern):
        x = params["embedding"][tokens]
        for i, option in enumerate(pattern):
            layer = params[f"block_{i}"]

            def normed(x, part, layer=layer):
                return model.norm.apply({"params": layer[f"{part}_norm"]}, x)

            update, _ = model.block.mixer.apply(
                {"params": layer["mixer"]}, normed(x, "mixer"), **where
            )
            x, wide = x + update, (24, 4, None)[option]
            if wide is not None:
                own = layer["feedforward"]["unit" if option == 0 else "stand_in_0"]
                x += SwiGLU(hidden_dim=wide).apply({"params": own}, normed(x, "feedforward"))
        hidden = model.norm.apply({"params": params["norm"]}, x)
        return model.apply({"params": params}, hidden, method="logits")

    patterns = all_patterns([3 if skip else 2] * LAYERS)
    for pattern in patterns[:: 3 if skip else 1]:
        given = given_options(model, jnp.asarray(pattern))
        found, out = logits_of(model, params, BATCH, given=given)
        np.testing.assert_allclose(
            np.asarray(found)[REAL], np.asarray(by_hand(pattern))[REAL], atol=2e-5
        )
        np.testing.assert_allclose(
            out.trace.aux["executed"].total / REAL.sum(), np.asarray(pattern) == 0
        )


def test_all_big_is_the_plain_model_bit_for_bit_and_so_is_a_chance_of_one():
    plain, batch = base(), BATCH
    params = params_of(plain)
    expected, _ = logits_of(plain, params, batch)
    for router in (FixedOption(), RandomOption(chances=(1.0, 0.0))):
        model = duo(router)
        found, _ = logits_of(model, with_base(model, params, key=jax.random.key(1)), batch)
        np.testing.assert_array_equal(np.asarray(found)[REAL], np.asarray(expected)[REAL])


def test_identical_twins_make_all_patterns_equal():
    model = duo(small=24)
    params = params_of(model)
    for i in range(LAYERS):
        layer = params[f"block_{i}"]["feedforward"]
        params[f"block_{i}"]["feedforward"] = layer | {"stand_in_0": layer["unit"]}
    view, patterns = View(model=model, params=params), all_patterns([2] * LAYERS)
    nats = pattern_nats(view, targets(BATCH), patterns)
    np.testing.assert_array_equal(nats, np.broadcast_to(nats[:1], nats.shape))
    assert not np.any(difficulty(nats, nats[-1]))
    first, second = (
        logits_of(model, params, BATCH, given=given_options(model, jnp.asarray(pattern)))[0]
        for pattern in patterns[[0, 5]]
    )
    np.testing.assert_array_equal(first, second)


def test_the_oracle_of_tokens_is_brute_force():
    """Each token of two packed documents by itself, in a context of another pattern."""
    model, params = duo(skip=True), params_of(duo(skip=True))
    batch = targets(ragged((11, 6), 11))
    batch["segments"] = jnp.asarray([[1] * 5 + [2] * 6, [1] * 6 + [0] * 5], jnp.int32)
    batch["positions"] = jnp.asarray([[*range(5), *range(6)], [*range(6), *[0] * 5]], jnp.int32)
    real = np.asarray(batch["segments"]) > 0
    patterns, reference = all_patterns([3] * LAYERS)[[0, 5, 13, 26]], [0, 1, 0]
    view = View(model=model, params=params)
    found = pattern_nats(view, batch, patterns, reference=reference, chunk=3)

    @jax.jit
    def nats(options):
        view = View(model=model, params=params, given=given_options(model, options))
        return -Context(batch=batch, views={"policy": view}).token_logp()

    for number, pattern in enumerate(patterns):
        for t in range(11):
            here = (np.arange(11) == t)[None, None]
            options = np.where(here, pattern[:, None, None], np.reshape(reference, (LAYERS, 1, 1)))
            alone = nats(jnp.asarray(np.broadcast_to(options, (LAYERS, 2, 11)), jnp.int32))
            rows = real[:, t]
            np.testing.assert_allclose(
                found[number, rows, t], np.asarray(alone)[rows, t], atol=2e-5
            )
    by_token = np.broadcast_to(patterns[1][:, None, None], (LAYERS, 2, 11))
    (same,) = pattern_nats(view, batch, by_token[None], reference=reference)
    np.testing.assert_allclose(same[real], found[1][real], atol=1e-6)


def test_oracles_are_bounds():
    model = duo()
    params, batch, patterns = params_of(model), targets(BATCH), all_patterns([2] * LAYERS)
    big = executed(patterns)
    view = View(model=model, params=params)
    nats = pattern_nats(view, batch, patterns, reference=[0] * LAYERS)[:, REAL]
    exact, at_most = (best_by_budget(nats, big, at_most=most) for most in (False, True))
    assert list(exact) == [0, 1, 2, 3]
    rng = np.random.default_rng(0)
    for k, best in exact.items():
        assert np.all(best <= nats[big == k])
        assert np.all(best.mean() <= random_routes(nats[big == k], trials=50, rng=rng))
    assert all(np.all(at_most[k] <= at_most[k - 1]) for k in (1, 2, 3))
    assert np.all(at_most[LAYERS] <= nats[0]) and np.all(difficulty(nats, nats[-1]) >= 0)
    assert at_most[LAYERS].mean() < nats[0].mean()  # the model is random, so some pattern is better
    rows = pattern_nats(view, batch, patterns)
    whole = np.where(REAL, rows, 0).sum(axis=2)  # one pattern for a row
    assert np.all(best_by_budget(whole, big, at_most=True)[LAYERS] <= whole[0])


def executing(share):
    """What three layers report whose mean is that."""
    shares = jnp.asarray([share - 0.1, share, share + 0.1])
    return Weighted(total=50 * shares, weight=jnp.full(3, 50.0))


def test_the_budget_loss_is_the_worked_one():
    squared = BudgetPenalty(budget=0.33, distance="squared")
    assert float(squared.of(executing(0.33)).mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(squared.of(executing(0.43)).mean()) == pytest.approx(0.01, rel=1e-5)
    view = View(model=base(), params=params_of(base()))
    with pytest.raises(UserError, match="give its units stand-ins"):
        squared(Context(batch=targets(BATCH), views={"policy": view}))


def test_padding_is_in_no_share():
    model = duo(FixedOption(option=1))
    _, out = logits_of(model, params_of(model), BATCH)
    assert float(mean_share(out.trace.aux["executed"])) == 0
    model = duo(LearnedOption())
    _, out = logits_of(model, params_of(model), BATCH)
    option = np.asarray(out.trace.figures["option"])
    share = np.mean(option[:, REAL] == 0)
    assert float(mean_share(out.trace.aux["executed"])) == pytest.approx(share) and 0 < share < 1


def test_random_routes_are_seeded_and_independent_of_place():
    model = duo(RandomOption())
    view, batch = View(model=model, params=params_of(model)), targets(ragged((60, 60), 60))

    def options(key, train):
        context = Context(batch=batch, views={"policy": view}, key=key, train=train)
        return np.asarray(context.output().trace.figures["option"])

    first, again, other = (options(jax.random.key(seed), True) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.3
    np.testing.assert_array_equal(options(jax.random.key(0), False), first)
    for one in (first, options(None, False)):  # 360 draws: a standard error of 0.026
        assert abs(one.mean() - 0.5) < 0.1
        assert all(np.mean(one[i] != one[j]) > 0.3 for i, j in ((0, 1), (1, 2)))
    rows = duo(RandomOption(granularity="row"))
    view = View(model=rows, params=params_of(rows))
    shared = options(jax.random.key(0), True)
    assert np.all(shared == shared[:, :, :1]) and 0 < shared.mean() < 1
    with pytest.raises(UserError, match="rows can share a draw of the stream"):
        options(None, False)


def test_training_makes_a_router_keep_its_budget_and_make_up_its_mind():
    """Only routers move; the entropy of their chances falls with the temperature."""
    model = duo(LearnedOption(coolest=0.1))
    params, batch = params_of(model), targets(ragged((11, 9), 11))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if "temperature" in str(path) else leaf, params
    )
    penalty = BudgetPenalty(budget=1 / 3, distance="squared")

    def seen(params, train):
        view = View(model=model, params=params)
        return Context(batch=batch, views={"policy": view}, key=jax.random.key(0), train=train)

    def loss(params):
        context = seen(params, True)
        trace = context.output().trace
        total = penalty(context).mean() + trace.aux["temperature"].mean()
        return total - 0.01 * context.token_logp().mean(), trace.figures["option_entropy"].mean()

    rates = jax.tree_util.tree_map_with_path(
        lambda path, _: 0.3 if "scores" in str(path) else 0.02 * ("temperature" in str(path)),
        params,
    )

    @jax.jit
    def step(params):
        (_, entropy), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g, rate: p - rate * g, params, gradient, rates), entropy

    entropies = []
    for _ in range(60):
        params, entropy = step(params)
        entropies.append(float(entropy))
    warmth = params["block_1"]["feedforward"]["routing"]["temperature"]
    np.testing.assert_allclose(warmth, 0.1, atol=0.021)  # 45 steps of 0.02, and then no further
    assert entropies[-1] < 0.5 * entropies[0]
    share = mean_share(seen(params, True).output().trace.aux["executed"])
    assert abs(float(share) - 1 / 3) < 0.07
    assert optax.tree.norm(jax.grad(loss, has_aux=True)(params)[0]) > 0


@pytest.mark.parametrize("capacity", [None, 0.4])
def test_decoding_is_one_pass_by_arg_max(capacity):
    model = duo(LearnedOption(), skip=True, capacity=capacity)
    params = params_of(model)
    whole, out = logits_of(model, params, BATCH)
    assert len(np.unique(np.asarray(out.trace.figures["option"])[:, REAL])) == 3
    found, _ = passes(model, params, FullCache(), BATCH, (4, 3, 1, 1, 1, 1))
    np.testing.assert_allclose(found[REAL], np.asarray(whole)[REAL], atol=1e-5)


def test_the_engine_writes_what_arg_max_over_rows_says():
    model = duo(LearnedOption(), capacity=0.5)
    params = params_of(model)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    decoder = Autoregressive(max_new_tokens=6, sampler=Greedy(), end_ids=(), prefill_chunk=3)
    written = decoder(View(model=model, params=params), prompts, key=jax.random.key(0))
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(6):
            tokens = jnp.asarray([text], jnp.int32)
            where = jnp.arange(len(text))[None], jnp.ones_like(tokens)
            logits, _ = logits_of(model, params, (tokens, *where))
            text.append(int(jnp.argmax(logits[0, -1])))
        assert np.asarray(written.tokens[row]).tolist()[-6:] == text[-6:]


def test_the_ledger_counts_what_was_chosen():
    model = duo(LearnedOption(), skip=True)
    params, (_, positions, segments) = params_of(model), BATCH
    _, out = logits_of(model, params, BATCH)
    option = np.asarray(out.trace.figures["option"])[:, REAL]
    plain = base()
    _, dense = logits_of(plain, params_of(plain), BATCH)
    where = {"positions": positions, "segments": segments}
    full, ours = plain.ledger(dense.trace, **where), model.ledger(out.trace, **where)
    routers = LAYERS * REAL.sum() * 2 * 16 * 3
    saved = np.sum(option == 1) * 6 * 16 * (24 - 4) + np.sum(option == 2) * 6 * 16 * 24
    assert float(ours.flops) == pytest.approx(float(full.flops) - saved + routers, rel=1e-6)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="stand_ins is empty"):
        with_stand_ins(base(), feedforward=())
    with pytest.raises(UserError, match=r"capacity 1\.5 must be above 0"):
        duo(capacity=1.5)
    with pytest.raises(UserError, match="have sum 1"):
        RandomOption(chances=(0.5, 0.6))
    model = duo()
    with pytest.raises(UserError, match="options for 2 units, but the model has 3"):
        given_options(model, jnp.zeros(2, jnp.int32))
    for router, message in (
        (FixedOption(option=2), r"router\.option is 2; use 0 to 1"),
        (RandomOption(chances=(0.5, 0.25, 0.25)), r"router\.chances has 3 for 2 options"),
    ):
        with pytest.raises(UserError, match=message):
            params_of(duo(router))
