"""The loop in this process, under the guards that a pod's host would be slow without."""

import dataclasses
import io

import jax
import pytest
from rich.console import Console

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.evals import Evaluation
from tokenlab.train.folder import read_jsonl
from tokenlab.train.loop import Loop, train
from tokenlab.train.run import open_run


def test_steps_move_nothing_between_host_and_device_unasked(tiny, tmp_path, monkeypatch):
    guarded = []
    real = Loop._advance

    def advance(loop):
        """All steps but those that evaluate, which are not of the loop."""
        if (loop.step + 1) % 12 == 0:
            return real(loop)
        with jax.transfer_guard("disallow"):
            guarded.append(loop.step)
            return real(loop)

    monkeypatch.setattr(Loop, "_advance", advance)
    train(tiny, tmp_path / "run", console=Console(file=io.StringIO()))
    assert len(guarded) == 22
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="transfer"):
        jax.jit(lambda x: x + 1)(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Evaluation):
    """An evaluation that cannot be made."""

    def __call__(self, *, model, params, tokenizer):
        raise UserError("no such corpus")


def test_an_evaluation_that_fails_costs_no_step(tiny, tmp_path):
    broken = config.replace(tiny, {"evals": {"broken": Broken()}, "checkpoint.every": 100})
    with pytest.raises(UserError, match="no such corpus"):
        train(broken, tmp_path / "run", console=Console(file=io.StringIO()))
    assert int(open_run(tmp_path / "run")[1].step) == 24


def test_progress_is_told_where_there_is_no_terminal(tiny, tmp_path):
    out = io.StringIO()
    train(tiny, tmp_path / "run", console=Console(file=out, width=40))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/24  loss ") and lines[-1].startswith("step 24/24  loss ")
    assert all("tok/s" in line and "% of matmul rate" in line for line in lines)
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run/metrics.jsonl")]
    assert f"loss {losses[-1]:.3f}  " in lines[-1]
