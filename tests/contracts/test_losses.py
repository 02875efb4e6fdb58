"""Every public loss and weighting of tokens against NumPy, and what all of them promise."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.objectives
from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.core.weighted import Weighted
from tokenlab.depth import DepthTrace
from tokenlab.models import Head, LinearHead, ModelOutput, Thoughts
from tokenlab.objectives import (
    AfterThought,
    AllTokens,
    BeforeThought,
    DistributionKL,
    ExpectedNextToken,
    MixturePolicy,
    NextToken,
    Objective,
    SmoothedNextToken,
    TargetRange,
    TeacherKL,
    Term,
    ThoughtPolicy,
    TokenLoss,
    TokenWeights,
    ZLoss,
)

VOCABULARY, WIDTH, CAP = 23, 6, 9.0
CHANCES = (0.25, 0.75)  # of the two depths of the model, of which the second halves the stream
# What two thoughts make of the stream, for the next token and for the one behind it; what they were
# drawn from, and how far what was drawn is from the token read.
AFTER, DRAWING, DRAWN = ((0.5, 0.8), (1.5, 1.2)), (0.7, 0.9), (1, 5)


def log_z(logits):
    top = logits.max(axis=-1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]


def nats(logits, targets):
    return log_z(logits) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def relative_entropy(logits, targets):
    """From the teacher, whose logits are of the batch that all oracles are asked about."""
    theirs = logits_of(teacher_parameters(), batch_of()["tokens"])
    ours, theirs = (each - log_z(each)[..., None] for each in (logits, theirs))
    return (np.exp(theirs) * (theirs - ours)).sum(axis=-1)


def expected_nats(logits, targets):
    return CHANCES[0] * nats(logits, targets) + CHANCES[1] * nats(scaled(logits, 0.5), targets)


def scaled(logits, factor):
    """Logits of the stream times a factor."""
    return CAP * np.tanh(np.arctanh(logits / CAP) * factor)


def after_thoughts(logits, targets):
    """Nats after each thought ``[S, M, B, T]``, and whether there is one: none before a row."""
    after = np.stack([[nats(scaled(logits, f), targets) for f in each] for each in AFTER])
    there = np.stack([np.ones(targets.shape), np.arange(targets.shape[1]) > np.zeros_like(targets)])
    return after, there


def mean_after_thoughts(logits, targets):
    after, there = after_thoughts(logits, targets)
    return (after.mean(axis=0) * there).sum(axis=0) / there.sum(axis=0)


def thought_policy(logits, targets, temperature=3.0):
    """Rewards are those at the parameters of the batch, for they carry no gradient."""
    batch = batch_of()
    fixed = logits_of(parameters(), batch["tokens"])
    after, there = after_thoughts(fixed, targets)
    gains = (nats(fixed, targets) - after) * there * batch["weights"] * (batch["segments"] > 0)
    rewards = gains[:, 0].copy()
    rewards[..., :-1] += gains[:, 1, :, 1:]
    advantages = np.maximum(rewards - rewards.mean(axis=0), 0)
    drawn = [(batch["tokens"] + step) % VOCABULARY for step in DRAWN]
    thought = [
        nats(scaled(logits, f) / temperature, d) for f, d in zip(DRAWING, drawn, strict=True)
    ]
    return (advantages * np.stack(thought)).mean(axis=0)


def smoothed(logits, targets, share=0.3):
    """The full sum over the vocabulary against the mixed target."""
    logp = logits - log_z(logits)[..., None]
    wanted = (1 - share) * np.eye(VOCABULARY)[targets] + share / VOCABULARY
    return -(wanted * logp).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A member, its float64 oracle from all logits, and whether it comes from a paper."""

    part: TokenLoss
    oracle: Callable
    paper: bool = True


def relative_to_the_batch(logits, targets):
    """From the distributions of the batch that all oracles are asked about."""
    wanted, logp = batch_of()["distribution"].astype(np.float64), logits - log_z(logits)[..., None]
    return (wanted * (np.log(np.where(wanted > 0, wanted, 1.0)) - logp)).sum(axis=-1)


def surrogate(logits, targets, count=3, clip=0.1):
    """The product over the K tokens of a thought, each from the Kth root, or over one token."""
    batch = batch_of()
    old, drawn = (batch[name].astype(np.float64) for name in ("old_logits", "distribution"))
    ratios = []
    for times in (count, 1):
        new_logp, old_logp = (z / times - log_z(z / times)[..., None] for z in (logits, old))
        ratios.append(np.exp(times * (drawn * (new_logp - old_logp)).sum(axis=-1)))
    ratio = np.where(batch["thought"] > 0, *ratios)
    advantages = batch["advantages"].astype(np.float64)
    return -np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages)


