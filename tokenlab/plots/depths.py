"""Which depths tokens are given, and what their targets cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tokenlab.evals import DepthHistogram
from tokenlab.plots.panels import panels

_LOSS = "tab:red"


def plot_depths(histograms: Mapping[str, DepthHistogram], *, unit: str = "blocks run") -> Figure:
    """One panel for each: bars are the share of tokens at each depth, dots the mean of their loss.

    A dashed line is the mean depth, with which the title ends.

    Args:
        histograms: by name; at least one depth each.
        unit: what depth counts.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not histograms or not all(len(each.depth) for each in histograms.values()):
        raise ValueError("give at least one depth for each name")
    figure, axes = panels(len(histograms), most=3, width=3.4, height=2.8)
    levels = np.unique(np.concatenate([each.depth for each in histograms.values()]))
    step = float(np.diff(levels).min()) if len(levels) > 1 else 1.0
    most = max(float(each.nats.max()) for each in histograms.values())
    for axis, (name, (depth, share, nats)) in zip(axes, histograms.items(), strict=True):
        axis.bar(depth, share, width=0.8 * step, color="lightsteelblue")
        mean = float(depth @ share)
        axis.axvline(mean, ls="--", lw=1, color="black")
        axis.set_title(f"{name}: {mean:.2f}", fontsize=9)
        axis.set_xticks(levels)
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.spines["top"].set_visible(False)
        loss = axis.twinx()
        loss.plot(depth, nats, "o-", ms=5, lw=1, color=_LOSS)
        loss.set_ylim(0, 1.1 * most)
        loss.spines["top"].set_visible(False)
        for one in (axis, loss):
            one.tick_params(labelsize=8)
        loss.tick_params(axis="y", colors=_LOSS)
        loss.set_ylabel("nats per token", fontsize=9, color=_LOSS)
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel("share of tokens", fontsize=9)
    return figure
