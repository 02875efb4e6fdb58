"""Where the vision tokens of a document lie, in which order they are read, and in which windows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.core.arrays import Array, Bool, Float, Int, Positions, Segments

Axis = Literal["frame", "row", "column"]
AXES: tuple[Axis, ...] = ("column", "row", "frame")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The vision span of a document: patches of frames, row by row, from one position on.

    Attributes:
        frames: frames t; 1 is an image.
        height: rows h of a frame.
        width: columns w of a frame.
        start: position of the first patch in its document.
    """

    frames: int = 1
    height: int
    width: int
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.start < 0:
            raise ValueError(f"{self} has no patches; use sizes of 1 or more and a start from 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows, columns."""
        return self.frames, self.height, self.width

    @property
    def size(self) -> int:
        """Number of patches."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Position behind the last patch."""
        return self.start + self.size

    def order(self, fastest: Axis) -> Int[np.ndarray, " N"]:
        """Patches in the order in which a scan reads them.

        Args:
            fastest: the axis along which the next patch lies.
        """
        axes = {"column": (0, 1, 2), "row": (0, 2, 1), "frame": (1, 2, 0)}[fastest]
        return np.arange(self.size).reshape(self.shape).transpose(axes).reshape(-1)

    def windows(self, window: Window, *, shifted: bool) -> Int[np.ndarray, "W N"]:
        """Patches of each window, -1 where a window reaches over the edge.

        Args:
            window: size of a window.
            shifted: whether windows begin half a window before the edge, along axes that one
                window does not span.
        """
        sizes = tuple(min(w, n) for w, n in zip(window.shape, self.shape, strict=True))
        shifts = [
            w // 2 if shifted and w < n else 0 for w, n in zip(sizes, self.shape, strict=True)
        ]
        begins = [range(-s, n, w) for s, n, w in zip(shifts, self.shape, sizes, strict=True)]
        corners = np.asarray(list(itertools.product(*begins)))
        offsets = np.moveaxis(np.indices(sizes), 0, -1).reshape(-1, 3)
        places = corners[:, None] + offsets[None]
        inside = np.all((places >= 0) & (places < np.asarray(self.shape)), axis=-1)
        flat = np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), self.shape, mode="clip")
        return np.where(inside, flat, -1)

    def spans(
        self,
        prompt: Bool[Array, "B T"],
        *,
        positions: Positions,
        segments: Segments,
    ) -> Bool[Array, "B T"]:
        """Which tokens are patches: those of documents whose prompt holds the whole span.

        Args:
            prompt: tokens that are given, not generated.
            positions: position of each token in its document.
            segments: document of each token, 0 for padding.
        """
        last = jnp.arange(positions.shape[1])[None] - positions + (self.end - 1)
        inside = (last >= 0) & (last < positions.shape[1])
        segment, given = (
            jnp.take_along_axis(each, last, axis=1, mode="clip") for each in (segments, prompt)
        )
        whole = inside & (segment == segments) & (segments > 0) & given
        return whole & (positions >= self.start) & (positions < self.end)

    def permuted(
        self,
        x: Float[Array, "B T D"],
        places: Int[np.ndarray, " N"],
        *,
        vision: Bool[Array, "B T"],
        positions: Positions,
    ) -> Float[Array, "B T D"]:
        """Place ``i`` of every span takes patch ``places[i]``; text stays where it was.

        Args:
            x: tokens.
            places: a permutation of the patches.
            vision: which tokens are patches, as :meth:`spans` gives them.
            positions: position of each token in its document.
        """
        patch = jnp.where(vision, positions - self.start, 0)

        def index(places: Int[np.ndarray, " N"]) -> Int[Array, "B T"]:
            moved = jnp.take(jnp.asarray(places), patch) - patch
            return jnp.arange(x.shape[1])[None] + jnp.where(vision, moved, 0)

        every = jnp.ones(vision.shape, bool)
        return exchanged(x, index(places), every, index(np.argsort(places)), every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """A box of patches that attend to each other.

    Attributes:
        frames: frames of the box.
        height: rows of the box.
        width: columns of the box.
    """

    frames: int = 2
    height: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"{self} is empty; use sizes of 1 or more")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows, columns."""
        return self.frames, self.height, self.width


@jax.custom_vjp
def exchanged(
    x: Float[Array, "B T D"],
    index: Int[Array, "B N"],
    there: Bool[Array, "B N"],
    back: Int[Array, "B T"],
    came: Bool[Array, "B T"],
) -> Float[Array, "B N D"]:
    """Places that take one token each, by ``index`` where ``there``, else zero.

    Tokens that ``came`` are at ``back``, so that the gradient is a gather too; a scatter, which it
    would be otherwise, is slow.
    """
    del back, came
    return jnp.where(there[..., None], jnp.take_along_axis(x, index[..., None], axis=1), 0)


def _exchanged(x: Array, *places: Array) -> tuple[Array, tuple[Array, ...]]:
    return exchanged(x, *places), places


def _exchanged_back(places: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
    index, there, back, came = places
    return exchanged(cotangent, back, came, index, there), None, None, None, None


exchanged.defvjp(_exchanged, _exchanged_back)
