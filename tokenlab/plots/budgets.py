"""Figures against the tokens that caches may keep or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_SPLIT = " at "
_MARKS = "osD^vP*Xh"


def plot_budgets(record: Mapping[str, Any], metrics: Sequence[str]) -> Figure:
    """One panel for each metric, one line for each policy, the mean over seeds by budget.

    A policy with one budget alone, such as the full cache, is a dashed line across.

    Args:
        record: what ``StudyResult.record`` gives, of arms named ``"policy at budget"``.
        metrics: which figures.
    """
    policies: dict[str, list[tuple[float, str]]] = {}
    for arm in record["ledger"]:
        name, _, budget = arm.rpartition(_SPLIT)
        policies.setdefault(name, []).append((float(budget), arm))
    several = max(len(arms) for arms in policies.values()) > 1
    figure = Figure(figsize=(4.4 * len(metrics) + 1.8, 3.8), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        shown: set[float] = set()
        marks = iter(_MARKS * len(policies))
        for name, arms in policies.items():
            arms = sorted(arms)
            means = [float(np.mean(record["figures"][metric][arm])) for _, arm in arms]
            if several and len(arms) == 1:
                axis.axhline(means[0], ls="--", color="black", label=name)
            else:
                budgets = [budget for budget, _ in arms]
                axis.plot(budgets, means, marker=next(marks), ms=5, lw=1.4, label=name)
                shown.update(budgets)
        axis.set_xscale("log")
        axis.set_xticks(sorted(shown), [f"{budget:g}" for budget in sorted(shown)])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("tokens per layer")
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure
