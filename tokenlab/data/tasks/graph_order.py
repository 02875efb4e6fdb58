"""Visiting the nodes of a graph in an order that has to be worked out step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

Edges = list[tuple[int, int]]


class _Step(NamedTuple):
    """A visit: the node, its depth, open nodes before it, those that the visit before opened."""

    node: int
    depth: int
    frontier: int
    enabled: int


def _depth_first(edges: Edges) -> list[_Step]:
    """Preorder from the least node on, along edges both ways, the least neighbour first."""
    near: dict[int, set[int]] = {}
    for a, b in edges:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    node, enabled = min(near), 0
    steps, path, seen, open_ = [], [], set(), {node}
    while True:
        steps.append(_Step(node, len(path), len(open_), enabled))
        seen.add(node)
        new = near[node] - seen - open_
        open_, enabled = (open_ | new) - {node}, len(new)
        path.append(node)
        while path and not near[path[-1]] - seen:
            path.pop()
        if not path:
            return steps
        node = min(near[path[-1]] - seen)


def _topological(edges: Edges) -> list[_Step]:
    """Of all nodes whose predecessors were visited always the least."""
    before: dict[int, set[int]] = {}
    for a, b in edges:
        before.setdefault(a, set())
        before.setdefault(b, set()).add(a)
    depth = {node: 0 for node, behind in before.items() if not behind}
    steps, seen, ready, enabled = [], set(), set(depth), 0
    while ready:
        node = min(ready)
        steps.append(_Step(node, depth[node], len(ready), enabled))
        seen.add(node)
        new = {other for other in set(before) - seen - ready if before[other] <= seen}
        depth |= {other: 1 + max(depth[each] for each in before[other]) for other in new}
        ready, enabled = (ready | new) - {node}, len(new)
    return steps


_ORDERS = {"depth_first": _depth_first, "topological": _topological}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphOrder(Task):
    """The edges of a connected graph in random order, then its nodes in the order of a search.

    An edge is written as its two nodes, and blanks fill the places of edges that a graph does not
    have, then come a sign, the nodes, and blanks. ``depth_first`` goes along edges both ways from
    the least node on, always to the least neighbour; ``topological`` goes along them one way and
    always takes the least node of those whose predecessors are written. The difficulty of a node is
    the number of nodes that are open when it is chosen (``frontier``, below).

    Attributes:
        nodes: names of nodes, and most nodes of a graph.
        min_nodes: fewest nodes of a graph, at least 2.
        edges: most edges of a graph, at least ``nodes - 1``; all numbers that connect it and that
            it has room for are equally likely.
        order: ``"depth_first"`` or ``"topological"``.
    """

    nodes: int = 8
    min_nodes: int = 4
    edges: int = 12
    order: str = "topological"

    def __post_init__(self):
        require(
            self.order in _ORDERS,
            f"GraphOrder.order is {self.order!r}; use one of {tuple(_ORDERS)}",
        )
        require(
            2 <= self.min_nodes <= self.nodes,
            f"GraphOrder graphs have from {self.min_nodes} to {self.nodes} nodes; "
            "use 2 <= min_nodes <= nodes",
        )
        require(
            self.edges >= self.nodes - 1,
            f"GraphOrder.edges is {self.edges}, too few to connect {self.nodes} nodes; "
            f"use {self.nodes - 1} or more",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Nodes, a blank, the sign."""
        return AlphabetTokenizer(symbols=(*(f"n{i} " for i in range(self.nodes)), "_ ", ": "))

    @property
    def length(self) -> int:
        """Positions of a row: edges, the sign, nodes."""
        return 2 * self.edges + 1 + self.nodes

    def _graph(self, rng: np.random.Generator) -> Edges:
        """Every node but the first has an edge from one before it; more are drawn from the rest."""
        size = int(rng.integers(self.min_nodes, self.nodes + 1))
        names = rng.permutation(self.nodes)[:size].tolist()
        edges = {(int(rng.integers(i)), i) for i in range(1, size)}
        rest = [(i, j) for j in range(size) for i in range(j) if (i, j) not in edges]
        more = rng.integers(min(len(rest), self.edges - len(edges)) + 1)
        edges |= {rest[i] for i in rng.choice(len(rest), size=more, replace=False)}
        ordered = rng.permutation(sorted(edges)).tolist()
        return [(names[a], names[b]) for a, b in ordered]

    def _steps(self, edges: Edges) -> list[_Step]:
        return _ORDERS[self.order](edges)

    def _read(self, symbols: Sequence[int]) -> Edges:
        """The edges of a written row."""
        pairs = zip(symbols[0 : 2 * self.edges : 2], symbols[1 : 2 * self.edges : 2], strict=True)
        return [(int(a), int(b)) for a, b in pairs if a < self.nodes]

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one graph each."""
        rng, first = np.random.default_rng(seed), 2 * self.edges
        symbols = np.full((count, self.length), self.nodes)
        difficulty = np.full((count, self.length), UNDEFINED)
        for row in range(count):
            edges = self._graph(rng)
            steps = self._steps(edges)
            symbols[row, first - 2 * len(edges) : first] = np.ravel(edges)
            symbols[row, first] = self.nodes + 1
            symbols[row, first + 1 :][: len(steps)] = [step.node for step in steps]
            difficulty[row, first:][: len(steps)] = [step.frontier for step in steps]
        return task_batch(symbols=symbols, difficulty=difficulty, segment_length=self.length)

    def features(self, rows: TaskBatch) -> dict[str, dict[str, Int[np.ndarray, "B T"]]]:
        """What is known of a graph at once, and what only a search finds.

        ``static``: ``nodes`` of the graph, ``edges`` of it, and of its ``hub``, the node that has
        most. ``execution``: ``depth`` of the node that is asked for in the search (the longest way
        to it, if topological), ``frontier`` before it, and ``enabled``, the nodes that the visit
        before opened.
        """
        names = {"static": ("nodes", "edges", "hub"), "execution": ("depth", "frontier", "enabled")}
        found = {
            group: {name: np.zeros_like(rows.difficulty) for name in members}
            for group, members in names.items()
        }
        for row, tokens in enumerate(rows.tokens - FIRST_SYMBOL):
            edges = self._read(tokens.tolist())
            steps = self._steps(edges)
            found["static"]["nodes"][row] = len(steps)
            found["static"]["edges"][row] = len(edges)
            found["static"]["hub"][row] = np.bincount(np.ravel(edges)).max()
            for name, values in found["execution"].items():
                values[row, 2 * self.edges :][: len(steps)] = [getattr(s, name) for s in steps]
        return found

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """A graph and its whole order each."""
        rows, at = self.sample(seed=seed, count=count), 2 * self.edges + 1
        return [
            Problem(
                prompt=tokens[:at].tolist(),
                answer=tokens[at:][: np.sum(hard >= 0)].tolist(),
                difficulty=int(hard.max()),
            )
            for tokens, hard in zip(rows.tokens, rows.difficulty, strict=True)
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Searches the graph of the prompt."""
        steps = self._steps(self._read([i - FIRST_SYMBOL for i in prompt]))
        return list(completion[: len(steps)]) == [step.node + FIRST_SYMBOL for step in steps]
