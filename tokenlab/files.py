"""Loading what a user names on the command line: an experiment file or a run folder."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType

from tokenlab.core.errors import UserError
from tokenlab.experiment import Experiment
from tokenlab.train.folder import load_experiment


def load_module(path: pathlib.Path) -> ModuleType:
    """Runs an experiment file.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} is neither an experiment file nor a run folder")
    name = ".".join(path.with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; name an experiment such as quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def experiment_of(path: pathlib.Path) -> Experiment:
    """The experiment of a file's ``config()``, or of a run folder.

    Raises:
        UserError: neither is there.
    """
    if path.is_dir():
        return load_experiment(path)
    module = load_module(path)
    if "config" not in vars(module):
        raise UserError(f"{path} has no function config() that returns an Experiment")
    return module.config()
