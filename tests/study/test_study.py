"""A whole study of a tiny experiment: run, judged, written, and resumed."""

import dataclasses
import io
import json
from typing import ClassVar

import matplotlib.image
import pytest
from rich.console import Console

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.data import PaddedText
from tokenlab.study import Bound, Claim, Measured, Study, Trial, interval, run_study
from tokenlab.study.study import read_record, tables
from tokenlab.study.trained import FineTuned
from tokenlab.train.optimizer import Constant


@pytest.fixture
def make(tiny):
    """Packed against padded rows, two seeds, two steps: one compiled step serves both arms."""
    packed = config.replace(
        tiny,
        {
            "steps": 2,
            "model.num_layers": 1,
            "evals.held_out.max_documents": 2,
            "checkpoint.best_metric": None,
            "objective.terms": {"next_token": tiny.objective.terms["next_token"]},
        },
    )
    padded = config.replace(packed, {"data": PaddedText(corpus=tiny.data.corpus, length=32)})
    usual = Study(
        name="rows",
        question="Do packed rows learn faster?",
        arms={"packed": packed, "padded": padded},
        matched="slots",
        claims=(
            Claim(arm="packed", than="padded", metric="held_out/perplexity"),
            Claim(arm="packed", than="padded", metric="held_out/bytes", better="higher"),
        ),
        seeds=(0, 1),
    )
    return lambda **changes: dataclasses.replace(usual, **changes)


def run(study, folder, known=None):
    output = io.StringIO()
    result = run_study(study, folder, console=Console(file=output, width=200), known=known)
    return result, output.getvalue()


def test_a_study_runs_is_recorded_and_resumes_without_training(make, tmp_path):
    study, folder = make(), tmp_path / "study"
    result, output = run(study, folder)
    assert [line for line in output.splitlines() if line.startswith("rows: ")] == [
        f"rows: {arm}, seed {seed}" for arm in ("packed", "padded") for seed in (0, 1)
    ]
    # Figures are those that each run wrote by itself.
    for metric, arms in result.figures.items():
        evaluation, _, figure = metric.partition("/")
        for arm, values in arms.items():
            for seed, value in zip(study.seeds, values, strict=True):
                lines = (folder / f"{arm}-{seed}" / "evals.jsonl").read_text().splitlines()
                assert json.loads(lines[-1])["evals"][evaluation][figure] == value
    perplexity = result.figures["held_out/perplexity"]
    assert len({*perplexity["packed"], *perplexity["padded"]}) == 4  # arms and seeds differ
    assert result.ledger["packed"]["slots"] == result.ledger["padded"]["slots"] == 2 * 8 * 32
    assert result.ledger["packed"]["tokens"] > 1.01 * result.ledger["padded"]["tokens"]

    same_bytes = result.verdicts[1]
    assert (same_bytes.measured, same_bytes.holds) == (0.0, False)
    assert not result.holds
    record = json.loads((folder / "results.json").read_text())
    assert record == json.loads(json.dumps(result.record()))
    assert [entry["metric"] for entry in record["claims"]] == [c.metric for c in study.claims]
    assert record["arms"] == {n: config.fingerprint(arm) for n, arm in study.arms.items()}
    assert matplotlib.image.imread(folder / "results.png").size

    arms, verdicts = tables(result)
    mean, low, _ = interval(perplexity["padded"])
    assert list(arms.columns[2].cells)[1] == f"{mean:.4f} ± {mean - low:.4f}"
    assert list(verdicts.columns[3].cells) == ["yes" if v.holds else "NO" for v in result.verdicts]

    logs = [folder / f"{arm}-{seed}" / "metrics.jsonl" for arm in study.arms for seed in (0, 1)]
    written = [path.read_text() for path in logs]
    again, output = run(study, folder)
    assert output.count("resuming") == 4
    assert again == result
    assert [path.read_text() for path in logs] == written  # timings too: no step was run again

    # Padding reads fewer tokens. What ran stays, and nothing is judged.
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match=r"arms are not matched in tokens: packed .*, padded"):
        run(make(matched="tokens", seeds=(0,)), folder)
    # The column that a claim names is the one that counts for it.
    own = dataclasses.replace(study.claims[0], matched="tokens")
    with pytest.raises(UserError, match=r"arms are not matched in tokens: packed"):
        run(make(seeds=(0,), claims=(own,)), folder)
    wrong = Claim(arm="packed", than="padded", metric="held_out/bits_per_bite")
    with pytest.raises(UserError, match="measures no 'held_out/bits_per_bite'; it has held_out/"):
        run(make(claims=(wrong,), seeds=(0,)), folder)
    assert not (folder / "results.json").exists()