LOSSES = {
    AfterThought: Row(AfterThought(), mean_after_thoughts),
    BeforeThought: Row(BeforeThought(), nats),
    ThoughtPolicy: Row(ThoughtPolicy(), thought_policy),
    MixturePolicy: Row(MixturePolicy(), surrogate),
    DistributionKL: Row(DistributionKL(), relative_to_the_batch),
    ExpectedNextToken: Row(ExpectedNextToken(), expected_nats),
    NextToken: Row(NextToken(), nats, paper=False),
    SmoothedNextToken: Row(SmoothedNextToken(smoothing=0.3), smoothed),
    TeacherKL: Row(TeacherKL(), relative_entropy),
    ZLoss: Row(ZLoss(), lambda logits, targets: log_z(logits) ** 2),
}
WEIGHTS = {
    AllTokens: (AllTokens(), False),
    TargetRange: (TargetRange(first=2, last=5), False),
}
every = pytest.mark.parametrize("member", LOSSES)


def public(family):
    return {
        member
        for member in vars(tokenlab.objectives).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }


def test_the_tables_hold_every_public_member():
    assert public(TokenLoss) == set(LOSSES)
    assert public(TokenWeights) == set(WEIGHTS)


class Bigram(nn.Module):
    """The smallest model with everything that a loss asks a model for."""

    dtype: str = "float32"
    head: Head = LinearHead(softcap=CAP)

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (VOCABULARY, WIDTH))

    def __call__(self, tokens, *, positions, segments, train):
        if self.is_initializing():
            self.head(self.embedding)
        hidden = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        trace = DepthTrace(
            depth=segments,
            active=segments[None] > 0,
            figures={"halting": jnp.tile(jnp.asarray(CHANCES)[:, None, None], (1, *tokens.shape))},
            streams=jnp.stack([hidden, hidden / 2]),
        )
        return ModelOutput(hidden=hidden, trace=trace)

    def think(self, tokens, **options):
        output = self(tokens, **options)
        hidden, real = output.hidden, options["segments"] > 0
        count = jnp.arange(tokens.shape[1])[None]
        return Thoughts(
            before=hidden,
            after=jnp.stack([jnp.stack([hidden * f for f in each]) for each in AFTER]),
            there=jnp.stack([real, real & (count > 0)]),
            share=jnp.zeros((2, 2, *tokens.shape)),
            drawn=jnp.stack([(tokens + step) % VOCABULARY for step in DRAWN])[:, None],
            drawing=jnp.stack([hidden * f for f in DRAWING])[:, None],
            output=output,
        )

    def logits(self, hidden):
        weight = self.head_weight().astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)
        return CAP * jnp.tanh(logits / CAP)

    def head_weight(self):
        return self.head(self.embedding)


def logits_of(params, tokens):
    """What ``Bigram`` means, in float64 NumPy."""
    embedding = np.asarray(params["embedding"], np.float64)
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    return CAP * np.tanh(embedding[tokens] @ kernel.T / CAP)


