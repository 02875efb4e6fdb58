"""A study runs its arms at several seeds, at an equal ledger, and judges its claims."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.experiment import Experiment
from tokenlab.plots.study import plot_study
from tokenlab.study.claims import Bound, Claim, Verdict, interval
from tokenlab.study.trial import Measured, Trial
from tokenlab.train.folder import write_json
from tokenlab.train.loop import train

MATCH_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What to run, what to compare, and what is claimed of it.

    Attributes:
        name: names the folder.
        question: one sentence that the study answers.
        arms: experiments or trials by name; they differ in what is studied.
        matched: ledger column, or cost of the trials, in which the arms that a claim compares are
            equal to one per cent, where the claim names no other.
        claims: what should come out.
        seeds: every arm runs with each of them.
    """

    name: str
    question: str
    arms: Mapping[str, Experiment | Trial]
    matched: str
    claims: tuple[Claim | Bound, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Everything a study measured.

    Attributes:
        study: the study.
        figures: metric -> arm -> one figure per seed.
        ledger: arm -> ledger columns, or costs, of one run.
        verdicts: one per claim.
    """

    study: Study
    figures: Mapping[str, Mapping[str, list[float]]]
    ledger: Mapping[str, Mapping[str, float]]
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(verdict.holds for verdict in self.verdicts)

    def record(self) -> dict[str, Any]:
        """The JSON that is kept as evidence."""
        return {
            "study": self.study.name,
            "question": self.study.question,
            "seeds": list(self.study.seeds),
            "matched": self.study.matched,
            "ledger": self.ledger,
            "figures": self.figures,
            "arms": {name: config.fingerprint(arm) for name, arm in self.study.arms.items()},
            "claims": [
                {"metric": claim.metric} | verdict._asdict()
                for claim, verdict in zip(self.study.claims, self.verdicts, strict=True)
            ],
        }


def run_study(
    study: Study,
    folder: pathlib.Path,
    *,
    console: Console,
    known: Mapping[str, Any] | None = None,
) -> StudyResult:
    """Runs every arm at every seed, resuming what an earlier call left, and judges.

    Writes ``results.json`` and ``results.png`` into ``folder``.

    Args:
        study: what to run.
        folder: of the arms' runs, and of the results.
        console: shows progress.
        known: a record of the same study whose arms need not run again, where their fingerprints
            and the seeds are what they were. It cannot say whether the code is.

    Raises:
        UserError: the study names what is not there, or its arms turn out not to be matched in
            ``study.matched``.
    """
    _check_names(study)
    figures: dict[str, dict[str, list[float]]] = {}
    ledger: dict[str, Mapping[str, float]] = {}
    for arm, part in study.arms.items():
        if known is not None and _is_known(study, arm, known):
            console.print(f"{study.name}: {arm} is known")
            ledger[arm] = known["ledger"][arm]
            for metric, arms in known["figures"].items():
                if arm in arms:
                    figures.setdefault(metric, {})[arm] = arms[arm]
            continue
        for seed in study.seeds:
            console.print(f"{study.name}: {arm}, seed {seed}")
            where = folder / f"{arm}-{seed}"
            if isinstance(part, Trial):
                measured = _tried(part, seed, where, console)
            else:
                measured = _trained(part, seed, where, console)
            ledger[arm] = measured.costs
            for metric, value in measured.figures.items():
                figures.setdefault(metric, {}).setdefault(arm, []).append(value)
    _check_matched(study, ledger)
    for claim in study.claims:
        for arm in claim.arms():
            if arm not in figures.get(claim.metric, ()):
                shown = ", ".join(metric for metric, arms in figures.items() if arm in arms)
                raise UserError(f"study {study.name} measures no {claim.metric!r}; it has {shown}")
    verdicts = tuple(claim.judge(figures[claim.metric]) for claim in study.claims)
    result = StudyResult(study=study, figures=figures, ledger=ledger, verdicts=verdicts)
    record = result.record()
    write_json(folder / "results.json", record)
    plot_study(record).savefig(folder / "results.png", dpi=150)
    return result


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """What :meth:`StudyResult.record` wrote.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        record = json.loads(path.read_text())
        missing = {"study", "seeds", "arms", "figures", "ledger"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no record of a study: {error}") from error
    if missing:
        raise UserError(f"{path} is no record of a study: it has no {', '.join(sorted(missing))}")
    return record


def _is_known(study: Study, arm: str, known: Mapping[str, Any]) -> bool:
    alike = known["arms"].get(arm) == config.fingerprint(study.arms[arm])
    return known["study"] == study.name and alike and known["seeds"] == list(study.seeds)


def _trained(experiment: Experiment, seed: int, folder: pathlib.Path, console: Console) -> Measured:
    outcome = train(config.replace(experiment, {"seed": seed}), folder, console=console)
    if not outcome.finished:
        raise KeyboardInterrupt
    return Measured.of(outcome.evals, outcome.ledger)


def _tried(trial: Trial, seed: int, folder: pathlib.Path, console: Console) -> Measured:
    """The figures that an earlier call left, or new ones."""
    path, fingerprint = folder / "trial.json", config.fingerprint(trial)
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["trial"] == fingerprint:
            console.print(f"  measured before: {path}", soft_wrap=True)
            return Measured(figures=kept["figures"], costs=kept["costs"])
    measured = trial.measure(seed=seed)
    figures = {name: float(value) for name, value in measured.figures.items()}
    costs = {name: float(value) for name, value in measured.costs.items()}
    write_json(path, {"trial": fingerprint, "figures": figures, "costs": costs})
    return Measured(figures=figures, costs=costs)


def _check_names(study: Study) -> None:
    """Finds before any arm is run what could not be judged after all of them are."""
    trained = {name: arm for name, arm in study.arms.items() if isinstance(arm, Experiment)}
    wanted: list[tuple[str, str, Iterable[str]]] = []
    if trained:
        columns = [field.name for field in dataclasses.fields(Ledger)]
        wanted.append(("ledger column", study.matched, columns))
        wanted += [("ledger column", _column(study, claim), columns) for claim in study.claims]
    for claim in study.claims:
        evaluation = claim.metric.partition("/")[0]
        wanted += [("arm", arm, study.arms) for arm in claim.arms()]
        wanted += [
            ("evaluation", evaluation, trained[arm].evals) for arm in claim.arms() if arm in trained
        ]
    for kind, name, known in wanted:
        if name not in known:
            raise UserError(f"study {study.name} has no {kind} {name!r}; it has {', '.join(known)}")
    if not study.claims:
        raise UserError(f"study {study.name} claims nothing; add a Claim to its claims")


def _check_matched(study: Study, ledger: Mapping[str, Mapping[str, float]]) -> None:
    columns = {study.matched} | {_column(study, claim) for claim in study.claims}
    for arm, costs in ledger.items():
        for column in sorted(columns - set(costs)):
            shown = ", ".join(costs)
            raise UserError(f"study {study.name}: {arm} has no {column!r}; it has {shown}")
    for claim in study.claims:
        column = _column(study, claim)
        totals = {arm: ledger[arm][column] for arm in claim.arms()}
        if max(totals.values()) > (1 + MATCH_TOLERANCE) * min(totals.values()):
            shown = ", ".join(f"{arm} {total:.4g}" for arm, total in totals.items())
            raise UserError(f"study {study.name}: arms are not matched in {column}: {shown}")


def _column(study: Study, claim: Claim | Bound) -> str:
    """In which the arms of a claim have to be equal."""
    own = claim.matched if isinstance(claim, Claim) else None
    return own or study.matched


def tables(result: StudyResult) -> list[Table]:
    """The claimed metrics by arm, and the verdicts."""
    metrics = list(dict.fromkeys(claim.metric for claim in result.study.claims))
    arms = Table("arm", result.study.matched, *metrics, title=result.study.question)
    for arm, columns in result.ledger.items():
        cells = []
        for metric in metrics:
            if arm not in result.figures[metric]:
                cells.append("")
                continue
            mean, low, _ = interval(result.figures[metric][arm])
            cells.append(f"{mean:.4f} ± {mean - low:.4f}")
        arms.add_row(arm, f"{columns[result.study.matched]:.4g}", *cells)
    verdicts = Table("claim", "measured", "95 % interval", "holds")
    for v in result.verdicts:
        verdict = "yes" if v.holds else "NO"
        verdicts.add_row(v.claim, f"{v.measured:.4f}", f"{v.low:.4f} to {v.high:.4f}", verdict)
    return [arms, verdicts]
