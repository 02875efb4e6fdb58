"""Runs as a user makes them: real processes, real kills, real mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tokenlab.train.folder import read_jsonl
from tokenlab.train.run import open_run


@pytest.fixture
def command(corpus_folder, request):
    """Starts ``python -m tokenlab train tests/tiny.py ...`` in ``corpus_folder``."""
    root = request.config.rootpath

    def start(*arguments, limit="true"):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(root),
            "JAX_COMPILATION_CACHE_DIR": str(root / ".cache" / "jax"),
        }
        return subprocess.Popen(
            [
                "bash",
                "-c",
                f'{limit}; exec "$@"',
                "-",
                sys.executable,
                "-m",
                "tokenlab",
                *map(str, arguments),
            ],
            cwd=corpus_folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.tiny = root / "tests" / "tiny.py"
    return start


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def deterministic(folder, name):
    lines = read_jsonl(folder / name)
    for line in lines:
        line.pop("speed", None)
    return lines


LONG = ("steps=300", "checkpoint.every=40", "evals.held_out.every=100")


def test_a_killed_run_resumes_bit_for_bit(command, corpus_folder):
    whole, killed = corpus_folder / "whole", corpus_folder / "killed"
    finish(command("train", command.tiny, *LONG, "--run-dir", whole))
    process = command("train", command.tiny, *LONG, "--run-dir", killed)
    wait_for_lines(killed / "metrics.jsonl", 130, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 130 <= len(read_jsonl(killed / "metrics.jsonl")) < 300
    out, _ = finish(command("train", command.tiny, *LONG, "--run-dir", killed))
    assert "resuming" in out
    assert deterministic(whole, "metrics.jsonl") == deterministic(killed, "metrics.jsonl")
    assert deterministic(whole, "evals.jsonl") == deterministic(killed, "evals.jsonl")
    assert len(deterministic(whole, "metrics.jsonl")) == 300
    states = [open_run(folder)[1] for folder in (whole, killed)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_sigterm_saves_and_exits_cleanly(command, corpus_folder):
    folder = corpus_folder / "run"
    process = command("train", command.tiny, *LONG, "--run-dir", folder)
    wait_for_lines(folder / "metrics.jsonl", 50, process)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process)
    done = int(open_run(folder)[1].step)
    assert 50 <= done < 300
    assert f"stopped at step {done}" in out
    out, _ = finish(command("train", folder))
    assert f"at step {done}" in out
    assert len(deterministic(folder, "metrics.jsonl")) == 300


def test_another_function_of_a_file_trains_and_a_varying_depth_is_in_its_report(
    tokenlab, command, corpus_folder
):
    two, folder = corpus_folder / "two.py", corpus_folder / "run"
    two.write_text(
        command.tiny.read_text()
        + """
from tokenlab import config as configs
from tokenlab.depth import MixtureOfRecursions


def looped():
    depth = MixtureOfRecursions(recursions=2)
    return configs.replace(config(), {"model.depth": depth, "model.num_layers": 4, "steps": 4})


def other(experiment):
    return 1
