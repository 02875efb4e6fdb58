"""Loading what a user names on the command line: an experiment file or a run folder."""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable
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
    """The experiment of a file's ``config()``, of another function of it, or of a run folder.

    Args:
        path: a file, ``FILE.py:FUNCTION`` or a run folder.

    Raises:
        UserError: none of them is there.
    """
    if path.is_dir():
        return load_experiment(path)
    name, colon, function = path.name.partition(".py:")
    file = path.with_name(f"{name}.py") if colon else path
    module = load_module(file)
    made = getattr(module, function or "config", None)
    experiment = made() if inspect.isfunction(made) and _needs_nothing(made) else None
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"{file} has no function {function or 'config'}() that returns an Experiment"
        )
    return experiment


def _needs_nothing(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return all(each.default is not each.empty for each in parameters)
