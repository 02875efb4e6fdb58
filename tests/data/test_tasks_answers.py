"""Tasks against slow, independent ways to work out answers and difficulties."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import UserError
from tokenlab.data.tasks.addition import Addition
from tokenlab.data.tasks.alphabet import AlphabetTokenizer
from tokenlab.data.tasks.associative_recall import AssociativeRecall
from tokenlab.data.tasks.brackets import Brackets
from tokenlab.data.tasks.graph_order import GraphOrder
from tokenlab.data.tasks.grid_questions import GridQuestions
from tokenlab.data.tasks.pointer_chase import PointerChase
from tokenlab.data.tasks.slot_text import SlotText
from tokenlab.data.tasks.source import TaskSource

chases = st.builds(
    PointerChase,
    values=st.integers(1, 20),
    queries=st.integers(1, 6),
    min_hops=st.integers(0, 3),
    max_hops=st.integers(3, 7),
    bijective=st.booleans(),
    unary=st.sampled_from([0, 7, 9]),
)
additions = st.builds(
    Addition,
    digits=st.integers(1, 25),
    sums=st.integers(1, 4),
    reversed=st.booleans(),
    chained=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
recalls = st.integers(1, 12).flatmap(
    lambda pairs: st.builds(
        AssociativeRecall,
        keys=st.integers(pairs, 30),
        values=st.integers(1, 30),
        pairs=st.just(pairs),
        queries=st.integers(1, pairs),
    )
)
grids = st.builds(
    GridQuestions,
    frames=st.integers(1, 3),
    height=st.integers(3, 5),
    width=st.integers(3, 5),
    landmarks=st.integers(1, 4),
    colours=st.integers(6, 9),
    most_red=st.integers(0, 5),
    questions=st.integers(1, 4),
)
graphs = st.integers(2, 6).flatmap(
    lambda nodes: st.builds(
        GraphOrder,
        nodes=st.just(nodes),
        min_nodes=st.integers(2, nodes),
        edges=st.integers(nodes - 1, 10),
        order=st.sampled_from(["depth_first", "topological"]),
    )
)
brackets = st.builds(
    Brackets,
    kinds=st.integers(1, 4),
    pairs=st.integers(1, 10),
    max_depth=st.integers(1, 5),
    letters=st.integers(0, 6),
    alphabet=st.integers(1, 4),
)
tasks = st.one_of(chases, additions, recalls, grids, graphs, brackets)
seeds = st.integers(0, 2**40)


def text(task, ids):
    return task.tokenizer.decode(ids).decode()


def slow_chase(prompt):
    """Answer and difficulty of the last query of a written chase."""
    words = prompt.split()
    first = next(i for i, word in enumerate(words) if word[0] in "^_|?")
    pointers, start, asked = words[: first - 1], words[first - 1], words[first:]
    hops = asked.count("|") if asked[-1] == "?" else int(asked[0][1:])
    trail = [start]
    while len(trail) <= hops:
        trail.append(pointers[int(trail[-1])])
    return [(trail[-1], hops)]


def slow_sum(prompt, backwards):
    """Digits of the sum with their carry chains, from whole numbers and windows of them."""
    a, b = map(int, prompt.rstrip("=").split("+"))
    digits = []
    for place in range(len(prompt) // 2):
        # the nearest window of places to the right that overflows on its own begins the carry
        chain = 0
        for reach in range(1, place + 1):
            window = [number // 10 ** (place - reach) % 10**reach for number in (a, b)]
            if sum(window) >= 10**reach:
                chain = reach
                break
        digits.append((str((a + b) // 10**place % 10), chain))
    return digits if backwards else digits[::-1]


def slow_recall(prompt):
    *pairs, asked = prompt.split()
    table = dict(zip(pairs[0::2], pairs[1::2], strict=True))
    return [(table[asked], len(pairs) - pairs.index(asked))]


def slow_grid(task, prompt):
    """Each patch with its frame, row and column; then what the question says in words."""
    *patches, asked = prompt.split()
    grid = {
        place: int(patch[1:])
        for place, patch in zip(
            itertools.product(*map(range, (task.frames, task.height, task.width))),
            patches,
            strict=True,
        )
    }
    marked = [colour for colour in grid.values() if colour >= task.colours]
    plain = {place: colour % task.colours for place, colour in grid.items()}
    assert len(marked) == 1
    landmarks = {
        colour: [place for place, other in plain.items() if other == colour]
        for colour in range(1, task.landmarks + 1)
    }
    assert all(len(places) == 1 for places in landmarks.values())
    kind = int(asked[1:])
    if kind == 0:
        return [(f"p{marked[0] - task.colours}", 1)]
    if kind == 1:
        return [(f"n{sum(colour == 0 for colour in plain.values())}", len(patches))]
    ((frame, row, column),) = landmarks[kind // 2]
    there = (frame, row, column + 1) if kind % 2 == 0 else (frame, row + 1, column)
    return [(f"p{plain[there]}", 2)]


def slow_graph(task, prompt):
    """The first of all permutations that respects the edges, or a search by recursion; a node is
    open once all before it are visited, or once a neighbour is."""
    words = [word for word in prompt.split() if word[0] == "n"]
    edges = list(zip(words[0::2], words[1::2], strict=True))
    nodes = sorted(set(words))
    if task.order == "topological":
        order = next(
            order
            for order in itertools.permutations(nodes)
            if all(order.index(a) < order.index(b) for a, b in edges)
        )
    else:
        order = []

        def visit(node):
            order.append(node)
            for other in nodes:
                if other not in order and {(node, other), (other, node)} & set(edges):
                    visit(other)

        visit(nodes[0])
    answers = []
    for i, node in enumerate(order):
        rest, seen = order[i:], order[:i]
        if task.order == "topological":
            opened = [n for n in rest if all(a in seen for a, b in edges if b == n)]
        else:
            opened = [n for n in rest if any({n} < {a, b} <= {n, *seen} for a, b in edges)]
        answers.append((node, len(opened) if i or task.order == "topological" else 1))
    return answers


def slow_bracket(prompt):
    """Pairs are crossed out from the inside: as often as one is left, so deep was it nested."""
    word = re.sub(r"w\d|!", "", prompt).replace(" ", "")
    heights = {}
    while pairs := list(re.finditer(r"\((\d)_*\)\1", word)):
        for found in pairs:
            inside = [heights[at] for at in range(*found.span()) if at in heights]
            heights[found.start()] = 1 + max(inside, default=0)
            blank = "_" * (found.end() - found.start())
            word = word[: found.start()] + blank + word[found.end() :]
    last = max(i for i, sign in enumerate(word) if sign == "(")
    inside = [height for at, height in heights.items() if at > last]
    return [(f"){word[last + 1]}", 1 + max(inside, default=0))]


def slow(task, prompt):
    if isinstance(task, GraphOrder):
        return slow_graph(task, prompt)
    if isinstance(task, Brackets):
        return slow_bracket(prompt)
    if isinstance(task, GridQuestions):
        return slow_grid(task, prompt)
    if isinstance(task, Addition):
        return slow_sum(prompt, task.reversed)
    return slow_chase(prompt) if isinstance(task, PointerChase) else slow_recall(prompt)


@settings(max_examples=150, deadline=None)
@given(task=tasks, seed=seeds)
def test_problems_have_the_slow_answer_and_difficulty(task, seed):
    for problem in task.problems(seed=seed, count=5):
        answers = slow(task, text(task, problem.prompt))
        written = [word for word, _ in answers]
        assert "".join(text(task, problem.answer).split()) == "".join(written)
        assert problem.difficulty == max(difficulty for _, difficulty in answers)


@settings(max_examples=150, deadline=None)
@given(task=tasks, seed=seeds)
def test_every_weighted_position_has_the_slow_answer_and_difficulty(task, seed):
    batch = task.sample(seed=seed, count=3)
    for row in range(3):
        for segment in range(1, batch.segments[row].max() + 1):
            inside = np.flatnonzero(batch.segments[row] == segment)
            ids = batch.tokens[row, inside].tolist()
            asked = np.flatnonzero(batch.weights[row, inside])
            if isinstance(task, Addition):
                assert asked.tolist() == [2 * task.digits + 1 + i for i in range(task.digits + 1)]
                answers = slow_sum(text(task, ids[: asked[0] + 1]), task.reversed)
            elif isinstance(task, PointerChase):
                before = task.unary + 1 if task.unary else 1  # from the start to the question
                first = task.values + before
                assert asked.tolist() == [first + (before + 2) * i for i in range(task.queries)]
                prompts = [ids[: task.values] + ids[i - before : i + 1] for i in asked]
                answers = [slow_chase(text(task, prompt))[0] for prompt in prompts]
            elif isinstance(task, GridQuestions):
                assert asked.tolist() == [task.patches + 2 * i for i in range(task.questions)]
                prompts = [ids[: task.patches] + ids[i : i + 1] for i in asked]
                answers = [slow_grid(task, text(task, prompt))[0] for prompt in prompts]
                assert len({prompt[-1] for prompt in prompts}) == task.questions
            elif isinstance(task, GraphOrder):
                answers = slow_graph(task, text(task, ids[: 2 * task.edges]))
                assert asked.tolist() == [2 * task.edges + i for i in range(len(answers))]
            elif isinstance(task, Brackets):
                assert [text(task, ids[i : i + 1]) for i in asked] == ["! "] * task.pairs
                answers = [slow_bracket(text(task, ids[: i + 1]))[0] for i in asked]
            else:
                assert asked.tolist() == [2 * (task.pairs + i) for i in range(task.queries)]
                prompts = [ids[: 2 * task.pairs] + ids[i : i + 1] for i in asked]
                answers = [slow_recall(text(task, prompt))[0] for prompt in prompts]
                # the distance counts the queries between as well
                answers = [(word, far + 2 * i) for i, (word, far) in enumerate(answers)]
            targets = batch.targets[row, inside][asked].tolist()
            assert [text(task, [i]).strip() for i in targets] == [word for word, _ in answers]
            assert batch.difficulty[row, inside][asked].tolist() == [far for _, far in answers]


@settings(max_examples=60, deadline=None)
@given(task=tasks, seed=seeds)
def test_rows_are_shifted_once_within_their_segments(task, seed):
    batch = task.sample(seed=seed, count=4)
    assert {array.shape for array in batch if array is not None} == {(4, task.length)}
    assert batch.tokens.min() >= 3 and batch.tokens.max() < task.tokenizer.vocab_size
    inner = batch.segments[:, :-1] == batch.segments[:, 1:]
    np.testing.assert_array_equal(batch.targets[:, :-1][inner], batch.tokens[:, 1:][inner])
    np.testing.assert_array_equal(batch.positions[:, 1:][inner], batch.positions[:, :-1][inner] + 1)
    starts = np.concatenate([np.ones((4, 1), bool), ~inner], axis=1)
    assert (batch.positions[starts] == 0).all()
    ends = np.concatenate([~inner, np.ones((4, 1), bool)], axis=1)
    assert (batch.targets[ends] == task.tokenizer.eos_id).all()
    assert (batch.weights[ends] == 0).all()
    np.testing.assert_array_equal(batch.weights == 1, batch.difficulty >= 0)
    np.testing.assert_array_equal(batch.weights == 0, batch.difficulty == -1)


@settings(max_examples=100, deadline=None)
@given(task=tasks, seed=seeds, data=st.data())
def test_check_accepts_the_answer_and_nothing_else(task, seed, data):
    (problem,) = task.problems(seed=seed, count=1)
    prompt, answer = problem.prompt, problem.answer
    assert task.check(prompt=prompt, completion=answer)
    assert task.check(prompt=prompt, completion=[*answer, 2, 5])
    assert not task.check(prompt=prompt, completion=answer[:-1])
    place = data.draw(st.integers(0, len(answer) - 1))
    wrong = data.draw(
        st.integers(0, task.tokenizer.vocab_size - 1).filter(lambda i: i != answer[place])
    )
    assert not task.check(prompt=prompt, completion=[*answer[:place], wrong, *answer[place + 1 :]])


@settings(max_examples=40, deadline=None)
@given(task=tasks, seed=seeds)
def test_text_display_round_trips(task, seed):
    ids = task.sample(seed=seed, count=1).tokens[0].tolist()
    assert task.tokenizer.encode(task.tokenizer.decode(ids)) == ids


def test_worked_examples():
    chase = PointerChase(values=3, queries=1, max_hops=4)
    prompt = chase.tokenizer.encode("1 2 0 1 ^4 ")
    assert chase.check(prompt=prompt, completion=chase.tokenizer.encode("2 "))
    addition = Addition(digits=4)
    prompt = addition.tokenizer.encode("0956+0148=")
    assert addition.check(prompt=prompt, completion=addition.tokenizer.encode("01104"))
    # right to left: 6 + 8 begins a carry, 5 + 4 hands it on, 9 + 1 begins another
    assert slow_sum("0956+0148=", False) == [("0", 0), ("1", 1), ("1", 2), ("0", 1), ("4", 0)]
    backwards = Addition(digits=4, reversed=True)
    assert backwards.check(prompt=prompt, completion=addition.tokenizer.encode("40110"))
    recall = AssociativeRecall(keys=3, values=3, pairs=2, queries=1)
    prompt = recall.tokenizer.encode("k2 v0 k0 v1 k2 ")
    assert recall.check(prompt=prompt, completion=recall.tokenizer.encode("v0 "))


def test_chained_digits_lengthen_the_carry_chains():
    longest = {
        chained: Addition(digits=12, chained=chained).sample(seed=0, count=500).difficulty.max()
        for chained in (0.0, 0.8)
    }
    assert longest[0.0] < longest[0.8] == 12


def test_draws_cover_hops_and_values_evenly():
    batch = PointerChase(values=8, queries=16, min_hops=2, max_hops=5).sample(seed=1, count=2000)
    hops = np.bincount(batch.difficulty[batch.difficulty >= 0])
    assert hops[:2].tolist() == [0, 0]
    np.testing.assert_allclose(hops[2:], 8000, rtol=0.05)
    values = np.bincount(batch.tokens[:, :8].ravel(), minlength=11)[3:]
    np.testing.assert_allclose(values, 2000, rtol=0.1)


def test_user_errors():
    with pytest.raises(UserError, match="use 0 <= min_hops <= max_hops"):
        PointerChase(min_hops=3, max_hops=2)
    with pytest.raises(UserError, match="use 0 < queries <= pairs <= keys"):
        AssociativeRecall(pairs=9, keys=8)
    with pytest.raises(UserError, match=r"Addition\.chained is 1\.5"):
        Addition(chained=1.5)
    with pytest.raises(UserError, match=r"GraphOrder\.order is 'random'"):
        GraphOrder(order="random")
    with pytest.raises(UserError, match="from 1 to 8 nodes"):
        GraphOrder(min_nodes=1)
    with pytest.raises(UserError, match="too few to connect 8 nodes; use 7 or more"):
        GraphOrder(edges=6)
    with pytest.raises(UserError, match=r"Brackets\.kinds must be 1"):
        Brackets(kinds=0)
    with pytest.raises(UserError, match=r"TaskSource\.split is 'test'"):
        TaskSource(task=Addition(), split="test")
    with pytest.raises(UserError, match="is not the alphabet of PointerChase"):
        TaskSource(task=PointerChase()).batches(
            tokenizer=Addition().tokenizer, batch_size=6, seed=5
        )
    with pytest.raises(UserError, match="begins with symbol"):
        AlphabetTokenizer(symbols=("a", "ab"))
    with pytest.raises(UserError, match="'3=4 ' is not made of the 12 task symbols"):
        Addition().tokenizer.encode("3=4 ")
    with pytest.raises(UserError, match="token id 15 is outside the vocabulary of 15"):
        Addition().tokenizer.decode([15])


def test_tasks_are_equal_by_their_fields():
    assert TaskSource(task=Addition(digits=3)) == TaskSource(task=Addition(digits=3))
    assert Addition(digits=3) != Addition(digits=4)
    assert dataclasses.replace(Addition(), digits=3) == Addition(digits=3)


def test_red_patches_are_of_any_number_and_landmarks_anywhere_inside():
    task = GridQuestions(height=4, width=3, most_red=3, colours=6, landmarks=1, questions=3)
    patches = (task.sample(seed=0, count=400).tokens[:, :12] - 3) % task.colours
    red = np.bincount((patches == 0).sum(axis=1), minlength=4)
    assert len(red) == 4 and red.min() > 60
    where = np.bincount(np.argmax(patches == 1, axis=1), minlength=12).reshape(4, 3)
    assert (where[-1] == 0).all() and (where[:, -1] == 0).all() and where[:-1, :-1].min() > 30


@settings(max_examples=40, deadline=None)
@given(seed=seeds, slots=st.integers(1, 6), wordings=st.integers(1, 4), words=st.integers(1, 3))
def test_slot_texts_say_each_slot_once_and_their_wording_is_all_that_is_free(
    seed, slots, wordings, words
):
    """Read back by their written form; all that a text may do is what changes between two draws."""
    task = SlotText(slots=slots, wordings=wordings, words=words)
    said = {}
    for problem in task.problems(seed=seed, count=4):
        held = [word for word in text(task, problem.prompt).split() if word != ">"]
        written = text(task, problem.answer).split()
        width = len(written) // slots
        clauses = [written[i : i + width] for i in range(0, len(written), width)]
        found = {}
        for opening, *inside, close in clauses:
            letter, wording, value = opening[1], opening[2:], inside[words]
            assert close == f"{wording}]" and letter not in found
            found[letter] = value[1:]
            plain = tuple(inside[:words] + inside[words + 1 :])
            assert said.setdefault(opening, plain) == plain
        assert sorted(letter + value for letter, value in found.items()) == held
        parts = np.split(np.asarray(problem.answer), slots)[::-1]
        other = np.concatenate(parts).tolist()
        assert task.check(prompt=problem.prompt, completion=other)
    assert len(set(said.values())) == len(said)