CLAIM = Claim(arm="packed", than="padded", metric="held_out/perplexity")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matched": "flop"}, "has no ledger column 'flop'; it has passes, tokens"),
        (
            {"claims": (dataclasses.replace(CLAIM, arm="pack"),)},
            "has no arm 'pack'; it has packed, padded",
        ),
        (
            {"claims": (dataclasses.replace(CLAIM, than="pad"),)},
            "has no arm 'pad'; it has packed, padded",
        ),
        (
            {"claims": (dataclasses.replace(CLAIM, metric="heldout/perplexity"),)},
            "has no evaluation 'heldout'; it has held_out",
        ),
        ({"claims": ()}, "claims nothing"),
    ],
)
def test_a_study_that_cannot_be_judged_is_refused_before_it_trains(
    make, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        run(make(**changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn(Trial):
    """A figure that is known, and a cost."""

    measured: ClassVar[int] = 0
    level: float
    kept: float = 4.0

    def measure(self, *, seed):
        Drawn.measured += 1
        return Measured(figures={"recall/share": self.level + seed}, costs={"kept": self.kept})


def drawn(**changes):
    usual = Study(
        name="drawn",
        question="Is high above low?",
        arms={"high": Drawn(level=2.0), "low": Drawn(level=1.0), "other": Drawn(level=0, kept=9)},
        matched="kept",
        claims=(
            Claim(arm="high", than="low", metric="recall/share", better="higher", margin=0.9),
            Bound(arm="other", metric="recall/share", limit=-9.0),
            Bound(arm="other", metric="recall/share", limit=0.2, side="below"),
        ),
        seeds=(0, 1),
    )
    return dataclasses.replace(usual, **changes)


def test_arms_of_a_record_stand_where_nothing_of_them_changed(tmp_path):
    study = drawn()
    first, _ = run(study, tmp_path / "first")
    known = read_record(tmp_path / "first" / "results.json")
    again, output = run(study, tmp_path / "again", known)
    assert [output.count(f"{arm} is known") for arm in study.arms] == [1] * len(study.arms)
    assert again.record() == first.record()
    changed, *others = study.arms
    arm = dataclasses.replace(study.arms[changed], level=5.0)
    newer = dataclasses.replace(study, arms={**study.arms, changed: arm})
    third, output = run(newer, tmp_path / "third", known)
    assert output.count("is known") == len(others)
    assert third.figures == run(newer, tmp_path / "alone")[0].figures != first.figures
    for other in ({"seeds": (5, 6)}, {"name": "another"}):
        _, output = run(dataclasses.replace(study, **other), tmp_path / "other", known)
        assert "is known" not in output


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no record of a study: .*No such file"):
        read_record(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('{"study": "x", "seeds"')
    with pytest.raises(UserError, match="is no record of a study: "):
        read_record(tmp_path / "half.json")
    (tmp_path / "other.json").write_text('{"study": "x", "seeds": []}')
    with pytest.raises(UserError, match="it has no arms, figures, ledger"):
        read_record(tmp_path / "other.json")


def test_trials_are_measured_once_and_judged(tmp_path):
    Drawn.measured = 0
    result, _ = run(drawn(), tmp_path)
    assert result.figures == {
        "recall/share": {"high": [2.0, 3.0], "low": [1.0, 2.0], "other": [0.0, 1.0]}
    }
    assert [v.holds for v in result.verdicts] == [True, True, False]
    assert result.ledger["other"] == {"kept": 9.0}  # compared with none, so it may cost more
    assert run(drawn(), tmp_path)[0].figures == result.figures and Drawn.measured == 6
    changed = drawn(arms=dict(drawn().arms, high=Drawn(level=5.0)))
    assert run(changed, tmp_path)[0].figures["recall/share"]["high"] == [5.0, 6.0]
    assert Drawn.measured == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"claims": (Claim(arm="high", than="other", metric="recall/share"),)},
            "not matched in kept",
        ),
        ({"claims": (Bound(arm="high", metric="recall/loss", limit=0),)}, "it has recall/share"),
        ({"matched": "flops"}, "high has no 'flops'; it has kept"),
    ],
)  # fmt: skip
def test_trials_that_cannot_be_judged_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(drawn(**changes), tmp_path)


def test_fine_tuning_begins_where_the_base_of_the_seed_ended(tiny, tmp_path, monkeypatch):
    """At a rate of nothing it stays there; the base is trained once for both arms."""
    monkeypatch.setattr("tokenlab.study.trained.cache_dir", lambda: tmp_path)
    base = config.replace(tiny, {"steps": 3, "checkpoint.best_metric": None})
    rate = {"optimizer.learning_rate": Constant(peak=0.0), "steps": 1}
    arms = [FineTuned(base=base, experiment=config.replace(base, changes))
            for changes in (rate, {"steps": 2})]  # fmt: skip
    still, moved = (arm.measure(seed=1) for arm in arms)
    (folder,) = (tmp_path / "trained").iterdir()
    ended = json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])["evals"]
    assert still.figures["held_out/bits_per_byte"] == pytest.approx(
        ended["held_out"]["bits_per_byte"], rel=1e-6
    )
    assert moved.figures["held_out/bits_per_byte"] < still.figures["held_out/bits_per_byte"]
    assert (still.costs["passes"], moved.costs["passes"]) == (1, 2)
