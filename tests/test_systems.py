"""The index is complete, and no status in it is a mere word."""

import json
import pathlib

import pytest

from tokenlab import config
from tokenlab.files import load_module
from tokenlab.systems import System, markdown, summary, systems, unbacked

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_every_system_is_listed_once():
    entries = systems()
    assert len(entries) == 150
    assert len({entry.name for entry in entries}) == 150
    assert all(entry.paper for entry in entries)


@pytest.mark.parametrize("entry", systems(), ids=lambda entry: entry.name)
def test_every_status_is_backed(entry):
    assert unbacked(entry, ROOT) is None


def test_the_pages_are_what_the_index_generates():
    assert (ROOT / "docs/systems.md").read_text() == markdown(systems()), "run make docs"
    assert summary(systems()) in (ROOT / "README.md").read_text(), "copy systems.summary into it"


RECORDS = sorted((ROOT / "docs/studies").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_recorded_study_is_of_the_experiment_as_it_is(path):
    (experiment,) = (ROOT / "experiments").rglob(f"{path.stem}.py")
    study, record = load_module(experiment).study(), json.loads(path.read_text())
    arms = {name: config.fingerprint(arm) for name, arm in study.arms.items()}
    assert record["arms"] == arms and record["seeds"] == list(study.seeds), "run it again"
    judged = [claim.judge(record["figures"][claim.metric]) for claim in study.claims]
    assert [verdict._asdict() for verdict in judged] == [
        {name: value for name, value in claim.items() if name != "metric"}
        for claim in record["claims"]
    ]


def entry_in(root, status, holds):
    (root / "docs/studies").mkdir(parents=True)
    (root / "x.py").write_text("def study():\n    ...\n")
    (root / "test_x.py").write_text("from tokenlab.depth import Thing\n")
    record = {"claims": [{"holds": True}, {"holds": holds}]}
    (root / "docs/studies/x.json").write_text(json.dumps(record))
    return System("f", "X", "A paper", "tokenlab.depth:Thing", "x.py", "test_x.py", status)


def test_a_status_without_evidence_is_refused(tmp_path):
    works = entry_in(tmp_path, "works", holds=True)
    assert unbacked(works, tmp_path) is None
    assert unbacked(works._replace(status="does not hold"), tmp_path) is not None
    assert unbacked(works._replace(status="splendid"), tmp_path) is not None
    assert unbacked(works._replace(part="tokenlab.depth:Other"), tmp_path) is not None
    assert unbacked(works._replace(status="planned"), tmp_path) is not None
    for name in ("x.py", "test_x.py", "docs/studies/x.json"):
        (tmp_path / name).rename(tmp_path / "away")
        assert unbacked(works, tmp_path) is not None, name
        (tmp_path / "away").rename(tmp_path / name)
    (tmp_path / "docs/studies/x.json").write_text(json.dumps({"claims": [{"holds": False}]}))
    assert unbacked(works, tmp_path) is not None
    assert unbacked(works._replace(status="does not hold"), tmp_path) is None
