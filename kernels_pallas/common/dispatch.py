"""Choosing the implementation of an operation: an ordered tuple per platform, with reasons.

The platform is that of the current mesh (``jax.set_mesh``), which JAX makes part of the key of
every compiled function; so a step compiled ahead of time for an absent TPU takes the TPU's
implementations in a process that has only a CPU. Without a mesh it is the default backend's.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

_logger = logging.getLogger(__name__)


class CannotRun(ValueError):
    """No implementation can take a call, or not the one that was asked for; one line says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: what ``impl=`` calls it, for example ``"xla"``.
        run: the function; takes the arguments of the operation.
        supports: takes the same arguments and returns why ``run`` cannot take them, or ``None``.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what is being traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """What the maker calls the device that is being traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def automatic_axes() -> dict[str, int]:
    """Axes of the current mesh along which the compiler splits arrays itself, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    manual = jax.sharding.AxisType.Manual
    return {name: size for name, size, how in axes if size > 1 and how != manual}


def needs(kind: str, interpret: Any) -> str | None:
    """Why a Pallas kernel for platform ``kind`` cannot run here, or ``None``.

    A kernel is one device's: the compiler cannot split it where it places arrays itself.

    Args:
        kind: what the kernel is written for.
        interpret: the kernel's ``config.interpret``; an interpreter runs anywhere.
    """
    if interpret:
        return None
    if platform() != kind:
        return f"it needs a {kind.upper()}, this is a {platform()}; config.interpret runs anywhere"
    automatic = automatic_axes()
    if automatic:
        return f"mesh axes {automatic} are not manual; call it inside jax.shard_map over them"
    return None


def anything(**arguments: Any) -> None:
    """The ``supports`` of an implementation that takes every argument."""
    del arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation and its implementations, the preferred one first.

    Attributes:
        name: name in messages.
        order: platform (``"cpu"``, ``"gpu"``, ``"tpu"``) to implementations; ``"cpu"`` also
            serves a platform that is not listed.
    """

    name: str
    order: Mapping[str, tuple[Implementation, ...]]

    @classmethod
    def of(
        cls,
        name: str,
        *,
        ref: Callable[..., Any],
        xla: Callable[..., Any],
        tpu: Callable[..., Any],
        tpu_supports: Callable[..., str | None],
        xla_supports: Callable[..., str | None] = anything,
        gpu: Callable[..., Any] | None = None,
        gpu_supports: Callable[..., str | None] = anything,
    ) -> "Operation":
        """An operation of the usual forms: a CPU prefers ``xla`` to ``ref``, a TPU ``tpu``.

        A GPU prefers ``gpu`` where there is such a form.
        """
        others = (
            Implementation(name="xla", run=xla, supports=xla_supports),
            Implementation(name="ref", run=ref, supports=anything),
        )
        order = {
            "cpu": others,
            "tpu": (Implementation(name="tpu", run=tpu, supports=tpu_supports), *others),
        }
        if gpu is not None:
            order["gpu"] = (Implementation(name="gpu", run=gpu, supports=gpu_supports), *others)
        return cls(name=name, order=order)

    def __call__(self, impl: str | None, **arguments: Any) -> Any:
        """Runs implementation ``impl``, or with ``None`` the first that supports the arguments.

        Args:
            impl: a name, of any platform, or ``None`` to choose; passing over one is logged once
                per reason.
            **arguments: arguments of the operation.

        Raises:
            CannotRun: ``impl`` is unknown or cannot run.
        """
        candidates = self.order.get(platform(), self.order["cpu"])
        if impl is not None:
            named = {one.name: one for order in self.order.values() for one in order}
            if impl not in named:
                raise CannotRun(f"{self.name} has no impl={impl!r}; use one of {sorted(named)}")
            candidates = (named[impl],)
        refusals = []
        for candidate in candidates:
            reason = candidate.supports(**arguments)
            if reason is None:
                for refusal in refusals:
                    _log_once(f"{self.name} runs impl={candidate.name!r}: {refusal}")
                return candidate.run(**arguments)
            refusals.append(f"impl={candidate.name!r} cannot run: {reason}")
        remedy = "" if impl is None else "; impl=None takes the best that can"
        raise CannotRun(f"{self.name}: {'; '.join(refusals)}{remedy}")


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
