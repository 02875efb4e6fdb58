"""Fewer layers the further a text is generated, the same ones for all rows of a batch."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokenlab.cache import Cache, LayerCache
from tokenlab.core.arrays import Array, Bool, Hidden, Positions, Prompt, Segments
from tokenlab.core.errors import UserError
from tokenlab.depth.base import DepthProgram, DepthTrace, Layers

Kept = Literal["top", "bottom"]


def linear_decay(*, most: int, fewest: int, columns: int) -> tuple[int, ...]:
    """``n(t) = floor(most - (most - fewest) (t - 1) / (columns - 1) + 1/2)`` for t from 1.

    Args:
        most: layers of the first column.
        fewest: layers of the last one, and of all behind it.
        columns: planned length of a text.
    """
    if columns < 1 or fewest > most:
        raise UserError(f"layers from {most} to {fewest} in {columns} columns; use fewest <= most")
    fall = (most - fewest) / max(1, columns - 1)
    return tuple(math.floor(most - fall * t + 0.5) for t in range(columns))


class SkipDecode(DepthProgram):
    """Column t of a text runs n(t) layers, always fewer or as many as the column before it.

    With L layers, ``keep="top"`` runs the first ``warmup`` and the last ``n(t) - warmup`` of them;
    ``"bottom"``, the early-termination twin, the first n(t). Layers that are left out hand the
    stream on. What column t + 1 runs, column t ran, so every layer that a token comes to has keys
    of all tokens before it: nothing is computed again, and nothing is copied.

    The column is a matter of position: t is 1 at position ``prompt_length``, where the first token
    that is written is read. Positions before it are the prompt and run n(1) layers; the last of
    them predicts the first token. Prompts that are not equally long have to be made so, with a sign
    of the task's own before the shorter ones.

    In training all layers run on all tokens under a mask; only the ledger gains. Over a cache, a
    step leaves out the layers that none of its rows runs.

    Reference: Del Corro, Del Giorno, Agarwal, Yu, Awadallah, Mukherjee, "SkipDecode: Autoregressive
    Skip Decoding with Batching and Caching for Efficient LLM Inference", 2023, arXiv:2307.02628.

    Differences from the paper: rows of a batch may be in different columns, as where a slot takes
    the next prompt; a layer runs if one of them runs it. The paper's schedule of each speed-up was
    not at hand; ``linear_decay`` is its rule.

    Attributes:
        counts: n(1), n(2), ...; the last holds for all columns behind.
        warmup: first layers that every column runs.
        keep: which layers run beside them.
        prompt_length: position of the first column.
    """

    counts: tuple[int, ...] = (1,)
    warmup: int = 1
    keep: Kept = "top"
    prompt_length: int = 0

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < max(1, self.warmup):
            raise UserError(
                f"counts {self.counts} need a column, and at least warmup {self.warmup} and 1 "
                "layers in each"
            )
        for t, (before, now) in enumerate(zip(self.counts, self.counts[1:], strict=False), start=2):
            if now > before:
                raise UserError(
                    f"column {t} runs {now} layers after {before} in column {t - 1}, whose keys "
                    "the others lack; give counts that never rise"
                )
        super().__post_init__()

    @nn.nowrap
    def layers(self, num_layers: int, *, column: int) -> tuple[int, ...]:
        """The layers that run in column t, from 1."""
        count = self.counts[min(column, len(self.counts)) - 1]
        return tuple(np.flatnonzero(np.asarray(self._runs(num_layers, np.asarray(count)))).tolist())

    @nn.nowrap
    def _runs(self, num_layers: int, count: Any) -> Any:
        """Which layers run where ``count [...]`` do, ``[L, ...]``."""
        layer = np.arange(num_layers).reshape(-1, *[1] * count.ndim)
        if self.keep == "bottom":
            return layer < count[None]
        return (layer < self.warmup) | (layer >= num_layers + self.warmup - count[None])

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
        """Runs each layer on the tokens whose column has it.

        Raises:
            UserError: a column has more layers than the model.
        """
        if self.counts[0] > num_layers:
            raise UserError(
                f"column 1 runs {self.counts[0]} of num_layers {num_layers}; lower counts"
            )
        column = jnp.clip(positions - self.prompt_length, 0, len(self.counts) - 1)
        count = jnp.asarray(self.counts, jnp.int32)[column]
        active = self._runs(num_layers, count) & (segments > 0)[None]
        first, after = self.layers(num_layers, column=1), []
        kinds = block.kinds()
        for i in range(num_layers):
            layer = kinds[i % len(kinds)].copy(parent=block.parent, name=f"block_{i}")
            own = None if cache is None else cache.layer(i)
            if i in first or self.is_initializing():
                where = {"positions": positions, "prompt": prompt, "train": train}
                where["segments"] = jnp.where(active[i], segments, 0)
                x, own = self._layer(layer, x, own, active[i], **where)
            after.append(own)
        cache = None if cache is None else cache.after(tuple(after))
        depth = jnp.sum(active, axis=0, dtype=jnp.int32)
        return x, DepthTrace(depth=depth, active=active), cache

    def _layer(
        self,
        layer: nn.Module,
        x: Hidden,
        own: LayerCache | None,
        active: Bool[Array, "B T"],
        **where: Any,
    ) -> tuple[Hidden, LayerCache | None]:
        """One layer on its tokens; not at all over a cache where none comes to it."""

        def run(layer: nn.Module, x: Hidden, own: Any) -> tuple[Hidden, Any]:
            y, after = layer(x, cache=own, **where)
            return jnp.where(active[..., None], y, x), after

        if own is None or own.stage != "next":
            return self._rematerialised(run)(layer, x, own)
        return nn.cond(jnp.any(active), run, lambda _, x, own: (x, own), layer, x, own)
