"""Speculation writes what decoding one by one writes: by enumeration, by draws, token for token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import (
    Autoregressive,
    Categorical,
    Greedy,
    RepetitionPenalty,
    Temperature,
    TopK,
)
from tokenlab.decode.speculative import (
    Chains,
    DynamicTree,
    FixedTree,
    Goose,
    KSequential,
    PromptLookup,
    RecursiveRejection,
    Speculative,
    Tree,
)
from tokenlab.decode.speculative.decoder import _decode, _prefill
from tokenlab.decode.speculative.verify import k_sequential, transport_rate
from tokenlab.models import LinearHead, llama

KEY = jax.random.key(3)
PROMPTS = [[1, 4, 9, 2, 7, 1, 4, 9], [3], [5, 5, 6, 5, 5, 6, 5], [12, 0, 3, 12]]


@functools.cache
def view(vocabulary=23, layers=2, seed=0, scale=0.6, max_length=64):
    network = llama(
        vocab_size=vocabulary, dim=8, num_layers=layers, num_heads=2, num_kv_heads=1,
        hidden_dim=8, max_length=max_length, head=LinearHead(),
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=scale, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )
    return View(model=network, params=params)


DRAFTERS = {
    "chain": Chains(length=4),
    "chains": Chains(count=3, length=3),
    "dynamic": DynamicTree(size=9, deepest=4),
    "layered": DynamicTree(size=9, deepest=4, threshold=0.1),
    "expected": DynamicTree(size=9, deepest=4, expected=True),
    "fixed": FixedTree(branches=(3, 2)),
    "early exit": Chains(length=3, view=None, early_exit=1),
    "lookup": PromptLookup(length=5),
    "goose": Goose(size=12, width=4, deepest=5),
    "followers": Goose(size=12, width=4, deepest=0),
    "spine": Goose(size=6, width=0, deepest=6),
}
SLOW = ("layered", "expected", "followers", "spine")
every = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in DRAFTERS]
)
OTHERS = {"draft": view(layers=1, seed=1)}


def run(drafter, prompts=PROMPTS, sampler=Greedy(), target=None, key=KEY, others=OTHERS, **rest):  # noqa: B008
    options = {"max_new_tokens": 17, "end_ids": ()} | rest
    call = options.pop("on_tokens", None)
    decoder = Speculative(drafter=drafter, sampler=sampler, **options)
    return decoder(target or view(), prompts, key=key, others=others, on_tokens=call)


@functools.cache
def greedy(name):
    return run(DRAFTERS[name])


@functools.cache
def plain(**options):
    decoder = Autoregressive(sampler=Greedy(), **({"max_new_tokens": 17, "end_ids": ()} | options))
    return decoder(view(), PROMPTS, key=KEY)


# ------------------------------------------------------------------ token for token


@every
def test_greedy_tokens_are_those_of_decoding_one_by_one(name):
    found = greedy(name)
    np.testing.assert_array_equal(found.tokens, plain().tokens)
    np.testing.assert_array_equal(found.lengths, 17)
    np.testing.assert_allclose(found.logp_model, plain().logp_model, atol=1e-4)
    np.testing.assert_array_equal(found.logp_behaviour, 0)


@every
def test_passes_and_accepted_tokens_account_for_all_that_is_written(name):
    found = greedy(name)
    passes, accepted = found.statistics["passes"], found.statistics["accepted"]
    # Every pass writes what it accepts and one token more, but for the bound on the last.
    assert (found.lengths - accepted <= passes).all()
    assert (passes <= found.lengths - accepted + 1).all()
    assert float(found.ledger.passes) == passes.max()
    assert ("draft" in found.others) == hasattr(DRAFTERS[name], "view")


def test_a_draft_that_is_the_target_is_always_accepted():
    for drafter in (Chains(length=4, temperature=1e-3), DynamicTree(size=4, temperature=1e-3)):
        found = run(drafter, others={"draft": view()})
        np.testing.assert_array_equal(found.tokens, plain().tokens)
        np.testing.assert_array_equal(found.statistics["passes"], 1 + -(-16 // 5))
        np.testing.assert_array_equal(found.statistics["accepted"], 16 - 3)


@pytest.mark.parametrize("name", ["dynamic", pytest.param("goose", marks=pytest.mark.slow)])
def test_end_tokens_and_bounds_are_where_they_are_one_by_one(name):
    ends = tuple(np.unique(plain().tokens[:, 5:9]))[:2]
    expected = plain(end_ids=ends)
    assert expected.lengths.min() < 17
    found = run(DRAFTERS[name], end_ids=ends)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for count in (1, 6):
        cut = run(DRAFTERS[name], max_new_tokens=count)
        np.testing.assert_array_equal(cut.tokens, plain().tokens[:, :count])


def test_streaming_shows_prefixes_and_a_caller_may_stop_rows():
    shown = []

    def stop_all(tokens, lengths):
        shown.append((tokens, lengths))
        return lengths > 5

    found = run(Chains(length=4), stream_every=1, on_tokens=stop_all)
    for tokens, lengths in shown:
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(tokens[row, :length], plain().tokens[row, :length])
    assert ((found.lengths > 5) & (found.lengths < 17)).any()


@every
def test_prompts_of_other_lengths_compile_nothing(name):
    greedy(name)
    sizes = _prefill._cache_size(), _decode._cache_size()
    run(DRAFTERS[name], prompts=[[2], [3] * 9, [1, 2], [4] * 12])
    assert (_prefill._cache_size(), _decode._cache_size()) == sizes


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("chains", "dynamic")), "goose"]
)
def test_a_row_depends_on_its_prompt_and_number_alone(name):
    sampler = Categorical(processors=(Temperature(value=1.3), TopK(k=9)))
    whole = run(DRAFTERS[name], sampler=sampler)
    alone = run(DRAFTERS[name], prompts=[PROMPTS[0]], sampler=sampler)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[0])


def test_penalties_see_the_drafted_path():
    """A processor that reads the history gives the same text as one by one."""
    sampler = Greedy(processors=(RepetitionPenalty(penalty=1.8),))
    expected = Autoregressive(max_new_tokens=17, end_ids=(), sampler=sampler)(
        view(), PROMPTS, key=KEY
    )
    assert (expected.tokens != plain().tokens).any()
    for name in ("chains", "dynamic", "goose"):
        np.testing.assert_array_equal(run(DRAFTERS[name], sampler=sampler).tokens, expected.tokens)


# ------------------------------------------------------------------ distributions

VOCABULARY, ROWS = 4, 6000


@functools.cache
def chances_of_three():
    """Probability of every three tokens after the prompt, by whole forward passes."""
    target = view(vocabulary=VOCABULARY, scale=0.9)
    texts = np.asarray(list(itertools.product(range(VOCABULARY), repeat=3)))
    tokens = np.concatenate([np.tile([1, 2, 1, 2], (len(texts), 1)), texts], axis=1)
    positions = np.broadcast_to(np.arange(7), tokens.shape)
    where = {"positions": jnp.asarray(positions), "segments": jnp.ones(tokens.shape, int)}
    out = target(jnp.asarray(tokens), **where)
    logits = np.asarray(target(out.hidden, method="logits"))[:, 3:6]
    logp = np.asarray(jax.nn.log_softmax(logits / 1.2, axis=-1))
    return np.exp(np.take_along_axis(logp, texts[..., None], axis=2)[..., 0].sum(axis=1))


DISTRIBUTED = {
    "chain": (Chains(length=3), RecursiveRejection()),
    "one of k": (Chains(length=2), KSequential(chains=1)),
    "spectr": (Chains(count=4, length=2), KSequential(chains=4)),
    "chains": (Chains(count=3, length=2), RecursiveRejection()),
    "dynamic": (DynamicTree(size=6, deepest=3), RecursiveRejection()),
    "layered": (DynamicTree(size=6, deepest=3, threshold=0.2), RecursiveRejection()),
    "expected": (DynamicTree(size=6, deepest=3, expected=True), RecursiveRejection()),
    "fixed": (FixedTree(branches=(3, 2)), RecursiveRejection()),
    "lookup": (PromptLookup(length=3), RecursiveRejection()),
    "goose": (Goose(size=6, width=2, deepest=3), RecursiveRejection()),
}


QUICK = ("spectr",)
slowly = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in DISTRIBUTED]


@pytest.mark.parametrize("name", slowly)
def test_what_is_written_has_the_targets_distribution(name):
    drafter, verifier = DISTRIBUTED[name]
    found = run(
        drafter,
        prompts=[[1, 2, 1, 2]] * ROWS,
        target=view(vocabulary=VOCABULARY, scale=0.9),
        others={"draft": view(vocabulary=VOCABULARY, layers=1, seed=5, scale=0.9)},
        sampler=Categorical(processors=(Temperature(value=1.2),)),
        verifier=verifier,
        max_new_tokens=3,
    )
    number = found.tokens @ [VOCABULARY**2, VOCABULARY, 1]
    observed = np.bincount(number, minlength=VOCABULARY**3)
    expected = ROWS * chances_of_three()
    assert abs(expected.sum() - ROWS) < 1
    statistic = np.sum((observed - expected) ** 2 / expected)
    # One seed in ten thousand would exceed this were it exact.
    assert statistic < scipy.stats.chi2.ppf(0.9999, VOCABULARY**3 - 1)
    assert found.statistics["accepted"].sum() > 0
    chosen = chances_of_three()[number]
    np.testing.assert_allclose(
        np.exp(found.logp_behaviour.sum(axis=1)), chosen, rtol=2e-3, atol=1e-6
    )


# ------------------------------------------------------------------ verifiers


CASES = [  # p, q, k, rate, accepted
    ((0.5, 0.5), (0.9, 0.1), 1, 1.0, 0.6),
    ((0.5, 0.5), (0.9, 0.1), 2, 1.43007, 0.81504),
    ((0.5, 0.5), (0.9, 0.1), 3, None, 0.91557),
    ((0.5, 0.5), (0.9, 0.1), 4, None, 0.96184),
    ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 2, 1.58443, 0.65844),
    ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 3, None, 0.71),
    ((0.2, 0.3, 0.5), (0.2, 0.3, 0.5), 3, 1.0, 1.0),
]


@pytest.mark.parametrize(("p", "q", "k", "rate", "accepted"), CASES)
def test_k_sequential_by_enumeration(p, q, k, rate, accepted):
    p, q = jnp.asarray(p), jnp.asarray(q)
    rho = float(transport_rate(p, q, jnp.float32(k)))
    if rate is not None:
        assert rho == pytest.approx(rate, abs=2e-5)
    keys, alive = jax.random.split(KEY, k), jnp.ones(k, bool)
    written, found = np.zeros(len(p)), 0.0
    for draft in itertools.product(range(len(p)), repeat=k):
        weight = float(jnp.prod(p[jnp.asarray(draft)]))
        _, residual = k_sequential(p, q, jnp.asarray(draft), alive, keys)
        left = weight
        for token in draft:
            chance = min(1.0, float(q[token]) / (rho * float(p[token])))
            written[token] += left * chance
            found += left * chance
            left *= 1 - chance
        written += left * np.asarray(residual)
    np.testing.assert_allclose(written, q, atol=2e-6)
    assert found == pytest.approx(accepted, abs=2e-5)


def test_the_residual_of_the_card():
    p, q = jnp.asarray([0.6, 0.3, 0.1]), jnp.asarray([0.2, 0.3, 0.5])
    keys, alive = jax.random.split(KEY, 3), jnp.ones(3, bool)
    _, residual = k_sequential(p, q, jnp.asarray([0, 0, 0]), alive, keys)
    np.testing.assert_allclose(residual, [0, 0, 1], atol=1e-6)


@pytest.mark.parametrize(("siblings", "accepted"), [(1, 0.6), (2, 0.7), (3, 1.0)])
def test_siblings_are_accepted_as_often_as_enumeration_says(siblings, accepted):
    """One level: D = (.6, .3, .1), T = (.2, .3, .5); all orders of siblings, all verdicts."""
    draft, target = np.asarray([0.6, 0.3, 0.1]), np.asarray([0.2, 0.3, 0.5])
    written, found = np.zeros(3), 0.0
    for order in itertools.permutations(range(3), siblings):
        weight, left, rest = 1.0, draft.copy(), target.copy()
        chances, proposals = [], []
        for token in order:
            weight *= left[token] / left.sum()
            proposals.append(left / left.sum())
            left[token] = 0
        reached = weight
        for token, proposal in zip(order, proposals, strict=True):
            chances.append(min(1.0, rest[token] / proposal[token]))
            written[token] += reached * chances[-1]
            found += reached * chances[-1]
            reached *= 1 - chances[-1]
            rest = np.maximum(rest - proposal, 0)
            rest = rest / rest.sum() if rest.sum() > 0 else rest
        written += reached * rest
        # The verifier itself, over many keys.
        tree = Tree(
            jnp.asarray(order), jnp.full(siblings, -1), jnp.ones(siblings, bool),
            jnp.asarray(np.stack(proposals), jnp.float32),
        )  # fmt: skip
        where = jnp.asarray(np.stack([target] * (siblings + 1)), jnp.float32)
        nodes, counts, _ = jax.vmap(
            lambda key, t=tree, w=where: RecursiveRejection().walk(t, w, key)
        )(jax.random.split(KEY, 4000))
        share = 1 - np.prod([1 - c for c in chances])
        assert float(jnp.mean(counts)) == pytest.approx(share, abs=0.035)
        assert float(jnp.mean(nodes == 0)) == pytest.approx(chances[0], abs=0.035)
    np.testing.assert_allclose(written, target, atol=1e-12)
    assert found == pytest.approx(accepted)


# ------------------------------------------------------------------ trees


def test_ancestors_and_paths_of_a_tree():
    parents = jnp.asarray([[-1, 0, 0, -1, 2, 4], [-1, -1, -1, 0, 1, 3]])
    tree = Tree(jnp.zeros((2, 6), int), parents, jnp.ones((2, 6), bool), None)
    expected = {(0, 4): [0, 2, 4], (0, 5): [0, 2, 4, 5], (1, 5): [0, 3, 5], (1, 2): [2]}
    for (row, node), path in expected.items():
        assert np.flatnonzero(tree.ancestors()[row, node]).tolist() == path
        found = tree.path(jnp.full(2, node), 6)[row]
        assert found.tolist() == path + [-1] * (6 - len(path))
    assert tree.path(jnp.full(2, -1), 6).tolist() == [[-1] * 6] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Chains(length=0), "must be at least 1"),
        (lambda: Chains(view=None), "give one, the other None"),
        (lambda: Chains(temperature=0.0), "must be above 0"),
        (lambda: DynamicTree(size=0), "at least 1 node"),
        (lambda: FixedTree(branches=()), "at least one level"),
        (lambda: PromptLookup(longest=1, shortest=2), "from 1 up"),
        (lambda: Goose(width=0, deepest=0), "one of the two sources"),
        (lambda: Goose(prior=(1.0, 0.1)), "two chances between 0 and 1"),
        (lambda: KSequential(chains=0), "must be at least 1"),
        (lambda: run(Chains(view="tiny")), "no view 'tiny' to draft with; there are: draft"),
        (lambda: run(Chains(), others={"draft": view(vocabulary=9)}), "a vocabulary of 9"),
        (lambda: run(Chains(view=None, early_exit=2)), "must be from 1 to 1"),
        (
            lambda: run(Chains(count=2), verifier=KSequential(chains=3)),
            "as many independent chains",
        ),
        (lambda: run(Chains(), prompts=[[1] * 60]), "exceed the model's context"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        change()
    assert "\n" not in str(caught.value)
