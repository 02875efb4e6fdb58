"""LeMo: attention that leaves uninformative tokens out while a model is fine-tuned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

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
from tokenlab.core.errors import UserError
from tokenlab.core.reports import REPORTS, report
from tokenlab.depth import Sequential
from tokenlab.models.attention import Attention, Memory
from tokenlab.models.informativeness import (
    Informativeness,
    KeptBlocks,
    KeptShare,
    PooledScores,
    TileScores,
    tile_scores,
)
from tokenlab.models.layers import FeedForward, SwiGLU
from tokenlab.models.pruned_backward import PrunedSwiGLU
from tokenlab.models.transformer import Transformer, layered
from tokenlab.routing import Route


class TokenDroppingAttention(Attention):
    """Attention among the tokens of informative blocks; the others pass with an update of 0.

    Kept tokens are gathered before they are projected, attend to each other at their own positions,
    and what they get is scattered back. So neither queries, keys and values nor what a backward
    pass needs of them exist for a dropped token. The choice looks at later tokens: the layer is for
    training, and its causal twin is plain attention on the same parameters.

    It reports the figures ``kept``, ``informative`` and ``pooled`` of tokens: those that were kept,
    those that ``PooledScores`` would keep, and by which scores; and its predictor's loss, if it has
    one.

    Reference: Tuowei Wang, Xingyu Chen, Kun Li, Ting Cao, Ju Ren, Yaoxue Zhang, "LeMo: Enabling
    LEss Token Involvement for MOre Context Fine-tuning", 2025, arXiv:2501.09767 (published as
    JENGA).

    Differences from the paper: every row of a batch keeps blocks of its own, where released code
    takes a batch for one row. Tokens are gathered and scattered by copies, not inside the kernel of
    attention.

    Attributes:
        informativeness: what blocks are ranked by.
        kept: how many of them stay.
        block: tokens of a block.
    """

    informativeness: Informativeness = PooledScores()
    kept: KeptBlocks = KeptShare()
    block: int = 64

    @nn.nowrap
    def causal_twin(self) -> Attention:
        """Attention of all tokens."""
        return Attention(**_options(self))

    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        cache: Memory | None = None,
        prompt: Prompt | None = None,
        train: bool = False,
    ) -> tuple[Hidden, None]:
        """Attends among kept tokens.

        Args:
            x: normalised residual stream.
            positions: position of each token in its document.
            segments: 0 for padding.
            cache: None.
            prompt: not read.
            train: not read.

        Raises:
            UserError: there is a cache, or keys are shared.
        """
        if cache is not None:
            raise UserError(
                "TokenDroppingAttention drops tokens that later ones may need: it keeps no cache "
                "and shares no keys; use model.causal_twin()"
            )
        valid = segments > 0
        where = {"positions": positions, "segments": segments}

        @functools.cache  # of one call: the scores, a predictor's loss and the report may ask
        def tiles() -> TileScores:
            return jax.lax.stop_gradient(self._tile_scores(x, **where))

        there = self._there(valid)
        scores = self.informativeness(
            jnp.where(valid[..., None], x, 0),
            block=self.block,
            there=there,
            heads=self.heads(x.shape[-1]),
            tiles=tiles,
        )
        kept = self._tokens(self.kept(scores, there=there), valid)
        route = Route.of(
            kept,
            jnp.ones(kept.shape, jnp.float32),
            capacity=min(kept.shape[1], self.block * self.kept.slots(there.shape[1])),
            aux={},
        )
        own, of = (jnp.take_along_axis(each, route.index, 1) for each in (positions, segments))
        of = jnp.where(route.valid(), of, 0)
        out, _ = super().__call__(route.gather(x), positions=own, segments=of)
        if self.is_mutable_collection(REPORTS):
            pooled = jnp.sum(tiles(), axis=1)
            figures = {
                "kept": kept,
                "informative": self._tokens(self.kept(pooled, there=there), valid),
                "pooled": jnp.where(valid, self._repeated(pooled, valid), 0.0),
            }
            self._report(x.shape[-1], figures, own, of)
        return route.scatter_add(jnp.zeros_like(x), out), None

    def _report(
        self,
        dim: int,
        figures: Mapping[str, Bool[Array, "B T"] | Float[Array, "B T"]],
        positions: Int[Array, "B C"],
        segments: Int[Array, "B C"],
    ) -> None:
        once = (segments > 0)[None]
        pairs = super().pairs(active=once, read=once, positions=positions, segments=segments)
        tokens = jnp.sum(figures["kept"], dtype=jnp.float32)
        report(
            self,
            figures={name: each.astype(jnp.float32) for name, each in figures.items()},
            flops=tokens * super().flops(dim) + pairs * self.flops_per_pair(dim),
            pairs=pairs,
        )  # fmt: skip

    def _there(self, valid: Bool[Array, "B T"]) -> Bool[Array, "B N"]:
        """Blocks that hold a token."""
        padded = jnp.pad(valid, ((0, 0), (0, -valid.shape[1] % self.block)))
        return jnp.any(padded.reshape(len(valid), -1, self.block), axis=2)

    def _tokens(self, blocks: Bool[Array, "B N"], valid: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        return self._repeated(blocks, valid) & valid

    def _repeated(self, blocks: Array, valid: Bool[Array, "B T"]) -> Array:
        return jnp.repeat(blocks, self.block, axis=1)[:, : valid.shape[1]]

    @nn.compact
    def _tile_scores(self, x: Hidden, *, positions: Positions, segments: Segments) -> TileScores:
        """Of all tokens, by the projections that attention has."""
        heads = self.heads(x.shape[-1])
        counts = {"q": self.num_heads, "k": self.num_kv_heads}
        q, k = (
            heads.rotate(
                self._project(x, count, heads.width, name, self.qk_norm), positions=positions
            )
            for name, count in counts.items()
        )
        return tile_scores(
            q=q, k=k, positions=positions, segments=segments, rule=self.rule, scale=heads.scale,
            block=self.block,
        )  # fmt: skip

    def flops(self, dim: int, *, projects: bool = True) -> int:
        """None of every token; those of kept tokens are reported."""
        return 0

    def pairs(
        self,
        *,
        active: Bool[Array, "R B T"],
        read: Bool[Array, "R B T"],
        positions: Positions,
        segments: Segments,
    ) -> Scalar:
        """None by the rule alone; those of kept tokens are reported."""
        return jnp.float32(0)


def lemo(
    model: Transformer,
    *,
    layers: Sequence[int],
    kept: KeptBlocks,
    informativeness: Informativeness,
    block: int = 64,
    pruned: float | None = None,
) -> Transformer:
    """The model to fine-tune with: some layers drop tokens, and backward passes are pruned.

    Parameters of ``model`` are parameters of this one, which has those of predictors besides
    (``taken_over`` puts the former into first parameters of the latter). What was trained is
    evaluated, decoded and saved with ``model`` itself.

    Args:
        model: of attention layers, adapted or not.
        layers: those that drop tokens, counted from 0. What the last layer drops is lost to the
            head, so it is best left out.
        kept: how many blocks each of them keeps.
        informativeness: what blocks are ranked by.
        block: tokens of a block.
        pruned: share of the columns of SwiGLU layers that backward passes leave out, in all layers,
            or None.

    Raises:
        UserError: there is no such layer, or layers are scanned.
    """
    if not set(layers) <= set(range(model.num_layers)):
        raise UserError(
            f"layers {tuple(layers)} drop tokens, and the model has 0 to {model.num_layers - 1}"
        )
    if isinstance(model.depth, Sequential) and model.depth.scan:
        raise UserError("lemo makes layers of several kinds; set model.depth.scan=False")
    kinds, blocks = model.block.kinds(), []
    for i, attention in enumerate(model.attentions()):
        kind = kinds[i % len(kinds)]
        if i in layers:
            dropping = {"kept": kept, "informativeness": informativeness, "block": block}
            kind = kind.clone(mixer=TokenDroppingAttention(**_options(attention), **dropping))
        if pruned is not None:
            kind = kind.clone(feedforward=_pruned(kind.feedforward, pruned))
        blocks.append(kind)
    return model.clone(block=layered(blocks))


def _options(attention: Attention) -> dict[str, Any]:
    """The fields that all attention has."""
    names = {field.name for field in dataclasses.fields(Attention)} - {"parent", "name"}
    return {name: getattr(attention, name) for name in names}


def _pruned(layer: FeedForward, share: float) -> FeedForward:
    if type(layer) is not SwiGLU:
        raise UserError(f"pruned={share} needs SwiGLU layers, not {type(layer).__name__}; use None")
    return PrunedSwiGLU(hidden_dim=layer.hidden_dim, adapter=layer.adapter, pruned=share)


def shrunk(
    model: Transformer,
    params: PyTree,
    batches: Iterable[Mapping[str, Array]],
    *,
    share: float = 0.8,
) -> tuple[Transformer, PyTree]:
    """Predictors without the hidden units that are idle (at most 0) in most cases.

    Args:
        model: as :func:`lemo` gave it, with ``PredictedScores``.
        params: its parameters.
        batches: passes over which cases are counted, the paper's are 100; a case is a block in one
            part of the stream. Each has ``tokens``, ``positions`` and ``segments``.
        share: of cases from which on a unit is removed. Where all or none of a layer's would be,
            none is.

    Reference: as ``TokenDroppingAttention``: arXiv:2501.09767.
    """
    idle = _idle(model, params, batches)
    kinds, blocks, params = model.block.kinds(), [], dict(params)
    for i in range(model.num_layers):
        kind, name = kinds[i % len(kinds)], f"block_{i}"
        if name in idle:
            attention = dict(params[name]["mixer"])
            predictor, units = _busy(attention["informativeness"], idle[name], share)
            scores = kind.mixer.informativeness.clone(units=units)
            kind = kind.clone(mixer=kind.mixer.clone(informativeness=scores))
            params[name] = params[name] | {"mixer": attention | {"informativeness": predictor}}
        blocks.append(kind)
    return model.clone(block=layered(blocks)), params


def _busy(
    predictor: PyTree, idle: Mapping[str, np.ndarray], share: float
) -> tuple[PyTree, tuple[int, ...]]:
    """The predictor without idle units, and how many of each layer are left."""
    predictor, units = dict(predictor), []
    for side in "qk":
        for number in (1, 2):
            own, following = f"{side}_{number}", f"{side}_{number + 1}"
            busy = np.flatnonzero(idle[f"idle_{own}"] < share)
            if len(busy) == 0:
                busy = np.arange(len(idle[f"idle_{own}"]))
            predictor[own] = {"kernel": predictor[own]["kernel"][:, busy]}
            predictor[following] = {"kernel": predictor[following]["kernel"][busy]}
            units.append(len(busy))
    return predictor, tuple(units)


def _idle(
    model: Transformer, params: PyTree, batches: Iterable[Mapping[str, Array]]
) -> dict[str, dict[str, np.ndarray]]:
    """By layer and name, the share of cases in which each unit is idle: a mean over batches."""

    @jax.jit
    def run(batch: Mapping[str, Array]) -> Any:
        _, kept = model.apply(
            {"params": params},
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            mutable=["intermediates"],
        )
        found: dict[str, Any] = dict(kept["intermediates"])
        return {
            layer: {
                name: value[0]
                for name, value in parts["mixer"]["informativeness"].items()
                if name.startswith("idle_")
            }
            for layer, parts in found.items()
            if "informativeness" in parts.get("mixer", {})
        }

    counted = [jax.device_get(run(batch)) for batch in batches]
    if not counted or not counted[0]:
        raise UserError("there is no predictor or no batch; use informativeness=PredictedScores()")
    return jax.tree.map(lambda *each: np.mean(each, axis=0), *counted)
