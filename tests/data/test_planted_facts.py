"""Facts planted in a text: who says what follows, by the rows themselves."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.context import Context
from tokenlab.core.errors import UserError
from tokenlab.data.tasks import PlantedFacts
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL
from tokenlab.objectives import TargetRange

TASK = PlantedFacts(size=200, facts=5, keys=6, values=3, words=8, text=True, span=500)
FACTS = TASK.values + TASK.keys + TASK.words  # the first symbol of a fact


def test_what_counts_is_said_where_the_difficulty_points_and_nothing_else_counts():
    rows = TASK.sample(seed=0, count=64)
    follows = collections.defaultdict(set)
    symbols, targets = rows.tokens - FIRST_SYMBOL, rows.targets - FIRST_SYMBOL
    counted = 0
    for row, place in zip(*np.nonzero(rows.weights), strict=True):
        source = symbols[row, place - rows.difficulty[row, place]]
        target = targets[row, place]
        if target < TASK.values:
            key = symbols[row, place] - TASK.values
            assert source == FACTS + key * TASK.values + target
            counted += 1
        else:
            assert TASK.values + TASK.keys <= min(source, target) and max(source, target) < FACTS
            follows[source].add(target)
    assert counted == 64 * 5 and {len(seen) for seen in follows.values()} == {4}
    unknown = targets[(rows.weights == 0) & (rows.targets != TASK.tokenizer.eos_id)]
    first_words = (unknown >= TASK.values + TASK.keys) & (unknown < FACTS)
    assert first_words.sum() <= 64  # a word behind a fact that begins the row


def test_positions_skip_and_stay_in_order_below_the_span():
    positions = TASK.sample(seed=0, count=64).positions
    steps = np.diff(positions, axis=1)
    assert steps.min() == 1 and set((steps > 1).sum(axis=1).tolist()) <= {0, 1, 2, 3}
    assert positions.max() < 500 and positions[:, -1].min() >= 199
    plain = PlantedFacts(size=200, facts=5, text=True).sample(seed=0, count=2).positions
    np.testing.assert_array_equal(plain, np.broadcast_to(np.arange(200), (2, 200)))


def test_answers_alone_are_a_range_of_targets():
    rows = TASK.sample(seed=1, count=4)._asdict()
    plain = PlantedFacts(size=200, facts=5, keys=6, values=3, words=8, span=500)
    answers = plain.sample(seed=1, count=4)
    np.testing.assert_array_equal(answers.tokens, rows["tokens"])
    asked = TargetRange(first=FIRST_SYMBOL, last=FIRST_SYMBOL + TASK.values)
    batch = {name: jnp.asarray(x) for name, x in rows.items() if x is not None}
    weights = asked(Context(batch=batch, views={})) * batch["weights"]
    np.testing.assert_array_equal(weights, answers.weights)


def test_facts_of_a_record_stand_side_by_side_and_are_asked_in_a_row():
    task = PlantedFacts(size=120, facts=6, record=3, keys=12)
    rows = task.sample(seed=0, count=200)
    asked = np.arange(task.size - 12, task.size, 2)
    told = asked - rows.difficulty[:, asked]
    assert (np.diff(told.reshape(200, 2, 3), axis=2) == 1).all()
    assert len(np.unique(told)) > 90  # anywhere
    keys = rows.tokens[:, asked] - FIRST_SYMBOL - task.values
    values = rows.targets[:, asked] - FIRST_SYMBOL
    facts = np.take_along_axis(rows.tokens, told, axis=1) - FIRST_SYMBOL
    np.testing.assert_array_equal(facts, task.values + 12 + task.words + 8 * keys + values)
    assert rows.weights.sum(axis=1).tolist() == [6.0] * 200


def test_records_that_do_not_fill_are_refused():
    with pytest.raises(UserError, match="records of 4"):
        PlantedFacts(facts=6, record=4)


def test_a_row_without_room_is_refused():
    with pytest.raises(UserError, match="no room"):
        PlantedFacts(size=15, facts=5)
