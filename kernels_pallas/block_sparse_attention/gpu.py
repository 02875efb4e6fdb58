"""Flash attention over lists of pairs of blocks on Hopper: tiles, operands, and the gradient.

The kernels are in ``gpu_forward`` and ``gpu_backward``. Each has tiles of its own, so blocks given
at run time are cut to the tiles of each; a static map is asked for in tiles. Heads are padded to
64, 128 or 256 columns with zeros, which add nothing to a score.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention import gpu_backward, gpu_forward, operands, pairs
from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.gpu_tiles import ROWS, Sides, Static, Tiles
from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import BlockSparseAttentionConfig
from kernels_pallas.common import hopper

_WIDTHS = (64, 128, 256)
# Whole tiles of every kernel.
_WHOLE = 128


class _Call(NamedTuple):
    """What is static of a call.

    Attributes:
        rule: who sees whom.
        scale: factor of the scores.
        softcap: bound of the absolute scores.
        block_q: queries in a block of the lists, and likewise of the static map.
        block_k: keys in a block.
        interpret: the ``interpret`` of the kernels.
    """

    rule: MaskRule
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    interpret: Any

    def forward(self, width: int) -> Tiles:
        """Queries stay; 128 keys are visited at a time where registers allow."""
        return Tiles(self._outer(self.block_q), self._outer(self.block_k) if width < 256 else 64, 2)

    def backward_q(self, width: int) -> Tiles:
        """Queries stay; two products of scores are in registers."""
        return Tiles(self._outer(self.block_q) if width < 256 else 64, 64, 2)

    def backward_kv(self, width: int) -> Tiles:
        """Keys stay; wide heads take two warpgroups for 64 of them."""
        return Tiles(self._outer(self.block_k) if width < 256 else 64, 64, 2)

    def _outer(self, block: int) -> int:
        return 2 * ROWS if block % (2 * ROWS) == 0 else ROWS


def supports(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    rule: MaskRule,
    blocks: Int[Array, "B Q N"] | None,
    block_shape: tuple[int, int],
    config: BlockSparseAttentionConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``."""
    del others
    reason = hopper.needs(config.interpret)
    if reason is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float16) or {k.dtype, v.dtype} != {q.dtype}:
        return (
            f"it takes bfloat16 or float16 alike, not {q.dtype}, {k.dtype}, {v.dtype}; tensor cores"
            " would round float32 to 10 bits"
        )
    if q.shape[3] > _WIDTHS[-1]:
        return f"heads of width {q.shape[3]} are wider than {_WIDTHS[-1]}"
    if blocks is not None:
        if any(size % ROWS for size in block_shape):
            return f"blocks of {block_shape} are not multiples of {ROWS}"
        return None
    return block_lists.static_map_refusal(rule, _WHOLE, _WHOLE, q.shape[1], k.shape[1])


def block_sparse_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    rule: MaskRule,
    scale: float,
    softcap: float | None,
    blocks: Int[Array, "B Q N"] | None,
    block_shape: tuple[int, int],
    config: BlockSparseAttentionConfig,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """See :func:`kernels_pallas.block_sparse_attention.partial_attention`."""
    queries, keys = q.shape[1], k.shape[1]
    tokens = Tokens(q_positions, kv_positions, q_segments, kv_segments)
    if blocks is not None:
        call = _Call(rule, scale, softcap, *block_shape, config.interpret)
        blocks = block_lists.distinct(blocks, block_lists.count(keys, call.block_k))
        return _attention(call, q, k, v, tokens, blocks)
    call = _Call(rule, scale, softcap, _WHOLE, _WHOLE, config.interpret)
    out, log_sum_exp = _attention(call, q, k, v, tokens, None)
    visible = block_lists.static_map(rule, ROWS, ROWS, queries, keys)
    return block_lists.where_in_order(out, log_sum_exp, tokens, rule, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, tokens: Tokens, blocks):
    return _forward(call, q, k, v, tokens, blocks)[0]


def _forward(call: _Call, q, k, v, tokens: Tokens, blocks):
    sides = _sides(call, call.forward(_width(q)), q, k, v, tokens, blocks, by_rows=True)
    static = _static(call, call.forward(_width(q)), q, k)
    out, log_sum_exp = gpu_forward.forward(static, sides)
    out = out[:, : q.shape[1], :, : q.shape[3]]
    log_sum_exp = jnp.swapaxes(log_sum_exp, 1, 2)[:, : q.shape[1]]
    return (out, log_sum_exp), (q, k, v, tokens, blocks, out, log_sum_exp)


def _backward(call: _Call, residuals, cotangents):
    q, k, v, tokens, blocks, out, log_sum_exp = residuals
    cotangent, by_log_sum_exp = cotangents
    inner = operands.inner_products(out, cotangent, by_log_sum_exp)
    per_query = jnp.stack([log_sum_exp * math.log2(math.e), inner], axis=1)
    per_query = operands.whole(per_query.transpose(0, 3, 1, 2), _WHOLE, 3)
    cotangent = _padded(cotangent)
    arrays = q, k, v, tokens, blocks
    tiles = call.backward_q(_width(q))
    rows = _sides(call, tiles, *arrays, by_rows=True)
    to_q = gpu_backward.backward_q(_static(call, tiles, q, k), rows, cotangent, per_query)
    tiles = call.backward_kv(_width(q))
    columns = _sides(call, tiles, *arrays, by_rows=False)
    to_k, to_v = gpu_backward.backward_kv(_static(call, tiles, q, k), columns, cotangent, per_query)
    to_q, to_k, to_v = (
        x[:, : like.shape[1], :, : like.shape[3]] for x, like in ((to_q, q), (to_k, k), (to_v, v))
    )
    return to_q, to_k, to_v, None, None


_attention.defvjp(_forward, _backward)


def _width(q: Array) -> int:
    return next(width for width in _WIDTHS if q.shape[3] <= width)


def _padded(x: Array) -> Array:
    return operands.whole(operands.whole(x, _WHOLE, 1), _width(x), 3)


def _static(call: _Call, tiles: Tiles, q: Array, k: Array) -> Static:
    group = q.shape[2] // k.shape[2]
    return Static(call.rule, call.scale, call.softcap, tiles, group, call.interpret)


def _sides(
    call: _Call,
    tiles: Tiles,
    q: Array,
    k: Array,
    v: Array,
    tokens: Tokens,
    blocks,
    *,
    by_rows: bool,
) -> Sides:
    sizes = (tiles.outer, tiles.inner) if by_rows else (tiles.inner, tiles.outer)
    tokens = operands.padded_tokens(tokens, _WHOLE, _WHOLE)
    queries, keys = tokens.q_positions.shape[1], tokens.kv_positions.shape[1]
    if blocks is not None:
        of_q, of_k = call.block_q // sizes[0], call.block_k // sizes[1]
        blocks = block_lists.finer(blocks, of_q, of_k, queries // sizes[0], keys // sizes[1])
    found = operands.pairs_of(call.rule, blocks, sizes, queries, keys, by_rows=by_rows)
    return Sides(
        *pairs.ranges(found, call.rule, tokens, *sizes, by_rows=by_rows),
        jnp.stack([tokens.q_positions, tokens.q_segments], axis=1),
        jnp.stack([tokens.kv_positions, tokens.kv_segments], axis=1),
        *map(_padded, (q, k, v)),
    )
