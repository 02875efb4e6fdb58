"""The run folder: everything a run leaves behind, and the rule for coming back to it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.experiment import RESUMABLE, Experiment


def default_folder(experiment: Experiment, root: pathlib.Path) -> pathlib.Path:
    """``root/<name>-<fingerprint>``: the same experiment always lives in the same folder."""
    return root / f"{experiment.name}-{config.fingerprint(experiment)}"


def load_experiment(folder: pathlib.Path) -> Experiment:
    """The experiment that a run folder was made by.

    Raises:
        UserError: the folder is not a run folder, or its config does not read.
    """
    path = folder / "config.json"
    try:
        return config.load(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a run folder: it has no config.json") from error
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} does not read ({error}); run its experiment file") from error


def claim(folder: pathlib.Path, experiment: Experiment) -> None:
    """Makes ``folder`` the home of ``experiment``, or checks that it already is.

    Raises:
        UserError: another experiment lives there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        old = config.fingerprint(load_experiment(folder), ignore=RESUMABLE)
        new = config.fingerprint(experiment, ignore=RESUMABLE)
        if old != new:
            raise UserError(
                f"{folder} holds a run of another experiment ({old}, not {new}); "
                f"choose another --run-dir, or train {folder} itself to continue that run"
            )
    write_json(folder / "config.json", config.dump(experiment))
    write_json(folder / "provenance.json", provenance())


def provenance() -> dict[str, Any]:
    """Versions, devices and source revision, for whoever reads the results later."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    device = jax.devices()[0]
    return {
        "command": sys.argv,
        "revision": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
    }


def _git(*arguments: str) -> str:
    here = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


class JsonLines:
    """An append-only ``.jsonl`` file that forgets what a resumed run will write again."""

    def __init__(self, path: pathlib.Path, *, after_step: int) -> None:
        """Opens ``path``, dropping lines later than ``after_step`` or cut short by a kill."""
        kept = [line for line in read_jsonl(path) if line["step"] <= after_step]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one object and hands it to the operating system."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """All whole lines of a ``.jsonl`` file; a last line cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
