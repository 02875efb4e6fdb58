"""How far a training run has come, for modules that change with it."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Scalar

_PROGRESS, _DONE = "progress", "done"


def given_progress(done: Scalar) -> dict[str, PyTree]:
    """What tells a model of it, for ``View(given=...)``.

    Args:
        done: float32 share of the run's steps that are done; known when the step runs only.
    """
    return {_PROGRESS: {_DONE: done}}


def progress(module: nn.Module) -> Scalar | None:
    """The share of the run that is done; None outside training, where nobody says it.

    Args:
        module: bound, anywhere in the model but under a transformation of Flax.
    """
    assert module.scope is not None, "a bound module"
    return module.scope.root.get_variable(_PROGRESS, _DONE)
