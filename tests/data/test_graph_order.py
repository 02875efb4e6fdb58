"""Features of graphs by hand, and how deep brackets go."""

import dataclasses

import numpy as np

from tokenlab.data.tasks.base import TaskBatch
from tokenlab.data.tasks.brackets import Brackets
from tokenlab.data.tasks.graph_order import GraphOrder


def test_features_of_a_worked_graph():
    task = GraphOrder(nodes=5, edges=5)
    text = "n3 n0 n3 n4 n0 n1 n4 n1 n4 n2 : n3 n0 n4 n1 n2 "
    rows = TaskBatch(
        tokens=np.asarray([task.tokenizer.encode(text)]),
        **{name: np.zeros((1, 16), int) for name in ("targets", "segments", "positions")},
        weights=np.ones((1, 16), np.float32), difficulty=np.zeros((1, 16), int),
    )  # fmt: skip
    found = task.features(rows)
    assert {name: values[0, 10] for name, values in found["static"].items()} == {
        "nodes": 5, "edges": 5, "hub": 3,
    }  # fmt: skip
    at = {name: values[0, 10:15].tolist() for name, values in found["execution"].items()}
    # 3 opens 0 and 4; 0 opens none, as 1 waits for 4; 4 opens 1 and 2
    assert at == {
        "depth": [0, 1, 1, 2, 2], "frontier": [1, 2, 1, 2, 1], "enabled": [0, 2, 0, 2, 0],
    }  # fmt: skip
    first = dataclasses.replace(task, order="depth_first").features(rows)["execution"]
    # from 0 by 1 to 4, then its neighbours 2 and 3
    at = {name: values[0, 10:15].tolist() for name, values in first.items()}
    assert at == {
        "depth": [0, 1, 2, 3, 3], "frontier": [1, 2, 2, 2, 1], "enabled": [0, 2, 1, 1, 0],
    }  # fmt: skip


def test_depths_of_brackets_are_bounded_and_reached():
    hard = Brackets(max_depth=3, pairs=12).sample(seed=0, count=100).difficulty
    assert set(np.unique(hard)) == {-1, 1, 2, 3}
