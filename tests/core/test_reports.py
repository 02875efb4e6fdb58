"""What layers report reaches the trace, the objective and the ledger, however they are run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.cache import FullCache
from tokenlab.core.context import Context, View
from tokenlab.core.parameters import parameter
from tokenlab.core.reports import report
from tokenlab.core.weighted import Weighted
from tokenlab.decode import passes
from tokenlab.depth import Recursive, Sequential
from tokenlab.models import llama
from tokenlab.models.layers import FeedForward
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term


class Scaled(FeedForward):
    """Multiplies by a learned factor; reports its square, and 5 operations a token."""

    @nn.compact
    def __call__(self, x, *, valid=None, train=False):
        factor = parameter(self, "factor", nn.initializers.constant(2.0), (1,), ("norm",))
        tokens = jnp.ones(x.shape[:2]) if valid is None else valid.astype(jnp.float32)
        report(
            self,
            aux={"square": Weighted.of(jnp.square(factor), jnp.ones(1))},
            figures={"seen": tokens},
            flops=5 * jnp.sum(tokens),
        )
        return x * factor.astype(x.dtype)[None, None]

    @nn.nowrap
    def flops(self, dim):
        return 0


ROWS = {
    "tokens": jnp.arange(12).reshape(2, 6),
    "targets": jnp.arange(12).reshape(2, 6),
    "positions": jnp.tile(jnp.arange(6)[None], (2, 1)),
    "segments": jnp.asarray([[1] * 6, [1] * 4 + [0] * 2]),
    "weights": jnp.asarray([[1.0] * 6, [1.0] * 4 + [0.0] * 2]),
}
DEPTHS = {
    "unrolled": (Sequential(), 3),
    "scanned": (Sequential(scan=True), 3),
    "rematerialised": (Sequential(remat="full"), 3),
    "scanned, rematerialised": (Sequential(scan=True, remat="full"), 3),
    "looped": (Recursive(recursions=3, sharing="cycle"), 3),
}


def model_of(depth):
    program, layers = DEPTHS[depth]
    model = llama(
        vocab_size=13, dim=8, num_layers=layers, num_heads=2, num_kv_heads=1, hidden_dim=8,
        depth=program,
    )  # fmt: skip
    return config.replace(model, {"block.feedforward": Scaled()})


@functools.partial(jax.jit, static_argnums=0)
def started(model):
    where = {name: ROWS[name] for name in ("positions", "segments")}
    return nn.meta.unbox(model.init(jax.random.key(0), ROWS["tokens"], **where)["params"])


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_layer_reports_once_and_the_loss_has_its_gradient(depth):
    model = model_of(depth)
    params = started(model)
    objective = Objective(
        terms={
            "next_token": Term(loss=NextToken(), coefficient=0.0),
            "square": AuxiliaryTerm(name="square", coefficient=0.5),
        }
    )

    @jax.jit
    def loss(params):
        views = {"policy": View(model=model, params=params)}
        context = Context(batch=ROWS, views=views, key=jax.random.key(1), train=True)
        return objective.value(objective(context)), context.output().trace

    (value, trace), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    assert float(value) == pytest.approx(0.5 * 3 * 4.0)
    np.testing.assert_array_equal(trace.figures["seen"], [ROWS["weights"]] * 3)
    assert float(trace.flops) == 3 * 5 * 10
    # d(factor^2 / 2) = factor, three times where one layer runs three times.
    factors = [leaf for leaf in jax.tree.leaves(gradient) if leaf.shape[-1:] == (1,)]
    assert sum(float(leaf.sum()) for leaf in factors) == pytest.approx(3 * 2.0)
    where = {name: ROWS[name] for name in ("positions", "segments")}
    silent = model.apply({"params": params}, ROWS["tokens"], **where)
    assert not silent.trace.aux and not silent.trace.figures and float(silent.trace.flops) == 0
    plain = model.ledger(silent.trace, **where).flops
    assert float(model.ledger(trace, **where).flops - plain) == 150


def test_passes_over_a_cache_count_what_is_reported():
    model = model_of("unrolled")
    tokens = ROWS["tokens"]
    begun = jax.jit(
        lambda p: passes.begin(model, p, FullCache(), tokens, jnp.asarray([6, 4]), capacity=8)
    )(started(model))
    assert float(begun.spent.flops) == 150
