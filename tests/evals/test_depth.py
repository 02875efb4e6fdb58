"""Depth against difficulty: fits by hand, and an allocation whose figures are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import Addition, GraphOrder, PointerChase, SlotText
from tokenlab.depth import FixedHalting, HaltingLoop, SkipDecode
from tokenlab.evals import DepthAllocation, DepthHistogram, depth_fit
from tokenlab.models import llama


def test_a_line_is_explained_and_noise_is_not():
    rng = np.random.default_rng(0)
    difficulty = rng.integers(1, 6, size=(400, 1)).astype(float)
    line = depth_fit(2 + 3 * difficulty[:, 0], difficulty)
    assert line.r_squared == pytest.approx(1) and line.spearman == pytest.approx([1])
    noise = depth_fit(rng.normal(size=400), difficulty)
    assert abs(noise.r_squared) < 0.02 and abs(noise.spearman[0]) < 0.15
    curved = depth_fit(np.exp(difficulty[:, 0]), difficulty)
    assert curved.spearman == pytest.approx([1]) and 0.5 < curved.r_squared < 0.9


def test_several_features_are_fitted_together():
    """The residuals are uncorrelated with every feature; the share is that of the variance."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 2))
    depth = features @ [1.0, -2.0] + rng.normal(size=300)
    fit = depth_fit(depth, features)
    assert fit.r_squared == pytest.approx(5 / 6, abs=0.05)
    alone = [depth_fit(depth, features[:, [i]]).r_squared for i in range(2)]
    pearson = [scipy.stats.pearsonr(depth, features[:, i]).statistic for i in range(2)]
    np.testing.assert_allclose(alone, np.square(pearson), rtol=1e-6)


def test_what_does_not_vary_follows_nothing():
    features = np.arange(6.0)[:, None]
    assert depth_fit(np.full(6, 2.0), features).r_squared == 0
    assert depth_fit(np.zeros(0), np.zeros((0, 1))).r_squared == 0
    assert depth_fit(np.arange(6.0), np.ones((6, 1))).spearman[0] == 0


def test_a_histogram_counts_tokens_and_averages_their_loss():
    depth, nats = np.asarray([[2.0, 4.0], [4.4, 2.0]]), np.asarray([[1.0, 5.0], [2.0, 2.0]])
    found = DepthHistogram.of(depth, nats)
    assert [side.tolist() for side in found] == [[2, 4], [0.5, 0.5], [1.5, 3.5]]
    assert found.share @ found.nats == pytest.approx(nats.mean())
    figures = found.figures()
    assert figures == {
        "share_at_depth_2": 0.5, "share_at_depth_4": 0.5,
        "nats_at_depth_2": 1.5, "nats_at_depth_4": 3.5,
    }  # fmt: skip
    again = DepthHistogram.read({"bits_per_byte": 1.0, **dict(reversed(figures.items()))})
    assert [side.tolist() for side in again] == [side.tolist() for side in found]


def test_a_depth_that_does_not_vary_has_no_figures():
    assert DepthHistogram.of(np.full(3, 5), np.ones(3)).figures() == {}
    assert [len(side) for side in DepthHistogram.read({"accuracy": 1.0})] == [0, 0, 0]
    empty = DepthHistogram.of(np.zeros(0), np.zeros(0))
    assert [len(side) for side in empty] == [0, 0, 0]


def measured(task, depth, layers, **options):
    model = llama(
        vocab_size=task.tokenizer.vocab_size, dim=16, num_layers=layers, num_heads=2,
        num_kv_heads=2, hidden_dim=16, depth=depth,
    )  # fmt: skip
    zeros = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), zeros, positions=zeros, segments=zeros + 1)["params"]
    allocation = DepthAllocation(task=task, rows=8, batch_size=4, **options)
    return allocation(model=model, params=nn.meta.unbox(params), tokenizer=task.tokenizer)


def test_known_depths_are_measured_in_recursions_or_in_layers():
    task = PointerChase(values=5, queries=4, max_hops=3)
    depth = HaltingLoop(halting=FixedHalting(depth=2), recursions=3)
    for twin in (True, False):
        found = measured(task, depth, 5, twin=twin)
        assert found["mean_depth"] == found["filler_depth"] == 2
        assert found["spearman"] == found["r_squared"] == 0
        assert not any("at_depth" in name for name in found)
    chance = {f"accuracy_at_{hops}" for hops in (1, 2, 3)}
    assert chance <= set(found) and found["nats"] == pytest.approx(np.log(12), abs=0.5)


def test_columns_are_difficulties_that_a_schedule_follows_downwards():
    """With a layer less in every clause, depth falls as clauses come; late tokens are the second
    half of them."""
    task = SlotText(slots=4)
    clause = (task.length - task.prompt_length) // 4
    counts = tuple(count for count in (5, 4, 3, 2) for _ in range(clause))
    depth = SkipDecode(counts=counts, prompt_length=task.prompt_length - 1)
    found = measured(task, depth, 5)
    assert [found[f"depth_at_{i}"] for i in range(4)] == [5, 4, 3, 2]
    assert found["mean_depth"] == 3.5
    assert [found[f"share_at_depth_{i}"] for i in (5, 4, 3, 2)] == [0.25] * 4
    nats = [found[f"nats_at_depth_{i}"] for i in (5, 4, 3, 2)]
    assert np.mean(nats) == pytest.approx(found["nats"], rel=1e-5)
    if found["right"] > 1:
        assert found["spearman"] <= 0


class Columns(GraphOrder):
    """Features that are known: the column, the columns from the end, and one number everywhere."""

    def features(self, rows):
        column = np.broadcast_to(np.arange(self.length), rows.tokens.shape)
        same = np.full_like(column, 3)
        return {"place": {"column": column, "rest": -column}, "none": {"same": same}}


def test_depth_is_fitted_to_the_features_of_a_task():
    task = Columns(nodes=3, min_nodes=3, edges=3)
    depth = SkipDecode(counts=(5, 4, 3), prompt_length=6)
    found = measured(task, depth, 5)
    assert found["right"] > 4 and found["r_squared"] < 1
    assert found["place_r_squared"] == pytest.approx(1)
    assert found["spearman_column"] == pytest.approx(-1)
    assert found["spearman_rest"] == pytest.approx(1)
    assert found["none_r_squared"] == found["spearman_same"] == 0


def test_another_alphabet_is_refused():
    task = PointerChase(values=5)
    with pytest.raises(UserError, match="not the alphabet"):
        DepthAllocation(task=task)(model=nn.Dense(1), params={}, tokenizer=Addition().tokenizer)
    with pytest.raises(ValueError, match="not a multiple of batch_size"):
        DepthAllocation(task=task, rows=10)
