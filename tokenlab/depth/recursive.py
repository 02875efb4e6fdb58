"""The same layers several times: depth without parameters."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.cache import Cache, Picked
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Positions, Prompt, Segments
from tokenlab.core.errors import UserError
from tokenlab.core.weighted import Weighted
from tokenlab.depth.base import DepthProgram, DepthTrace, Layers
from tokenlab.depth.loop_keys import KeySharing, LoopKeys
from tokenlab.routing import Route

Sharing = Literal["cycle", "middle_cycle", "sequence", "middle_sequence"]


class Parts(NamedTuple):
    """How many layers a looped stack has.

    Attributes:
        first: before the loop.
        loop: of one recursion.
        last: behind the loop.
    """

    first: int
    loop: int
    last: int


class LayerNames(NamedTuple):
    """The names of ``SharedLayers``.

    Attributes:
        first: layers before the loop.
        loop: layers of one recursion.
        last: layers behind the loop.
    """

    first: list[str]
    loop: list[str]
    last: list[str]


class SharedLayers(NamedTuple):
    """The modules of a looped stack; each is one set of parameters, however often it runs.

    Attributes:
        first: layers before the loop.
        loop: layers of one recursion.
        last: layers behind the loop.
    """

    first: list[nn.Module]
    loop: list[nn.Module]
    last: list[nn.Module]


class Went(NamedTuple):
    """The tokens that came to a recursion.

    Attributes:
        kept: which.
        aux: named auxiliary losses of what chose them.
    """

    kept: Bool[Array, "B T"]
    aux: dict[str, Weighted]


class Loop(DepthProgram):
    """Layers of their own, then the same few layers up to ``recursions`` times, then others.

    In recursion r a layer reads the keys and values that ``keys`` names: ``recursion_wise``, those
    that the tokens of recursion r have in it; ``shared``, those of recursion 1, of which later ones
    compute queries only; ``hybrid``, of each token those of the last recursion up to r that it
    went through. Decoding keeps a cache of each recursion and layer, where keys are shared of each
    layer, and computes the same function as one pass over the whole row.

    Attributes:
        recursions: passes through the loop.
        keys: whose keys and values a recursion reads.
    """

    recursions: int = 3
    keys: KeySharing = "recursion_wise"

    @nn.compact
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
        """Runs the ends on all tokens and the loop on those that come to each recursion."""
        if prompt is not None:
            raise UserError(
                f"{type(self).__name__} does not tell its layers which tokens are the prompt; "
                "use depth=Sequential(), or data without a prompt"
            )
        layers = self._layers(block, num_layers)
        count = len(self.cached_layers(num_layers))
        own = [None if cache is None else cache.layer(i) for i in range(count)]
        begin, end = len(layers.first), count - len(layers.last)
        where = {"positions": positions, "segments": segments, "train": train}
        x, first = self._run(layers.first, x, own[:begin], **where)
        keys = LoopKeys(self.keys, own[begin:end], layers=len(layers.loop))
        x, went = self._loop(layers.loop, x, keys, **where)
        x, went, last = self._behind(layers.last, x, went, own[end:], **where)
        if cache is not None:
            cache = cache.after((*first, *keys.finished(), *last))
        return x, self._trace(segments > 0, went, layers), cache

    @nn.nowrap
    def cached_layers(self, num_layers: int) -> tuple[int, ...]:
        """One cache of each recursion and layer, in order; of each layer where keys are shared."""
        first, loop, last = self._parts(num_layers)
        own = 1 if self.keys == "shared" else self.recursions
        return (
            *range(first),
            *[first + i for _ in range(own) for i in range(loop)],
            *range(num_layers - last, num_layers),
        )

    @nn.nowrap
    def projects(self, num_layers: int) -> tuple[bool, ...]:
        """Not from the second recursion on where keys are shared."""
        first, loop, last = self._parts(num_layers)
        later = (self.recursions - 1) * loop
        return (True,) * (first + loop) + (self.keys != "shared",) * later + (True,) * last

    @nn.nowrap
    @abc.abstractmethod
    def _parts(self, num_layers: int) -> Parts:
        """How the nominal layers are divided.

        Raises:
            UserError: they do not divide.
        """

    @nn.nowrap
    def _divided(self, num_layers: int, *, first: int, last: int, by: str) -> Parts:
        """``_parts`` with so many layers at each end, as the option ``by`` says."""
        looped = num_layers - first - last
        if looped < self.recursions or looped % self.recursions:
            raise UserError(
                f"num_layers {num_layers} under {by} leaves {looped} layers, which are "
                f"not a multiple of recursions {self.recursions}; change one of them"
            )
        return Parts(first, looped // self.recursions, last)

    def _loop(
        self,
        layers: list[nn.Module],
        x: Hidden,
        keys: LoopKeys,
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, Any]:
        """All recursions; and what ``_trace`` is told of them, here that all tokens came."""
        where = {"positions": positions, "segments": segments, "train": train}
        for r in range(self.recursions):
            x, after = self._run(self._of(layers, r), x, keys.given(r, None), **where)
            keys.left(r, after)
        return x, []

    def _routed(
        self,
        layers: list[nn.Module],
        x: Hidden,
        route: Route,
        keys: LoopKeys,
        recursion: int,
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> Float[Array, "B C D"]:
        """A recursion of the tokens of ``route`` alone, gathered and left so."""
        picked = Picked(route.index, route.kept)
        y, after = self._run(
            self._of(layers, recursion),
            route.gather(x),
            keys.given(recursion, picked),
            positions=picked.gather(positions),
            segments=jnp.where(route.valid(), picked.gather(segments), 0),
            train=train,
        )
        keys.left(recursion, after)
        return y

    @nn.nowrap
    def _of(self, layers: Sequence[Any], recursion: int) -> list[Any]:
        """The shared layers in the order in which a recursion runs them."""
        return list(layers)

    def _behind(
        self,
        layers: list[nn.Module],
        x: Hidden,
        went: Any,
        given: list[Any],
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, Any, list[Any]]:
        """The layers behind the loop on what it gave; returns what ``_trace`` is told, too."""
        x, after = self._run(layers, x, given, positions=positions, segments=segments, train=train)
        return x, went, after

    @nn.nowrap
    def names(self, num_layers: int) -> LayerNames:
        """The parameters of each layer, by their names in the model.

        Raises:
            UserError: the layers do not divide.
        """
        parts = self._parts(num_layers)
        return LayerNames(
            _numbered("block_first", parts.first),
            [f"block_{i}" for i in range(parts.loop)],
            _numbered("block_last", parts.last),
        )

    def _layers(self, block: Layers, num_layers: int) -> SharedLayers:
        if len(block.kinds()) > 1:
            raise UserError(
                f"{type(self).__name__} shares layers of one kind, not {len(block.kinds())}; "
                "give the model one block"
            )
        return SharedLayers(
            *(
                [block.copy(parent=block.parent, name=name) for name in part]
                for part in self.names(num_layers)
            )
        )

    def _run(
        self,
        layers: list[nn.Module],
        x: Hidden,
        given: list[Any],
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, list[Any]]:
        """``x`` through ``layers`` in turn, each with what it is ``given``, and that afterwards."""

        def body(layer: nn.Module, x: Hidden, own: Any) -> tuple[Hidden, Any]:
            return layer(x, positions=positions, segments=segments, cache=own, train=train)

        body, after = self._rematerialised(body), []
        for layer, own in zip(layers, given, strict=True):
            x, own = body(layer, x, own)
            after.append(own)
        return x, after

    def _trace(self, valid: Bool[Array, "B T"], went: Any, layers: SharedLayers) -> DepthTrace:
        """The trace of a loop whose recursions ran on the tokens of these routes, or on all."""
        routes: list[Route | Went] = went
        kept = [route.kept for route in routes] or [valid] * self.recursions

        def of(masks: list[Bool[Array, "B T"]]) -> Bool[Array, "R B T"]:
            loop = [mask for mask in masks for _ in layers.loop]
            return jnp.stack([valid] * len(layers.first) + loop + [valid] * len(layers.last))

        active = of(kept)
        read = None if self.keys == "recursion_wise" else of(kept[:1] * self.recursions)
        return DepthTrace(depth=jnp.sum(active, axis=0), active=active, read=read)


class Recursive(Loop):
    """Every token through the same few layers ``recursions`` times.

    With ``num_layers`` L and N recursions, ``cycle`` loops over L / N layers, ``0 1 0 1 0 1``, and
    ``sequence`` runs each N times before the next, ``0 0 0 1 1 1``; the ``middle`` ones keep a
    first and a last layer of their own and share (L - 2) / N. Parameters do not grow with N at
    equal (L - 2) / N, because each layer is one module that is called again.

    Reference: Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with
    Layer-wise LoRA", 2024, arXiv:2410.20672 (without its LoRA).

    Attributes:
        sharing: which layers are shared.
    """

    sharing: Sharing = "middle_cycle"

    @nn.nowrap
    def places(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """The nominal layers that each shared layer stands for.

        Raises:
            UserError: they do not divide.
        """
        first, loop, _ = self._parts(num_layers)
        order = [i for r in range(self.recursions) for i in self._of(range(loop), r)]
        return tuple(
            tuple(first + at for at, layer in enumerate(order) if layer == i) for i in range(loop)
        )

    @nn.nowrap
    def _parts(self, num_layers: int) -> Parts:
        if self._in_sequence() and self.keys != "recursion_wise":
            raise UserError(
                f"keys={self.keys!r} needs the same layers in each recursion, which "
                f"sharing={self.sharing!r} has not; use a cycle"
            )
        ends = 1 if self.sharing.startswith("middle") else 0
        return self._divided(num_layers, first=ends, last=ends, by=self.sharing)

    @nn.nowrap
    def apart(self) -> str | None:
        """Why tokens of different recursions cannot be in one pass; None where they can."""
        if self._in_sequence():
            return f"recursions with sharing={self.sharing!r} run their layers in different orders"
        if self.keys != "recursion_wise":
            return f"recursions with keys={self.keys!r} read each other's keys"
        return None

    @nn.nowrap
    def enters(
        self,
        params: PyTree,
        x: Float[Array, "B 1 D"],
        *,
        recursion: Int[Array, " B"],
        active: Bool[Array, " B"],
    ) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
        """Whether single tokens come to the recursion that is theirs next, and under what gate.

        What decoders ask that do not run all recursions of a token in one pass.

        Args:
            params: of this program.
            x: the stream, one token of each row.
            recursion: of each token, from 0; none has more than ``recursions``.
            active: rows that count.
        """
        return active & (recursion < self.recursions), jnp.ones(len(x))

    @nn.nowrap
    def joined(self, x: Hidden, y: Hidden, *, gate: Float[Array, " B"]) -> Hidden:
        """The stream behind a recursion that made ``y`` of ``x``."""
        return y

    @nn.nowrap
    def _in_sequence(self) -> bool:
        return self.sharing.endswith("sequence")

    @nn.nowrap
    def _of(self, layers: Sequence[Any], recursion: int) -> list[Any]:
        if not self._in_sequence():
            return list(layers)
        start = recursion * len(layers)
        return [layers[(start + i) // self.recursions] for i in range(len(layers))]


def _numbered(name: str, count: int) -> list[str]:
    """Names of ``count`` layers; a single one has no number."""
    return [name] * count if count < 2 else [f"{name}_{i}" for i in range(count)]
