"""The figure of a study."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


def plot_study(record: Mapping[str, Any]) -> Figure:
    """Every claimed metric by arm: one dot per seed and the mean as a bar.

    Args:
        record: what ``StudyResult.record`` gives.
    """
    claimed = list(dict.fromkeys(claim["metric"] for claim in record["claims"]))
    widest = max(len(record["figures"][metric]) for metric in claimed)
    width = max(4.2, 0.9 * widest)
    figure = Figure(figsize=(width * len(claimed), 3.6), layout="constrained")
    axes = figure.subplots(1, len(claimed), squeeze=False)[0]
    for axis, metric in zip(axes, claimed, strict=True):
        arms = record["figures"][metric]
        for place, values in enumerate(arms.values()):
            mean = sum(values) / len(values)
            axis.hlines(mean, place - 0.25, place + 0.25, lw=2)
            axis.plot([place] * len(values), values, "o", color="black", ms=4, alpha=0.6)
        names = [textwrap.fill(arm, max(11, 60 // len(arms))) for arm in arms]
        axis.set_xticks(range(len(arms)), names, fontsize=8)
        axis.set_xlim(-0.6, len(arms) - 0.4)
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    question = f"{record['question']} (equal {record['matched']})"
    figure.suptitle(textwrap.fill(question, int(14 * width) * len(claimed)), fontsize=9)
    return figure
