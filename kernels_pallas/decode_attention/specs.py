"""Block sizes, and the shapes that tests and benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_LANES = 128
# Bytes of keys (and as many of values) of all heads that a TPU handles at a time.
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAttentionConfig:
    """Block sizes.

    Attributes:
        block: slots handled at a time; ``None`` derives it, for ``"tpu"`` from the bytes that
            they take.
        split: of ``"tpu"``: parts into which the slots of a row are dealt, merged at the end
            by their log-sum-exps; ``None`` is 1. More than 1 is for chips with two cores under
            one program (v5p) and fewer rows than cores. One core gains nothing by it, and
            neither does a CPU.
        interpret: of ``"tpu"``: the ``interpret`` of ``pallas_call``; true runs the kernel
            anywhere, slowly.
    """

    block: int | None = None
    split: int | None = None
    interpret: Any = False

    def of(self, slots: int) -> int:
        """Slots that ``"xla"`` handles at a time, of a row of ``slots``."""
        return min(slots, self.block or 1024)

    def tiles(self, slots: int, kv_heads: int, width: int, itemsize: int) -> tuple[int, int]:
        """Key/value heads and slots that the TPU handles at a time, of a row of ``slots``.

        Args:
            slots: slots of a row.
            kv_heads: heads that read the same slots.
            width: width of a head.
            itemsize: bytes of an element.
        """
        one = _LANES * -(-width // _LANES) * itemsize
        heads = max(1, min(kv_heads, _BLOCK_BYTES // (_LANES * one)))
        while kv_heads % heads:
            heads -= 1
        whole = -(-slots // _LANES) * _LANES
        fitting = _BLOCK_BYTES // (heads * one) // _LANES * _LANES
        return heads, self.block or min(whole, max(_LANES, min(fitting, 1024)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: rows.
        queries: queries of a row.
        slots: slots of a row.
        heads: query heads.
        kv_heads: key/value heads.
        width: width of a head.
        page: slots of a page; ``None`` where each row lies in one piece.
        selected: selected units of a row; ``None`` where all slots are read.
        unit: slots of a selected unit.
        per_head: whether each key/value head has a selection of its own.
    """

    batch: int
    queries: int
    slots: int
    heads: int
    kv_heads: int
    width: int
    page: int | None = None
    selected: int | None = None
    unit: int = 1
    per_head: bool = False


SHAPES = {
    "laptop-full": Shape(batch=1, queries=1, slots=32768, heads=32, kv_heads=8, width=128),
    "laptop-selected": Shape(
        batch=1, queries=1, slots=32768, heads=32, kv_heads=8, width=128,
        selected=2048, per_head=True,
    ),
    "laptop-selected-pages": Shape(
        batch=1, queries=1, slots=32768, heads=32, kv_heads=8, width=128,
        page=16, selected=128, unit=16, per_head=True,
    ),
}  # fmt: skip

# What a TPU runs; the first is the one that schedules are compared at.
TPU_SHAPES = {
    "tpu-32k": Shape(batch=8, queries=1, slots=32768, heads=32, kv_heads=8, width=128),
    "tpu-32k-paged": Shape(
        batch=8, queries=1, slots=32768, heads=32, kv_heads=8, width=128, page=64
    ),
    "tpu-tree": Shape(
        batch=4, queries=8, slots=8192, heads=16, kv_heads=4, width=128, page=16
    ),
    "tpu-32k-pages": Shape(
        batch=8, queries=1, slots=32768, heads=32, kv_heads=8, width=128,
        page=64, selected=32, unit=64, per_head=True,
    ),
    "tpu-32k-tokens": Shape(
        batch=8, queries=1, slots=32768, heads=32, kv_heads=8, width=128, selected=2048
    ),
    "tpu-narrow": Shape(batch=8, queries=1, slots=8192, heads=8, kv_heads=8, width=64),
    "tpu-wide": Shape(
        batch=2, queries=4, slots=8192, heads=8, kv_heads=1, width=256, selected=512, per_head=True
    ),
}  # fmt: skip


def arguments(named: Shape, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a call of that shape."""
    page = named.page or named.slots
    pages = named.batch * named.slots // page
    pool = jax.ShapeDtypeStruct((pages, named.kv_heads, page, named.width), dtype)
    whole = {
        "q": jax.ShapeDtypeStruct((named.batch, named.queries, named.heads, named.width), dtype),
        "k": pool,
        "v": pool,
        "q_positions": jax.ShapeDtypeStruct((named.batch, named.queries), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((named.batch,), jnp.int32),
    }
    if named.page is not None:
        table = named.batch, named.slots // named.page
        whole["pages"] = jax.ShapeDtypeStruct(table, jnp.int32)
    if named.selected is not None:
        lists = named.batch, named.kv_heads if named.per_head else 1, named.selected
        whole["selected"] = jax.ShapeDtypeStruct(lists, jnp.int32)
    return whole


def program(
    *, shape: str, dtype: str, backward: bool, block: int | None = None, scores: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A call of a named shape, for ``kernels_pallas.common.schedule``.

    Raises:
        ValueError: a backward pass is asked for; the kernels have none.
    """
    # Above this module: the operations themselves take the config from here.
    import kernels_pallas.decode_attention as op

    if backward:
        raise ValueError("decode_attention has no backward kernels; leave out --backward")
    named = (SHAPES | TPU_SHAPES)[shape]
    config = DecodeAttentionConfig(block=block)
    scale = named.width**-0.5

    def attend(arrays: Any) -> Any:
        return op.decode_attention(
            **arrays, unit=named.unit, scale=scale, impl="tpu", config=config
        )

    def vote(arrays: Any) -> Any:
        kept = {key: x for key, x in arrays.items() if key not in ("v", "selected")}
        return op.token_scores(**kept, scale=scale, impl="tpu", config=config)

    return (vote if scores else attend), (arguments(named, dtype),)
