"""Curves of a run folder."""

from __future__ import annotations

import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from tokenlab.train.folder import read_jsonl


def plot_curves(folder: pathlib.Path) -> Figure:
    """Loss, gradient norm and learning rate of a run, with its held-out figures.

    Args:
        folder: the run folder.
    """
    lines = read_jsonl(folder / "metrics.jsonl")
    evals = read_jsonl(folder / "evals.jsonl")
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, norm, rate = figure.subplots(1, 3)
    loss.plot(steps, [line["terms/next_token"] if "terms/next_token" in line else line["loss"]
                      for line in lines], lw=1, label="training, nats per token")  # fmt: skip
    for name in dict.fromkeys(name for line in evals for name in line["evals"]):
        points = [
            (line["step"], line["evals"][name]["bits_per_byte"])
            for line in evals
            if "bits_per_byte" in line["evals"].get(name, {})
        ]
        if points:
            loss.plot(*zip(*points, strict=True), "o-", ms=4, label=f"{name}, bits per byte")
    loss.set_title("loss")
    loss.legend(frameon=False, fontsize=8)
    norm.plot(steps, [line["grad_norm"] for line in lines], lw=1)
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_major_formatter("{x:g}")
    norm.yaxis.set_minor_formatter(NullFormatter())
    norm.set_title("gradient norm before clipping")
    rate.plot(steps, [line["learning_rate"] for line in lines], lw=1)
    rate.set_title("learning rate")
    for axis in (loss, norm, rate):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    return figure
