"""JAX's own sparse attention kernel for TPUs, as a program to read schedules of.

Its parts as functions on their own, with operands of the program: see
``kernels_pallas.block_sparse_attention.cost.kernel``.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from kernels_pallas.common.predict import EVERY, Step

Pass = Literal["forward", "fused", "by_queries", "by_keys"]
_PRODUCTS = {"forward": 2, "fused": 5, "by_queries": 3, "by_keys": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block sizes of one kernel.

    Attributes:
        q: queries in a block.
        k: keys in a block.
        compute: keys that are multiplied at a time.
    """

    q: int
    k: int
    compute: int


# Splash at its best: the block sizes of the fewest cycles of a visited block, and the cycles of a
# call for each head with those of the fastest call, of all block sizes that the slow part of
# ``tests/kernels_pallas/test_attention_speed.py`` compiles. Its backward pass is faster as one
# kernel than as two, by which a block takes more than 1.4 times as long.
BEST: Mapping[tuple[str, Pass], tuple[Blocks, int]] = {
    ("v5e", "forward"): (Blocks(q=512, k=2048, compute=512), 54046),
    ("v6e", "forward"): (Blocks(q=1024, k=2048, compute=512), 37786),
    ("v5e", "fused"): (Blocks(q=1024, k=512, compute=512), 117764),
    ("v6e", "fused"): (Blocks(q=2048, k=2048, compute=256), 70993),
}


def program(
    *, which: Pass, q: int, k: int, compute: int, length: int, heads: int, width: int, dtype: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Causal attention, or one kernel of its gradient, for ``kernels_pallas.common.schedule``."""
    sizes = {"block_q": q, "block_kv": k, "block_kv_compute": compute}
    sizes |= {"block_q_dkv": q, "block_kv_dkv": k, "block_kv_dkv_compute": compute}
    fused = which == "fused"
    sizes |= {} if fused else {"block_q_dq": q, "block_kv_dq": k}
    blocks = splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    made = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    array = jax.ShapeDtypeStruct((heads, length, width), dtype)
    if which == "forward":
        return made, (array,) * 3
    row = jax.ShapeDtypeStruct((heads, length), jnp.float32)

    def backward(queries, keys, values, log_sum_exp, cotangent, inner):
        options = {
            "mask_value": made.kwargs["mask_value"],
            "mask_function": made.kwargs["mask_function"],
            "attn_logits_soft_cap": None,
            "is_mqa": False,
            "interpret": False,
            "q_layout": blocks.q_layout,
            "k_layout": blocks.k_layout,
            "v_layout": blocks.v_layout,
        }
        arrays = (queries, keys, values, None, None, log_sum_exp, cotangent, inner)
        if which == "by_queries":
            return splash._splash_attention_bwd_dq(
                *arrays, bq=q, bkv=k, mask_info=made.dq_mask_info, **options
            )
        return splash._splash_attention_bwd_dkv(
            *arrays,
            bq=q,
            bkv=k,
            bkv_compute=compute,
            mask_info=made.dkv_mask_info,
            use_fused_bwd_kernel=fused,
            **options,
        )

    return backward, (array, array, array, row, array, row)


def parts(which: Pass, blocks: Blocks) -> dict[str, tuple[str, ...]]:
    """Names for ``predict.part_cycles``."""
    separate = blocks.compute < blocks.k
    if which == "fused":
        # Gradients of queries are cleared in every step, and copied where they are summed apart.
        before = ("first", EVERY)
        return {
            "before": before,
            "bodies": ("body",),
            "after": (EVERY, "last") if separate else ("last",),
        }
    return {"before": ("first",), "bodies": ("body",), "after": ("last",)}


def steps(
    which: Pass, blocks: Blocks, *, length: int, heads: int, width: int, itemsize: int = 2
) -> collections.Counter[Step]:
    """The grid steps of a causal call: all blocks, those above the diagonal without a body."""
    by_rows = which in ("forward", "by_queries")
    num_q, num_k = length // blocks.q, length // blocks.k
    of_q, of_k = (n * width * itemsize for n in (blocks.q, blocks.k))
    of_q *= 1 if which == "forward" else 2
    found: collections.Counter[Step] = collections.Counter()
    for outer in range(num_q if by_rows else num_k):
        last = (num_k if by_rows else num_q) - 1
        for inner in range(last + 1):
            i, j = (outer, inner) if by_rows else (inner, outer)
            live = j * blocks.k < (i + 1) * blocks.q
            names = {"first"} if inner == 0 else set()
            names |= {"last"} if inner == last else set()
            names |= {"body"} if live else set()
            moved = live * (2 * of_k if by_rows else of_q)
            moved += (inner == 0) * (of_q if by_rows else 2 * of_k)
            moved += (inner == last) * (of_q if by_rows else 2 * of_k)
            # Partial gradients of queries are written for each block of keys, zeros as well.
            moved += (which == "fused") * blocks.q * width * itemsize
            work = live * _PRODUCTS[which] * blocks.q * blocks.k * width
            found[Step(parts=frozenset(names), bytes=moved, multiply_adds=work)] += 1
    return collections.Counter({step: heads * count for step, count in found.items()})


def summed_bytes(
    which: Pass, blocks: Blocks, *, length: int, heads: int, width: int, itemsize: int = 2
) -> float:
    """What is moved after the kernel, to sum partial gradients of queries."""
    return (which == "fused") * (length // blocks.k + 1) * heads * length * width * itemsize
