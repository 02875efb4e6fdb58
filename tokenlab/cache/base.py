"""The cache family: what one attention layer keeps, and what a query sees of it."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Int


class CacheView(NamedTuple):
    """What a query attends to.

    Attributes:
        k: keys.
        v: values.
        positions: original position of each entry.
        segments: 1 for an entry, 0 for an empty slot.
    """

    k: Float[Array, "B S K E"]
    v: Float[Array, "B S K E"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePolicy(abc.ABC):
    """Decides which keys and values of one layer are kept; its state is a pytree."""

    @abc.abstractmethod
    def init(self, *, batch: int, num_kv_heads: int, head_dim: int, dtype: Any) -> PyTree:
        """An empty cache for ``batch`` rows."""

    @abc.abstractmethod
    def append(
        self,
        state: PyTree,
        *,
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> PyTree:
        """Adds new entries; those with segment 0 are padding and are not kept.

        Padding must come after the entries of its row.
        """

    @abc.abstractmethod
    def view(self, state: PyTree, *, q: Float[Array, "B T H E"]) -> CacheView:
        """What the queries ``q`` may attend to."""
