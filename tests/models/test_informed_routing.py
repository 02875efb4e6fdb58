"""Informed routing: masks by hand, tokens gathered or not, training, published models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from tests.models.routed_models import (
    KEY,
    LAYERS,
    RANK,
    SEES,
    base,
    errors,
    informed,
    logits_of,
    params_of,
    passes,
    ragged,
    targets,
    whole_rows,
)
from tokenlab.cache import FullCache, RingCache
from tokenlab.core.context import Context, View
from tokenlab.core.duration import Clock
from tokenlab.core.errors import UserError
from tokenlab.core.weighted import Weighted
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.decode.speculative import PromptLookup, Speculative
from tokenlab.interop import load_pretrained
from tokenlab.models import (
    Forecaster,
    RoutedMixer,
    fit_forecasters,
    given_options,
    with_base,
    with_stand_ins,
)
from tokenlab.objectives import BudgetPenalty
from tokenlab.routing import FixedOption, LearnedOption
from tokenlab.routing.options import straight_through
from tokenlab.train.optimizer import SGD, Constant, Group

BATCH = ragged((11, 6, 1), 11)
REAL = np.asarray(BATCH[2]) > 0


@functools.cache
def varied():
    """Parameters under which routers of all units choose now this and now that."""
    for seed in range(99):
        params = params_of(informed(), seed=seed)
        _, out = logits_of(informed(), params, BATCH)
        shares = np.mean(np.asarray(out.trace.figures["option"])[:, REAL], axis=1)
        if np.all((shares > 0.1) & (shares < 0.9)):
            return params
    raise AssertionError("no seed has routers that change their minds")


# ---------------------------------------------------------------- units run or forecast


def test_running_all_units_is_the_base_bit_for_bit():
    plain, params = base(LAYERS), params_of(base(LAYERS))
    expected, _ = logits_of(plain, params, BATCH)
    model = informed(FixedOption())
    assert isinstance(model.block.mixer, RoutedMixer)
    found, out = logits_of(model, with_base(model, params, key=KEY), BATCH)
    np.testing.assert_array_equal(np.asarray(found)[REAL], np.asarray(expected)[REAL])
    np.testing.assert_array_equal(out.trace.aux["executed"].total, REAL.sum())


def test_forecasts_of_nothing_are_skips():
    skips, model, params = informed(FixedOption(), forecast=False), informed(), varied()
    none = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "wide" in str(path) else leaf, params
    )
    options = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 3, 11)), jnp.int32)
    pair = [
        logits_of(each, none, BATCH, given=given_options(each, options))[0]
        for each in (model, skips)
    ]
    np.testing.assert_array_equal(*(np.asarray(each)[REAL] for each in pair))


def test_masks_by_hand():
    """Tokens that attention leaves out are keys as ever."""
    model, params = informed(), varied()
    tokens, positions, segments = BATCH
    options = np.random.default_rng(3).integers(0, 2, (4, 3, 11))
    found, _ = logits_of(
        model, params, BATCH, given=given_options(model, jnp.asarray(options, jnp.int32))
    )
    x, where = params["embedding"][tokens], {"positions": positions, "segments": segments}
    for i in range(LAYERS):
        for j, part in enumerate(("mixer", "feedforward")):
            layer = params[f"block_{i}"]
            h = model.norm.apply({"params": layer[f"{part}_norm"]}, x)
            unit, own = getattr(model.block, part).unit, {"params": layer[part]["unit"]}
            full = unit.apply(own, h, **where)[0] if part == "mixer" else unit.apply(own, h)
            linear = layer[part]["stand_in_0"]
            cheap = h @ linear["narrow"]["kernel"] @ linear["wide"]["kernel"]
            x = x + jnp.where(options[2 * i + j][..., None] == 0, full, cheap)
    hidden = model.norm.apply({"params": params["norm"]}, x)
    expected = model.apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(np.asarray(found)[REAL], np.asarray(expected)[REAL], atol=2e-5)


def chosen(out):
    return np.asarray(out.trace.figures["option"])[:, REAL]


@pytest.mark.parametrize("capacity", [0.2, 0.7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathering_tokens_changes_nothing(capacity, dtype):
    """Whether the slots suffice (0.7) or not (0.2)."""
    dense, params = informed().clone(dtype=dtype), varied()
    expected, out = logits_of(dense, params, BATCH)
    option = chosen(out)
    few = informed(capacity=capacity).clone(dtype=dtype)
    found, same = logits_of(few, params, BATCH)
    if dtype == "bfloat16":
        scale = np.abs(np.asarray(expected, np.float32)[REAL]).max()
        agree = np.asarray(same.trace.figures["option"])[:, REAL] == option
        assert agree.mean() > 0.95  # rounding may turn a token that is on the edge
        if agree.all():
            np.testing.assert_allclose(
                np.asarray(found)[REAL], np.asarray(expected)[REAL], atol=0.05 * scale
            )
        return
    np.testing.assert_allclose(np.asarray(found)[REAL], np.asarray(expected)[REAL], atol=1e-5)
    np.testing.assert_array_equal(same.trace.figures["option"], out.trace.figures["option"])
    assert float(same.trace.flops) == float(out.trace.flops)


@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("policy", [FullCache(), RingCache(budget=64)])
def test_decoding_is_one_pass_by_arg_max(capacity, policy):
    model, params = informed(capacity=capacity), varied()
    whole, out = logits_of(model, params, BATCH)
    option = chosen(out)
    found, last = passes(model, params, policy, BATCH, (4, 3, 1, 1, 1, 1))
    np.testing.assert_allclose(found[REAL], np.asarray(whole)[REAL], atol=1e-5)
    where = {"positions": BATCH[1], "segments": BATCH[2]}
    ledger = model.ledger(out.trace, **where)
    asked = np.zeros(REAL.shape, int)
    asked[REAL] = np.sum(option[::2] == 0, axis=0)
    assert float(ledger.attended_pairs) == np.sum(asked * (np.arange(11) + 1))
    assert float(last.cache.pairs.sum()) == float(ledger.attended_pairs)


def test_drafts_are_read_as_single_tokens_are():
    model, params = informed(capacity=0.5), varied()
    view, prompts = View(model=model, params=params), [[3, 1, 4, 1, 5, 3, 1], [2, 6, 2, 6]]
    plain = Autoregressive(max_new_tokens=8, sampler=Greedy(), end_ids=())
    drafted = Speculative(drafter=PromptLookup(), max_new_tokens=8, sampler=Greedy(), end_ids=())
    ours, theirs = (each(view, prompts, key=KEY) for each in (drafted, plain))
    np.testing.assert_array_equal(np.asarray(ours.tokens), np.asarray(theirs.tokens))


def test_the_ledger_has_what_forecasts_save_and_cost():
    model, params, plain = informed(), varied(), base(LAYERS)
    _, out = logits_of(model, params, BATCH)
    option = chosen(out)
    _, dense = logits_of(plain, params_of(plain), BATCH)
    where = {"positions": BATCH[1], "segments": BATCH[2]}
    full, ours = plain.ledger(dense.trace, **where), model.ledger(out.trace, **where)
    tokens = REAL.sum()
    looking = 2 * LAYERS * tokens * (2 * 16 * (32 + 2) + 4 * 16 * RANK)
    saved = np.sum(option[::2] == 1) * 2 * 2 * 16 * 16 + np.sum(option[1::2] == 1) * 6 * 16 * 24
    pairs = float(full.attended_pairs) - float(ours.attended_pairs)
    expected = float(full.flops) + looking - saved - pairs * 2 * 2 * 16
    assert float(ours.flops) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- training


def test_draws_are_exactly_one_hot_with_the_gradient_of_the_softmax():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 2)) * 5, jnp.float32)
    hard = np.asarray(straight_through(logits))
    assert np.all((hard == 0) | (hard == 1)) and np.all(hard.sum(axis=-1) == 1)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 9, 2)), jnp.float32)
    ours, soft = (
        jax.grad(lambda u, f=f: jnp.sum(weights * f(u)))(logits)
        for f in (straight_through, jax.nn.softmax)
    )
    np.testing.assert_allclose(ours, soft, atol=1e-6)


def test_draws_have_the_chances_that_scores_give():
    router = LearnedOption(mixing="drawn", temperature=3.0)
    x, valid = jnp.ones((1, 4000, 2)), jnp.ones((1, 4000), bool)
    params = {"scores": {"kernel": jnp.asarray([[0.5, 0.0], [0.5, 0.0]])}}
    options = {"forecast": None, "options": 2, "valid": valid}
    drawn = router.apply({"params": params}, x, **options, train=True, rngs={"routes": KEY})
    share = float(jnp.mean(drawn.weights[..., 0]))
    assert abs(share - 1 / (1 + np.exp(-1))) < 0.025  # whatever the temperature
    fixed = router.apply({"params": params}, x, **options, train=False, rngs={"routes": KEY})
    assert float(jnp.mean(fixed.weights[..., 0])) == 1  # no noise outside training


def test_the_penalty_is_the_worked_one():
    penalty = BudgetPenalty(budget=0.75, coefficient=20.0)

    def value(*shares):
        shares = jnp.asarray(shares)
        return 20 * float(penalty.of(Weighted(total=8 * shares, weight=shares * 0 + 8)).mean())

    assert value(0.75, 0.75) == value(0.5, 1.0) == 0 and value(1.0, 1.0) == pytest.approx(5.0)
    nothing = jnp.zeros(2)
    assert float(penalty.of(Weighted(total=nothing, weight=nothing)).mean()) == 0


def test_only_routers_and_forecasters_move_and_every_one_of_them_does():
    model, params, batch = informed(), varied(), targets(BATCH)
    rate = SGD(learning_rate=Constant(peak=1e-3))
    clock = Clock(tokens_per_step=1, tokens_per_epoch=lambda: 1, total_steps=1)
    rule = SGD(
        learning_rate=Constant(peak=0.1),
        trained=("*/routing/*",),
        groups=(Group(parameters=("*/stand_in_0/*",), optimizer=rate),),
    ).build(clock)
    penalty = BudgetPenalty(budget=0.5)

    def loss(params):
        views = {"policy": View(model=model, params=params)}
        context = Context(batch=batch, views=views, key=KEY, train=True)
        nats = Weighted.of(-context.token_logp(), batch["weights"])
        return nats.mean() + 20 * penalty(context).mean()

    updates, _ = rule.update(jax.jit(jax.grad(loss))(params), rule.init(params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.any(leaf) == ("routing" in name or "stand_in_0" in name), name
        assert np.all(np.isfinite(leaf))


def test_padding_has_no_part_in_training():
    model = informed(LearnedOption(with_forecast=True))
    params = params_of(model, seed=2)

    @jax.jit
    def gradient(batch):
        def loss(params):
            views = {"policy": View(model=model, params=params)}
            context = Context(batch=batch, views=views, key=KEY, train=True)
            nats = Weighted.of(-context.token_logp(), batch["weights"])
            return nats.mean() + BudgetPenalty(budget=0.2)(context).mean()

        return jax.grad(loss)(params)

    batch = targets(BATCH)
    wider = {name: jnp.pad(each, ((0, 1), (0, 4))) for name, each in batch.items()}
    wider["tokens"] = wider["tokens"].at[:, 11:].set(5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient(batch), gradient(wider)
    )


# ---------------------------------------------------------------- published models


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_a_published_model_takes_forecasters(family, tmp_path):
    """Layers of one kind, and of several with norms on both sides."""
    plain, params, _ = load_pretrained(published.folder(family, tmp_path / "model"))
    whole, model = (
        with_stand_ins(
            plain, mixer=(Forecaster(rank=4),), feedforward=(Forecaster(rank=4),), router=each
        )
        for each in (FixedOption(), SEES)
    )
    rows = np.random.default_rng(0).integers(0, plain.vocab_size, (6, 12))
    first = with_base(whole, params, key=KEY)
    expected, _ = logits_of(plain, params, whole_rows(rows))
    found, _ = logits_of(whole, first, whole_rows(rows))
    np.testing.assert_array_equal(found, expected)
    fitted = fit_forecasters(whole, first, jnp.asarray(rows))
    assert np.all(errors(whole, fitted, rows)["forecast_unexplained"] < 1)
    routed = with_base(model, fitted, key=KEY)
    assert jax.tree.structure(routed) != jax.tree.structure(fitted)
    jax.tree.map(
        np.testing.assert_array_equal,
        routed["block_0"]["mixer"]["stand_in_0"],
        fitted["block_0"]["mixer"]["stand_in_0"],
    )
    logits, out = logits_of(model, routed, whole_rows(rows))
    assert np.all(np.isfinite(logits)) and len(out.trace.aux["executed"].total) == (
        2 * plain.num_layers
    )
    again = with_stand_ins(model, feedforward=(None,))
    assert again.block.kinds()[0].feedforward.unit == plain.block.kinds()[0].feedforward


def test_mistakes_are_one_line():
    blind = informed(SEES, forecast=False)
    with pytest.raises(UserError, match="needs a stand-in that is not None"):
        params_of(blind)
