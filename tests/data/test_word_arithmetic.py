"""Arithmetic in words against a reader of its text."""

import collections
import math

import numpy as np
import pytest

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import TaskSource, WordArithmetic

RULES = {
    "add": lambda value, operand: value + operand,
    "subtract": lambda value, operand: value - operand,
    "multiply": lambda value, operand: value * operand,
    "reflect": lambda value, operand: operand - value,
}
TASKS = {
    "plain": WordArithmetic(),
    "large": WordArithmetic(modulus=37, clauses=6, least=1, wordings=1),
    "written": WordArithmetic(plan="written", largest=3),
    "apart": WordArithmetic(plan="apart", slots=3, openings=2, checks=0.5, cut=0.5),
}
every = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def words_of(task, ids):
    return task.tokenizer.decode([int(i) for i in ids if i > 2]).decode().split()


def worked_out(task, question):
    """Names of the operations, and the operand and value of each step, from written words."""
    value, names, steps = int(question[0][1:]), [], []
    for verb, operand in zip(question[1::2], question[2::2], strict=True):
        kind, operand = int(verb[1:]) // task.wordings, int(operand[1:])
        if kind < len(RULES):
            names.append(list(RULES)[kind])
            value = RULES[names[-1]](value, operand) % task.modulus
            steps.append((f"n{operand}", f"n{value}"))
    return names, steps


@every
def test_a_thousand_rows_say_what_a_reader_works_out(task):
    batch = task.sample(seed=5, count=1000)
    broken = 0
    for row in range(1000):
        words = words_of(task, batch.tokens[row])
        length = int(batch.segments[row].sum())
        ended = batch.tokens[row, length - 1] == 2
        cut = words.index("?")
        names, steps = worked_out(task, words[:cut])
        assert task.least <= len(names) <= task.clauses
        begun = {
            "none": [],
            "written": ["<plan>", *names],
            "apart": ["<slot>"] * task.slots,
        }[task.plan]
        at = cut + 1 + len(begun)
        assert words[cut + 1 : at + 1] == [*begun, "<think>"]
        *thoughts, close, answer = words[at + 1 :]
        assert (close, answer) == ("</think>", steps[-1][1])
        wanted = [word for step in steps for word in step]
        found = [word for word in thoughts if word[:2] != "so"]
        while "check" in found:
            place = found.index("check")
            # What is checked is the value before, unless the thoughts break off there.
            assert found[place + 1 : place + 2] in ([found[place - 1]], [])
            del found[place : place + 2]
        assert found == wanted[: len(found)]
        broken += found != wanted
        first = cut + 1 if task.plan == "written" else at
        scored = np.flatnonzero(batch.weights[row])
        assert scored.tolist() == list(range(first, length - ended))
        assert set(batch.difficulty[row, scored]) == {len(names)}
        assert batch.targets[row, scored[-1]] == 2
        if task.plan == "apart":
            assert words_of(task, batch.plan[row]) == ["<plan>", *names, "<think>"]
    assert 0 < broken < 600 if task.cut else broken == 0


@every
def test_answers_are_read_behind_thoughts_of_any_length(task):
    close = task.mark("</think>")
    for problem in task.problems(seed=2, count=200):
        words = words_of(task, problem.prompt)
        _, steps = worked_out(task, words[: words.index("?")])
        right, wrong = (
            task.tokenizer.encode(f"n{(int(steps[-1][1][1:]) + i) % task.modulus} ") for i in (0, 1)
        )
        assert problem.answer == right and problem.difficulty == len(steps)
        assert task.check(prompt=problem.prompt, completion=[*wrong, close, *right])
        assert not task.check(prompt=problem.prompt, completion=[*right, close, *wrong])
        assert not task.check(prompt=problem.prompt, completion=[*right, close])


def test_the_entropy_of_plans_is_that_of_many():
    task = WordArithmetic(plan="apart", clauses=2, least=1)
    rows = task.sample(seed=0, count=5000).plan
    counts = np.array(list(collections.Counter(map(bytes, rows)).values())) / len(rows)
    assert -(counts * np.log(counts)).sum() == pytest.approx(task.plan_entropy, abs=0.02)
    assert TASKS["plain"].plan_entropy == pytest.approx(math.log(3) + 3 * math.log(4))


def test_batches_have_the_plans_of_their_rows():
    task = TASKS["apart"]
    batch = next(iter(TaskSource(task=task).batches(
        tokenizer=task.tokenizer, batch_size=40, seed=0
    )))  # fmt: skip
    assert batch["plan"].shape == (40, task.clauses + 2)
    for tokens, plan in zip(batch["tokens"], batch["plan"], strict=True):
        words = words_of(task, tokens)
        names, _ = worked_out(task, words[: words.index("?")])
        assert words_of(task, plan)[1:-1] == names


@pytest.mark.parametrize(
    "fields",
    [
        {"largest": 10},
        {"largest": 0},
        {"least": 5},
        {"least": 0},
        {"wordings": 0},
        {"slots": -1},
        {"checks": 1.0},
        {"cut": 1.5},
    ],
)
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(UserError, match="WordArithmetic"):
        WordArithmetic(**fields)
