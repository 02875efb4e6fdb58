"""Every public drafter and verifier: a config of itself, named after its paper."""

import inspect

import pytest

import tokenlab.decode.speculative as speculative
from tokenlab import config
from tokenlab.decode.speculative import (
    Chains,
    Drafter,
    DynamicTree,
    FixedTree,
    Goose,
    KSequential,
    PromptLookup,
    RecursiveRejection,
    Speculative,
    Verifier,
)

# Their exactness, token for token and in distribution: tests/decode/test_speculative.py.
DRAFTERS = {
    Chains: Chains(count=2, length=3),
    DynamicTree: DynamicTree(size=5),
    FixedTree: FixedTree(branches=(2, 1)),
    PromptLookup: PromptLookup(length=4),
    Goose: Goose(size=8),
}
VERIFIERS = {KSequential: KSequential(chains=2), RecursiveRejection: RecursiveRejection()}


@pytest.mark.parametrize(("family", "table"), [(Drafter, DRAFTERS), (Verifier, VERIFIERS)])
def test_the_tables_hold_every_public_member(family, table):
    public = {
        member
        for member in vars(speculative).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }
    assert public == set(table)


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=lambda part: type(part).__name__)
def test_a_drafter_is_its_own_config(drafter):
    decoder = Speculative(drafter=drafter)
    loaded = config.load(config.dump(decoder))
    assert loaded == decoder and hash(loaded) == hash(decoder)
    assert 1 <= drafter.depth <= drafter.nodes
    assert drafter.chains in (0, drafter.nodes // drafter.depth)


@pytest.mark.parametrize("verifier", VERIFIERS.values(), ids=lambda part: type(part).__name__)
def test_a_verifier_is_its_own_config(verifier):
    assert config.load(config.dump(verifier)) == verifier


@pytest.mark.parametrize("member", [*DRAFTERS, *VERIFIERS])
def test_methods_name_their_source(member):
    assert "Reference: " in inspect.getdoc(member)
