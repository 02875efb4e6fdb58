"""Programs, run from what the rows write."""

import re

import numpy as np
import pytest

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import Programs

TASK = Programs()


def test_answers_are_what_the_written_program_says_and_words_come_twice():
    rows = TASK.sample(seed=0, count=200)
    seen = set()
    for tokens, targets, difficulty in zip(rows.tokens, rows.targets, rows.difficulty, strict=True):
        text = TASK.tokenizer.decode(tokens.tolist()).decode()
        values, depths = {}, {}
        for name, right in re.findall(r"(x\d) = ((?:x\d \+ )?n\d) ;", text):
            source = right[:2] if right[0] == "x" else None
            values[name] = (values.get(source, 0) + int(right[-1])) % 10
            depths[name] = depths[source] + 1 if source else 0
        assert len(values) == TASK.statements
        asked = re.findall(r"(x\d) \? n(\d) # ((?:w\d )+): ((?:w\d )+)", text)
        assert len(asked) == TASK.queries
        for name, answer, word, again in asked:
            assert int(answer) == values[name] and word == again
        scored = np.nonzero(difficulty >= 0)[0]
        expected = []
        for name, answer, word, _ in asked:
            expected += [(f"n{answer}", 1 + depths[name])]
            expected += [(letter, 0) for letter in word.split()]
        found = [
            (TASK.tokenizer.decode([int(targets[at])]).decode().strip(), int(difficulty[at]))
            for at in scored
        ]
        assert found == expected
        seen |= {depth for _, depth in found}
    assert seen == {0, 1, 2, 3, 4}


def test_a_program_of_one_statement_and_bad_sizes():
    one = Programs(statements=1, names=1, queries=1)
    assert set(one.sample(seed=0, count=50).difficulty.ravel()) == {-1, 0, 1}
    with pytest.raises(UserError, match="sets 7 of 6 names"):
        Programs(statements=7)
    with pytest.raises(UserError, match="modulus is 1"):
        Programs(modulus=1)
