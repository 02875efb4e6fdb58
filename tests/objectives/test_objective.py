"""The weighted sum of means, and the memory of the context it reads from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.core.context import Context, View
from tokenlab.models import LinearHead, ModelOutput
from tokenlab.objectives import (
    AllTokens,
    NextToken,
    Objective,
    SmoothedNextToken,
    Term,
    TokenLoss,
    TokenWeights,
    ZLoss,
)

CALLS = []


class Counted(nn.Module):
    """Writes down every forward pass that is traced."""

    label: str = "policy"
    head: nn.Module = LinearHead()

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (11, 4))

    def __call__(self, tokens, *, positions, segments, train):
        CALLS.append(self.label)
        return ModelOutput(hidden=self.embedding[tokens], trace=None)

    def head_weight(self):
        return self.embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(TokenLoss):
    """A loss that is an array of the batch."""

    name: str

    def __call__(self, context):
        return context.batch[self.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(TokenWeights):
    """Says nothing about padding; would like every position to count."""

    factor: float = 1.0

    def __call__(self, context):
        return jnp.full(context.batch["weights"].shape, self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence(TokenWeights):
    """Weights that depend on the parameters."""

    def __call__(self, context):
        return jnp.exp(context.token_logp())


BATCH = {
    "tokens": jnp.asarray([[1, 2, 3], [4, 5, 0]], jnp.int32),
    "targets": jnp.asarray([[2, 3, 4], [5, 6, 0]], jnp.int32),
    "positions": jnp.asarray([[0, 1, 2], [0, 1, 0]], jnp.int32),
    "segments": jnp.asarray([[1, 1, 1], [1, 1, 0]], jnp.int32),
    "weights": jnp.asarray([[1, 0, 2], [0.5, 1, 0]], jnp.float32),
    "a": jnp.asarray([[1, 9, 2], [4, 3, jnp.nan]], jnp.float32),
    "b": jnp.asarray([[-1, 9, 0], [2, 1, jnp.inf]], jnp.float32),
}


def params(seed=0):
    return {"embedding": jax.random.normal(jax.random.key(seed), (11, 4))}


def context(views=("policy",), parameters=None):
    parameters = params() if parameters is None else parameters
    made = {name: View(model=Counted(label=name), params=parameters) for name in views}
    return Context(batch=BATCH, views=made)


def value(objective, seen=None):
    return float(objective.value(objective(context() if seen is None else seen)))


def test_the_value_is_the_sum_of_coefficients_times_means():
    objective = Objective(
        terms={
            "a": Term(loss=Numbers(name="a"), coefficient=3.0),
            "b": Term(loss=Numbers(name="b"), coefficient=-0.5),
        }
    )
    sums = objective(context())
    # The masked NaN and infinity count for nothing: 1 + 4 + 2 + 3 = 10 over a weight of 4.5.
    assert (float(sums["a"].total), float(sums["a"].weight)) == (10.0, 4.5)
    assert (float(sums["b"].total), float(sums["b"].weight)) == (1.0, 4.5)
    assert value(objective) == pytest.approx(3 * 10 / 4.5 - 0.5 * 1 / 4.5)


def test_token_weights_multiply_those_of_the_batch():
    plain = Objective(terms={"a": Term(loss=Numbers(name="a"))})
    for tokens in (AllTokens(), Everything(), Everything(factor=3.0)):
        objective = Objective(terms={"a": Term(loss=Numbers(name="a"), tokens=tokens)})
        assert value(objective) == pytest.approx(value(plain))
    assert float(objective(context())["a"].weight) == 3 * 4.5


def test_weights_carry_no_gradient():
    objective = Objective(terms={"it": Term(loss=NextToken(), tokens=Confidence())})

    def through_both(parameters):
        return objective.value(objective(context(parameters=parameters)))

    def through_values_alone(parameters):
        seen = context(parameters=parameters)
        weights = BATCH["weights"] * Confidence()(context())
        return jnp.sum(NextToken()(seen) * weights) / jnp.sum(weights)

    found, expected = (
        jax.jit(jax.grad(loss))(params()) for loss in (through_both, through_values_alone)
    )
    np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-5, atol=1e-6)
    assert np.abs(found["embedding"]).max() > 0.01


def test_terms_share_one_forward_pass_per_view():
    objective = Objective(
        terms={
            "next_token": Term(loss=NextToken()),
            "again": Term(loss=SmoothedNextToken(), tokens=Confidence()),
            "z_loss": Term(loss=ZLoss()),
            "reference": Term(loss=NextToken(view="reference"), coefficient=0.1),
        }
    )
    CALLS.clear()
    seen = context(views=("policy", "reference", "unused"))
    objective(seen)
    objective(seen)
    assert sorted(CALLS) == ["policy", "reference"]


def test_a_quantity_nobody_asks_for_is_never_computed():
    CALLS.clear()
    value(Objective(terms={"a": Term(loss=Numbers(name="a"))}))
    assert CALLS == []


def test_views_score_with_their_own_parameters():
    views = {name: View(model=Counted(), params=params(seed)) for seed, name in enumerate("pq")}
    seen = Context(batch=BATCH, views=views)
    for seed, name in enumerate("pq"):
        embedding = np.asarray(params(seed)["embedding"], np.float64)
        logits = embedding[BATCH["tokens"]] @ embedding.T
        expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
            logits, BATCH["targets"][..., None], axis=-1
        ).squeeze(-1)
        np.testing.assert_allclose(NextToken(view=name)(seen), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_a_loss_of_another_shape_is_refused():
    """A loss that was already reduced would otherwise be broadcast over the weights."""

    class Reduced(TokenLoss):
        def __call__(self, context):
            return jnp.float32(1.0)

    with pytest.raises(ValueError, match="differ in shape"):
        Objective(terms={"a": Term(loss=Reduced())})(context())
