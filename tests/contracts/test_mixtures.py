"""Every public mixture of tokens, and every density, against NumPy and by frequency."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tokenlab import config
from tokenlab.models import mixtures
from tokenlab.models.mixtures import (
    DirichletDraw,
    ExpectedToken,
    MeanOfSamples,
    RandomMixture,
    TokenMixture,
)

LOGITS = np.array([[2.0, 0.5, -1.0, 0.0, -30.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
TABLE = {
    ExpectedToken: (ExpectedToken(),),
    MeanOfSamples: (MeanOfSamples(count=3), MeanOfSamples(count=2, normalised=False)),
    DirichletDraw: (DirichletDraw(), DirichletDraw(scale=20.0)),
}
PARTS = [part for parts in TABLE.values() for part in parts]
every = pytest.mark.parametrize("part", PARTS, ids=str)
drawn = pytest.mark.parametrize(
    "part", [part for part in PARTS if isinstance(part, RandomMixture)], ids=str
)


def softmax(z):
    z = np.exp(np.asarray(z, np.float64) - np.max(z, axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@functools.partial(jax.jit, static_argnums=0)
def draw(part, logits, keys):
    return part(logits=logits, keys=keys)


def test_the_table_holds_every_public_member():
    found = {
        member
        for member in vars(mixtures).values()
        if inspect.isclass(member)
        and issubclass(member, TokenMixture)
        and not inspect.isabstract(member)
    }
    assert found == set(TABLE)


@every
def test_shares_are_float32_not_negative_and_sum_to_one(part):
    for dtype in (jnp.float32, jnp.bfloat16):
        shares = draw(part, jnp.asarray(LOGITS, dtype), keys(2))
        assert shares.dtype == jnp.float32 and shares.shape == LOGITS.shape
        assert (shares >= 0).all()
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    assert draw._cache_size() <= 2 * len(PARTS)


@every
def test_a_row_depends_on_itself_and_its_key(part):
    own = keys(2)
    both = draw(part, LOGITS, own)
    for row in range(2):
        alone = draw(part, LOGITS[row : row + 1], own[row : row + 1])
        np.testing.assert_array_equal(alone[0], both[row])
    before = draw._cache_size()
    draw(config.load(config.dump(part)), LOGITS + 1, keys(2, seed=1))
    assert draw._cache_size() == before


@every
def test_the_expectation_is_what_is_drawn_from(part):
    """So the mean embedding fed is that of the distribution, whatever the embeddings are."""
    many = np.asarray(draw(part, np.repeat(LOGITS[:1], 20_000, axis=0), keys(20_000)))
    count = part.count if isinstance(part, MeanOfSamples) and part.normalised else 1
    expected = softmax(LOGITS[0] / count)
    if isinstance(part, DirichletDraw):
        expected = np.where(expected < part.floor, 0.0, expected)
        expected /= expected.sum()
    np.testing.assert_allclose(many.mean(axis=0), expected, atol=0.01)


@every
def test_is_its_own_config_and_names_its_paper(part):
    assert config.load(config.dump(part)) == part
    assert "Reference: " in inspect.getdoc(type(part))
    assert "arXiv:" in inspect.getdoc(type(part))


def test_one_sample_is_the_token_that_sampling_draws():
    own = keys(500)
    logits = np.repeat(LOGITS[:1], 500, axis=0)
    tokens = jax.jit(jax.vmap(jax.random.categorical))(own, logits)
    for normalised in (True, False):
        shares = draw(MeanOfSamples(count=1, normalised=normalised), logits, own)
        np.testing.assert_array_equal(shares, jax.nn.one_hot(tokens, 5))


def test_more_samples_are_nearer_to_the_expected_embedding():
    """The covariance of the mean embedding is that of one token over K."""
    rng = np.random.default_rng(0)
    embedding, p = rng.normal(size=(5, 3)), softmax(LOGITS[0])
    centred = embedding - p @ embedding
    one = (p[:, None] * centred).T @ centred
    logits = np.repeat(LOGITS[:1], 40_000, axis=0)
    for count in (1, 4, 16):
        part = MeanOfSamples(count=count, normalised=False)
        fed = np.asarray(draw(part, logits, keys(40_000))) @ embedding
        np.testing.assert_allclose(fed.mean(axis=0), p @ embedding, atol=0.02)
        np.testing.assert_allclose(np.cov(fed.T) * count, one, atol=0.03)


def test_normalised_samples_come_from_the_root_of_the_probabilities():
    p = np.array([[0.64, 0.36]])
    shares = np.asarray(
        draw(MeanOfSamples(count=2), np.repeat(np.log(p), 50_000, axis=0), keys(50_000))
    )
    np.testing.assert_allclose(shares.mean(axis=0), [0.5714, 0.4286], atol=0.005)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_ratio_of_means_is_the_product_over_their_tokens(normalised):
    part = MeanOfSamples(count=3, normalised=normalised)
    tokens = np.array([0, 3, 0])
    mixture = np.eye(5)[tokens].mean(axis=0)
    other = np.array([0.3, 1.0, -0.5, 0.2, 0.0])
    temperature, power = (3, 1) if normalised else (1, 1 / 3)
    new, old = (softmax(z / temperature)[tokens] for z in (other, LOGITS[0]))
    found = jax.jit(part.log_ratio)(mixture=mixture[None], new=other[None], old=LOGITS[:1])
    np.testing.assert_allclose(np.exp(found[0]), np.prod(new / old) ** power, rtol=1e-5)


def test_the_density_of_dirichlet_draws():
    part, both = DirichletDraw(), jnp.ones(2)
    mixture = jnp.array([0.3, 0.7])
    densities = [
        part.log_density(mixture=mixture, alpha=jnp.array(alpha), support=both)
        for alpha in ([0.6, 0.4], [0.5, 0.5])
    ]
    assert float(densities[0]) == pytest.approx(-0.499318, abs=1e-6)
    new, old = jnp.log(jnp.array([[0.6, 0.4]])), jnp.log(jnp.array([[0.5, 0.5]]))
    ratio = np.exp(part.log_ratio(mixture=mixture[None], new=new, old=old))
    assert float(ratio[0]) == pytest.approx(0.873793, abs=1e-6)
    alpha = np.array([2.0, 0.7, 1.3])
    inside = np.array([0.2, 0.5, 0.3])
    found = part.log_density(
        mixture=jnp.asarray(inside), alpha=jnp.asarray(alpha), support=jnp.ones(3)
    )
    assert float(found) == pytest.approx(scipy.stats.dirichlet.logpdf(inside, alpha), rel=1e-5)


def test_the_support_is_what_either_policy_finds_likely():
    part = DirichletDraw()
    p_new, p_old = np.array([0.6, 0.3995, 0.0005]), np.array([0.0004, 0.7, 0.2996])
    mixture = np.array([0.2, 0.5, 0.3])
    new, old = (jnp.log(jnp.asarray(p))[None] for p in (p_new, p_old))
    found = part.log_ratio(mixture=jnp.asarray(mixture)[None], new=new, old=old)
    clamped = [np.maximum(p, 1e-3) / np.maximum(p, 1e-3).sum() for p in (p_new, p_old)]
    new, old = (scipy.stats.dirichlet.logpdf(mixture, alpha) for alpha in clamped)
    assert float(found[0]) == pytest.approx(new - old, rel=1e-4)
    outside = draw(part, np.log(p_new)[None], keys(1))
    assert float(outside[0, 2]) == 0.0


@drawn
def test_equal_policies_have_ratio_one_and_the_gradient_of_the_log_density(part):
    mixture = draw(part, LOGITS, keys(2))
    old = jnp.asarray(LOGITS)

    @jax.jit
    def ratio(new):
        return jnp.exp(part.log_ratio(mixture=mixture, new=new, old=old)).sum()

    assert float(ratio(old)) == pytest.approx(2.0, abs=1e-5)
    gradient = np.asarray(jax.grad(ratio)(old), np.float64)
    assert np.isfinite(gradient).all()
    if isinstance(part, MeanOfSamples):
        # d log softmax(z / K) of K tokens, or a Kth of that of K tokens at K = 1.
        temperature = part.count if part.normalised else 1
        expected = np.asarray(mixture) - softmax(LOGITS / temperature)
    else:
        rng, step = np.random.default_rng(0), 1e-2
        direction = rng.normal(size=LOGITS.shape).astype(np.float32)
        moved = [
            float(part.log_ratio(mixture=mixture, new=old + s * direction, old=old).sum())
            for s in (step, -step)
        ]
        slope = (moved[0] - moved[1]) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=0.02, abs=1e-3)
        return
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("member", "change"),
    [(MeanOfSamples, {"count": 0}), (DirichletDraw, {"scale": 0.0}), (DirichletDraw, {"floor": 0})],
)
def test_impossible_mixtures_are_refused(member, change):
    with pytest.raises(ValueError, match="must be"):
        member(**change)