def batch_of(rows=4, width=8, seed=0):
    """Rows of one to ``width`` real tokens, weights that differ, zero on some of them."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(width, 1, rows).astype(int)
    positions = np.broadcast_to(np.arange(width), (rows, width))
    segments = (positions < lengths[:, None]).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], size=(rows, width)) * segments
    weights[:, 0] = 1.0
    distribution = rng.dirichlet(np.full(VOCABULARY, 0.3), size=(rows, width))
    distribution[:, 1, :5] = 0.0  # tokens that are never right
    tokens = rng.integers(0, VOCABULARY, (rows, width)).astype(np.int32) * segments
    old_logits = logits_of(parameters(), tokens)
    return {
        "tokens": tokens,
        "targets": rng.integers(0, VOCABULARY, (rows, width)).astype(np.int32) * segments,
        "positions": (positions * segments).astype(np.int32),
        "segments": segments,
        "weights": weights.astype(np.float32),
        "distribution": distribution.astype(np.float32),
        "thought": rng.integers(0, 2, (rows, width)).astype(np.float32),
        "advantages": rng.normal(scale=0.5, size=(rows, width)).astype(np.float32),
        "old_logits": (old_logits + rng.normal(scale=0.1, size=old_logits.shape)).astype(
            np.float32
        ),
    }


@functools.cache
def parameters():
    rng = np.random.default_rng(0)
    shape = (VOCABULARY, WIDTH)
    embedding, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    return {"embedding": embedding, "head": {"kernel": kernel}}


def teacher_parameters():
    return jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), parameters())


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(network, loss, params, batch):
    """Values of every position, the sums of the term, and the gradient of its mean."""

    def mean(params):
        teacher = View(model=network, params=teacher_parameters())
        views = {"policy": View(model=network, params=params), "teacher": teacher}
        context = Context(batch=batch, views=views)
        sums = Objective(terms={"it": Term(loss=loss)})(context)["it"]
        return sums.mean(), (loss(context), sums)

    gradient, (values, sums) = jax.grad(mean, has_aux=True)(params)
    return values, sums, gradient


def close(left, right, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


@every
def test_equals_the_oracle_and_is_float32(member):
    row, batch = LOSSES[member], batch_of()
    values, sums, _ = evaluate(Bigram(), row.part, parameters(), batch)
    expected = row.oracle(logits_of(parameters(), batch["tokens"]), batch["targets"])
    assert values.dtype == sums.total.dtype == jnp.float32 and values.shape == (4, 8)
    real = batch["segments"] > 0
    close(values[real], expected[real])
    close(sums.total, (expected * batch["weights"]).sum())
    close(sums.weight, batch["weights"].sum())


@every
def test_the_gradient_is_the_slope_of_the_oracle(member):
    """Central differences in float64, along one direction in all parameters."""
    row, batch, params = LOSSES[member], batch_of(), parameters()
    rng = np.random.default_rng(1)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), wide)

    def mean(step):
        moved = jax.tree.map(lambda leaf, d: leaf + step * d, wide, direction)
        values = row.oracle(logits_of(moved, batch["tokens"]), batch["targets"])
        return (values * batch["weights"]).sum() / batch["weights"].sum()

    expected = (mean(1e-5) - mean(-1e-5)) / 2e-5
    _, _, gradient = evaluate(Bigram(), row.part, params, batch)
    products = jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-4)


@every
def test_the_second_call_compiles_nothing(member):
    evaluate(Bigram(), LOSSES[member].part, parameters(), batch_of())
    compiled = evaluate._cache_size()
    again = config.load(config.dump(LOSSES[member].part))
    evaluate(Bigram(), again, parameters(), batch_of(seed=1))
    assert evaluate._cache_size() == compiled


@every
def test_padding_changes_nothing(member):
    """Wider rows and one more row, all of it padding that holds other tokens."""
    part, batch, wider = LOSSES[member].part, batch_of(), batch_of(rows=5, width=11, seed=9)
    for name, rows in wider.items():
        rows[:] = 0 if name in ("segments", "weights") else rows
        rows[:4, :8] = batch[name]
    values, sums, gradient = evaluate(Bigram(), part, parameters(), batch)
    padded_values, padded_sums, padded_gradient = evaluate(Bigram(), part, parameters(), wider)
    real = batch["segments"] > 0
    close(padded_values[:4, :8][real], values[real])
    close((padded_sums, padded_gradient), (sums, gradient))


@every
def test_fully_masked_is_zero_and_finite(member):
    nothing = {"segments": np.zeros((4, 8), np.int32), "weights": np.zeros((4, 8), np.float32)}
    for masked in (nothing, {"weights": nothing["weights"]}):
        _, sums, gradient = evaluate(
            Bigram(), LOSSES[member].part, parameters(), batch_of() | masked
        )
        assert float(sums.total) == float(sums.weight) == float(sums.mean()) == 0.0
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


@every
def test_rows_may_come_in_any_order(member):
    part, batch, order = LOSSES[member].part, batch_of(), [2, 0, 3, 1]
    values, sums, gradient = evaluate(Bigram(), part, parameters(), batch)
    permuted = {name: rows[order] for name, rows in batch.items()}
    moved_values, moved_sums, moved_gradient = evaluate(Bigram(), part, parameters(), permuted)
    close(moved_values, values[jnp.asarray(order)])
    close((moved_sums, moved_gradient), (sums, gradient))


@every
def test_a_bfloat16_model_gives_float32_losses_near_the_float32_ones(member):
    part, batch = LOSSES[member].part, batch_of()
    exact, _, _ = evaluate(Bigram(), part, parameters(), batch)
    values, sums, gradient = evaluate(Bigram(dtype="bfloat16"), part, parameters(), batch)
    assert values.dtype == sums.total.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    real = batch["weights"] > 0
    close(values[real], exact[real], rtol=0.05, atol=0.15)


@pytest.mark.parametrize("member", WEIGHTS)
def test_weights_are_float32_not_negative_and_move_with_their_rows(member):
    part, _ = WEIGHTS[member]
    view = View(model=Bigram(), params=parameters())

    @jax.jit
    def weigh(batch):
        return part(Context(batch=batch, views={"policy": view}))

    batch, order = batch_of(), np.asarray([2, 0, 3, 1])
    weights = weigh(batch)
    assert weights.dtype == jnp.float32 and weights.shape == (4, 8) and (weights >= 0).all()
    moved = weigh({name: rows[order] for name, rows in batch.items()})
    np.testing.assert_array_equal(moved, weights[order])
    assert weigh._cache_size() == 1


PARTS = [row.part for row in LOSSES.values()] + [part for part, _ in WEIGHTS.values()]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_the_object_is_its_own_config(part):
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    term = Term(loss=LOSSES[NextToken].part, coefficient=0.5)
    assert config.load(config.dump(term)) == term


def test_methods_from_papers_name_them():
    papers = {member: row.paper for member, row in LOSSES.items()}
    papers |= {member: paper for member, (_, paper) in WEIGHTS.items()}
    for member, paper in papers.items():
        doc = inspect.getdoc(member) or ""
        assert doc and ("Reference: " in doc and "arXiv:" in doc) == paper, member


def test_a_mean_of_nothing_is_zero():
    assert float(Weighted.of(jnp.ones(3), jnp.zeros(3)).mean()) == 0.0
