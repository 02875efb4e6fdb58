"""Rows by asynchronous copies: only those that the index names cross the memory bus.

A row of a float32 array is copied alone. Two bfloat16 rows share the 32-bit words of a pair, in
HBM as in VMEM, and nothing that addresses HBM can part them; so a word row (the pair) is what is
copied, once where both rows are wanted, and taken apart in VMEM. Per batch row of ``C`` used
slots, ``W`` word rows (``C`` for float32, the distinct pairs for bfloat16; 4 bytes an element):

    gather_tokens           reads W,      writes C
      its gradient          reads C,      writes T
    scatter_add_tokens      reads W + C,  writes W     (the residual's buffer, in place)
      its gradient          reads W + C,  writes C     (the residual's is the cotangent itself)

which is 1.00 times the least for float32, and for bfloat16 1.00 times the least in words. A pair
that straddles two blocks of slots is read, or written, once more. Counted as if bfloat16 rows
could be copied alone, a random 2/3 (1/3) of the tokens costs 1.17 (1.33) times the least to
gather and 1.22 (1.44) times to scatter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.common import dispatch
from kernels_pallas.token_routing.ref import in_use
from kernels_pallas.token_routing.specs import MAX_WIDTH, TokenRoutingConfig

_DTYPES = (jnp.float32, jnp.bfloat16)
_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def supports_gather(*, x, index, count, dtype, config) -> str | None:
    """Why the gather cannot run, or ``None``."""
    del index, count
    return dispatch.needs("tpu", config.interpret) or _refusal(x, (x.dtype, dtype))


def supports_scatter_add(*, residual, y, gate, index, count, config) -> str | None:
    """Why the scatter cannot run, or ``None``."""
    del gate, index, count
    reason = dispatch.needs("tpu", config.interpret)
    return reason or _refusal(residual, (residual.dtype, y.dtype))


def _refusal(tokens, dtypes) -> str | None:
    if not all(dtype in _DTYPES for dtype in dtypes):
        return "it takes float32 and bfloat16"
    if tokens.shape[1] % _packing(tokens.dtype):
        return f"bfloat16 rows are copied in pairs, so a length of {tokens.shape[1]} is odd"
    if tokens.shape[2] > MAX_WIDTH:
        return f"a width of {tokens.shape[2]} is over {MAX_WIDTH}"
    return None


def gather_tokens(
    *,
    x: Float[Array, "B T D"],
    index: Int[Array, "B C"],
    count: Int[Array, " B"],
    dtype: jnp.dtype,
    config: TokenRoutingConfig,
) -> Float[Array, "B C D"]:
    """See :func:`kernels_pallas.token_routing.gather_tokens`."""
    return _gather(config, dtype, x.shape[1], x.dtype, x, index, count)


def scatter_add_tokens(
    *,
    residual: Float[Array, "B T D"],
    y: Float[Array, "B C D"],
    gate: Float[Array, "B C"],
    index: Int[Array, "B C"],
    count: Int[Array, " B"],
    config: TokenRoutingConfig,
) -> Float[Array, "B T D"]:
    """See :func:`kernels_pallas.token_routing.scatter_add_tokens`."""
    return _scatter(config, residual, y, gate, index, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(config, dtype, length, x_dtype, x, index, count):
    del length, x_dtype
    return _gather_call(config, dtype, x, index, count)


def _gather_forward(config, dtype, length, x_dtype, x, index, count):
    del length, x_dtype
    return _gather_call(config, dtype, x, index, count), (index, count)


def _gather_backward(config, dtype, length, x_dtype, residuals, cotangent):
    del dtype
    return _spread_call(config, length, x_dtype, cotangent, *residuals), None, None


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scatter(config, residual, y, gate, index, count):
    return _scatter_call(config, residual, y, gate, index, count)


def _scatter_forward(config, residual, y, gate, index, count):
    out = _scatter_call(config, residual, y, gate, index, count)
    return out, (y, gate, index, count)


def _scatter_backward(config, residuals, cotangent):
    return cotangent, *_pull_call(config, cotangent, *residuals), None, None


_scatter.defvjp(_scatter_forward, _scatter_backward)


# Word rows.


def _packing(dtype) -> int:
    """Rows that share a word."""
    return 4 // jnp.dtype(dtype).itemsize


def _word(index, slot, packing: int):
    return index[0, 0, slot] >> (packing - 1)


def _rows_of(word, packing: int):
    """The slice of the rows of a word row."""
    return pl.ds(pl.multiple_of(word * packing, packing), packing)


def _differs(index, slot, packing: int):
    """Whether a slot is the first of its batch row, or in another word than the one before."""
    before = _word(index, jnp.maximum(slot - 1, 0), packing)
    return (slot == 0) | (_word(index, slot, packing) != before)


def _each_word(index, first, slots, packing: int, needed, start):
    """``start(position, word)`` for those of ``slots`` slots that need it; returns how many."""

    def body(position, started):
        slot = first + position
        wanted = needed(slot)
        pl.when(wanted)(lambda: start(position, _word(index, slot, packing)))
        return started + wanted.astype(jnp.int32)

    return lax.fori_loop(0, slots, body, jnp.int32(0))


def _wait(copies, copy) -> None:
    """Waits for a number of copies, all of the size of ``copy``."""

    def body(_, carry):
        copy.wait()
        return carry

    lax.fori_loop(0, copies, body, 0)


def _diagonal(size: int):
    rows = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return rows == lax.broadcasted_iota(jnp.int32, (size, size), 1)


# Gather, and the gradient of the scatter, which gathers too.


def _gathered(count, index, x, scratch):
    """float32 rows of the slots of this grid step, zeros where none; the next step's are sent for.

    Returns the rows ``[C', D]`` and how many of them are tokens.
    """
    raw, parts, rows, pending, arrived = scratch
    block, packing = rows.shape[0], _packing(x.dtype)
    batch, step = pl.program_id(0), pl.program_id(1)

    def used(step):
        return jnp.clip(count[batch] - step * block, 0, block)

    def fresh(slot):
        # A block fetches its first word itself; float32 fetches a repeated row again.
        return (slot % block == 0) | _differs(index, slot, packing) | (packing == 1)

    def copy(buffer, position, word):
        source = x.at[batch, _rows_of(word, packing)]
        target = raw.at[buffer, _rows_of(position, packing)]
        return pltpu.make_async_copy(source, target, arrived.at[buffer])

    def send_for(step):
        def start(position, word):
            copy(step % 2, position, word).start()

        pending[step % 2] = _each_word(index, step * block, used(step), packing, fresh, start)

    pl.when(step == 0)(lambda: send_for(step))
    pl.when(step + 1 < pl.num_programs(1))(lambda: send_for(step + 1))
    buffer, tokens = step % 2, used(step)
    _wait(pending[buffer], copy(buffer, 0, 0))
    _unpack(raw.at[buffer], parts)

    def pick(position, holder):
        slot = step * block + position
        holder = jnp.where(fresh(slot), position, holder)
        part = index[0, 0, slot] & (packing - 1)
        rows[pl.ds(position, 1), :] = parts[part, pl.ds(holder, 1), :]
        return holder

    if packing > 1:
        lax.fori_loop(0, tokens, pick, jnp.int32(0))
    found = rows if packing > 1 else parts.at[0]
    filled = lax.broadcasted_iota(jnp.int32, rows.shape, 0) < tokens
    return jnp.where(filled, found[...], 0.0), tokens


def _gather_scratch(block: int, width: int, dtype) -> list[Any]:
    return [
        pltpu.VMEM((2, _packing(dtype) * block, width), dtype),
        pltpu.VMEM((_packing(dtype), block, width), jnp.float32),
        pltpu.VMEM((block, width), jnp.float32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def _gather_kernel(count, index, x, out, *scratch):
    rows, _ = _gathered(count, index, x, scratch)
    out[0] = rows.astype(out.dtype)


def _gather_call(config, dtype, x, index, count):
    (batch, _, width), slots = x.shape, index.shape[1]
    block = config.slots(slots, width)
    return pl.pallas_call(
        _gather_kernel,
        out_shape=jax.ShapeDtypeStruct((batch, slots, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(slots, block)),
            in_specs=[_row_of_scalars(slots), _ANYWHERE],
            out_specs=_block_of_rows(block, width),
            scratch_shapes=_gather_scratch(block, width, x.dtype),
        ),
        name="gather_tokens",
        **_options(config),
    )(count, index[:, None, :], x)


def _pull_kernel(count, index, gate, y, cotangent, y_gradient, gate_gradient, *scratch):
    rows, tokens = _gathered(count, index, cotangent, scratch)
    block = rows.shape[0]
    diagonal = _diagonal(block)
    here = lax.broadcasted_iota(jnp.int32, (1, block), 1) < tokens
    # A lane per slot becomes a sublane per slot, and back, by a sum with one term.
    lanes = jnp.where(here, gate[0, 0], 0.0)
    sublanes = jnp.sum(jnp.where(diagonal, lanes, 0.0), axis=1, keepdims=True)
    y_gradient[0] = (sublanes * rows).astype(y_gradient.dtype)
    filled = lax.broadcasted_iota(jnp.int32, rows.shape, 0) < tokens
    products = rows * jnp.where(filled, y[0].astype(jnp.float32), 0.0)
    dots = jnp.sum(products, axis=1, keepdims=True)
    gate_gradient[0, 0] = jnp.sum(jnp.where(diagonal, dots, 0.0), axis=0, keepdims=True)


def _pull_call(config, cotangent, y, gate, index, count):
    """Gradients of ``y`` and ``gate``."""
    batch, slots, width = y.shape
    block = config.slots(slots, width)
    blocks = pl.cdiv(slots, block)
    padding = blocks * block - slots
    lanes = jnp.pad(gate, ((0, 0), (0, padding))).reshape(batch, blocks, 1, block)
    a_block_of_lanes = pl.BlockSpec((1, 1, 1, block), lambda b, i, *_: (b, i, 0, 0))
    y_gradient, gate_gradient = pl.pallas_call(
        _pull_kernel,
        out_shape=(y, lanes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, blocks),
            in_specs=[
                _row_of_scalars(slots),
                a_block_of_lanes,
                _block_of_rows(block, width),
                _ANYWHERE,
            ],
            out_specs=(_block_of_rows(block, width), a_block_of_lanes),
            scratch_shapes=_gather_scratch(block, width, cotangent.dtype),
        ),
        name="scatter_add_tokens_backward",
        **_options(config),
    )(count, index[:, None, :], lanes, y, cotangent)
    return y_gradient, gate_gradient.reshape(batch, -1)[:, :slots]


# Scatter.


def _scatter_kernel(count, index, gate, y, residual, out, *scratch):
    """Reads the word rows of a block, adds to them, and writes them back where they were.

    Three buffers: while one is added to, the next is read and the last is written.
    """
    del residual  # out is the same memory
    raw, total, source, carry, pending, read, written = scratch
    block, packing = source.shape[0], _packing(out.dtype)
    batch, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    buffer = step % 3

    def used(step):
        return jnp.clip(count[batch] - step * block, 0, block)

    def incoming(step, position, word):
        here = raw.at[step % 3, _rows_of(position, packing)]
        there = out.at[batch, _rows_of(word, packing)]
        return pltpu.make_async_copy(there, here, read.at[step % 3])

    def outgoing(position, word):
        here = raw.at[buffer, _rows_of(position, packing)]
        there = out.at[batch, _rows_of(word, packing)]
        return pltpu.make_async_copy(here, there, written.at[0])

    def send_for(step):
        def needed(slot):
            # A word row that the block before has too comes from there, not from memory.
            return _differs(index, slot, packing)

        def start(position, word):
            incoming(step, position, word).start()

        pending[step % 3] = _each_word(index, step * block, used(step), packing, needed, start)

    pl.when(step == 0)(lambda: send_for(step))
    pl.when(step + 1 < steps)(lambda: send_for(step + 1))
    source[...] = y[0].astype(jnp.float32)
    _wait(pending[buffer], incoming(step, 0, 0))
    _unpack(raw.at[buffer], total)

    @pl.when((step > 0) & ~_differs(index, step * block, packing))
    def _():
        total[:, pl.ds(0, 1), :] = carry[...]

    last = _accumulate(index, gate, source, total, step * block, used(step))
    carry[...] = total[:, pl.ds(last, 1), :]
    _pack(total, raw.at[buffer])
    # In order, for a word row that two blocks write.
    pl.when(step > 0)(lambda: _wait(pending[3], outgoing(0, 0)))
    pending[3] = _each_word(
        index,
        step * block,
        used(step),
        packing,
        lambda slot: (slot % block == 0) | _differs(index, slot, packing),
        lambda position, word: outgoing(position, word).start(),
    )
    pl.when(step + 1 == steps)(lambda: _wait(pending[3], outgoing(0, 0)))


def _accumulate(index, gate, source, total, first, slots):
    """Adds gated rows where their words are held; returns where the last is."""
    packing = total.shape[0]

    def add(position, holder):
        slot = first + position
        holder = jnp.where(_differs(index, slot, packing), position, holder)
        row = (index[0, 0, slot] & (packing - 1), pl.ds(holder, 1), slice(None))
        total[row] += gate[0, 0, slot] * source[pl.ds(position, 1), :]
        return holder

    return lax.fori_loop(0, slots, add, jnp.int32(0))


def _unpack(words, parts) -> None:
    """Word rows ``[rows in a word · C', D]`` to float32 ``[rows in a word, C', D]``."""
    if words.dtype == jnp.float32:
        parts[0] = words[...]
        return
    both = pltpu.bitcast(words[...], jnp.uint32)
    parts[0] = lax.bitcast_convert_type(both << 16, jnp.float32)
    parts[1] = lax.bitcast_convert_type(both & jnp.uint32(0xFFFF0000), jnp.float32)


def _pack(parts, words) -> None:
    """The inverse, rounded."""
    if words.dtype == jnp.float32:
        words[...] = parts[0]
        return
    low, high = (
        lax.bitcast_convert_type(parts[row].astype(words.dtype).astype(jnp.float32), jnp.uint32)
        for row in range(2)
    )
    words[...] = pltpu.bitcast((low >> 16) | high, words.dtype)


def _scatter_call(config, residual, y, gate, index, count):
    batch, slots, width = y.shape
    block, packing = config.slots(slots, width), _packing(residual.dtype)
    scratch = [
        pltpu.VMEM((3, packing * block, width), residual.dtype),
        pltpu.VMEM((packing, block, width), jnp.float32),
        pltpu.VMEM((block, width), jnp.float32),
        pltpu.VMEM((packing, 1, width), jnp.float32),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA((1,)),
    ]
    return pl.pallas_call(
        _scatter_kernel,
        out_shape=residual,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(slots, block)),
            in_specs=[
                _row_of_scalars(slots),
                _row_of_scalars(slots),
                _block_of_rows(block, width),
                _ANYWHERE,
            ],
            out_specs=_ANYWHERE,
            scratch_shapes=scratch,
        ),
        input_output_aliases={4: 0},
        name="scatter_add_tokens",
        **_options(config),
    )(count, index[:, None, :], gate[:, None, :], y, residual)


# The gradient of the gather.


def _spread_kernel(tokens_of, slots_of, low, high, index, cotangent, out, total, source):
    batch, step = pl.program_id(0), pl.program_id(1)
    final = pl.num_programs(1) - 1
    tokens, slots = tokens_of[batch, step], slots_of[batch, step]
    before = tokens_of[batch, jnp.maximum(step - 1, 0)]
    after = tokens_of[batch, jnp.minimum(step + 1, final)]

    @pl.when((step == 0) | (before != tokens))
    def _():
        total[...] = jnp.zeros_like(total)

    source[...] = cotangent[0].astype(jnp.float32)

    def add(slot, carry):
        row = pl.ds(index[0, 0, slot] - tokens * total.shape[0], 1)
        total[row, :] += source[pl.ds(slot - slots * source.shape[0], 1), :]
        return carry

    lax.fori_loop(low[batch, step], high[batch, step], add, 0)

    @pl.when((step == final) | (after != tokens))
    def _():
        out[0] = total[...].astype(out.dtype)


def _staircase(config, length: int, width: int, index, count):
    """The pairs of a block of tokens and a block of slots that meet, in order.

    The index is sorted, so both go up together: every block is visited in one run of steps, and
    crosses the memory bus once.

    Returns int32 ``[B, S]``: block of tokens, block of slots, first slot, slot after the last.
    """
    slots = index.shape[1]
    tall, wide = config.tokens(length, width), config.slots(slots, width)
    blocks = pl.cdiv(length, tall)
    edges = jnp.minimum(jnp.arange(blocks + 1, dtype=jnp.int32) * tall, length)
    below = in_use(index, count)[:, None, :] & (index[:, None, :] < edges[None, :, None])
    starts = jnp.sum(below, axis=2, dtype=jnp.int32)
    low, high = starts[:, :-1], starts[:, 1:]
    first = jnp.minimum(low, slots - 1) // wide
    last = jnp.maximum(first, (high - 1) // wide)
    ends = jnp.cumsum(last - first + 1, axis=1)
    step = jnp.arange(blocks + pl.cdiv(slots, wide), dtype=jnp.int32)[None, :]
    tokens_of = jnp.sum(ends[:, None, :] <= step[:, :, None], axis=2, dtype=jnp.int32)
    idle = tokens_of == blocks
    tokens_of = jnp.minimum(tokens_of, blocks - 1)
    here = tokens_of[:, :, None] == jnp.arange(blocks)[None, None, :]
    first, last, ends, low, high = (
        jnp.sum(jnp.where(here, values[:, None, :], 0), axis=2)
        for values in (first, last, ends, low, high)
    )
    slots_of = jnp.minimum(first + step - (ends - (last - first + 1)), last)
    low = jnp.maximum(low, slots_of * wide)
    high = jnp.where(idle, low, jnp.minimum(high, (slots_of + 1) * wide))
    return tokens_of, slots_of, low, high


def _spread_call(config, length, dtype, cotangent, index, count):
    batch, slots, width = cotangent.shape
    tall, wide = config.tokens(length, width), config.slots(slots, width)
    steps = _staircase(config, length, width, index, count)
    return pl.pallas_call(
        _spread_kernel,
        out_shape=jax.ShapeDtypeStruct((batch, length, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(batch, steps[0].shape[1]),
            in_specs=[
                _row_of_scalars(slots),
                pl.BlockSpec((1, wide, width), lambda b, s, t, c, *_: (b, c[b, s], 0)),
            ],
            out_specs=pl.BlockSpec((1, tall, width), lambda b, s, t, *_: (b, t[b, s], 0)),
            scratch_shapes=[
                pltpu.VMEM((tall, width), jnp.float32),
                pltpu.VMEM((wide, width), jnp.float32),
            ],
        ),
        name="gather_tokens_backward",
        **_options(config),
    )(*steps, index[:, None, :], cotangent)


def _row_of_scalars(slots: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, slots), lambda b, i, *_: (b, 0, 0), memory_space=pltpu.SMEM)


def _block_of_rows(block: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, block, width), lambda b, i, *_: (b, i, 0))


def _options(config: TokenRoutingConfig) -> dict[str, Any]:
    # Copies and carries pass from one step of a batch row to the next.
    semantics = ("parallel", "arbitrary")
    return {
        "interpret": config.interpret,
        "compiler_params": pltpu.CompilerParams(dimension_semantics=semantics),
    }
