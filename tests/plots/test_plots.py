"""What the figures draw, counted; and that each can be written as a picture."""

import itertools
import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from tokenlab.depth import DepthTrace
from tokenlab.evals import DepthHistogram
from tokenlab.plots import (
    plot_budgets,
    plot_curves,
    plot_depths,
    plot_maps,
    plot_pass_lengths,
    plot_received,
    plot_study,
    plot_token_values,
)


def boxes(figure):
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def lines_of(figure):
    """The letters of each line of text, from the top, left to right."""
    rows = {}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        rows.setdefault(y, []).append((x, text.get_text()))
    return ["".join(letter for _, letter in sorted(rows[y])) for y in sorted(rows, reverse=True)]


def painted(figure, path):
    """The pixels of a figure."""
    figure.savefig(path)
    return matplotlib.image.imread(path)[..., :3]


def test_every_token_has_a_box_of_its_width_and_its_letters():
    pieces = ["The ", "quick", " fox", "\n", "jumps"]
    figure = plot_token_values(pieces, [0.0, 1.0, 2.0, 3.0, 4.0], label="loss, nats")
    assert [box.get_width() for box in boxes(figure)] == [4, 5, 4, 1, 5]
    assert [box.get_xy() for box in boxes(figure)] == [
        (0, -0.5), (4, -0.5), (9, -0.5), (13, -0.5), (0, -1.5)
    ]  # fmt: skip
    assert lines_of(figure) == ["The quick fox⏎", "jumps"]
    assert figure.axes[1].get_xlabel() == "loss, nats"


def test_colours_follow_the_values():
    figure = plot_token_values(
        ["a", "b", "c", "d"], [0.0, 2.0, 1.0, 2.0], label="x", colours="Greys"
    )
    low, high, middle, again = (box.get_facecolor()[0] for box in boxes(figure))
    assert low > middle > high == again  # grey darkens
    letters = [text.get_color() for text in figure.axes[0].texts]
    assert letters == ["black", "white", "black", "white"]  # readable on its ground


def test_a_token_without_a_value_is_grey_and_does_not_spoil_the_scale():
    figure = plot_token_values(["a", "b", "c"], [float("nan"), 1.0, 3.0], label="x")
    red, green, blue, _ = boxes(figure)[0].get_facecolor()
    assert red == green == blue
    assert figure.axes[1].get_xlim() == (1.0, 3.0)


def test_lines_break_before_tokens_and_inside_those_longer_than_a_line():
    figure = plot_token_values(["aaa ", "bbbb", "c" * 14], [1, 2, 3], label="x", columns=6)
    assert lines_of(figure) == ["aaa ", "bbbb", "cccccc", "cccccc", "cc"]
    assert max(box.get_x() + box.get_width() for box in boxes(figure)) <= 6
    colours = {box.get_facecolor() for box in boxes(figure)[2:]}
    assert len(boxes(figure)) == 5 and len(colours) == 1  # all parts of one token look alike


def test_marks_that_cannot_be_seen_are_shown_and_empty_tokens_are_not():
    figure = plot_token_values(["a\tb", "", "\x00"], [1, 2, 3], label="x")
    assert lines_of(figure) == ["a⇥b\ufffd"]
    assert len(boxes(figure)) == 2


@pytest.mark.parametrize(("pieces", "values"), [(["a"], [1, 2]), ([], []), ([""], [1])])
def test_values_that_do_not_fit_the_text_are_refused(pieces, values):
    with pytest.raises(ValueError, match="give one value per piece"):
        plot_token_values(pieces, values, label="x")


def test_nothing_of_a_text_is_cut_off(tmp_path):
    picture = painted(plot_token_values(["word "] * 60, range(60), label="x"), tmp_path / "a.png")
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 1.0).all()
    assert (picture < 1.0).any(axis=-1).mean() > 0.3


def test_two_texts_can_share_a_scale_and_whole_numbers_have_whole_ticks():
    figure = plot_token_values(["a", "b"], [2, 4], label="x", colours="Greys", limits=(0, 3))
    (middle, top), bar = boxes(figure), figure.axes[1]
    assert bar.get_xlim() == (0, 3)
    assert top.get_facecolor() == matplotlib.colormaps["Greys"](1.0)
    assert middle.get_facecolor() == matplotlib.colormaps["Greys"](2 / 3)
    figure.draw_without_rendering()
    assert all(tick % 1 == 0 for tick in bar.get_xticks())
    fractions = plot_token_values(["a", "b"], [0.0, 0.5], label="x").axes[1].get_xticks()
    assert any(tick % 1 for tick in fractions)


