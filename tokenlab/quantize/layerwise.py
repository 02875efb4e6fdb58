"""Quantising a decoder layer by layer, each on what the quantised layers before it make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from kernels_pallas.block_sparse_attention import MaskRule
from tokenlab.core.arrays import (
    Array,
    Float,
    Hidden,
    Int,
    Positions,
    Segments,
    Tokens,
    Weights,
)
from tokenlab.core.errors import UserError
from tokenlab.quantize.base import Quantized, Quantizer
from tokenlab.quantize.importance import (
    AttentionConcentration,
    LayerView,
    TokenImportance,
    Uniform,
)
from tokenlab.quantize.rotation import Rotation
from tokenlab.quantize.rounding import GPTQ

# Projections that read the same input, in the order in which a layer computes them.
GROUPS = (
    ("mixer/q", "mixer/k", "mixer/v"),
    ("mixer/out",),
    ("feedforward/gate", "feedforward/up"),
    ("feedforward/down",),
)
# The norm whose gain goes into a group of projections.
_NORMS = {0: "mixer_norm", 2: "feedforward_norm"}


@runtime_checkable
class DecoderModel(Protocol):
    """What is quantised: a ``models.Transformer`` whose layers have parameters of their own."""

    block: Any
    num_layers: int
    dim: int
    dtype: Any
    embedding_scale: float

    def attentions(self) -> Sequence[Any]:
        """The attention of every layer."""
        ...


class QuantizedModel(NamedTuple):
    """A quantised model.

    Attributes:
        params: of the same model, with the matrices that the codes stand for, float32.
        projections: codes and scales by path, such as ``"block_0/mixer/q"``, in the rotated bases.
    """

    params: PyTree
    projections: Mapping[str, Quantized]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layerwise:
    """Quantises every projection of a decoder; embeddings, norms and biases stay as they are.

    Layers are done from the first to the last, and in a layer the projections of attention's
    inputs, of its output, of gate and up, and of down, each with second moments
    ``M = Σ_j r_j x_j x_jᵀ`` of what it reads once all before it are quantised. The token weights r
    are those of the layer before it is quantised.

    Attributes:
        quantizer: rounds one kernel.
        rotation: bases in which kernels are rounded, or None. Gains of norms are then folded into
            the projections. The parameters returned are rotated back, so that the same model takes
            them: ``A round(Aᵀ W B) Bᵀ`` is what a rotated model computes, with its Hadamard
            transforms before ``out`` and ``down``.
        importance: weights of the calibration tokens.
        power: features are multiplied by ``r^power``, moments so by its square.
        copies: how often each calibration row is read, rolled further along itself each time, so
            that its tokens also occur at other positions.
        batch_size: rows at a time.
    """

    quantizer: Quantizer = GPTQ()
    rotation: Rotation | None = None
    importance: TokenImportance = Uniform()
    power: float = 0.5
    copies: int = 1
    batch_size: int = 4

    def __call__(
        self,
        model: DecoderModel,
        params: PyTree,
        *,
        tokens: Int[Array, "N T"] | None = None,
        segments: Int[Array, "N T"] | None = None,
    ) -> QuantizedModel:
        """Quantises all layers.

        Args:
            model: the decoder.
            params: its parameters, one tree per layer (``models.unrolled``).
            tokens: calibration rows; None where the quantizer reads no data.
            segments: documents of the rows, 0 for padding; None where each row is one.

        Raises:
            UserError: a layer is not one of attention and a gated feed-forward part, it cannot be
                rotated, or calibration rows are missing.
        """
        kinds = model.block.kinds()
        _check(kinds, params, self.rotation is not None)
        rows = None
        if self.quantizer.calibrated:
            if tokens is None:
                name = type(self.quantizer).__name__
                raise UserError(f"{name} needs calibration tokens; give tokens=")
            segments = jnp.ones_like(tokens) if segments is None else segments
            tokens, segments = (expand(x, copies=self.copies) for x in (tokens, segments))
            rows = _batches(model, params["embedding"], tokens, segments, self.batch_size)
        made, codes = dict(params), {}
        for number, mixer in enumerate(model.attentions()):
            name, block = f"block_{number}", kinds[number % len(kinds)].clone(parent=None)
            layer = _Layer(block=block, rule=mixer.rule, heads=mixer.heads(model.dim))
            made[name], found, rows = self._layer(layer, params[name], rows)
            codes |= {f"{name}/{path}": one for path, one in found.items()}
        return QuantizedModel(params=made, projections=codes)

    def _layer(
        self, layer: _Layer, params: PyTree, rows: list[_Rows] | None
    ) -> tuple[PyTree, dict[str, Quantized], list[_Rows] | None]:
        """One layer's parameters, its codes, and the rows that the next layer reads."""
        weights: list[Weights] = [_weights(layer, self, params, batch) for batch in rows or ()]
        given, bases = params, {}
        if self.rotation is not None:
            params, bases = _folded(params), layer.bases(self.rotation, params)
        codes = {}
        for group in GROUPS:
            moment = None if rows is None else _summed(layer, group[0], params, rows, weights)
            kernels = {path: _at(params, path)["kernel"] for path in group}
            for path, one, values in _rounded(self.quantizer, kernels, moment, bases):
                dtype = _at(given, path)["kernel"].dtype  # folding made it float32
                params = _replaced(params, f"{path}/kernel", values.astype(dtype))
                codes[path] = one
        if rows is not None:
            rows = [_output(layer, params, batch) for batch in rows]
        return params, codes, rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuaRot(Layerwise):
    """Rotation, then GPTQ on tokens that count alike.

    Reference: Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman,
    "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv:2404.00456.

    Differences from the paper: weights only.
    """

    rotation: Rotation | None = Rotation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RSQ(Layerwise):
    """Rotate, scale, then quantise: QuaRot whose tokens count by the attention they receive.

    Reference: Sung, Yadav, Li, Yoon, Bansal, "RSQ: Learning from Important Tokens Leads to Better
    Quantized LLMs", 2025, arXiv:2503.01820.

    Differences from the paper: importance multiplies moments by r and features by its root, as
    the released code does, where the paper speaks of scaling features; embeddings are not centred
    before they are rotated, which is exact for LayerNorm only; rows are read once unless
    ``copies`` says otherwise (8 in the paper).
    """

    rotation: Rotation | None = Rotation()
    importance: TokenImportance = AttentionConcentration()


