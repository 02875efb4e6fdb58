"""What a run shows while it runs: a bar, TensorBoard events, and the rate it reaches."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.summary import Writer

LINES = 20  # of progress where there is no bar


def matmul_rate() -> float:
    """Floating-point operations per second of a large float32 matrix product on all devices."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best * jax.device_count()


class Bar:
    """A progress bar of the whole run with loss, speed and share of the matmul rate."""

    def __init__(self, console: Console, *, total: int, done: int, peak: float) -> None:
        """Starts at ``done`` of ``total`` steps; ``peak`` is in operations per second.

        Where the console is not a terminal there is a line now and then instead.
        """
        self._peak, self._total, self._console = peak, total, console
        self._next_line = done + 1
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total, completed=done, note="")
        self._progress.start()
        self._since = time.perf_counter()

    def advance(self, step: int, *, loss: float, tokens: float, flops: float) -> dict[str, float]:
        """Shows step ``step``; returns the speed since the last call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        speed = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "utilisation": flops / seconds / self._peak,
        }
        note = (
            f"loss {loss:.3f}  {speed['tokens_per_second']:,.0f} tok/s  "
            f"{speed['utilisation']:.0%} of matmul rate"
        )
        self._progress.update(self._task, completed=step, note=note)
        if not self._console.is_terminal and step >= self._next_line:
            line = f"step {step}/{self._total}  {note}"
            self._console.print(line, soft_wrap=True, highlight=False)
            self._next_line = step + max(1, self._total // LINES)
        return speed

    def pause(self) -> None:
        """Leaves out the time until now, which went into an evaluation or a checkpoint."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Ends the bar."""
        self._progress.stop()


class Events:
    """TensorBoard event files of a run."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Writes under ``folder/events``."""
        self._writer = Writer(str(folder / "events"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds scalars at ``step``."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.flush()
        self._writer.close()
