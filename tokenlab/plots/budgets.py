"""Figures against the tokens that caches may keep or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_SPLIT = " at "


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
    figure = Figure(figsize=(4.6 * len(metrics), 3.8), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for name, arms in policies.items():
            arms = sorted(arms)
            means = [float(np.mean(record["figures"][metric][arm])) for _, arm in arms]
            if several and len(arms) == 1:
                axis.axhline(means[0], ls="--", color="black", label=name)
            else:
                axis.plot([budget for budget, _ in arms], means, "o-", label=name)
        axis.set_xlabel("tokens per layer")
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    return figure
