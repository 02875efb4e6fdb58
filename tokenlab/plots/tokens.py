"""Text coloured by a number per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.cm
import matplotlib.patches
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokenlab.depth import DepthTrace

_RECEIVED = {
    "depth": "blocks run",
    "recursions": "recursions",
    "active_experts": "experts run",
    "halting": "chance of halting",
}
_MARKS = {"\n": "⏎", "\t": "⇥"}


def plot_token_values(
    pieces: Sequence[str],
    values: Sequence[float],
    *,
    label: str,
    columns: int = 90,
    colours: str = "YlOrRd",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws a text whose tokens are shaded by a value: loss, depth, credit.

    Args:
        pieces: text of each token.
        values: one number per token; NaN where there is none.
        label: what the number is, with its unit.
        columns: characters per line, at most.
        colours: name of a Matplotlib colour map.
        limits: ends of the scale; None takes the least and the greatest value.

    Raises:
        ValueError: there is no piece, or not one value for each.
    """
    if len(pieces) != len(values) or not any(pieces):
        raise ValueError(f"{len(pieces)} pieces and {len(values)} values; give one value per piece")
    places = list(_layout(pieces, columns))
    lines = places[-1].line + 1
    width = max(place.column + len(place.text) for place in places)
    size = (max(0.08 * width, 3.0) + 0.4, 0.24 * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    shades = np.asarray(values, np.float64)
    scale = Normalize(*(limits or (np.nanmin(shades), np.nanmax(shades))), clip=True)
    palette = matplotlib.colormaps[colours].with_extremes(bad="lightgrey")
    painted = palette(scale(np.ma.masked_invalid(shades)))
    for number, line, column, text in places:
        colour = tuple(painted[number])
        corner = (column, -line - 0.5)
        axis.add_patch(matplotlib.patches.Rectangle(corner, len(text), 1, color=colour, lw=0))
        dark = np.dot(colour[:3], [0.3, 0.6, 0.1]) < 0.5
        for offset, letter in enumerate(text):
            axis.text(
                column + offset + 0.5, -line, letter, family="monospace", fontsize=8,
                ha="center", va="center", color="white" if dark else "black",
            )  # fmt: skip
    axis.set_xlim(0, max(width, 3.0 / 0.08))
    axis.set_ylim(0.5 - lines, 0.5)
    axis.axis("off")
    bar = matplotlib.cm.ScalarMappable(norm=scale, cmap=palette)
    whole = np.all((shades % 1 == 0) | np.isnan(shades))
    figure.colorbar(
        bar, ax=axis, label=label, location="bottom", fraction=0.06, aspect=60,
        ticks=MaxNLocator(integer=True) if whole else None,
    )  # fmt: skip
    return figure


def plot_received(
    pieces: Sequence[str],
    trace: DepthTrace,
    *,
    figure: str = "depth",
    entry: int | None = None,
    row: int = 0,
    label: str | None = None,
    columns: int = 90,
    colours: str = "YlGnBu",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draws a text whose tokens are shaded by what a pass gave them: depth, experts, halting.

    Args:
        pieces: text of each token that was read, from the row's first.
        trace: of the pass.
        figure: ``"depth"``, the blocks run on a token; or a figure of the trace, such as
            ``"recursions"``, ``"active_experts"`` or ``"halting"``.
        entry: which layer's figure, of ``"halting"`` which recursion's, from 0; None is the mean
            over layers, of ``"halting"`` the first recursion.
        row: of the batch.
        label: what the number is; None says it of the figures above, and names the others.
        columns: characters per line, at most.
        colours: name of a Matplotlib colour map.
        limits: ends of the scale; None takes the least and the greatest value.

    Raises:
        ValueError: the trace has no such figure, or fewer tokens than there are pieces.
    """
    if figure == "depth":
        entries = trace.depth[None]
    elif figure in trace.figures:
        entries = trace.figures[figure]
    else:
        known = ", ".join(["depth", *trace.figures])
        raise ValueError(f"the trace has no figure {figure!r}; it has {known}")
    if entry is None and figure == "halting":
        entry = 0
    values = np.asarray(entries, np.float64)[:, row, : len(pieces)]
    return plot_token_values(
        pieces,
        (values.mean(axis=0) if entry is None else values[entry]).tolist(),
        label=_label(figure, entry, len(values)) if label is None else label,
        columns=columns,
        colours=colours,
        limits=limits,
    )


def _label(figure: str, entry: int | None, entries: int) -> str:
    said = _RECEIVED.get(figure, figure)
    if entry is None:
        return said if entries == 1 else f"{said}, mean over layers"
    return f"{said}, {'recursion' if figure == 'halting' else 'layer'} {entry + 1}"


class _Place(NamedTuple):
    """Where a piece, or the part of it that fits on a line, is written."""

    piece: int
    line: int
    column: int
    text: str


def _layout(pieces: Sequence[str], columns: int) -> Iterator[_Place]:
    """Breaks lines after line ends and before pieces that do not fit."""
    line = column = 0
    for number, piece in enumerate(pieces):
        for text in piece.splitlines(keepends=True):
            shown = "".join(_MARKS.get(c, c if c.isprintable() else "\ufffd") for c in text)
            if column and column + len(shown) > columns:
                line, column = line + 1, 0
            while shown:
                yield _Place(number, line, column, shown[:columns])
                column += len(shown[:columns])
                shown = shown[columns:]
                if shown or text.endswith("\n"):
                    line, column = line + 1, 0
