"""The depth family: programs that decide how often blocks run on each token."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import flax.struct
import jax
from flax import linen as nn

from tokenlab.cache import Cache
from tokenlab.core.arrays import (
    Array,
    Bool,
    Float,
    Hidden,
    Int,
    Positions,
    Prompt,
    Scalar,
    Segments,
)
from tokenlab.core.reports import Reports
from tokenlab.core.weighted import Weighted


@flax.struct.dataclass
class DepthTrace:
    """What a depth program did.

    Attributes:
        depth: block applications each token went through; 0 for padding.
        active: which tokens went through each of the R applications.
        aux: named auxiliary losses, to be weighed by the objective.
        read: which tokens of the pass each application could read; None where only active ones.
        figures: figures of tokens by name, of the program and those that layers report, as
            ``core.reports`` says.
        flops: operations that layers report beside those that every token costs.
        pairs: query-key pairs that layers report beside those that their rules admit.
        streams: the stream as it leaves each of N depths, for losses of all of them, or None; the
            model's are normalised.
    """

    depth: Int[Array, "B T"]
    active: Bool[Array, "R B T"]
    aux: dict[str, Weighted] = flax.struct.field(default_factory=dict)
    read: Bool[Array, "R B T"] | None = None
    figures: dict[str, Float[Array, "L B T"]] = flax.struct.field(default_factory=dict)
    flops: Scalar | float = 0.0
    pairs: Scalar | float = 0.0
    streams: Float[Array, "N B T D"] | None = None

    def reporting(self, reports: Reports) -> DepthTrace:
        """With what the layers report."""
        return dataclasses.replace(
            self,
            aux=self.aux | reports.aux,
            figures=self.figures | reports.figures,
            flops=reports.flops,
            pairs=reports.pairs,
        )

    def asking(self) -> Bool[Array, "R B T"]:
        """Which tokens ask others: of the active ones those that layers name, if all layers do."""
        asked = self.figures.get("asked")
        if asked is None or asked.shape != self.active.shape:
            return self.active
        return self.active & (asked > 0)

    def tokens_read(self) -> Bool[Array, "R B T"]:
        """``read``, spelt out."""
        return self.active if self.read is None else self.read


@runtime_checkable
class Layers(Protocol):
    """What a depth program runs: a block, or a pattern of blocks; a Linen module."""

    parent: Any

    def kinds(self) -> Sequence[Any]:
        """The blocks that take turns, one where all layers are alike."""
        ...

    def copy(self, **changes: Any) -> Any:
        """The module with other fields, ``parent`` and ``name`` among them."""
        ...


Remat = Literal["none", "dots", "full"]
_POLICIES = {"dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, "full": None}


class DepthProgram(nn.Module, abc.ABC):
    """The depth family: runs a block on the tokens it chooses, as often as it chooses.

    Attributes:
        remat: what the backward pass recomputes: nothing, all but matrix products, or everything.
    """

    remat: Remat = "none"

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        block: Layers,
        *,
        num_layers: int,
        positions: Positions,
        segments: Segments,
        cache: Cache | None = None,
        train: bool = False,
        prompt: Prompt | None = None,
    ) -> tuple[Hidden, DepthTrace, Cache | None]:
        """Runs the stack; returns the stream, the trace and the new caches.

        Raises:
            UserError: a prompt is marked, and the program does not tell its layers.
        """

    @nn.nowrap
    def cached_layers(self, num_layers: int) -> tuple[int, ...]:
        """The nominal layer behind each cache, in the order of ``Cache.layer``: one a layer.

        Raises:
            UserError: the layers do not divide as the program needs it.
        """
        return tuple(range(num_layers))

    @nn.nowrap
    def projects(self, num_layers: int) -> tuple[bool, ...]:
        """Whether tokens get keys and values of their own, for each of the R applications."""
        return (True,) * num_layers

    @nn.nowrap
    def causal_twin(self) -> DepthProgram:
        """The program to evaluate and decode with, on the same parameters; itself if causal."""
        return self

    def _rematerialised(self, body: Callable[..., Any], *, scanned: bool = False) -> Any:
        """``body`` under the remat policy."""
        if self.remat == "none":
            return body
        return nn.remat(body, policy=_POLICIES[self.remat], prevent_cse=not scanned)
