"""What a call costs on a TPU: its kernels on their own, and the grid steps that they run.

The steps come from the list of pairs that the kernels get, so that a rule, packed documents and
lists at run time are all counted as they would run.
"""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels_pallas.block_sparse_attention import operands, pairs, tpu_backward, tpu_forward
from kernels_pallas.block_sparse_attention import specs as shapes
from kernels_pallas.block_sparse_attention.blocks import Tokens, distinct, static_map
from kernels_pallas.block_sparse_attention.masks import Causal, MaskRule, SlidingWindow
from kernels_pallas.block_sparse_attention.tpu_operands import Operands, Static
from kernels_pallas.common.predict import Peak, Step, call_cycles, part_cycles
from kernels_pallas.common.schedule import Schedule

PASSES: tuple[shapes.Pass, ...] = ("forward", "backward")
SHAPES = shapes.SHAPES | shapes.TPU_SHAPES
# Names of the parts of a grid step, for ``predict.part_cycles``; the rule is a ``RangeRule``.
BODIES = ("segments", "positions", "whole")
PARTS = {
    "forward": {"before": ("first", "turn"), "bodies": BODIES, "after": ("last",)},
    "backward": {"before": ("start", "first", "turn"), "bodies": BODIES, "after": ("last",)},
}
_KINDS = {
    pairs.LIVE: "segments",
    pairs.LIVE | pairs.ALIKE: "positions",
    pairs.LIVE | pairs.ALIKE | pairs.WHOLE: "whole",
}
# Products of a pair: scores and results; scores and its gradient, and three gradients.
_PRODUCTS = {"forward": 2, "backward": 5}


def rule_of(shape: shapes.Shape) -> Causal | SlidingWindow:
    """Causal, within the window of the shape if it has one."""
    return Causal() if shape.window is None else SlidingWindow(size=shape.window)