@pytest.fixture
def trace():
    """Two rows of three tokens, two layers of experts, chances of three depths."""
    chances = jnp.arange(18.0).reshape(3, 2, 3) / 18
    experts = jnp.asarray([[[1, 2, 3], [0, 0, 0]], [[3, 2, 5], [1, 1, 1]]], jnp.float32)
    return DepthTrace(
        depth=jnp.asarray([[4, 2, 6], [2, 2, 2]]),
        active=jnp.ones((6, 2, 3), bool),
        figures={"active_experts": experts, "halting": chances, "mine": experts[:1]},
    )


@pytest.mark.parametrize(
    ("asked", "values", "label"),
    [
        ({}, [4, 2, 6], "blocks run"),
        ({"row": 1}, [2, 2, 2], "blocks run"),
        ({"figure": "active_experts"}, [2, 2, 4], "experts run, mean over layers"),
        ({"figure": "active_experts", "entry": 1}, [3, 2, 5], "experts run, layer 2"),
        ({"figure": "halting"}, [0, 1, 2], "chance of halting, recursion 1"),
        ({"figure": "halting", "entry": 2, "row": 1}, [15, 16, 17],
         "chance of halting, recursion 3"),
        ({"figure": "mine", "label": "my own"}, [1, 2, 3], "my own"),
    ],
)  # fmt: skip
def test_a_text_is_shaded_by_what_its_tokens_received(trace, asked, values, label):
    figure = plot_received(["a", "b", "c"], trace, colours="Greys", **asked)
    values = [value / (18 if "halting" in asked.values() else 1) for value in values]
    expected = plot_token_values(["a", "b", "c"], values, label=label, colours="Greys")
    shades = [box.get_facecolor() for box in boxes(figure)]
    drawn = [box.get_facecolor() for box in boxes(expected)]
    np.testing.assert_allclose(shades, drawn, atol=0.01)  # a colour map has 256 shades
    assert figure.axes[1].get_xlabel() == label
    np.testing.assert_allclose(figure.axes[1].get_xlim(), expected.axes[1].get_xlim(), rtol=1e-6)


def test_the_beginning_of_a_row_can_be_drawn_and_nothing_beyond_it(trace):
    assert len(boxes(plot_received(["a", "b"], trace))) == 2
    with pytest.raises(ValueError, match="give one value per piece"):
        plot_received(["a", "b", "c", "d"], trace)
    with pytest.raises(ValueError, match="it has depth, active_experts, halting, mine"):
        plot_received(["a"], trace, figure="experts")


@pytest.fixture
def run_folder(tmp_path):
    steps = range(1, 21)
    lines = [
        {"step": s, "loss": 9.0, "terms/next_token": 5 / s, "grad_norm": s, "learning_rate": s / 20}
        for s in steps
    ]
    evals = [
        {"step": 10, "evals": {"held_out": {"bits_per_byte": 2.0, "tokens": 5}}},
        {"step": 20, "evals": {"held_out": {"bits_per_byte": 1.5}, "probe": {"accuracy": 0.5}}},
    ]
    for name, entries in (("metrics", lines), ("evals", evals)):
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_curves_hold_the_numbers_of_the_run(run_folder):
    figure = plot_curves(run_folder)
    loss, norm, rate = figure.axes
    training, held_out = loss.lines  # the probe has no bits per byte
    np.testing.assert_array_equal(training.get_xdata(), range(1, 21))
    np.testing.assert_allclose(training.get_ydata(), [5 / s for s in range(1, 21)])
    assert held_out.get_xydata().tolist() == [[10, 2.0], [20, 1.5]]
    shown = [text.get_text() for text in loss.get_legend().get_texts()]
    assert shown == ["training, nats per token", "held_out, bits per byte"]
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), range(1, 21))
    np.testing.assert_allclose(rate.lines[0].get_ydata(), np.arange(1, 21) / 20)
    assert [axis.get_xlabel() for axis in figure.axes] == ["step"] * 3
    painted(figure, run_folder / "curves.png")
    labels = [label.get_text() for label in norm.get_yticklabels()]
    assert {"1", "2", "5", "10"} <= set(labels)


def test_curves_of_a_run_with_another_objective_and_no_evaluation(run_folder):
    (run_folder / "evals.jsonl").unlink()
    line = {"step": 1, "loss": 9.0, "grad_norm": 1.0, "learning_rate": 0.1}
    (run_folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    loss, *_ = plot_curves(run_folder).axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[9.0]]


