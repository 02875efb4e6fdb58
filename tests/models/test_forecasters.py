"""Forecasters in closed form, by alternating least squares and by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models.routed_models import (
    KEY,
    LAYERS,
    RANK,
    VOCABULARY,
    base,
    errors,
    informed,
    logits_of,
    params_of,
    targets,
    whole_rows,
)
from tokenlab.core.context import Context, View
from tokenlab.core.duration import Clock
from tokenlab.core.errors import UserError
from tokenlab.models import (
    Forecaster,
    fit_forecasters,
    given_options,
    reduced_rank,
    with_base,
    with_stand_ins,
)
from tokenlab.objectives import AuxiliaryTerm, Objective
from tokenlab.routing import FixedOption
from tokenlab.train.optimizer import AdamW, Constant


def regression(seed=0, n=200, d=12, f=12):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    y = np.tanh(x @ rng.normal(size=(d, f))) + x @ rng.normal(size=(d, f)) * 0.3
    return x, y


def test_the_closed_form_is_what_alternating_least_squares_finds():
    (x, y), rank = regression(), 3
    narrow, wide = reduced_rank(x.T @ x, x.T @ y, rank=rank)
    error = np.mean((x @ narrow @ wide - y) ** 2)
    left = np.random.default_rng(1).normal(size=(12, rank))
    for _ in range(3000):
        right = np.linalg.lstsq(x @ left, y, rcond=None)[0]
        # min over W1 of |X W1 W2 - Y|: W2 has full rank, so Y W2^+ is all that W1 can reach.
        left = np.linalg.lstsq(x, y @ np.linalg.pinv(right), rcond=None)[0]
    assert np.mean((x @ left @ right - y) ** 2) == pytest.approx(error, abs=1e-9)
    ols = np.linalg.lstsq(x, y, rcond=None)[0]
    top = np.linalg.svd(x @ ols)[2][:rank]
    np.testing.assert_allclose(x @ narrow @ wide, x @ ols @ top.T @ top, atol=1e-8)
    assert error > np.mean((x @ ols - y) ** 2)


def test_a_map_of_that_rank_is_found_also_where_inputs_are_degenerate():
    x, _ = regression()
    x = np.concatenate([x, x[:, :3]], axis=1)
    rng = np.random.default_rng(2)
    exact = rng.normal(size=(15, 4)) @ rng.normal(size=(4, 9))
    narrow, wide = reduced_rank(x.T @ x, x.T @ (x @ exact), rank=4)
    np.testing.assert_allclose(x @ narrow @ wide, x @ exact, atol=1e-6 * np.abs(x @ exact).max())


def test_fitted_forecasters_are_the_best_that_gradients_find():
    model = informed(FixedOption())
    rows = np.random.default_rng(5).integers(0, VOCABULARY, (12, 16))
    start = with_base(model, params_of(base(LAYERS)), key=KEY)
    params = fit_forecasters(model, start, jnp.asarray(rows), batch_size=5)
    assert isinstance(model.block.mixer.stand_ins[0], Forecaster)
    best = errors(model, params, rows)
    assert best["forecast_error"].shape == (2 * LAYERS,)
    objective = Objective(terms={"fit": AuxiliaryTerm(name="forecast_error")})
    clock = Clock(tokens_per_step=1, tokens_per_epoch=lambda: 1, total_steps=600)
    optimizer = AdamW(
        learning_rate=Constant(peak=3e-2), trained=("*/stand_in_0/*",), weight_decay=0.0
    )
    rule = optimizer.build(clock)
    batch = targets(whole_rows(rows))

    @jax.jit
    def descend(params):
        def loss(params):
            context = Context(batch=batch, views={"policy": View(model=model, params=params)})
            return objective.value(objective(context))

        def step(carry, _):
            params, state = carry
            updates, state = rule.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, rule.init(params)), None, length=600)[0][0]

    moved = descend(start)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: "stand_in" in str(path) or np.testing.assert_array_equal(a, b),
        moved, start,
    )  # fmt: skip
    first, last = (errors(model, each, rows)["forecast_error"] for each in (start, moved))
    assert np.all(best["forecast_error"] <= last + 1e-5)
    np.testing.assert_allclose(last, best["forecast_error"], rtol=0.05)
    assert np.all(first > 1.2 * best["forecast_error"])
    assert np.all(best["forecast_unexplained"] < 1) and np.all(best["forecast_cosine"] > 0)


def test_units_that_are_linear_are_forecast_and_no_mask_matters():
    """Feed-forward layers whose output is W x of rank 2, so that a forecaster of rank 3 has it."""
    model = with_stand_ins(
        base(LAYERS).clone(block=base(LAYERS).block.clone(feedforward=Forecaster(rank=2))),
        feedforward=(Forecaster(rank=RANK),),
    )
    rows = np.random.default_rng(5).integers(0, VOCABULARY, (12, 16))
    params = fit_forecasters(model, params_of(model), jnp.asarray(rows))
    np.testing.assert_allclose(errors(model, params, rows)["forecast_error"], 0, atol=1e-6)
    expected, _ = logits_of(model, params, whole_rows(rows))
    options = np.random.default_rng(0).integers(0, 2, (LAYERS, *rows.shape))
    given = given_options(model, jnp.asarray(options, jnp.int32))
    found, _ = logits_of(model, params, whole_rows(rows), given=given)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match="is no Forecaster"):
        fit_forecasters(informed(FixedOption(), forecast=False), {}, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(UserError, match="make some with with_stand_ins"):
        fit_forecasters(base(), {}, jnp.zeros((1, 4), jnp.int32))