def kernel(
    *, which: shapes.Pass, shape: str, dtype: str, block_q: int, block_k: int, listed: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One kernel of a named shape, for ``kernels_pallas.common.schedule``.

    Its operands are those of the program, so that the compiler does not keep them in VMEM, as it
    does with what a program makes itself, and with arrays of a few hundred KiB. With ``listed``
    the number of steps is dynamic.
    """
    sizes = SHAPES[shape]
    rule, struct = rule_of(sizes), cast(Any, jax.ShapeDtypeStruct)
    static = Static(rule, sizes.width**-0.5, None, block_q, block_k, False)
    queries, keys = (-(-sizes.length // block) * block for block in (block_q, block_k))
    entries = int(static_map(rule, block_q, block_k, sizes.length, sizes.length).sum())
    q = struct((sizes.batch, sizes.heads, queries, sizes.width), dtype)
    k = struct((sizes.batch, sizes.kv_heads, keys, sizes.width), dtype)
    q_tokens, kv_tokens = (struct((sizes.batch, 2, n), jnp.int32) for n in (queries, keys))
    arrays = [Operands(q_tokens, kv_tokens, q, k, k)]
    if which == "backward":
        arrays += [q, struct((sizes.batch, sizes.heads, 2, queries), jnp.float32)]
    backward = functools.partial(tpu_backward.by_columns, queries=True)
    run = tpu_forward.run if which == "forward" else backward

    def call(packed: Any, count: Any, *arrays: Any) -> Any:
        return run(static, pairs.Listed(packed, count if listed else entries), *arrays)

    return call, (struct((sizes.batch * entries,), jnp.int32), struct((), jnp.int32), *arrays)


def steps(
    which: shapes.Pass,
    shape: shapes.Shape,
    rule: MaskRule,
    *,
    block_q: int,
    block_k: int,
    itemsize: int = 2,
    blocks: Int[Array, "B Q N"] | None = None,
) -> collections.Counter[Step]:
    """The grid steps of a call over whole rows of one document each.

    Args:
        which: the kernel.
        shape: of the call.
        rule: of the call.
        block_q: queries in a block.
        block_k: keys in a block.
        itemsize: bytes of an element.
        blocks: lists at run time; ``None`` takes the blocks from the rule.
    """
    by_rows = which == "forward"
    listed = _entries(shape, rule, block_q, block_k, blocks, by_rows=by_rows)
    entries = np.asarray(listed.entries).reshape(shape.batch, -1)[:, : int(listed.steps)]
    width = -(-shape.width // 128) * 128
    own, other = (n * width * itemsize for n in (block_q, block_k))
    # Queries and results stay while keys and values pass, or the other way round, in pairs.
    own, other = (own, 2 * other) if by_rows else (2 * other, 2 * own)
    group = 1 if by_rows else shape.heads // shape.kv_heads
    found: collections.Counter[Step] = collections.Counter()
    for row in entries:
        before = -1
        inner = np.asarray(pairs.inner(jnp.asarray(row))).tolist()
        for place, (entry, loaded) in enumerate(zip(row.tolist(), inner, strict=True)):
            for head in range(group):
                parts = _parts(which, entry, first=place == 0 and head == 0)
                parts -= {"first", "turn"} if head else set()
                parts -= {"last"} if head < group - 1 else set()
                moved = own * (("first" in parts) + ("last" in parts))
                moved += other * (loaded != before or group > 1)
                before = loaded
                live = bool(entry & pairs.LIVE)
                work = live * _PRODUCTS[which] * block_q * block_k * shape.width
                found[Step(parts=frozenset(parts), bytes=moved, multiply_adds=work)] += 1
    outer = shape.heads if by_rows else shape.kv_heads
    return collections.Counter({step: outer * count for step, count in found.items()})


def _parts(which: shapes.Pass, entry: int, *, first: bool) -> set[str]:
    parts = {"start"} if first and which == "backward" else set()
    parts |= {"first"} if entry & pairs.FIRST else set()
    parts |= {"turn"} if entry & pairs.TURN else set()
    parts |= {"last"} if entry & pairs.LAST else set()
    kind = entry & (pairs.LIVE | pairs.ALIKE | pairs.WHOLE)
    return parts | ({_KINDS[kind]} if kind else set())


def _entries(shape, rule, block_q, block_k, blocks, *, by_rows: bool) -> pairs.Listed:
    positions = jnp.broadcast_to(jnp.arange(shape.length), (shape.batch, shape.length))
    ones = jnp.ones_like(positions)
    tokens = operands.padded_tokens(Tokens(positions, positions, ones, ones), block_q, block_k)
    if blocks is not None:
        blocks = distinct(blocks, -(-shape.length // block_k))
    sizes = block_q, block_k
    found = operands.pairs_of(rule, blocks, sizes, shape.length, shape.length, by_rows=by_rows)
    return pairs.packed(
        found, rule, tokens, block_q, block_k, by_rows=by_rows, shortened=blocks is not None
    )


def candidates(which: shapes.Pass, shape: str, dtype: str) -> list[dict[str, int]]:
    """Tiles to try: those with a float32 score matrix of 4 MiB at most."""
    del which
    most = 1 << (20 if jnp.dtype(dtype).itemsize == 2 else 18)
    lengths = [n for n in (256, 512, 1024, 2048) if n <= max(SHAPES[shape].length, 256)]
    return [
        {"block_q": q, "block_k": k}
        for q in lengths
        for k in lengths
        if 1 << 17 <= q * k <= most and max(q, k) <= 4 * min(q, k)
    ]


def tuned_name(which: shapes.Pass, shape: str, dtype: str) -> str:
    """The key of an entry of ``tuned.json``."""
    return shapes.tuned_key(which, dtype, SHAPES[shape].width, rule_of(SHAPES[shape]))


def predicted(
    found: Schedule,
    peak: Peak,
    which: shapes.Pass,
    shape: str,
    dtype: str,
    sizes: Mapping[str, int],
) -> float:
    """Cycles of a call of a named shape."""
    named, itemsize = SHAPES[shape], jnp.dtype(dtype).itemsize
    counted = steps(
        which,
        named,
        rule_of(named),
        block_q=sizes["block_q"],
        block_k=sizes["block_k"],
        itemsize=itemsize,
    )
    cycles = call_cycles(counted, part_cycles(found, **PARTS[which]), peak)
    if which == "backward":
        cycles += unscaled_bytes(named, itemsize) / peak.bytes_per_cycle
    return cycles


def unscaled_bytes(shape: shapes.Shape, itemsize: int) -> float:
    """What scaling and casting the gradients of the queries moves, after the kernel."""
    return shape.batch * shape.heads * shape.length * shape.width * (4 + itemsize)
