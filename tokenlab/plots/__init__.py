"""Pictures of runs and of what each token received."""

from tokenlab.plots.budgets import plot_budgets
from tokenlab.plots.curves import plot_curves
from tokenlab.plots.depths import plot_depths
from tokenlab.plots.maps import plot_maps
from tokenlab.plots.passes import plot_pass_lengths
from tokenlab.plots.study import plot_study
from tokenlab.plots.tokens import plot_received, plot_token_values

__all__ = [
    "plot_budgets",
    "plot_curves",
    "plot_depths",
    "plot_maps",
    "plot_pass_lengths",
    "plot_received",
    "plot_study",
    "plot_token_values",
]
