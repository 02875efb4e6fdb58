"""How many tokens single passes of a model write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokenlab.plots.panels import panels


def plot_pass_lengths(lengths: Mapping[str, Sequence[int]]) -> Figure:
    """One panel for each way of drafting: the share of passes that write 1, 2, ... tokens.

    A dashed line is the mean, with which the title ends.

    Args:
        lengths: tokens that each pass wrote, by name; at least one pass each.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not lengths or not all(len(counts) for counts in lengths.values()):
        raise ValueError("give at least one pass for each name")
    longest = max(max(counts) for counts in lengths.values())
    figure, axes = panels(len(lengths), most=4, width=2.6, height=2.1)
    for axis, (name, counts) in zip(axes, lengths.items(), strict=True):
        shares = np.bincount(counts, minlength=longest + 1)[1:] / len(counts)
        axis.bar(range(1, longest + 1), shares, width=0.85)
        mean = float(np.mean(counts))
        axis.axvline(mean, ls="--", lw=1, color="black")
        axis.set_title(f"{name}: {mean:.2f}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlim(0.3, longest + 0.7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("tokens of a pass", fontsize=9)
    figure.supylabel("share of passes", fontsize=9)
    return figure
