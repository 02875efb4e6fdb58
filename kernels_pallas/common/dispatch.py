"""Choosing the implementation of an operation: an ordered tuple per platform, with reasons."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

_logger = logging.getLogger(__name__)


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

    def __call__(self, impl: str | None, **arguments: Any) -> Any:
        """Runs implementation ``impl``, or with ``None`` the first that supports the arguments.

        Args:
            impl: a name, or ``None`` to choose; passing over one is logged once per reason.
            **arguments: arguments of the operation.

        Raises:
            ValueError: ``impl`` is unknown on this platform or cannot run; the message has the
                reason.
        """
        platform = jax.default_backend()
        candidates = self.order.get(platform, self.order["cpu"])
        if impl is not None:
            names = [candidate.name for candidate in candidates]
            if impl not in names:
                raise ValueError(f"{self.name} has no impl={impl!r} on {platform}; use {names}")
            candidates = (candidates[names.index(impl)],)
        refusals = []
        for candidate in candidates:
            reason = candidate.supports(**arguments)
            if reason is None:
                for refusal in refusals:
                    _log_once(f"{self.name} runs impl={candidate.name!r}: {refusal}")
                return candidate.run(**arguments)
            refusals.append(f"impl={candidate.name!r} cannot run: {reason}")
        raise ValueError(f"{self.name}: {'; '.join(refusals)}")


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)
