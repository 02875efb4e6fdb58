"""LinMU: a decoder whose attention is a two-way state space and windows of patches."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.attention import ssd_flops
from tokenlab.cache import Heads, LayerCache, RecurrentState, SharedKeys
from tokenlab.core.arrays import (
    Array,
    Bool,
    Float,
    Hidden,
    Positions,
    Prompt,
    Scalar,
    Segments,
)
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import taken_over
from tokenlab.models.attention import Attention, Memory, Mixer
from tokenlab.models.flex_ma import FlexMA
from tokenlab.models.grid import AXES, Axis, Grid, Window
from tokenlab.models.layers import Linear, LowRank
from tokenlab.models.local_windows import LocalWindows
from tokenlab.models.transformer import Transformer, layered


class MMATE(Mixer):
    """The M-MATE block: a two-way state space and windows of patches, in linear time.

    ``out_i = α_i FlexMA_i + β_i Local_i`` with α and β sigmoids of a linear map, one half at the
    start. Only a prompt is read in both directions, and only a whole span of patches in a prompt is
    vision; without a prompt the layer is causal throughout. To decode it keeps one matrix per head
    (``cache=Recurrent()``), and reads a prompt in one pass.

    Reference: Hongjie Wang, Niraj K. Jha, "LinMU: Multimodal Understanding Made Linear", 2026,
    arXiv:2601.01322.

    Differences from the paper: no code is published, so these are chosen here: how decays and the
    gate of the two directions are made and how they start, the norm of each head, and that patches
    lie in a grid that is the same in every document. A document with that many tokens in its prompt
    and no image is not told apart.

    Attributes:
        attention: what it takes the place of; both branches have its projections.
        grid: where the patches of a document lie.
        window: which patches attend to each other.
        shifted: whether windows begin half a window before the edge.
        fastest: along which axis the state space reads patches.
        chunk: tokens of a chunk of the state space.
        branches: which branches there are; one alone has no weight.
    """

    attention: Attention
    grid: Grid
    window: Window = Window()
    shifted: bool = False
    fastest: Axis = "column"
    chunk: int = 64
    branches: Literal["both", "flex", "local"] = "both"

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        cache: Memory | None = None,
        prompt: Prompt | None = None,
        train: bool = False,
    ) -> tuple[Hidden, Memory | None]:
        """Both branches, weighed.

        Args:
            x: normalised residual stream.
            positions: position of each token in its document; documents lie in one piece.
            segments: document of each token, 0 for padding.
            cache: this layer's state; rows hold one document each.
            prompt: tokens that are given; None is none, or all of the pass that begins a cache.
            train: not read.

        Raises:
            UserError: the cache is not of this kind, or a later pass has more than one token.
        """
        if isinstance(cache, SharedKeys):
            raise UserError("MMATE has no keys that a loop could share; use keys='recursion_wise'")
        if cache is not None:
            self._check(cache, x.shape[1])
            if cache.stage == "first" and prompt is None:
                prompt = segments > 0
        given = jnp.zeros(segments.shape, bool) if prompt is None else prompt & (segments > 0)
        vision = self.grid.spans(given, positions=positions, segments=segments)
        parts = {}
        if self.branches != "local":
            flex = FlexMA(
                attention=self.attention.copy(parent=None), grid=self.grid, fastest=self.fastest,
                chunk=self.chunk, name="flex",
            )  # fmt: skip
            parts["flex"], state = flex(
                x, positions=positions, segments=segments, vision=vision,
                prompt=None if prompt is None else given,
                state=None if cache is None else cache.state.matrices,
            )  # fmt: skip
            if cache is not None:
                cache = cache.replace(state=cache.state.replace(matrices=state))
        if self.branches != "flex":
            local = LocalWindows(
                attention=self.attention.copy(parent=None), grid=self.grid, window=self.window,
                shifted=self.shifted, name="local",
            )  # fmt: skip
            parts["local"] = local(x, positions=positions, vision=vision)
            if cache is not None:
                read = self._partners(vision, positions)
                cache = cache.replace(pairs=cache.pairs + jnp.sum(read, axis=1))
        if self.branches == "both":
            weights = nn.sigmoid(
                Linear(2, axes=("embed", "norm"), bias=True, zero=True, name="combine")(x)
            )
            out = weights[..., :1] * parts["flex"] + weights[..., 1:] * parts["local"]
        else:
            (out,) = parts.values()
        return jnp.where((segments > 0)[..., None], out, 0), cache

    def _check(self, cache: LayerCache, length: int) -> None:
        if not isinstance(cache.state, RecurrentState):
            raise UserError(
                f"MMATE keeps a state and not what {type(cache.policy).__name__} does; "
                "decode with cache=Recurrent()"
            )
        if cache.stage == "draft" or (cache.stage == "next" and length > 1):
            raise UserError(
                "MMATE reads a prompt in one pass, in both directions, and then token by token; "
                "decode with prefill_chunk=None and without drafts"
            )

    def heads(self, dim: int) -> Heads:
        """Those of the attention."""
        return self.attention.heads(dim)

    def flops(self, dim: int, *, projects: bool = True) -> int:
        """Of a patch in a prompt: both scans, and the projections of both branches.

        Of text, and of what is generated, this is an upper bound.
        """
        del projects  # There are no keys to share.
        part = self.attention
        flex = part.flops(dim) + 2 * 2 * dim * part.num_heads
        flex += 2 * ssd_flops(heads=part.num_heads, width=part.width(dim), chunk=self.chunk)
        local, combine = part.flops(dim), 2 * 2 * dim
        return {"both": flex + local + combine, "flex": flex, "local": local}[self.branches]

    def flops_per_pair(self, dim: int) -> int:
        """Of a pair of patches in a window."""
        return self.attention.flops_per_pair(dim)

    def pairs(
        self,
        *,
        active: Bool[Array, "R B T"],
        read: Bool[Array, "R B T"],
        positions: Positions,
        segments: Segments,
    ) -> Scalar:
        """Pairs of active patches in a window, where every whole span is in a prompt."""
        del read  # There are no keys to share.
        if self.branches == "flex":
            return jnp.float32(0)

        vision = self.grid.spans(segments > 0, positions=positions, segments=segments)
        partners = self._partners(vision, positions)
        return jnp.sum(jnp.where(active, partners[None], 0.0))

    @nn.nowrap
    def _partners(self, vision: Bool[Array, "B T"], positions: Positions) -> Float[Array, "B T"]:
        """Patches in the window of each patch."""
        patches = self.grid.windows(self.window, shifted=self.shifted)
        sizes = np.zeros(self.grid.size, np.float32)
        inside = patches >= 0
        sizes[patches[inside]] = np.repeat(inside.sum(axis=1), inside.sum(axis=1))
        patch = jnp.where(vision, positions - self.grid.start, 0)
        return jnp.where(vision, jnp.take(jnp.asarray(sizes), patch), 0.0)


def linmu(
    teacher: Transformer,
    *,
    grid: Grid,
    window: Window,
    chunk: int = 64,
    branches: Literal["both", "flex", "local"] = "both",
    adapter: LowRank | None = None,
) -> Transformer:
    """The student of a decoder: the same, with :class:`MMATE` in place of attention.

    Windows are shifted in odd layers, and layers take turns in the axis along which patches are
    read, so that layers come in up to six kinds.

    Args:
        teacher: a decoder of attention layers.
        grid: where the patches of a document lie.
        window: which patches attend to each other.
        chunk: tokens of a chunk of the state space.
        branches: which branches there are.
        adapter: what is added to the kernels of feed-forward layers, or None.
    """
    kinds = teacher.block.kinds()
    turns = min(math.lcm(len(kinds), 2, len(AXES)), teacher.num_layers)
    attentions = teacher.attentions()
    blocks = []
    for i in range(turns):
        kind = kinds[i % len(kinds)]
        mixer = MMATE(
            attention=attentions[i], grid=grid, window=window, shifted=i % 2 == 1,
            fastest=AXES[i % len(AXES)], chunk=chunk, branches=branches,
        )  # fmt: skip
        feedforward = kind.feedforward.clone(adapter=adapter)
        blocks.append(kind.clone(mixer=mixer, feedforward=feedforward))
    return teacher.clone(block=layered(blocks))


def with_teacher(params: PyTree, teacher: PyTree) -> PyTree:
    """A student's first parameters with all that its teacher has; both branches get its attention.

    Args:
        params: of a model that :func:`linmu` gave.
        teacher: parameters of the model it was given.
    """
    return taken_over(params, teacher, within=("/flex/", "/local/softmax/"))
