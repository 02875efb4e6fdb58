"""Endless rows of a task: alike for every number of processes, batch size and restart."""

import itertools
import json

import numpy as np
import pytest

from tokenlab.data.tasks.addition import Addition
from tokenlab.data.tasks.associative_recall import AssociativeRecall
from tokenlab.data.tasks.grid_questions import GridQuestions
from tokenlab.data.tasks.pointer_chase import PointerChase
from tokenlab.data.tasks.source import TaskSource


def run(source, **options):
    given_options = {"tokenizer": source.task.tokenizer, "batch_size": 6, "seed": 5}
    return source.batches(**given_options | options)


@pytest.mark.parametrize("task", [PointerChase(), Addition(), AssociativeRecall()])
def test_global_batches_do_not_depend_on_the_number_of_processes(task):
    source = TaskSource(task=task)
    whole = list(itertools.islice(run(source), 4))
    for count in (2, 3):
        parts = [
            list(itertools.islice(run(source, shard_index=i, shard_count=count), 4))
            for i in range(count)
        ]
        for step, batch in enumerate(whole):
            for name, values in batch.items():
                joined = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(values, joined)
    numbers = np.concatenate([batch["documents"][:, 0] for batch in whole])
    assert numbers.tolist() == list(range(24))
    assert len({row.tobytes() for batch in whole for row in batch["tokens"]}) == 24


def test_rows_do_not_depend_on_the_batch_size():
    source = TaskSource(task=Addition())
    rows = []
    for size in (1, 7, 48, 100):
        batches = itertools.islice(run(source, batch_size=size), 1 + 100 // size)
        joined = [
            np.concatenate(arrays)[:100]
            for arrays in zip(*(b.values() for b in batches), strict=True)
        ]
        rows.append(joined)
    for arrays in zip(*rows, strict=True):
        for other in arrays[1:]:
            np.testing.assert_array_equal(arrays[0], other)


def test_splits_and_seeds_share_no_row():
    rows = []
    for split, seed in itertools.product(("train", "held_out"), (0, 1, 2)):
        batches = run(TaskSource(task=AssociativeRecall(), split=split), seed=seed)
        tokens = [batch["tokens"] for batch in itertools.islice(batches, 20)]
        rows += [row.tobytes() for row in np.concatenate(tokens)]
    assert len(set(rows)) == len(rows) == 720


def test_restored_source_goes_on_exactly():
    dataset = run(TaskSource(task=PointerChase()))
    straight = iter(dataset)
    for _ in range(5):
        state = json.dumps(straight.get_state())
        wanted = next(straight)
        resumed = iter(dataset)
        resumed.set_state(json.loads(state))
        np.testing.assert_array_equal(next(resumed)["tokens"], wanted["tokens"])


def test_the_prompt_is_what_comes_before_the_first_answer_of_a_segment():
    for task in (GridQuestions(height=4, width=4), Addition(sums=3)):
        source = TaskSource(task=task, prompts=True)
        batch = next(iter(source.batches(tokenizer=task.tokenizer, batch_size=5, seed=0)))
        for row in range(5):
            for segment in np.unique(batch["segments"][row]):
                inside = batch["segments"][row] == segment
                first = np.flatnonzero(batch["weights"][row, inside])[0]
                expected = np.arange(inside.sum()) <= first
                np.testing.assert_array_equal(batch["prompt"][row, inside], expected)
        plain = TaskSource(task=task).batches(tokenizer=task.tokenizer, batch_size=5, seed=0)
        assert "prompt" not in next(iter(plain))
