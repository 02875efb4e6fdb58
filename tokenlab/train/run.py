"""From an experiment to the objects that run it: tokenizer, data, trainer, clock."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import grain
import jax

from tokenlab.core.context import View
from tokenlab.core.duration import Clock
from tokenlab.core.errors import UserError
from tokenlab.data.base import Batch, OnPolicy
from tokenlab.data.fetch import cache_dir
from tokenlab.experiment import Experiment
from tokenlab.tokenizers import Tokenizer, cached_fit, load_tokenizer
from tokenlab.train.checkpoint import Checkpointing, Checkpoints
from tokenlab.train.folder import load_experiment
from tokenlab.train.step import StepMetrics, Trainer, TrainState


def fit_tokenizer(experiment: Experiment) -> Tokenizer:
    """The experiment's tokenizer, fitted on its training documents or taken from the cache."""
    corpora = experiment.data.corpora
    texts = (
        corpus_texts[i].text
        for corpus in corpora
        for corpus_texts in [corpus.documents("train")]
        for i in range(len(corpus_texts))
    )
    content = "-".join(corpus.fingerprint for corpus in corpora)
    return cached_fit(
        experiment.tokenizer,
        corpus_fingerprint=content,
        texts=texts,
        cache_dir=cache_dir() / "tokenizers",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """An experiment with everything resolved that needs the data or the devices.

    Attributes:
        experiment: what was asked for.
        tokenizer: fitted.
        trainer: model, objective and optimiser, bound to the mesh.
        clock: durations in steps of this run.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    trainer: Trainer
    clock: Clock

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        *,
        tokenizer: Tokenizer | None = None,
        views: Mapping[str, View] | None = None,
    ) -> Run:
        """Resolves an experiment.

        Args:
            experiment: the experiment.
            tokenizer: its tokenizer, where a run folder holds it already.
            views: models beside the policy, such as a teacher.

        Raises:
            UserError: the tokenizer has more ids than the model's vocabulary.
        """
        tokenizer = fit_tokenizer(experiment) if tokenizer is None else tokenizer
        model = experiment.model
        if tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is "
                f"{model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
            )
        data = experiment.data
        clock = Clock(
            tokens_per_step=experiment.batch_size * data.tokens_per_row,
            tokens_per_epoch=lambda: data.tokens_per_epoch(tokenizer=tokenizer),
        )
        clock = dataclasses.replace(clock, total_steps=clock.steps(experiment.steps))
        schedule = experiment.optimizer.learning_rate.build(clock)
        trainer = Trainer(
            model=model,
            objective=experiment.objective,
            optimizer=experiment.optimizer.build(clock),
            schedule=schedule,
            mesh=experiment.mesh.build(),
            seed=experiment.seed,
            accumulation=experiment.accumulation,
            ema_decay=experiment.ema_decay,
            views=views or {},
            rollouts=data if isinstance(data, OnPolicy) else None,
            moves=experiment.optimizer.moves,
            total_steps=clock.total_steps,
        )
        return cls(experiment=experiment, tokenizer=tokenizer, trainer=trainer, clock=clock)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        assert self.clock.total_steps is not None
        return self.clock.total_steps

    def batches(self) -> grain.DatasetIterator[Batch]:
        """This process's rows of each step, from the start of the run."""
        experiment = self.experiment
        return iter(
            experiment.data.batches(
                tokenizer=self.tokenizer,
                batch_size=experiment.batch_size,
                seed=experiment.seed,
                shard_index=jax.process_index(),
                shard_count=jax.process_count(),
            )
        )

    def steps(
        self,
        state: TrainState,
        *,
        first: int = 0,
        last: int | None = None,
        batches: Iterable[Batch] | None = None,
    ) -> Iterator[tuple[TrainState, StepMetrics]]:
        """The run's steps alone, without a folder: the state and the metrics behind each.

        Args:
            state: to go on from; the first step gives it up.
            first: batch of the first step.
            last: batch behind that of the last; None is the end of the run.
            batches: rows in the place of the run's own; an iterator goes on where it is.
        """
        last = self.total_steps if last is None else last
        for batch in itertools.islice(self.batches() if batches is None else batches, first, last):
            state, metrics = self.trainer.step(state, self.trainer.put(batch))
            yield state, metrics


def open_run(folder: pathlib.Path, *, step: int | None = None) -> tuple[Run, TrainState]:
    """A finished or stopped run, for evaluation, generation and notebooks.

    Args:
        folder: the run folder.
        step: which checkpoint; None takes the newest.

    Raises:
        UserError: there is no such checkpoint, or it does not fit the config.
    """
    experiment = load_experiment(folder)
    run = Run.of(experiment, tokenizer=load_tokenizer(folder))
    checkpoints = Checkpoints(folder, options=Checkpointing())
    if checkpoints.latest is None or (step is not None and step not in checkpoints.steps):
        have = ", ".join(map(str, checkpoints.steps)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {have}")
    return run, checkpoints.restore_state(run.trainer.abstract_state(), step=step)