"""
    )
    tokenlab("train", "two.py:looped", "--run-dir", folder)
    report = json.loads((folder / "report.json").read_text())
    held_out = report["evals"]["held_out"]
    shares = [held_out[name] for name in held_out if name.startswith("share_at_depth_")]
    assert report["step"] == 4 and sum(shares) == pytest.approx(1) and len(shares) > 1
    assert (folder / "depths.png").stat().st_size > 0
    for name in ("missing", "other", "Fraction"):
        _, err = tokenlab("train", f"two.py:{name}", "--run-dir", folder, code=2)
        assert f"no function {name}()" in err


def test_train_eval_generate_and_continue(tokenlab, command, corpus_folder):
    folder = corpus_folder / "run"
    out, _ = tokenlab("train", command.tiny, "model.num_layers=1", "--run-dir", folder)
    assert "bits_per_byte" in out
    assert str(folder) in out.replace("\n", "")
    for name in ("config.json", "provenance.json", "report.json", "curves.png", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0, name
    assert not (folder / "depths.png").exists()  # which does not vary
    assert list((folder / "events").iterdir())
    report = json.loads((folder / "report.json").read_text())
    assert report["finished"] and report["step"] == 24
    tokenlab("eval", folder)
    evaluated = json.loads((folder / "eval-24.json").read_text())
    assert evaluated == report["evals"]
    greedy = ("generate", folder, "--prompt", "The ", "--tokens", 8, "--temperature", 0)
    out, _ = tokenlab(*greedy)
    assert out.startswith("The ")
    again, _ = tokenlab(*greedy)
    assert out == again
    _, err = tokenlab("generate", folder, "--prompt", "x" * 60, "--tokens", 8, code=2)
    assert "exceed the model's context of 64" in err
    # Longer than before: the run goes on from its checkpoint.
    tokenlab("train", folder, "steps=30")
    assert int(open_run(folder)[1].step) == 30


def test_mistakes_are_one_line_and_exit_2(tokenlab, command, corpus_folder):
    folder = corpus_folder / "run"
    tokenlab("train", command.tiny, "steps=2", "--run-dir", folder)
    config = (folder / "config.json").read_bytes()
    cases = [
        (["train", command.tiny, "model.num_layer=3"], "did you mean 'num_layers'?"),
        (["train", command.tiny, "steps=ten"], "steps takes int"),
        (["train", command.tiny, "steps"], "write field=value"),
        (["train", "nowhere.py"], "neither an experiment file nor a run folder"),
        (["train", command.tiny, "model.vocab_size=100"], "set model.vocab_size="),
        (["train", command.tiny, "data.corpus.pattern=no/*.txt"], "no/*.txt"),
        (["train", command.tiny, "seed=1", "--run-dir", folder], "another experiment"),
        (["train", command.tiny, "mesh.fsdp=3"], "change the mesh.* fields"),
        (["train", command.tiny, "batch_size=6", "accumulation=4"], "not a multiple"),
        (["train", command.tiny, "model.block.mixer.impl=tpu"], "it needs a TPU, this is a cpu"),
        (["train", command.tiny, "objective.terms.z_loss.loss.impl=tpu"], "it needs a TPU"),
        (["generate", corpus_folder, "--prompt", "x"], "not a run folder"),
        (["eval", folder, "--step", 77], "no checkpoint of step 77"),
    ]
    for arguments, message in cases:
        _, err = tokenlab(*arguments, code=2)
        assert message in err, (arguments, err)
        lines = [line for line in err.splitlines() if line.startswith("tokenlab:")]
        assert len(lines) == 1 and "Traceback" not in err
    assert (folder / "config.json").read_bytes() == config


def test_a_loss_that_is_not_a_number_stops_the_run(tokenlab, command, corpus_folder):
    folder = corpus_folder / "run"
    overflow = "objective.terms.z_loss.coefficient=1e38"
    _, err = tokenlab("train", command.tiny, overflow, "--run-dir", folder, code=1)
    line = err.strip().splitlines()[-1]
    assert "the loss is not finite at step" in line
    assert "documents" in line and "no checkpoint was written" in line
    assert read_jsonl(folder / "metrics.jsonl") == []


def test_a_full_disk_loses_nothing(command, corpus_folder):
    """A limit on file size stands in for the disk; the checkpoint before it stays good."""
    folder = corpus_folder / "run"
    finish(command("train", command.tiny, "steps=4", "--run-dir", folder))
    more = ("train", command.tiny, "steps=8", "checkpoint.every=6", "--run-dir", folder)
    _, err = finish(command(*more, limit="ulimit -f 6"), code=2)
    assert "could not be written" in err and "resumes from step 4" in err
    assert int(open_run(folder)[1].step) == 4
    finish(command(*more))
    assert int(open_run(folder)[1].step) == 8


def test_a_disk_with_too_little_room_is_seen_before_writing(
    tokenlab, command, corpus_folder, monkeypatch
):
    folder = corpus_folder / "run"
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10_000))
    _, err = tokenlab("train", command.tiny, "steps=2", "--run-dir", folder, code=2)
    assert "could not be written" in err and "are free); free the disk" in err
    assert "starts anew" in err and err.count("\n") == 1


def test_a_checkpoint_of_another_vocabulary_is_refused(tokenlab, command, corpus_folder):
    folder = corpus_folder / "run"
    tokenlab("train", command.tiny, "steps=2", "--run-dir", folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 264', '"vocab_size": 300'))
    _, err = tokenlab("eval", folder, code=2)
    assert "does not fit the config" in err and "300" in err


def test_help_lists_the_fields(tokenlab, command):
    out, _ = tokenlab("train", command.tiny, "--help")
    assert "model.block.mixer.num_heads: int = 2\n    query heads.\n" in out
