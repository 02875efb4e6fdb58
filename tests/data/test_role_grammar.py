"""The role grammar against solvers of each strategy, and counts of what is drawn."""

import collections
import dataclasses

import numpy as np
import pytest

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import RoleGrammar
from tokenlab.data.tasks.role_grammar import SETS

TASK = RoleGrammar(words=1000)
IS, MASK = (TASK.tokenizer.encode(text)[0] for text in ("IS ", "MASK "))


def by_position(tokens):
    """Reads the roles off the place of IS."""
    adjective, noun = (tokens[1], tokens[2]) if tokens[0] == IS else (tokens[2], tokens[0])
    return [adjective] * 3 if tokens[3] == adjective else [adjective, noun, noun]


def by_class(tokens, task=TASK):
    """Looks up the queried word; of untrained ones the first half are taken for nouns."""
    nouns, _ = task.class_ids()
    unseen = task.unseen_ids()
    is_noun = {*nouns, *unseen[: len(unseen) // 2]}
    words = [token for token in tokens[:3] if token != IS]
    query = tokens[3]
    (other,) = [word for word in words if word != query] or [query]
    return [other, query, query] if query in is_noun else [query] * 3


def score(solver, name, rows=4000, **fields):
    task = dataclasses.replace(TASK, **fields).evaluation(name)
    batch = task.sample(seed=5, count=rows)
    wanted = batch.targets[:, 4:].tolist()
    found = [solver(tokens) for tokens in batch.tokens.tolist()]
    return np.mean([a == b for a, b in zip(found, wanted, strict=True)])


@pytest.mark.parametrize("name", SETS)
def test_reading_positions_is_always_right(name):
    assert score(by_position, name, rows=500) == 1.0
    assert score(by_position, name, rows=500, zipf=1.5, ambiguity=0.1) == 1.0


def test_looking_up_classes_is_right_until_they_are_switched():
    assert score(by_class, "val") == score(by_class, "head") == score(by_class, "tail") == 1.0
    for name in ("switch", "head_switch", "tail_switch"):
        assert score(by_class, name) == 0.0
    assert score(by_class, "holdout", rows=20_000) == pytest.approx(0.504, abs=0.02)


def test_four_forms_are_equally_likely():
    batch = TASK.sample(seed=1, count=8000)
    tokens = batch.tokens
    assert (tokens[:, 4:] == MASK).all()
    first = tokens[:, 0] == IS
    assert (first ^ (tokens[:, 1] == IS)).all()
    adjective = batch.targets[:, 4] == tokens[:, 3]
    forms = collections.Counter(zip(first.tolist(), adjective.tolist(), strict=True))
    assert len(forms) == 4
    assert all(count == pytest.approx(2000, abs=150) for count in forms.values())
    np.testing.assert_array_equal(batch.weights[0], [0, 0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("zipf", [0.0, 1.0001, 1.2, 1.5])
def test_words_are_drawn_by_rank(zipf):
    task = dataclasses.replace(TASK, zipf=zipf)
    ids = task.sample(seed=2, count=40_000).targets[:, :4]
    for members in task.class_ids():
        chances = np.arange(1, 501.0) ** -zipf
        expected = chances / chances.sum()
        found = np.bincount(ids[np.isin(ids, members)] - members[0], minlength=500)
        np.testing.assert_allclose(found / found.sum(), expected, atol=0.006)


def test_sets_draw_what_they_say():
    nouns, adjectives = map(np.asarray, TASK.class_ids())
    unseen = np.asarray(TASK.unseen_ids())
    words = {"head": [nouns[:20], adjectives[:20]], "tail": [nouns[-50:], adjectives[-50:]]}
    assert len(unseen) == 100
    for name, fields in SETS.items():
        batch = TASK.evaluation(name).sample(seed=3, count=3000)
        adjective, noun = (
            batch.targets[:, 4],
            batch.targets[batch.targets[:, 4] != batch.targets[:, 5], 5],
        )
        wanted = (
            [unseen, unseen]
            if name == "holdout"
            else words.get(name.split("_")[0], [nouns, adjectives])
        )
        wanted = wanted[::-1] if fields.get("switched") else wanted
        assert np.isin(noun, wanted[0]).all() and np.isin(adjective, wanted[1]).all(), name
    trained = dataclasses.replace(TASK, zipf=1.0001, ambiguity=0.1).sample(seed=0, count=3000)
    assert not np.isin(trained.targets, unseen).any()


def test_marked_words_are_spread_over_frequencies_and_change_class_half_of_the_time():
    task = dataclasses.replace(TASK, ambiguity=0.1, zipf=0.0)
    marked = task.marked()
    assert marked.sum(axis=1).tolist() == [50, 50]
    assert all(part.sum() == 1 for row in marked for part in np.split(row, 50))
    rows = task.sample(seed=4, count=60_000).targets
    first = rows[:, 0] == IS
    noun = np.where(first, rows[:, 2], rows[:, 0])
    nouns, adjectives = map(np.asarray, task.class_ids())
    crossed = np.isin(noun, adjectives)
    assert crossed.mean() == pytest.approx(0.1 / 2, abs=0.005)
    assert np.isin(noun[crossed], adjectives[marked[1]]).all()
    often = np.isin(noun, nouns[marked[0]]).mean()
    assert often == pytest.approx(0.1 / 2, abs=0.005)
    plain = dataclasses.replace(TASK, ambiguity=0.0)
    assert not plain.marked().any()


@pytest.mark.parametrize(
    "change", [{"words": 21}, {"words": 10}, {"zipf": -1.0}, {"ambiguity": 1.5}]
)
def test_impossible_tasks_are_one_line(change):
    with pytest.raises(UserError, match="use"):
        RoleGrammar(**change)
    with pytest.raises(UserError, match="has no set"):
        TASK.evaluation("nothing")
