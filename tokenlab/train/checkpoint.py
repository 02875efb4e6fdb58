"""Checkpoints: state, data position and counts, written together or not at all."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from tokenlab.core.duration import Duration, Fraction
from tokenlab.core.errors import UserError
from tokenlab.train.step import TrainState

STATE, DATA, COUNTS = "state", "data", "counts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """When checkpoints are written and which are kept.

    Attributes:
        every: distance between checkpoints; the last step always has one.
        keep_last: newest checkpoints kept.
        keep_best: checkpoints kept with the lowest value of ``best_metric``.
        best_metric: ``evaluation/metric`` that ranks checkpoints, or None.
    """

    every: Duration = Fraction(of_run=0.25)
    keep_last: int = 1
    keep_best: int = 1
    best_metric: str | None = None


class Checkpoints:
    """The checkpoints of one run folder.

    Saving is asynchronous and atomic: a folder appears under its final name only when complete,
    and one that a killed process left half-written is removed, never restored.
    """

    def __init__(self, folder: pathlib.Path, *, options: Checkpointing) -> None:
        """Opens ``folder/checkpoints``, which need not exist."""
        keep: list[Any] = [LatestN(options.keep_last)]
        if options.best_metric is not None and options.keep_best:
            keep.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics["best"],
                    reverse=True,
                    n=options.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._folder = folder / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder.resolve(),
            item_names=(STATE, DATA, COUNTS),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        *,
        state: TrainState,
        data: grain.DatasetIterator,
        counts: Mapping[str, Any],
        best: float | None = None,
    ) -> None:
        """Starts writing a checkpoint; the caller may go on training at once.

        Args:
            step: steps done.
            state: the train state.
            data: the batch iterator, its position is saved.
            counts: JSON-able totals of the run.
            best: value that ranks this checkpoint, lower is better.

        Raises:
            UserError: this or the checkpoint before could not be written, with the cause.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            reason = f"it needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
            raise self._failed(OSError(reason))
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                    counts=ocp.args.JsonSave(dict(counts)),
                ),
                metrics=None if best is None else {"best": best},
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk.

        Raises:
            UserError: a checkpoint could not be written, with the cause.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> UserError:
        reason = str(error).strip().partition("\n")[0]
        good = max(self._manager.all_steps(read=True), default=None)
        remedy = "starts anew" if good is None else f"resumes from step {good}"
        return UserError(
            f"a checkpoint could not be written to {self._folder} ({reason}); free the disk and "
            f"run the same command again: it {remedy}"
        )

    def restore(
        self, abstract: TrainState, *, data: grain.DatasetIterator, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and counts of ``step`` (the newest); moves ``data`` to its position.

        Raises:
            UserError: the checkpoint is of a model with other shapes.
        """
        restored = self._restore(
            step,
            state=ocp.args.StandardRestore(abstract),
            data=grain.checkpoint.CheckpointRestore(data),
            counts=ocp.args.JsonRestore(),
        )
        return restored[STATE], restored[COUNTS]

    def restore_state(self, abstract: TrainState, *, step: int | None = None) -> TrainState:
        """The state alone, for evaluation and generation.

        Raises:
            UserError: the checkpoint is of a model with other shapes.
        """
        return self._restore(step, state=ocp.args.StandardRestore(abstract))[STATE]

    def _restore(self, step: int | None, **items: ocp.args.CheckpointArgs) -> Any:
        step = self.latest if step is None else step
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"checkpoint {step} of {self._folder} does not fit the config ({reason}); "
                f"use the vocabulary and shapes it was trained with"
            ) from error

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self.wait()
        self._manager.close()
