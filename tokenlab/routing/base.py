"""The router family: picks tokens of each row, and how strongly each is changed."""

from __future__ import annotations

import abc
from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.token_routing import gather_tokens, in_use, scatter_add_tokens
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Scalar
from tokenlab.core.per_device import per_device
from tokenlab.core.weighted import Weighted

_STREAM, _SLOTS = ("batch", None, None), ("batch", None)


@flax.struct.dataclass
class Route:
    """Picked tokens of each row.

    Attributes:
        index: positions in the row, in order; those from ``count`` on mean nothing.
        count: picked tokens of each row.
        gate: float32 factor of each picked token's update.
        kept: the same choice as a mask.
        aux: named auxiliary losses of the router.
    """

    index: Int[Array, "B C"]
    count: Int[Array, " B"]
    gate: Float[Array, "B C"]
    kept: Bool[Array, "B T"]
    aux: dict[str, Weighted]

    @classmethod
    def of(
        cls,
        kept: Bool[Array, "B T"],
        gates: Float[Array, "B T"],
        *,
        capacity: int,
        aux: dict[str, Weighted],
    ) -> Route:
        """The route that keeps ``kept``, at most ``capacity`` tokens of a row.

        Args:
            kept: the choice.
            gates: float32 factor of each token, kept or not.
            capacity: slots C.
            aux: auxiliary losses.
        """
        length = kept.shape[1]
        places = jnp.where(kept, jnp.arange(length)[None, :], length)
        index = jnp.minimum(jnp.sort(places, axis=1)[:, :capacity], length - 1)
        gate = jnp.take_along_axis(gates, index, axis=1)
        return cls(index=index, count=jnp.sum(kept, axis=1), gate=gate, kept=kept, aux=aux)

    def valid(self) -> Bool[Array, "B C"]:
        """Slots that hold a token."""
        return in_use(self.index, self.count)

    def gather(self, x: Hidden) -> Float[Array, "B C D"]:
        """The picked tokens of the stream, 0 in the other slots."""
        return per_device(
            gather_tokens,
            axes={"x": _STREAM, "index": _SLOTS, "count": ("batch",)},
            out=_STREAM,
            x=x,
            index=self.index,
            count=self.count,
        )

    def scatter_add(self, x: Hidden, update: Float[Array, "B C D"]) -> Hidden:
        """The stream with the gated updates of the picked tokens added."""
        return per_device(
            scatter_add_tokens,
            axes={
                "residual": _STREAM,
                "y": _STREAM,
                "gate": _SLOTS,
                "index": _SLOTS,
                "count": ("batch",),
            },
            out=_STREAM,
            residual=x,
            y=update,
            gate=self.gate,
            index=self.index,
            count=self.count,
        )


class Router(nn.Module, abc.ABC):
    """The router family.

    A member that looks at later tokens says ``causal = False`` and gives in ``causal_twin`` the
    member with the same parameters by which a model is evaluated and decodes.
    """

    causal: ClassVar[bool]

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        *,
        active: Bool[Array, "B T"],
        capacity: int,
        limit: Int[Array, " B"],
        share: float | Scalar,
    ) -> Route:
        """Picks among the active tokens.

        Args:
            x: the residual stream.
            active: tokens that may be picked; none of them is padding.
            capacity: slots C of the result, for members that fill a fixed number.
            limit: of those, how many a row may use.
            share: of the active tokens, for members that pick each by itself and by chance.
        """

    @nn.nowrap
    @abc.abstractmethod
    def causal_twin(self) -> Router:
        """A causal member with the same parameters; itself where it is causal."""
