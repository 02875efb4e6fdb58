"""The shapes of drafted trees: DySpec's greedy growth and Goose's allocation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.decode import Greedy, History
from tokenlab.decode.speculative import DynamicTree, Goose, PromptLookup, RecursiveRejection
from tokenlab.decode.speculative.lookup import GooseState, longest_match

SAMPLER = Greedy()
pytestmark = pytest.mark.usefixtures("unchecked")  # stand-ins for models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted(DynamicTree):
    """Drafts from a table: what comes next depends on the last token and the depth."""

    table: tuple[tuple[tuple[float, ...], ...], ...]  # by depth and last token
    view: str | None = "draft"

    def _root(self, draft, state, history):
        logits = jnp.log(jnp.asarray(self.table))[0, history.last(1)[:, 0]]
        return logits, state

    def _after(self, draft, history, sampler, state, tree):
        depth = jnp.sum(tree.ancestors(), axis=2)
        return jnp.asarray(self.table)[jnp.minimum(depth, len(self.table) - 1), tree.tokens], state

    def _shaped(self, logits, history, sampler):
        return jax.nn.softmax(logits, axis=-1)


def history(rows):
    tokens = jnp.asarray(rows)
    lengths = jnp.full(len(tokens), tokens.shape[1])
    return History(jnp.pad(tokens, ((0, 0), (0, 8))), lengths, lengths)


def drafted(table, rows=((0,), (1,)), seed=0, **options):
    drafter = Planted(table=table, **options)
    keys = jax.random.split(jax.random.key(seed), len(rows))
    tree, _ = drafter.propose((None, None), 0, history=history(rows), sampler=SAMPLER, keys=keys)
    return jax.tree.map(np.asarray, tree)


def table_of(seed, vocabulary=3, depth=4):
    chances = np.random.default_rng(seed).dirichlet(
        np.full(vocabulary, 0.7), size=(depth, vocabulary)
    )
    return tuple(tuple(tuple(row) for row in level) for level in np.maximum(chances, 1e-6).tolist())


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 100), expected=st.booleans())
def test_every_node_goes_where_verification_is_likeliest_to_arrive(seed, expected):
    table, deepest, roots = table_of(seed), 4, (0, 1)
    tree = drafted(table, seed=seed, size=10, deepest=deepest, expected=expected)

    def rank(value, left):
        return value * np.sum((left / left.sum()) ** 2) if expected and value else value

    for row, root in enumerate(roots):
        ways, depths = {-1: (1.0, np.asarray(table[0][root]))}, {-1: 0}
        values = []
        for i in range(10):
            if not tree.valid[row, i]:
                assert max(value for value, _ in ways.values()) == 0
                continue
            parent, token = int(tree.parents[row, i]), int(tree.tokens[row, i])
            value, left = ways[parent]
            left = left / left.sum()
            best = max(rank(*way) for way in ways.values())
            assert rank(value, left) >= best * (1 - 1e-4)
            np.testing.assert_allclose(tree.proposals[row, i], left, atol=1e-5)
            values.append(value)
            rest = left.copy()
            rest[token] = 0
            depths[i] = depths[parent] + 1
            ways[parent] = (value * (1 - left[token]) if rest.sum() > 1e-9 else 0.0, rest)
            below = np.asarray(table[min(depths[i], 3)][token])
            ways[i] = (value * left[token] if depths[i] < deepest else 0.0, below)
        if not expected:
            assert all(a >= b * (1 - 1e-4) for a, b in itertools.pairwise(values))
        assert max(depths.values()) <= deepest


def test_expected_acceptance_leaves_a_doubtful_child_for_a_certain_sibling():
    """Root (.6, .4): a first child is reached by .6 and accepted by 1/3, its sibling .4 and 1."""
    root, doubtful = (0.6, 0.4, 1e-30), (1 / 3,) * 3
    parents = {True: [], False: []}
    for expected, seed in itertools.product((True, False), range(6)):
        tree = drafted(
            ((root,) * 3, (doubtful,) * 3), seed=seed, size=2, deepest=3, expected=expected
        )
        of_likely = tree.parents[tree.tokens[:, 0] == 0]
        parents[expected] += of_likely[:, 1].tolist()
    assert set(parents[True]) == {-1} and set(parents[False]) == {0}


def test_a_draft_without_doubt_gives_a_chain():
    one_hot = ((1e-30, 1.0, 1e-30),) * 3
    tree = drafted((one_hot,) * 2, size=5, deepest=9)
    np.testing.assert_array_equal(tree.parents, [[-1, 0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(tree.tokens, 1)


def test_a_draft_without_opinion_gives_siblings():
    vocabulary = 12
    uniform = ((tuple([1 / vocabulary] * vocabulary),) * vocabulary,) * 2
    tree = drafted(uniform, size=10, deepest=9)
    # While 1 - j / V is above 1 / V: all of them hang on the root, and no token twice.
    np.testing.assert_array_equal(tree.parents, -1)
    assert all(len(set(row.tolist())) == 10 for row in tree.tokens)


def test_a_threshold_leaves_out_what_is_unlikely():
    table = table_of(3)
    tree = drafted(table, size=10, deepest=4, threshold=0.2)
    assert not tree.valid.all() and tree.valid[:, 0].all()


# ------------------------------------------------------------------ what the context says


@settings(deadline=None, max_examples=40)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14), shortest=st.integers(1, 3))
def test_the_latest_match_of_the_longest_suffix(tokens, shortest):
    expected = (-1, 0)
    for size in range(3, shortest - 1, -1):
        places = [at for at in range(size, len(tokens)) if tokens[at - size : at] == tokens[-size:]]
        if len(tokens) >= size and places:
            expected = (places[-1], size)
            break
    padded = jnp.asarray([tokens + [7] * (16 - len(tokens))])
    past = History(padded, jnp.asarray([len(tokens)]), jnp.asarray([1]))
    found = longest_match(past, longest=3, shortest=shortest)
    assert tuple(int(x[0]) for x in found) == expected


def test_prompt_lookup_copies_what_followed():
    past = History(jnp.asarray([[5, 6, 7, 8, 5, 6, 0, 0]]), jnp.asarray([6]), jnp.asarray([2]))
    tree, _ = PromptLookup(length=6).propose(None, (), history=past, sampler=SAMPLER, keys=None)
    assert tree.tokens[0, :4].tolist() == [7, 8, 5, 6]
    np.testing.assert_array_equal(tree.valid[0], [True] * 4 + [False] * 2)


def goose_tree(p, b, size, spine=20, width=8):
    """A tree over a long spine whose tokens all have followers."""
    goose = Goose(size=size, width=width, deepest=spine)
    vocabulary = 1000
    following = jnp.arange(vocabulary)[:, None] * 10 + jnp.arange(width)[None] + 500
    state = GooseState(
        following=(following % vocabulary)[None],
        spine=jnp.asarray([p]),
        branch=jnp.asarray(b)[None] if np.ndim(b) else (b * (1 - b) ** jnp.arange(width))[None],
    )
    tree = jax.tree.map(
        lambda x: x[0],
        jax.vmap(goose._tree)(state, jnp.arange(1, spine + 1)[None], jnp.asarray([0])),
    )
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize(
    ("p", "b", "spine", "value"), [(0.7, 0.12, 10, 2.3351), (0.5, 0.1, 5, 1.2296)]
)
def test_the_budget_goes_to_the_spine_as_far_as_it_is_worth_it(p, b, spine, value):
    tree = goose_tree(p, b, 12)
    on_spine = (tree.parents == np.arange(12) - 1) & (tree.tokens == np.arange(1, 13))
    assert tree.valid.all() and on_spine.sum() == spine and on_spine[:spine].all()
    total = sum(p**i for i in range(1, spine + 1))
    ranks = {}
    for node in range(spine, 12):
        parent = int(tree.parents[node])
        rank = ranks[parent] = ranks.get(parent, -1) + 1
        total += p ** (parent + 1) * (1 - p) * b * (1 - b) ** rank
    assert total == pytest.approx(value, abs=6e-5)


def test_equal_chances_give_a_shallow_tree():
    tree = goose_tree(0.12, 0.12, 12)
    assert (tree.parents == -1).sum() >= 6


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
@pytest.mark.slow
def test_more_is_accepted_than_by_either_source_alone(seed):
    """Where the spine and the branches alone are parts of the tree."""
    rng = np.random.default_rng(seed)
    vocabulary, spine_size, width = 6, 4, 2
    table = rng.integers(-1, vocabulary, size=(vocabulary, width)).astype(np.int32)
    spine = rng.integers(0, vocabulary, size=spine_size).astype(np.int32)
    spine[rng.integers(0, spine_size + 1) :] = -1
    best = rng.integers(0, vocabulary, size=64)  # the target's choice, by depth

    def accepted(deepest, width, size):
        goose = Goose(size=size, width=width, deepest=deepest)
        state = GooseState(
            following=jnp.asarray(table[:, :width])[None], spine=jnp.asarray([0.6]),
            branch=jnp.full((1, width), 0.3),
        )  # fmt: skip
        tree = jax.vmap(goose._tree)(
            state, jnp.asarray(spine[:deepest])[None], jnp.asarray([2], jnp.int32)
        )
        depth = np.asarray(jnp.sum(tree.ancestors(), axis=2))[0]
        choice = best[np.concatenate([[0], depth])]
        target = jax.nn.one_hot(jnp.asarray(choice), vocabulary)[None]
        verdict = RecursiveRejection()(tree, target, keys=jax.random.split(jax.random.key(0), 1))
        return int(verdict.count[0])

    everything = accepted(spine_size, width, 40)
    assert everything >= accepted(spine_size, 0, spine_size)
    assert everything >= accepted(0, width, 40)