def record(**rest):
    claim = {"claim": "new: lower held_out/bits_per_byte than old by 0", "holds": True}
    return {
        "question": "Is the new way better than the old one?",
        "matched": "flops",
        "figures": {
            "held_out/bits_per_byte": {"new": [1.0, 2.0, 3.0], "old": [4.0, 4.0, 5.5]},
            "held_out/bits": {"new": [1.0], "old": [1.0]},
            "held_out/bytes": {"new": [1.0], "old": [1.0]},
        },
        "claims": [claim | {"metric": "held_out/bits_per_byte"}],
    } | rest


def test_a_study_shows_each_seed_and_the_mean_of_what_is_claimed():
    figure = plot_study(record())
    (axis,) = figure.axes  # nothing that is not claimed, however alike its name
    assert axis.get_title() == "held_out/bits_per_byte"
    assert [list(line.get_ydata()) for line in axis.lines] == [[1.0, 2.0, 3.0], [4.0, 4.0, 5.5]]
    means = [bar.get_segments()[0] for bar in axis.collections]
    assert [segment[0, 1] for segment in means] == [2.0, 4.5]
    assert [segment[:, 0].mean() for segment in means] == [0, 1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["new", "old"]
    assert "equal flops" in figure.get_suptitle()


def test_long_names_of_arms_do_not_run_into_each_other():
    names = ["mixture of recursions", "a plain Transformer", "one shared block"]
    figures = {"e/m": {name: [1.0, 2.0] for name in names}}
    claims = [{"metric": "e/m", "claim": "", "holds": True}]
    figure = plot_study(record(figures=figures, claims=claims * 2))
    (axis,) = figure.axes  # claimed twice, drawn once
    figure.draw_without_rendering()
    spans = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(spans))


def test_many_arms_keep_their_words_whole_and_apart():
    names = [
        f"{name} at {size}" for size in (96, 384) for name in ("TokenSelect", "sink", "PageTopK")
    ]
    names += [f"arm {number}" for number in range(19)]
    claims = [{"metric": "e/m", "claim": "", "holds": True}]
    figure = plot_study(record(figures={"e/m": {name: [1.0] for name in names}}, claims=claims))
    (axis,) = figure.axes
    figure.draw_without_rendering()
    labels = axis.get_xticklabels()
    assert [" ".join(label.get_text().split()) for label in labels] == names
    spans = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(spans))


def test_budgets_are_a_line_for_each_policy():
    figures = {"full at 1000": [1.0, 3.0], "sinks at 128": [9.0, 7.0], "sinks at 384": [5.0, 5.0]}
    record = {"ledger": {arm: {} for arm in figures}, "figures": {"text/perplexity": figures}}
    (axis,) = plot_budgets(record, ["text/perplexity"]).axes
    lines = {line.get_label(): np.asarray(line.get_data()).tolist() for line in axis.lines}
    assert lines["sinks"] == [[128, 384], [8, 5]]
    assert lines["full"][1] == [2, 2]


def test_budgets_have_one_legend_beside_the_panels_and_ticks_where_something_was_measured():
    figures = {f"{name} at {budget}": [1.0] for name in "abcdefghij" for budget in (96, 384)}
    metrics = ["needle/nats", "text/perplexity"]
    record = {"ledger": figures, "figures": dict.fromkeys(metrics, figures)}
    figure = plot_budgets(record, metrics)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list("abcdefghij")
    for axis in figure.axes:
        assert axis.get_window_extent().x1 < legend.get_window_extent().x0
        assert [label.get_text() for label in axis.get_xticklabels()] == ["96", "384"]


MAPS = {
    "keeps all": np.asarray([[0.0, 1.0, 2.0], [0.5, np.nan, 4.0]]),
    "keeps some": np.asarray([[8.0, 1.0, 2.0], [0.5, 0.25, 4.0]]),
}
SIDES = {
    "rows": ["10 %", "90 %"], "columns": [128, 256, 512], "row_label": "depth",
    "column_label": "tokens", "label": "nats",
}  # fmt: skip


