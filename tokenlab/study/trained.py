"""Models that several arms of a study share: trained once, kept with what else is prepared."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import jax
from jaxtyping import PyTree
from rich.console import Console

from tokenlab import config
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.data.base import Batch
from tokenlab.data.fetch import cache_dir
from tokenlab.experiment import Experiment
from tokenlab.study.trial import Measured, Trial
from tokenlab.tokenizers.base import Tokenizer
from tokenlab.train.loop import train
from tokenlab.train.run import Run, open_run


def trained(experiment: Experiment, *, console: Console | None = None) -> tuple[View, Tokenizer]:
    """The model of an experiment as its run leaves it, and its tokenizer.

    The run folder lies in the cache under the experiment's fingerprint; a run that was stopped goes
    on, and one that is finished is only read.

    Raises:
        UserError: the run was interrupted.
    """
    folder = cache_dir() / "trained" / f"{experiment.name}-{config.fingerprint(experiment)}"
    outcome = train(experiment, folder, console=console or Console(quiet=True))
    if not outcome.finished:
        raise UserError(f"the run in {folder} was interrupted; start it again to go on")
    run, state = open_run(folder)
    return View(model=run.experiment.model, params=state.best_params), run.tokenizer


def continued(run: Run, params: PyTree, batches: Iterator[Batch]) -> PyTree:
    """The parameters after a stage of training: the steps of ``run`` from ``params`` on.

    Args:
        run: the stage; its data and seed of the rows are not asked.
        params: what it begins with, which it gives up.
        batches: rows of the steps; a later stage goes on with them.
    """
    return stage(run, params, batches)[0]


def stage(run: Run, params: PyTree, batches: Iterator[Batch]) -> tuple[PyTree, Ledger]:
    """As :func:`continued`, and the ledger of the last step, empty where there is none."""
    state, ledger = run.trainer.init(params), Ledger()
    for after, metrics in run.steps(state, batches=batches):
        state, ledger = after, metrics.ledger
    return state.params, jax.device_get(ledger)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuned(Trial):
    """An experiment that goes on from the parameters which another one ends with.

    Attributes:
        base: trained once for each seed, whatever arms go on from it.
        experiment: with the same parameters; its rows are drawn from ``seed + 1000``.
    """

    base: Experiment
    experiment: Experiment

    def measure(self, *, seed: int) -> Measured:
        """Its evaluations, and the ledger of its own steps.

        Raises:
            UserError: a run was interrupted.
        """
        begun, _ = trained(config.replace(self.base, {"seed": seed}))
        experiment = config.replace(self.experiment, {"seed": seed + 1000})
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(
                experiment,
                pathlib.Path(folder) / "run",
                console=Console(quiet=True),
                params=begun.params,
            )
        if not outcome.finished:
            raise UserError(f"{experiment.name} was interrupted; start the study again")
        return Measured.of(outcome.evals, outcome.ledger)
