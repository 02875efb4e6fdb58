"""The one loop."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from tokenlab.core.context import View
from tokenlab.core.duration import Duration
from tokenlab.core.ledger import Ledger
from tokenlab.data.base import Batch
from tokenlab.decode import Completion, Samples
from tokenlab.experiment import Experiment
from tokenlab.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from tokenlab.train.checkpoint import Checkpoints
from tokenlab.train.folder import JsonLines, claim, read_jsonl, write_json
from tokenlab.train.mesh import placed_on
from tokenlab.train.progress import Bar, Events, matmul_rate
from tokenlab.train.run import Run
from tokenlab.train.step import StepMetrics, TrainState


class Diverged(Exception):
    """The loss is no longer a number; the message is one line for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of ``train`` ended.

    Attributes:
        run: the resolved run.
        state: the last state.
        evals: figures of the last evaluations by name.
        samples: the last texts written.
        ledger: costs of all training passes, forward only.
        finished: False where a signal stopped the run early.
    """

    run: Run
    state: TrainState
    evals: Mapping[str, Mapping[str, float]]
    samples: Sequence[Completion]
    ledger: Mapping[str, float]
    finished: bool


def train(
    experiment: Experiment,
    folder: pathlib.Path,
    *,
    console: Console,
    params: PyTree | None = None,
    tokenizer: Tokenizer | None = None,
) -> Outcome:
    """Trains ``experiment`` in ``folder``, from its newest checkpoint if there is one.

    Order of resumption: the run's own newest complete checkpoint, else a fresh state.

    Args:
        experiment: what to train.
        folder: the run folder.
        console: where progress is shown.
        params: parameters of a fresh state, such as ``models.adapted`` gave; None draws them.
        tokenizer: of a fresh run, such as a published model's; None is the experiment's.

    Raises:
        UserError: the folder, the data or the config cannot be used.
        Diverged: the loss became NaN or infinite.
    """
    claim(folder, experiment)
    saved = (folder / "tokenizer.json").exists()
    run = Run.of(experiment, tokenizer=load_tokenizer(folder) if saved else tokenizer)
    if not saved:
        save_tokenizer(run.tokenizer, folder)
    with Interrupt() as interrupt:
        return Loop(run, folder, console, interrupt, params).go()


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop."""

    def __enter__(self) -> Interrupt:
        """Takes the signals over."""
        self.requested = False
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception: object) -> None:
        """Gives the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Loop:
    """One pass over the steps of a run; every side effect of training is here."""

    def __init__(
        self,
        run: Run,
        folder: pathlib.Path,
        console: Console,
        interrupt: Interrupt,
        params: PyTree | None = None,
    ) -> None:
        """Restores or initialises the state and opens the logs."""
        self.run, self.folder, self.console, self.interrupt = run, folder, console, interrupt
        self.checkpoints = Checkpoints(folder, options=run.experiment.checkpoint)
        self.data: grain.DatasetIterator[Batch] = run.batches()
        self.counts: dict[str, float] = dict.fromkeys(dataclasses.asdict(Ledger()), 0.0)
        self.state = self._first_state(params)
        self.step = int(self.state.step)
        self.metrics = JsonLines(folder / "metrics.jsonl", after_step=self.step)
        self.eval_lines = JsonLines(folder / "evals.jsonl", after_step=self.step)
        self.events = Events(folder)
        past = read_jsonl(folder / "evals.jsonl")
        self.evals: dict[str, dict[str, float]] = past[-1]["evals"] if past else {}
        self.samples: list[Completion] = []
        self.pending: tuple[int, StepMetrics, Batch] | None = None
        self.since_log = np.zeros(2)  # slots and operations since the last line

    def _first_state(self, params: PyTree | None) -> TrainState:
        if self.checkpoints.latest is None:
            return self.run.trainer.init(params)
        abstract = self.run.trainer.abstract_state()
        state, counts = self.checkpoints.restore(abstract, data=self.data)
        self.counts |= counts  # which an older run has fewer of
        self.console.print(f"resuming {self.folder} at step {int(state.step)}", soft_wrap=True)
        return state

    def go(self) -> Outcome:
        """Runs until the last step or a signal, then closes everything."""
        total, first = self.run.total_steps, self.step
        rate = matmul_rate()
        self.bar = Bar(self.console, total=total, done=self.step, peak=rate)
        try:
            while self.step < total and not self.interrupt.requested:
                self._advance()
                if self._due(self.run.experiment.checkpoint.every):
                    self._save()
            if self.step > first and self.step not in self.checkpoints.steps:
                self._save()
        finally:
            self.bar.stop()
            self.metrics.close()
            self.eval_lines.close()
            self.events.close()
        self.checkpoints.close()
        return Outcome(
            run=self.run,
            state=self.state,
            evals=self.evals,
            samples=self.samples,
            ledger=self.counts,
            finished=self.step >= total,
        )

    def _advance(self) -> None:
        batch = next(self.data)
        self.state, metrics = self.run.trainer.step(self.state, self.run.trainer.put(batch))
        # The device works on this step while the host reads the metrics of the one before.
        self._read_pending()
        self.step += 1
        self.pending = (self.step, metrics, batch)
        due = {
            name: evaluation
            for name, evaluation in self.run.experiment.evals.items()
            if self._due(evaluation.every)
        }
        if due or self.step == self.run.total_steps:
            self._read_pending()
        samples = self.run.experiment.samples
        try:
            if due:
                self._evaluate(due)
            if samples is not None and self._due(samples.every):
                self._sample(samples)
        except Exception:
            self._save()  # looking at a state must not cost it
            self.checkpoints.wait()
            raise

    def _due(self, every: Duration) -> bool:
        distance = self.run.clock.steps(every)
        return self.step == self.run.total_steps or (distance > 0 and self.step % distance == 0)

    def _read_pending(self) -> None:
        if self.pending is None:
            return
        step, device_metrics, batch = self.pending
        self.pending = None
        metrics: StepMetrics = jax.device_get(device_metrics)
        if not np.isfinite(metrics.loss):
            raise Diverged(self._divergence(step, batch))
        for name, value in dataclasses.asdict(metrics.ledger).items():
            self.counts[name] += float(value)
        self.since_log += np.asarray([metrics.ledger.slots, 3 * metrics.ledger.flops])
        if step % self.run.experiment.log_every and step != self.run.total_steps:
            return
        scalars = {
            "loss": float(metrics.loss),
            **{f"terms/{name}": float(mean) for name, mean in metrics.means.items()},
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
        }
        tokens, flops = self.since_log
        speed = self.bar.advance(step, loss=scalars["loss"], tokens=tokens, flops=flops)
        self.since_log = np.zeros(2)
        ledger = {name: self.counts[name] for name in ("tokens", "slots", "flops")}
        self.metrics.write({"step": step, **scalars, "ledger": ledger, "speed": speed})
        self.events.write(step, scalars | {f"speed/{n}": v for n, v in speed.items()})

    def _divergence(self, step: int, batch: Batch) -> str:
        documents = np.unique(batch["documents"])
        shown = ", ".join(map(str, documents[documents >= 0][:20]))
        good = self.checkpoints.latest
        remedy = f"the checkpoint of step {good} is good" if good else "no checkpoint was written"
        return (
            f"the loss is not finite at step {step} (documents {shown}); {remedy}; "
            f"lower optimizer.learning_rate.peak or look at those documents"
        )

    def _evaluate(self, evaluations: Mapping[str, Any]) -> None:
        with placed_on(self.run.trainer.mesh):
            for name, evaluation in evaluations.items():
                self.evals[name] = evaluation(
                    model=self.run.experiment.model,
                    params=self.state.best_params,
                    tokenizer=self.run.tokenizer,
                )
        self.eval_lines.write({"step": self.step, "evals": self.evals})
        scalars = {f"evals/{n}/{k}": v for n in evaluations for k, v in self.evals[n].items()}
        self.events.write(self.step, scalars)
        self.bar.pause()

    def _sample(self, samples: Samples) -> None:
        view = View(model=self.run.experiment.model, params=self.state.best_params)
        with placed_on(self.run.trainer.mesh):
            written = samples(view, self.run.tokenizer, seed=self.run.experiment.seed)
        with (self.folder / "samples.txt").open("a") as file:
            for prompt, text in written:
                file.write(f"--- step {self.step}\n{prompt}|{text}\n")
        self.samples = written
        self.bar.pause()

    def _save(self) -> None:
        self._read_pending()  # a state whose loss is not finite is never saved
        name = self.run.experiment.checkpoint.best_metric
        best = None
        if name is not None:
            evaluation, _, metric = name.partition("/")
            best = self.evals.get(evaluation, {}).get(metric)
        self.checkpoints.save(
            self.step, state=self.state, data=self.data, counts=self.counts, best=best
        )
        self.bar.pause()


def report(outcome: Outcome, folder: pathlib.Path) -> None:
    """Writes ``report.json``: the figures by which runs are compared."""
    write_json(
        folder / "report.json",
        {
            "finished": outcome.finished,
            "step": int(outcome.state.step),
            "parameters": sum(x.size for x in jax.tree.leaves(outcome.state.params)),
            "ledger": outcome.ledger,
            "evals": outcome.evals,
        },
    )
