"""Tables of numbers as panels of colours under one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.cm
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from tokenlab.plots.panels import panels

_WRITTEN = 60  # cells of a panel that still have room for their numbers


def plot_maps(
    maps: Mapping[str, Float[np.ndarray, "R C"]],
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    row_label: str,
    column_label: str,
    label: str,
    colours: str = "YlOrRd",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """One panel for each map, all under one scale of colours; a title ends with the mean.

    With rows that are depths of a hidden sentence and columns that are lengths of a context, these
    are needle maps.

    Args:
        maps: values by name; NaN, which is grey, where there is none.
        rows: what the rows are, from the top.
        columns: what the columns are.
        row_label: what rows have in common, with its unit.
        column_label: what columns have in common, with its unit.
        label: what the values are, with their unit.
        colours: name of a Matplotlib colour map.
        limits: ends of the scale; None takes the least and the greatest value.

    Raises:
        ValueError: there is no map, or one has another shape than rows and columns say.
    """
    shape = (len(rows), len(columns))
    wrong = [name for name, values in maps.items() if np.shape(values) != shape]
    if not maps or wrong:
        found = ", ".join(f"{name} {np.shape(maps[name])}" for name in wrong) or "no map"
        raise ValueError(f"{found}; give maps of shape {shape}, as rows and columns say")
    low, high = limits or (
        min(float(np.nanmin(values)) for values in maps.values()),
        max(float(np.nanmax(values)) for values in maps.values()),
    )
    scale = Normalize(low, high, clip=True)
    palette = matplotlib.colormaps[colours].with_extremes(bad="lightgrey")
    figure, axes = panels(len(maps), most=5, width=2.2, height=2.2)
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        _panel(axis, np.asarray(values, float), scale, palette)
        axis.set_title(f"{name}: {np.nanmean(values):.2f}", fontsize=9)
        _ticks(axis, rows, columns)
    figure.supxlabel(column_label, fontsize=9)
    figure.supylabel(row_label, fontsize=9)
    bar = matplotlib.cm.ScalarMappable(norm=scale, cmap=palette)
    figure.colorbar(bar, ax=figure.axes, label=label, fraction=0.03, aspect=30)
    return figure


def _panel(axis: Axes, values: np.ndarray, scale: Normalize, palette: Colormap) -> None:
    axis.imshow(values, norm=scale, cmap=palette, aspect="auto", interpolation="nearest")
    if values.size > _WRITTEN:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = np.dot(palette(scale(value))[:3], [0.3, 0.6, 0.1]) < 0.5
            axis.text(
                column, row, f"{value:.2f}", fontsize=7, ha="center", va="center",
                color="white" if dark else "black",
            )  # fmt: skip


def _ticks(axis: Axes, rows: Sequence[object], columns: Sequence[object]) -> None:
    """At most eight names a side."""
    for names, put in ((columns, axis.set_xticks), (rows, axis.set_yticks)):
        places = range(0, len(names), math.ceil(len(names) / 8))
        put(places, [str(names[place]) for place in places], fontsize=8)
    axis.tick_params(length=2)
