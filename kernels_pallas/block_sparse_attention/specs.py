"""Block sizes, and the shapes that tests and benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.common.tuned import lookup

# Log-sum-exp of a query that sees no key: finite, so that merging and gradients need no care.
NOTHING = -1e30

Pass = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparseAttentionConfig:
    """Block sizes.

    Attributes:
        block: of ``"xla"``: queries, and granularity of keys, handled at a time; ``None``
            derives it from the length.
        block_q: of ``"tpu"``: queries handled at a time; ``None`` takes what was tuned for the
            device, or else derives it from the length.
        block_k: of ``"tpu"``: keys handled at a time; likewise.
        backward_q: of the backward pass of ``"tpu"``; ``None`` takes ``block_q`` if that is given.
        backward_k: likewise.
        interpret: of ``"tpu"`` and ``"gpu"``: the ``interpret`` of Pallas; runs the kernel
            anywhere, slowly. ``"tpu"`` takes true, ``"gpu"`` parameters of the Mosaic-GPU one.
    """

    block: int | None = None
    block_q: int | None = None
    block_k: int | None = None
    backward_q: int | None = None
    backward_k: int | None = None
    interpret: Any = False

    def of(self, length: int) -> int:
        """The block size for ``length`` queries: at least 128, and at most 16 blocks."""
        return min(length, self.block or max(128, -(-length // 16)))

    def tiles(
        self, which: Pass, *, queries: int, keys: int, width: int, dtype: Any, rule: MaskRule
    ) -> tuple[int, int]:
        """Queries and keys that the TPU handles at a time: explicit, else tuned, else derived.

        What was tuned holds for one pass, dtype, width and rule, at any length that is not
        shorter than its tiles. Derived are 1024 queries, or a quarter of them but 512 at least,
        and 512 keys; 512 of both in float32; and never more than all in whole lanes of 128.
        """
        backward = which == "backward"
        block_q = self.backward_q if backward and self.backward_q else self.block_q
        block_k = self.backward_k if backward and self.backward_k else self.block_k
        tuned = lookup("block_sparse_attention", tuned_key(which, dtype, width, rule))
        limits = _lanes(queries), _lanes(keys)
        if tuned and tuned["block_q"] <= limits[0] and tuned["block_k"] <= limits[1]:
            derived = tuned["block_q"], tuned["block_k"]
        else:
            tall = (
                512 if jnp.dtype(dtype).itemsize > 2 else max(512, min(1024, _lanes(queries // 4)))
            )
            derived = min(tall, limits[0]), min(512, limits[1])
        return block_q or derived[0], block_k or derived[1]


def tuned_key(which: Pass, dtype: Any, width: int, rule: MaskRule) -> str:
    """The name of an entry of ``tuned.json``; a rule is a dataclass, so it prints its sizes."""
    return f"{which} {jnp.dtype(dtype).name} {width} {rule}"


def _lanes(length: int) -> int:
    return -(-length // 128) * 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: rows.
        length: positions of a row.
        heads: query heads.
        kv_heads: key/value heads.
        width: width of a head.
        window: positions that a token sees; ``None`` for all before it.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    window: int | None = None


SHAPES = {
    "laptop-512": Shape(batch=8, length=512, heads=6, kv_heads=6, width=64),
    "laptop-512-grouped": Shape(batch=8, length=512, heads=6, kv_heads=2, width=64),
    "laptop-256": Shape(batch=8, length=256, heads=8, kv_heads=8, width=32),
    "laptop-2048": Shape(batch=1, length=2048, heads=6, kv_heads=6, width=64),
    "laptop-8192": Shape(batch=1, length=8192, heads=2, kv_heads=2, width=64),
}

# What a TPU runs; the first is the one that schedules are compared at.
TPU_SHAPES = {
    "tpu-4096": Shape(batch=1, length=4096, heads=8, kv_heads=8, width=128),
    "tpu-4096-grouped": Shape(batch=1, length=4096, heads=8, kv_heads=2, width=128),
    "tpu-4096-window": Shape(batch=1, length=4096, heads=8, kv_heads=8, width=128, window=1024),
    "tpu-2048-narrow": Shape(batch=2, length=2048, heads=8, kv_heads=8, width=64),
    "tpu-2048-wide": Shape(batch=1, length=2048, heads=4, kv_heads=1, width=256),
}

# What a GPU runs.
GPU_SHAPES = {
    "gpu-4096": Shape(batch=1, length=4096, heads=8, kv_heads=8, width=128),
    "gpu-4096-grouped": Shape(batch=1, length=4096, heads=8, kv_heads=2, width=128),
    "gpu-4096-window": Shape(batch=1, length=4096, heads=8, kv_heads=8, width=128, window=1024),
    "gpu-2048-narrow": Shape(batch=2, length=2048, heads=8, kv_heads=8, width=64),
    "gpu-2048-wide": Shape(batch=1, length=2048, heads=4, kv_heads=1, width=256),
}


def program(
    *,
    shape: str,
    dtype: str,
    backward: bool,
    impl: Literal["tpu", "gpu"] = "tpu",
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A call of a named shape, or its gradient, for ``schedule`` and ``resources``."""
    # Above this module: the operation itself takes the config from here.
    import kernels_pallas.block_sparse_attention as op

    named = (SHAPES | TPU_SHAPES | GPU_SHAPES)[shape]
    rule = op.Causal() if named.window is None else op.SlidingWindow(size=named.window)
    tokens = jax.ShapeDtypeStruct((named.batch, named.length), jnp.int32)
    arrays = tuple(
        jax.ShapeDtypeStruct((named.batch, named.length, heads, named.width), dtype)
        for heads in (named.heads, named.kv_heads, named.kv_heads)
    )

    def attend(q: Any, k: Any, v: Any, positions: Any, segments: Any) -> Any:
        return op.block_sparse_attention(
            q=q,
            k=k,
            v=v,
            q_positions=positions,
            kv_positions=positions,
            q_segments=segments,
            kv_segments=segments,
            rule=rule,
            scale=named.width**-0.5,
            impl=impl,
            config=BlockSparseAttentionConfig(block_q=block_q, block_k=block_k),
        )

    def loss(*arguments: Any) -> Any:
        return jnp.sum(attend(*arguments).astype(jnp.float32))

    function = jax.grad(loss, argnums=(0, 1, 2)) if backward else attend
    return function, (*arrays, tokens, tokens)