def expand(tokens: Int[Array, "N T"], *, copies: int) -> Int[Array, "M T"]:
    """Rows and their copies, copy c rolled to the right by ``c T / copies``.

    Args:
        tokens: rows, or what goes with them.
        copies: how many there are in the end, the rows themselves included.
    """
    length = tokens.shape[1]
    return jnp.concatenate([jnp.roll(tokens, c * length // copies, axis=1) for c in range(copies)])


class _Layer(NamedTuple):
    """One layer: its module, and the rule and the heads of its attention."""

    block: nn.Module
    rule: MaskRule
    heads: Any

    def bases(self, rotation: Rotation, params: PyTree) -> dict[str, Any]:
        dim, hidden_dim = _at(params, "feedforward/gate")["kernel"].shape
        return rotation.of(
            dim=dim,
            num_heads=self.heads.num_heads,
            num_kv_heads=self.heads.num_kv_heads,
            head_dim=self.heads.width,
            hidden_dim=hidden_dim,
        )


@flax.struct.dataclass
class _Rows:
    """A batch of calibration rows on its way through the layers."""

    tokens: Tokens
    counts: Int[Array, "B T"]
    positions: Positions
    segments: Segments
    hidden: Hidden


def _batches(
    model: DecoderModel,
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "N T"],
    segments: Int[Array, "N T"],
    size: int,
) -> list[_Rows]:
    """All rows as the first layer reads them, the last batch filled up with padding."""
    real = (segments > 0).astype(jnp.int32)
    occurs = jnp.bincount(tokens.reshape(-1), real.reshape(-1), length=len(embedding))
    missing = ((0, -len(tokens) % size), (0, 0))
    tokens, segments = jnp.pad(tokens, missing), jnp.pad(segments, missing)
    batches = []
    for start in range(0, len(tokens), size):
        some, parts = tokens[start : start + size], segments[start : start + size]
        hidden = jnp.take(embedding, some, axis=0).astype(model.dtype) * model.embedding_scale
        positions = jnp.broadcast_to(jnp.arange(some.shape[1])[None], some.shape)
        batches.append(
            _Rows(
                tokens=some,
                counts=occurs[some],
                positions=positions,
                segments=parts,
                hidden=hidden,
            )
        )
    return batches


def _apply(layer: _Layer, params: PyTree, rows: _Rows) -> tuple[Hidden, PyTree]:
    """What the layer makes of the rows, and what its parts read on the way."""
    (out, _), seen = layer.block.apply(
        {"params": params},
        rows.hidden,
        positions=rows.positions,
        segments=rows.segments,
        mutable=["intermediates"],
    )
    return out, seen["intermediates"]


# Of each, XLA computes no more of the layer than it reads.


@functools.partial(jax.jit, static_argnums=0)
def _output(layer: _Layer, params: PyTree, rows: _Rows) -> _Rows:
    return dataclasses.replace(rows, hidden=_apply(layer, params, rows)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weights(layer: _Layer, method: Layerwise, params: PyTree, rows: _Rows) -> Weights:
    """Factors of the moments, 0 for padding."""
    seen = _apply(layer, params, rows)[1]["mixer"]
    view = LayerView(
        tokens=rows.tokens,
        counts=rows.counts,
        positions=rows.positions,
        segments=rows.segments,
        hidden=rows.hidden,
        queries=seen["queries"][0],
        keys=seen["keys"][0],
        rule=layer.rule,
        scale=layer.heads.scale,
        softcap=layer.heads.softcap,
    )
    return method.importance(view) ** (2 * method.power)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moment(
    layer: _Layer, path: str, params: PyTree, rows: _Rows, weights: Weights
) -> Float[Array, "I I"]:
    """``Σ r x xᵀ`` over what a projection reads."""
    (inputs,) = _at(_apply(layer, params, rows)[1], path)["inputs"]
    scaled = inputs.astype(jnp.float32) * jnp.sqrt(weights)[..., None]
    return jnp.einsum("bti,btj->ij", scaled, scaled, precision=jax.lax.Precision.HIGHEST)


def _summed(
    layer: _Layer, path: str, params: PyTree, rows: list[_Rows], weights: list[Weights]
) -> Float[np.ndarray, "I I"]:
    """The moment over all batches, summed in float64, which devices may not have."""
    pairs = zip(rows, weights, strict=True)
    parts = (np.asarray(_moment(layer, path, params, *pair), np.float64) for pair in pairs)
    return functools.reduce(np.add, parts)


def _rounded(
    quantizer: Quantizer,
    kernels: Mapping[str, Float[Array, "I _"]],
    moment: Float[np.ndarray, "I I"] | None,
    bases: Mapping[str, Any],
) -> Iterator[tuple[str, Quantized, Float[Array, "I _"]]]:
    """Projections of the same inputs, in other bases: codes in those, values in their own."""
    left, rights = None, {}
    for path in kernels:
        left, rights[path] = bases.get(path, (None, None))
    rotated = {
        path: _product(None if left is None else left.T, np.asarray(kernel, np.float64), right)
        for (path, kernel), right in zip(kernels.items(), rights.values(), strict=True)
    }
    if moment is None:
        found = {path: quantizer(weight=_narrow(kernel)) for path, kernel in rotated.items()}
    else:
        moment = _product(None if left is None else left.T, moment, left)
        whole = quantizer(
            weight=_narrow(np.concatenate([*rotated.values()], axis=1)), moment=moment
        )
        ends = np.cumsum([kernel.shape[1] for kernel in rotated.values()])[:-1].tolist()
        parts = zip(*(jnp.split(x, ends, axis=1) for x in whole), strict=True)
        found = {path: Quantized(*part) for path, part in zip(rotated, parts, strict=True)}
    for path, one in found.items():
        right = None if rights[path] is None else rights[path].T
        yield path, one, _narrow(_product(left, np.asarray(one.values, np.float64), right))


def _product(left: Any, middle: Any, right: Any) -> Any:
    """Of what is there."""
    middle = middle if left is None else left @ middle
    return middle if right is None else middle @ right


def _narrow(x: Float[np.ndarray, "I O"]) -> Float[Array, "I O"]:
    return jnp.asarray(x, jnp.float32)


def _folded(params: PyTree) -> PyTree:
    """A layer whose norms have gains of one; the projections after them have theirs."""
    for number, norm in _NORMS.items():
        gain = params[norm]["scale"]
        for path in GROUPS[number]:
            kernel = gain[:, None] * _at(params, path)["kernel"]
            params = _replaced(params, f"{path}/kernel", kernel)
        params = _replaced(params, f"{norm}/scale", jnp.ones_like(gain))
    return params


def _check(kinds: Sequence[Any], params: PyTree, rotated: bool) -> None:
    if "block_0" not in params:
        raise UserError("layers are stacked; quantise models.unrolled(model, params)")
    for name in (name for name in params if name.startswith("block_")):
        for path in (path for group in GROUPS for path in group):
            if "kernel" not in _at(params[name], path):
                raise UserError(f"{name} has no {path}; only gated attention layers are quantised")
    if rotated and any(kind.post_norm is not None for kind in kinds):
        raise UserError("a norm after a projection does not turn with it; leave out the rotation")


def _at(tree: PyTree, path: str) -> PyTree:
    for key in path.split("/"):
        tree = tree.get(key, {})
    return tree


def _replaced(tree: PyTree, path: str, value: Array) -> PyTree:
    key, _, rest = path.partition("/")
    return dict(tree) | {key: _replaced(tree[key], rest, value) if rest else value}