def test_maps_share_one_scale_and_one_place_for_each_cell():
    figure = plot_maps(MAPS, **SIDES)
    *panels, bar = figure.axes
    assert [axis.get_title() for axis in panels] == ["keeps all: 1.50", "keeps some: 2.62"]
    for axis, values in zip(panels, MAPS.values(), strict=True):
        (image,) = axis.images
        np.testing.assert_array_equal(image.get_array().filled(np.nan), values)
        assert (image.norm.vmin, image.norm.vmax) == (0.0, 8.0)
        written = {text.get_position(): text.get_text() for text in axis.texts}
        assert written == {
            (column, row): f"{value:.2f}"
            for (row, column), value in np.ndenumerate(values)
            if np.isfinite(value)
        }
        assert [label.get_text() for label in axis.get_xticklabels()] == ["128", "256", "512"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["10 %", "90 %"]
    assert bar.get_ylabel() == "nats"
    assert figure.get_supxlabel() == "tokens" and figure.get_supylabel() == "depth"


def test_a_large_map_is_not_written_full_and_values_outside_the_limits_have_the_end_colours():
    values = np.linspace(0, 2, 300).reshape(10, 30)
    sides = SIDES | {"rows": range(10), "columns": range(30)}
    axis, _ = plot_maps({"x": values}, **sides, limits=(0.5, 1.0)).axes
    assert not axis.texts
    assert len(axis.get_xticks()) <= 8 and len(axis.get_yticks()) <= 8
    (image,) = axis.images
    colours = image.cmap(image.norm(values))
    assert (colours[0, 0] == image.cmap(0.0)).all() and (colours[-1, -1] == image.cmap(1.0)).all()


@pytest.mark.parametrize("count", [1, 5, 6, 7, 9])
def test_panels_stand_in_even_lines_and_each_column_has_names_below(count, tmp_path):
    maps = {str(number): np.eye(2, 3) for number in range(count)}
    figure = plot_maps(maps, **SIDES)
    figure.draw_without_rendering()
    panels = figure.axes[:count]
    lines = {}
    for axis in panels:
        lines.setdefault(round(axis.get_position().y0, 3), []).append(axis)
    sizes = [len(line) for line in lines.values()]
    assert max(sizes) <= 5 and max(sizes) - min(sizes) <= 1
    columns = {}
    for axis in panels:
        columns[round(axis.get_position().x0, 3)] = axis  # the lowest one stays
    assert all(
        any(label.get_visible() and label.get_text() for label in axis.get_xticklabels())
        for axis in columns.values()
    )
    picture = painted(figure, tmp_path / "maps.png")
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 1.0).all()


@pytest.mark.parametrize("maps", [{}, {"x": np.zeros((3, 2))}])
def test_maps_of_another_shape_are_refused(maps):
    with pytest.raises(ValueError, match=r"give maps of shape \(2, 3\)"):
        plot_maps(maps, **SIDES)


def test_lengths_of_passes_are_shares_with_the_mean_marked():
    figure = plot_pass_lengths({"copied": [1, 1, 4, 2], "drafted": np.asarray([3])})
    copied, drafted = figure.axes
    heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in copied.patches}
    assert heights == pytest.approx({1.0: 0.5, 2.0: 0.25, 3.0: 0.0, 4.0: 0.25})
    assert [bar.get_height() for bar in drafted.patches] == [0, 0, 1, 0]
    assert copied.lines[0].get_xdata()[0] == 2 and copied.get_title() == "copied: 2.00"


@pytest.mark.parametrize("lengths", [{}, {"copied": [1], "drafted": []}])
def test_no_passes_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one pass"):
        plot_pass_lengths(lengths)


def test_depths_are_shares_with_the_loss_of_each_above_them(tmp_path):
    varied = DepthHistogram(np.asarray([2, 4]), np.asarray([0.25, 0.75]), np.asarray([1.0, 3.0]))
    fixed = DepthHistogram(np.asarray([6]), np.asarray([1.0]), np.asarray([2.0]))
    figure = plot_depths({"causal": varied, "whole": fixed})
    causal, whole, loss, other = figure.axes
    shares = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in causal.patches}
    assert shares == pytest.approx({2: 0.25, 4: 0.75})
    assert loss.lines[0].get_xydata().tolist() == [[2, 1], [4, 3]]
    assert other.lines[0].get_xydata().tolist() == [[6, 2]]
    assert loss.get_ylim() == other.get_ylim()
    assert causal.get_title() == "causal: 3.50" and whole.get_title() == "whole: 6.00"
    assert causal.lines[0].get_xdata()[0] == 3.5
    figure.draw_without_rendering()
    assert [label.get_text() for label in whole.get_xticklabels()] == ["2", "4", "6"]
    picture = painted(figure, tmp_path / "depths.png")
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 1.0).all()


@pytest.mark.parametrize("histograms", [{}, {"a": DepthHistogram.read({})}])
def test_no_depths_are_refused(histograms):
    with pytest.raises(ValueError, match="at least one depth"):
        plot_depths(histograms)
