"""Units of a cache by asynchronous copies, in Pallas for the TPU's Mosaic compiler.

A program handles one list of units (:mod:`kernels_pallas.decode_attention.plan`) for one group of
key heads: a loop over blocks of them, the next block's copies under way while one is computed,
also from one list of a row to its next. Of a list of all heads, one copy brings a unit of all
heads of the group.

Bytes: every unit of which something is seen is copied once for each head that reads it, and
nothing else of keys and values; so pages and whole rows cost what they must, plus 4 bytes of mask
for each listed slot (below 1 % of 128-wide bfloat16 keys and values). A single float32 token is
copied alone. A bfloat16 token shares its 32-bit words with its neighbour, and nothing that
addresses HBM can part them: the pair is copied, once where both are selected. So scattered
bfloat16 tokens cost up to twice what they must, and each is a copy of a row for every head,
whose start takes longer than its bytes: on a TPU select pages where that serves.

Where a cache lies matters as much. The kernels take it heads first. A decode loop under ``jit``
that writes new entries as flat rows, ``k.reshape(-1, E).at[(b · K + head) · S + slot].set(...)``,
keeps it so; ``k.at[b, :, slot].set(...)`` makes XLA hold it slots first and copy it whole at each
step. Heads whose width is no multiple of 128 lie in HBM as wide as the next one, and are brought
into that form, by a copy of the cache, when a program takes them as an argument.

Queries and their heads lie on sublanes, slots on lanes. Statistics are in base 2: ``exp2`` is what
the hardware has.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention import NOTHING, merge_partial
from kernels_pallas.common import dispatch
from kernels_pallas.decode_attention import plan as plans
from kernels_pallas.decode_attention.plan import Plan
from kernels_pallas.decode_attention.specs import DecodeAttentionConfig

# Masked scores; below NOTHING, so that a query that sees nothing has weights of zero, not of one.
_NEVER = 2 * NOTHING
_LANES = 128
_DTYPES = (jnp.bfloat16, jnp.float32)
# Of the scalar memory that holds the lists of a row, twice; and of scores kept in VMEM.
_LIST_BYTES = 1 << 18
_SCORE_BYTES = 1 << 22
_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


class _Static(NamedTuple):
    """Sizes: key heads of a group, slots of a block and of a copy, queries and their heads."""

    heads: int
    block: int
    unit: int
    queries: int
    group: int
    scale: float
    softcap: float | None
    interpret: Any

    @property
    def per_block(self) -> int:
        return self.block // self.unit


def supports(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    v: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    selected: Int[Array, "B L M"] | None,
    unit: int,
    config: DecodeAttentionConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``."""
    del others
    page, slots = k.shape[2], shown.shape[2]
    reason = _refusal(q, k, v, slots=slots, config=config)
    if reason is not None or selected is None:
        return reason
    if unit != 1 and (unit % 8 or page % unit):
        return f"selected units of {unit} slots are neither 1 nor 8s that fill pages of {page}"
    static = _static(q, k, slots, unit, 1.0, None, config)
    _, lists, count = selected.shape
    return _overflow(lists * count * max(1, unit // static.unit))


def supports_scores(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    config: DecodeAttentionConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``."""
    del others
    slots = shown.shape[2]
    reason = _refusal(q, k, slots=slots, config=config)
    if reason is not None:
        return reason
    static = _score_static(q, k, slots, 1.0, None, config)
    if _score_bytes(static, q, slots) > _SCORE_BYTES:
        return f"the scores of {slots} slots do not fit the memory of a core"
    return None


def _refusal(q: Array, *pools: Array, slots: int, config: DecodeAttentionConfig) -> str | None:
    reason = dispatch.needs("tpu", config.interpret)
    if reason is not None:
        return reason
    dtypes = [x.dtype for x in (q, *pools)]
    if q.dtype not in _DTYPES or set(dtypes) != {q.dtype}:
        return f"it takes bfloat16 or float32 alike, not {', '.join(map(str, dtypes))}"
    if q.shape[1] > plans.MOST_QUERIES:
        return f"{q.shape[1]} queries of a row are more than {plans.MOST_QUERIES}"
    if pools[0].shape[2] % 8:
        return f"{pools[0].shape[2]} slots in one piece are not a multiple of 8"
    return _overflow(slots // _static(q, pools[0], slots, None, 1.0, None, config).unit)


def _overflow(units: int) -> str | None:
    if 4 * units > _LIST_BYTES:
        return f"{units} units of a row overflow the scalar memory; make pages or units larger"
    return None


def _static(
    q: Array,
    k: Array,
    slots: int,
    chosen: int | None,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
    lists: int = 1,
) -> _Static:
    kv_heads, page = k.shape[1:3]
    itemsize = k.dtype.itemsize
    heads, block = config.tiles(slots, kv_heads // lists, q.shape[3], itemsize)
    unit = plans.copied(page, chosen, block, itemsize)
    block = max(unit, block // unit * unit)
    group = q.shape[2] // kv_heads
    return _Static(heads, block, unit, q.shape[1], group, scale, softcap, config.interpret)


def decode_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    v: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    selected: Int[Array, "B L M"] | None,
    unit: int,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """See :func:`kernels_pallas.decode_attention.partial_decode_attention`."""
    slots, page, split = shown.shape[2], k.shape[2], config.split or 1
    lists = 1 if selected is None else selected.shape[1]
    chosen = None if selected is None else unit
    static = _static(q, k, slots, chosen, scale, softcap, config, lists)
    sizes = {"page": page, "unit": static.unit, "block": static.block, "split": split}
    if selected is None:
        plan = plans.of_slots(shown, pages, **sizes)
    else:
        plan = plans.of_selected(shown, pages, selected, chosen=unit, **sizes)
    outs, log_sum_exps = _attend(static, split, plan, _queries(q, k.shape[1]), k, v)
    parts = [_whole(x, q, split) for x in (outs, log_sum_exps[..., :1])]
    out, log_sum_exp = parts[0], parts[1][..., 0]
    if split == 1:
        out, log_sum_exp = out[0], log_sum_exp[0]
    else:
        out, log_sum_exp = merge_partial(out, log_sum_exp)
    return out.astype(q.dtype), log_sum_exp


def token_scores(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> Float[Array, "B K S"]:
    """See :func:`kernels_pallas.decode_attention.token_scores`; votes by key head.

    Keys are read once; the scores of a group of heads stay in VMEM until their sums are known.
    """
    slots, page = shown.shape[2], k.shape[2]
    static = _score_static(q, k, slots, scale, softcap, config)
    sizes = {"page": page, "unit": static.unit, "block": static.block, "split": 1}
    plan = plans.of_slots(shown, pages, **sizes)
    votes = _vote(static, plan, _queries(q, k.shape[1]), k)
    votes = votes.transpose(0, 1, 3, 2, 4).reshape(q.shape[0], k.shape[1], -1)[..., :slots]
    return jnp.where(jnp.any(shown, axis=1)[:, None], votes, NOTHING)


def _score_static(
    q: Array,
    k: Array,
    slots: int,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> _Static:
    """With so few heads in a group that their scores fit, if any do."""
    static = _static(q, k, slots, None, scale, softcap, config)
    while static.heads > 1 and _score_bytes(static, q, slots) > _SCORE_BYTES:
        smaller = next(n for n in range(static.heads - 1, 0, -1) if static.heads % n == 0)
        static = static._replace(heads=smaller)
    return static


def _score_bytes(static: _Static, q: Array, slots: int) -> int:
    rows = _padded(static.queries * static.group, q.dtype)
    return 4 * static.heads * rows * -(-slots // static.block) * static.block


def _padded(rows: int, dtype: Any) -> int:
    tile = 32 // jnp.dtype(dtype).itemsize
    return -(-rows // tile) * tile


def _queries(q: Float[Array, "B T H E"], kv_heads: int) -> Float[Array, "B K R E"]:
    """By key head; rows are queries by their heads, filled up to whole tiles."""
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    rows = grouped.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, width)
    missing = _padded(rows.shape[2], q.dtype) - rows.shape[2]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))


def _whole(
    x: Float[Array, "BX K R W"], q: Float[Array, "B T H E"], split: int
) -> Float[Array, "X B T H W"]:
    """Undoes ``_queries``, part by part."""
    batch, length, heads, _ = q.shape
    kv_heads, width = x.shape[1], x.shape[3]
    x = x[:, :, : length * heads // kv_heads]
    x = x.reshape(batch, split, kv_heads, length, heads // kv_heads, width)
    return x.transpose(1, 0, 3, 2, 4, 5).reshape(split, batch, length, heads, width)


# Nothing but inference decodes; `impl="xla"` has gradients.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(static: _Static, split: int, plan: Plan, q, k, v):
    return _run_attention(static, split, plan, q, k, v)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _vote(static: _Static, plan: Plan, q, k):
    return _run_votes(static, plan, q, k)


def _refuse(*arguments: Any) -> Any:
    del arguments
    raise NotImplementedError(
        "decode attention with impl='tpu' is forward only; differentiate it with impl='xla'"
    )


_attend.defjvp(_refuse)
_vote.defjvp(_refuse)


# Copies.


class _Stream:
    """Blocks of a row's lists on their way into two buffers, one block ahead."""

    def __init__(self, static: _Static, split, lists, bits, pools, buffers, seen, scratch):
        self.static = static
        self.counts, self.order, self.units, self.bits = *lists, bits
        self.pools, self.buffers, self.seen = pools, buffers, seen
        self.started, self.turn, self.arrived = scratch
        self.part, self.group = pl.program_id(0), pl.program_id(1)
        self.row = lax.div(self.part, split)

        @pl.when(self.group == 0)
        def _():
            self.turn[0] = 0
            self._start(0, 0, 0)

    def list_of(self, group):
        """A list for each group, or one for all."""
        return group if self.units.shape[1] > 1 else 0

    @property
    def count(self):
        """Blocks of this program."""
        return self.counts[self.part, self.list_of(self.group)]

    def number(self, index):
        """Number of the program's block ``index`` in its list."""
        return self.order[0, self.list_of(self.group), index]

    def next(self, index):
        """Waits for block ``index``, sends for the one after it; returns the block's buffer."""
        buffer = self.turn[0]
        ends = index + 1 == self.count
        group = self.group + ends.astype(jnp.int32)

        @pl.when(group < pl.num_programs(1))
        def _():
            self._start(group, jnp.where(ends, 0, index + 1), 1 - buffer)

        def wait(_, carry):
            for copy in self._copies(buffer, 0, 0, 0):
                copy.wait()
            return carry

        lax.fori_loop(0, self.started[buffer], wait, 0)
        self._copy_of_bits(0, 0, buffer).wait()
        self.turn[0] = 1 - buffer
        return buffer

    def _start(self, group, index, buffer):
        per_block = self.static.per_block
        which = self.list_of(group)
        block = self.order[0, which, index]

        def send(index, started):
            unit = self.units[0, which, block * per_block + index]

            @pl.when(unit >= 0)
            def _():
                for copy in self._copies(buffer, group, unit, index):
                    copy.start()

            return started + (unit >= 0).astype(jnp.int32)

        self.started[buffer] = lax.fori_loop(
            0, per_block, send, jnp.int32(0), unroll=math.gcd(per_block, 4)
        )
        self._copy_of_bits(which, block, buffer).start()

    def _copies(self, buffer, group, unit, index):
        size, heads = self.static.unit, self.static.heads
        per_page = self.pools[0].shape[2] // size
        start = pl.multiple_of(lax.rem(unit, per_page) * size, size)
        there = lax.div(unit, per_page), pl.ds(group * heads, heads), pl.ds(start, size)
        here = buffer, slice(None), pl.ds(pl.multiple_of(index * size, size), size)
        return [
            pltpu.make_async_copy(pool.at[there], into.at[here], self.arrived.at[number, buffer])
            for number, (pool, into) in enumerate(zip(self.pools, self.buffers, strict=True))
        ]

    def _copy_of_bits(self, which, block, buffer):
        arrived = self.arrived.at[len(self.pools), buffer]
        return pltpu.make_async_copy(
            self.bits.at[self.row, which, block], self.seen.at[buffer], arrived
        )


def _buffers(static: _Static, pools: list[Array]) -> list[Any]:
    """Scratch of a stream, after its pools' buffers."""
    return [
        *(pltpu.VMEM((2, static.heads, static.block, x.shape[3]), x.dtype) for x in pools),
        pltpu.VMEM((2, 1, static.block), jnp.int32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((len(pools) + 1, 2)),
    ]


def _lists(plan: Plan, split: int) -> list[pl.BlockSpec]:
    """Of a part's order, and of a row's units and what is whole: scalars."""
    return [
        pl.BlockSpec(
            (1, *x.shape[1:]), lambda b, g, *_, n=n: (b // n, 0, 0), memory_space=pltpu.SMEM
        )
        for x, n in ((plan.order, 1), (plan.units, split), (plan.whole, split))
    ]


def _options(static: _Static) -> dict[str, Any]:
    # Copies pass from one list of a row to the next.
    semantics = ("parallel", "arbitrary")
    # Plans name no place outside the pool; checking each copy again takes longer than starting it.
    parameters = pltpu.CompilerParams(dimension_semantics=semantics, disable_bounds_checks=True)
    return {"interpret": static.interpret, "compiler_params": parameters}


# Attention.


def _run_attention(static: _Static, split: int, plan: Plan, q, k, v):
    parts, groups, rows = plan.count.shape[0], k.shape[1] // static.heads, q.shape[2]
    per_group = (None, static.heads, rows)
    shape = (parts, k.shape[1], rows)
    return pl.pallas_call(
        functools.partial(_attention_kernel, static=static, split=split),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(parts, groups),
            in_specs=[
                *_lists(plan, split),
                pl.BlockSpec((*per_group, q.shape[3]), lambda b, g, *_: (b // split, g, 0, 0)),
                *([_ANYWHERE] * 3),
            ],
            out_specs=[
                pl.BlockSpec((*per_group, width), lambda b, g, *_: (b, g, 0, 0))
                for width in (q.shape[3], _LANES)
            ],
            scratch_shapes=_buffers(static, [k, v]),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*shape, width), jnp.float32) for width in (q.shape[3], _LANES)
        ],
        name="decode_attention",
        **_options(static),
    )(plan.count, plan.order, plan.units, plan.whole, q, plan.bits, k, v)


def _attention_kernel(
    count, order, units, whole, q, bits, k, v, out, log_sum_exp, keys, values, seen, *scratch,
    static, split,
):  # fmt: skip
    lists = count, order, units
    stream = _Stream(static, split, lists, bits, (k, v), (keys, values), seen, scratch)
    which = stream.list_of(stream.group)

    def add(index, carry):
        highest, total, accumulated = carry
        buffer = stream.next(index)

        @pl.when(whole[0, which, stream.number(index)] == 0)
        def _():
            _clear(values.at[buffer], seen[buffer])

        scores = _scores(static, q[...], keys[buffer], seen[buffer])
        higher = jnp.maximum(highest, jnp.max(scores, axis=2, keepdims=True))
        weights = jnp.exp2(scores - higher)
        kept = jnp.exp2(highest - higher)
        total = total * kept + jnp.sum(weights, axis=2, keepdims=True)
        more = _product(weights.astype(values.dtype), values[buffer], 1)
        return higher, total, accumulated * kept + more

    column = jnp.zeros((*q.shape[:2], 1), jnp.float32)
    start = jnp.full_like(column, NOTHING), column, jnp.zeros(q.shape, jnp.float32)
    highest, total, accumulated = lax.fori_loop(0, stream.count, add, start)
    total = jnp.where(total > 0, total, 1.0)
    out[...] = accumulated / total
    # NOTHING was never scaled to base 2.
    rows = jnp.where(highest > NOTHING, (highest + jnp.log2(total)) * math.log(2.0), NOTHING)
    log_sum_exp[...] = jnp.broadcast_to(rows, log_sum_exp.shape)


def _clear(values, seen) -> None:
    """Zeros where nobody sees: memory that no copy wrote, and what empty slots hold."""
    heads, slots, width = values.shape
    lanes = min(width, _LANES)
    column = jnp.broadcast_to(seen, (lanes, slots)).T != 0
    for start in range(0, width, lanes):
        part = pl.ds(start, min(lanes, width - start))
        for head in range(heads):
            kept = values[head, :, part].astype(jnp.float32)
            kept = jnp.where(column[:, : kept.shape[1]], kept, 0.0)
            values[head, :, part] = kept.astype(values.dtype)


# Votes.


def _run_votes(static: _Static, plan: Plan, q, k):
    batch, groups, rows = q.shape[0], k.shape[1] // static.heads, q.shape[2]
    count = plan.bits.shape[2]
    return pl.pallas_call(
        functools.partial(_vote_kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, groups),
            in_specs=[
                *_lists(plan, 1),
                pl.BlockSpec((None, static.heads, rows, q.shape[3]), lambda b, g, *_: (b, g, 0, 0)),
                *([_ANYWHERE] * 2),
            ],
            out_specs=pl.BlockSpec(
                (None, None, count, static.heads, static.block), lambda b, g, *_: (b, g, 0, 0, 0)
            ),
            scratch_shapes=[
                pltpu.VMEM((count, static.heads, rows, static.block), jnp.float32),
                *_buffers(static, [k]),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, groups, count, static.heads, static.block), jnp.float32
        ),
        name="token_scores",
        **_options(static),
    )(plan.count, plan.order, plan.units, plan.whole, q, plan.bits, k)


def _vote_kernel(
    count, order, units, whole, q, bits, k, votes, scores, keys, seen, *scratch, static
):
    del whole  # scores of unseen slots are replaced, whatever their keys are
    stream = _Stream(static, 1, (count, order, units), bits, (k,), (keys,), seen, scratch)

    def score(index, carry):
        highest, total = carry
        buffer = stream.next(index)
        fresh = _scores(static, q[...], keys[buffer], seen[buffer])
        scores[stream.number(index)] = fresh
        higher = jnp.maximum(highest, jnp.max(fresh, axis=2, keepdims=True))
        weights = jnp.sum(jnp.exp2(fresh - higher), axis=2, keepdims=True)
        return higher, total * jnp.exp2(highest - higher) + weights

    column = jnp.zeros((*q.shape[:2], 1), jnp.float32)
    start = jnp.full_like(column, NOTHING), column
    highest, total = lax.fori_loop(0, stream.count, score, start)
    share = 1.0 / jnp.where(total > 0, total, 1.0)

    def vote(index, carry):
        block = stream.number(index)
        votes[block] = jnp.sum(jnp.exp2(scores[block] - highest) * share, axis=1)
        return carry

    lax.fori_loop(0, stream.count, vote, 0)


# Both.


def _scores(static: _Static, q, keys, seen):
    """In base 2, ``[heads, rows, slots]``."""
    products = _product(q, keys, 2)
    if static.softcap is None:
        scores = products * (static.scale * math.log2(math.e))
    else:
        capped = jnp.tanh(products * (static.scale / static.softcap))
        scores = capped * (static.softcap * math.log2(math.e))
    shape = scores.shape[1:]
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    # Of a row; no query is called after the last, for the rows that fill up a tile.
    query = sum((row >= (t + 1) * static.group).astype(jnp.int32) for t in range(static.queries))
    bit = lax.shift_right_logical(jnp.broadcast_to(seen, shape), query) & 1
    return jnp.where((bit != 0)[None], scores, _NEVER)


def _product(a, b, contracted: int):
    """By heads, over the last axis of ``a`` and ``contracted`` of ``b``."""
    return lax.dot_general(
        a,
        b,
        (((2,), (contracted,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
