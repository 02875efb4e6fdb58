"""The depth family: programs that decide how often blocks run on each token."""

from __future__ import annotations

import abc

import flax.struct
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.cache import CachePolicy
from tokenlab.core.arrays import Array, Bool, Hidden, Int, Positions, Segments
from tokenlab.core.weighted import Weighted


@flax.struct.dataclass
class DepthTrace:
    """What a depth program did.

    Attributes:
        depth: block applications each token went through; 0 for padding.
        active: which tokens went through each of the R applications.
        aux: named auxiliary losses, to be weighed by the objective.
    """

    depth: Int[Array, "B T"]
    active: Bool[Array, "R B T"]
    aux: dict[str, Weighted] = flax.struct.field(default_factory=dict)


class DepthProgram(nn.Module, abc.ABC):
    """The depth family: runs a block on the tokens it chooses, as often as it chooses."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        block: nn.Module,
        *,
        num_layers: int,
        positions: Positions,
        segments: Segments,
        policy: CachePolicy | None = None,
        cache: PyTree = None,
        train: bool = False,
    ) -> tuple[Hidden, DepthTrace, PyTree]:
        """Runs the stack; returns the stream, the trace and the new caches."""
