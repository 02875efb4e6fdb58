"""Arithmetic word problems with answers, from templates of grade-school mathematics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from tokenlab.core.errors import UserError
from tokenlab.data.builders.base import CorpusBuilder, Example
from tokenlab.data.builders.text import one_line
from tokenlab.data.fetch import fetch

_SHA256 = "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"
_SIZE = 10_000
_SUFFIX = " Give the result as your final answer. Do not include units."
# Runs apart from us: the package needs some thirty others, none of which the library needs.
_PROGRAM = f"""
import json, reasoning_gym
for item in reasoning_gym.create_dataset("gsm_symbolic", size={_SIZE}, seed=0):
    print(json.dumps({{"question": item["question"], "answer": item["answer"]}}))
"""


class MathWordProblems(CorpusBuilder):
    """Examples are a question and its answer, a number in digits."""

    SUMMARY = "Grade-school word problems with numeric answers, made from 100 templates."
    LICENCE = "Apache-2.0 (reasoning-gym)"
    CITATION = (
        "Zafir Stojanovski et al., Reasoning Gym, 2025, arXiv 2505.24760; templates after "
        "Iman Mirzadeh et al., GSM-Symbolic, 2024, arXiv 2410.05229."
    )
    MEGABYTES = 2.4
    FIELDS: ClassVar = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
    UNIQUE = ("question",)

    def examples(self) -> Iterator[Example]:
        """Problems in the order they are drawn."""
        pinned = fetch("pypi:reasoning-gym==0.1.25", sha256=_SHA256)
        complete = fetch("pypi+deps:reasoning-gym==0.1.25")
        # Bytecode written there would count as damage of the stored packages.
        paths = {"PYTHONPATH": f"{pinned}{os.pathsep}{complete}", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            env=os.environ | paths | {"PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"reasoning-gym does not run on this Python: {reason}")
        return problems(done.stdout.splitlines())


def problems(lines: Iterable[str]) -> Iterator[Example]:
    """Reads one JSON object per line; drops the sentence that all questions end with."""
    for line in lines:
        record = json.loads(line)
        question = one_line(record["question"]).removesuffix(_SUFFIX)
        yield {"question": question, "answer": one_line(record["answer"])}
