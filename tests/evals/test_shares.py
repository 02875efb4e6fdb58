"""Models of which a share of the units runs: what a pass says, and running as many as asked."""

import jax
import numpy as np
import pytest

from tests.models.routed_models import KEY, RANK, base, errors, informed, params_of, targets
from tests.models.routed_models import ragged as rows_of
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.evals import at_share, routed_pass
from tokenlab.models import with_base, with_forecasters
from tokenlab.models.adapters import drawn
from tokenlab.objectives.budget import mean_share
from tokenlab.routing import LearnedOption

BATCH = targets(rows_of((11, 11, 11), 11))


def test_a_pass_says_what_its_trace_and_ledger_say():
    model = informed()
    params = params_of(model)
    found = routed_pass(model, params, BATCH)
    context = Context(batch=BATCH, views={"policy": View(model=model, params=params)}, key=KEY)
    trace = context.output().trace
    where = {name: BATCH[name] for name in ("positions", "segments")}
    np.testing.assert_allclose(found.nats, -np.mean(context.token_logp()), rtol=1e-5)
    assert float(found.flops) == float(model.ledger(trace, **where).flops)
    assert float(found.units_run) == float(mean_share(trace.aux["executed"]))
    shares = np.asarray(trace.figures["option"] == 0).mean(axis=(1, 2))
    np.testing.assert_allclose(found.means["executed"], shares, rtol=1e-6)
    assert routed_pass(base(), params_of(base()), BATCH).units_run is None


def test_as_many_units_run_as_are_asked_for_and_no_scores_change_places():
    model = informed()
    params = params_of(model)
    units = 4 * BATCH["tokens"].size
    for share in (0.25, 0.6):
        moved = at_share(model, params, BATCH, share=share)
        found = float(routed_pass(model, moved, BATCH).units_run)
        assert share <= found < share + 8 / units  # each number is of a token; some are equal
    changes = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: a - b, moved, params))
    added = [
        np.asarray(each)
        for path, each in changes
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("scores/bias")
    ]
    assert len(added) == 4 and np.ptp([each[0] for each in added]) < 1e-5
    assert all(each[1] == 0 for each in added)
    assert sum(np.any(each) for _, each in changes) == 4

    linear = informed(LearnedOption())
    with pytest.raises(UserError, match="no bias to shift; use head=NarrowScores"):
        at_share(linear, params_of(linear), BATCH, share=0.5)


def test_forecasters_are_put_in_and_fitted_and_the_function_is_the_same():
    plain = base(layers=2)
    params = drawn(plain, KEY)
    rows = np.asarray(BATCH["tokens"])
    model, fitted = with_forecasters(plain, params, rows, rank=RANK, key=KEY)
    assert float(routed_pass(model, fitted, BATCH).units_run) == 1
    np.testing.assert_allclose(
        routed_pass(model, fitted, BATCH).nats, routed_pass(plain, params, BATCH).nats, rtol=1e-6
    )
    first = errors(model, with_base(model, params, key=KEY), rows)["forecast_error"]
    assert np.all(errors(model, fitted, rows)["forecast_error"] < first)
