"""Every public task keeps the promises of ``Task``."""

import dataclasses
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import tokenlab.data.tasks
from tokenlab.data.tasks.addition import Addition
from tokenlab.data.tasks.associative_recall import AssociativeRecall
from tokenlab.data.tasks.base import Task
from tokenlab.data.tasks.brackets import Brackets
from tokenlab.data.tasks.graph_order import GraphOrder
from tokenlab.data.tasks.grid_questions import GridQuestions
from tokenlab.data.tasks.minimum_sum import MinimumNonNegativeSum
from tokenlab.data.tasks.planted_facts import PlantedFacts
from tokenlab.data.tasks.pointer_chase import PointerChase
from tokenlab.data.tasks.programs import Programs
from tokenlab.data.tasks.role_grammar import RoleGrammar
from tokenlab.data.tasks.slot_text import SlotText
from tokenlab.data.tasks.word_arithmetic import WordArithmetic

TABLE = {
    PointerChase: ({"max_hops": 4}, {"values": 40}, {"unary": 9}),
    Addition: ({"digits": 9}, {"reversed": True}),
    AssociativeRecall: ({"pairs": 30}, {"keys": 200}),
    Brackets: ({"letters": 0}, {"kinds": 5, "pairs": 12, "max_depth": 2}),
    GraphOrder: ({"order": "depth_first"}, {"nodes": 12, "min_nodes": 2, "edges": 14}),
    GridQuestions: ({"frames": 4}, {"questions": 3, "most_red": 12, "height": 5}),
    MinimumNonNegativeSum: ({"traces": 3, "low": 0}, {"digits": 5, "part": "held_out"}),
    PlantedFacts: (
        {"size": 100, "span": 400},
        {"facts": 3, "keys": 5, "values": 30},
        {"facts": 4, "record": 2},
    ),
    Programs: ({"statements": 2, "names": 3}, {"modulus": 23, "letters": 5, "queries": 1}),
    RoleGrammar: ({"words": 40, "ambiguity": 0.5}, {"zipf": 1.2, "switched": True}),
    SlotText: ({"slots": 6, "words": 1},),
    WordArithmetic: (
        {"plan": "written", "modulus": 23, "least": 1},
        {"plan": "apart", "checks": 0.4, "cut": 0.3, "openings": 3},
    ),
}
MEMBERS = [
    pytest.param(member(**fields), id=f"{member.__name__}-{i}")
    for member, changes in TABLE.items()
    for i, fields in enumerate(({}, *changes))
]


def same(left, right):
    for name in left._fields:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def test_every_public_task_is_in_the_table():
    found = set()
    for module in pkgutil.walk_packages(tokenlab.data.tasks.__path__, "tokenlab.data.tasks."):
        for _, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(member, Task):
                found.add(member)
    assert found - {Task} == set(TABLE)


@pytest.mark.parametrize("task", MEMBERS)
def test_samples_have_the_promised_types_and_shapes(task):
    batch = task.sample(seed=0, count=5)
    size = (5, task.length)
    for name, values in batch._asdict().items():
        if name in ("distribution", "mixture"):
            assert values is None or values.shape == (*size, task.tokenizer.vocab_size), name
            assert values is None or values.dtype == np.float32, name
            continue
        if name == "plan":
            assert values is None or (len(values) == 5 and values.dtype == np.int32)
            continue
        assert values.shape == size, name
        assert values.dtype == (np.float32 if name == "weights" else np.int32), name
    if batch.distribution is not None:
        np.testing.assert_allclose(batch.distribution.sum(axis=2), batch.weights, rtol=1e-5)
    assert set(np.unique(batch.weights)) == {0, 1}
    np.testing.assert_array_equal(batch.weights > 0, batch.difficulty >= 0)
    for ids in (batch.tokens, batch.targets):
        assert ids.min() >= 0 and ids.max() < task.tokenizer.vocab_size


@pytest.mark.parametrize("task", MEMBERS)
def test_samples_and_problems_are_functions_of_their_seed(task):
    for seed in (7, (7, 1)):
        same(task.sample(seed=seed, count=4), task.sample(seed=seed, count=4))
        assert task.problems(seed=seed, count=4) == task.problems(seed=seed, count=4)
    rows = [task.sample(seed=seed, count=4).tokens.tobytes() for seed in (7, 8, (7, 1), (8, 7))]
    assert len(set(rows)) == 4


@pytest.mark.parametrize("corrupted", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", MEMBERS)
def test_answers_pass_and_every_corruption_fails(task, corrupted):
    problems = task.problems(seed=1, count=50)
    assert len({tuple(problem.prompt) for problem in problems}) == 50
    for number, problem in enumerate(problems):
        answer = problem.answer
        assert task.check(prompt=problem.prompt, completion=answer)
        assert task.check(prompt=problem.prompt, completion=[*answer, task.tokenizer.eos_id])
        assert not task.check(prompt=problem.prompt, completion=[])
        for place in range(len(answer) if number < corrupted else 0):
            for wrong in {*range(task.tokenizer.vocab_size)} - {answer[place]}:
                completion = [*answer[:place], wrong, *answer[place + 1 :]]
                assert not task.check(prompt=problem.prompt, completion=completion)


def form(task, ids):
    """The symbols without their numbers; strokes are a number too."""
    text = task.tokenizer.decode(list(ids)).decode().replace("|", "_")
    return "".join(c for c in text if not c.isdigit())


@pytest.mark.parametrize("task", MEMBERS)
def test_problems_look_like_the_beginning_of_a_training_segment(task):
    batch = task.sample(seed=3, count=64)
    first = batch.segments[0] == 1
    prompt_length = int(np.argmax(batch.weights[0, first] > 0)) + 1
    if isinstance(task, Brackets):  # which ask at any place: problems are beginnings of rows
        rows = task.sample(seed=3, count=5).tokens.tolist()
        for row, problem in zip(rows, task.problems(seed=3, count=5), strict=True):
            assert row[: len(problem.prompt)] == problem.prompt and problem.difficulty > 0
        return
    seen = {form(task, row[first][:prompt_length].tolist()) for row in batch.tokens}
    assert len(seen) < 16
    for problem in task.problems(seed=3, count=5):
        assert len(problem.prompt) == prompt_length
        assert form(task, problem.prompt) in seen
        assert problem.difficulty >= 0


@pytest.mark.parametrize("task", MEMBERS)
def test_the_object_is_its_own_config(task):
    assert task == dataclasses.replace(task)
    assert hash(task) == hash(dataclasses.replace(task))
    assert type(task).__dataclass_params__.frozen
    attributes = inspect.getdoc(type(task)).split("Attributes:")[1]
    for field in dataclasses.fields(task):
        assert field.kw_only
        assert f"\n    {field.name}: " in attributes
