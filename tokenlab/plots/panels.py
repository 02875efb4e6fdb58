"""Panels of one kind, side by side and below each other."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels(count: int, *, most: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels that share both axes, in even lines of at most ``most``.

    Args:
        count: panels.
        most: of a line.
        width: of a panel, inches.
        height: of a panel, inches.
    """
    down = math.ceil(count / most)
    across = math.ceil(count / down)
    size = (0.5 + width * across, 0.5 + height * down)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[max(0, count - across) : count]:  # nothing stands below
        axis.tick_params(labelbottom=True)
    return figure, axes[:count]
