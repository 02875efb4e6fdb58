"""The results, the block sizes, and the shapes that tests and benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common.tuned import lookup

# What a kernel may hold in VMEM, of 64 MiB (v5p, tpu7x) to 128 MiB (v5e, v6e) that a core has.
VMEM_BYTES = 48 * 2**20

Pass = Literal["forward", "by_hidden", "by_weight"]


class TargetLogits(NamedTuple):
    """What a loss over a vocabulary needs to know of the logits, float32.

    Attributes:
        target: logit of the target.
        log_sum_exp: log-sum-exp of the logits.
        mean: mean of the logits.
    """

    target: Float[Array, "B T"]
    log_sum_exp: Float[Array, "B T"]
    mean: Float[Array, "B T"]


class VocabularyStatistics(NamedTuple):
    """:class:`TargetLogits`, and what a policy or an adaptive method asks of the distribution.

    Attributes:
        target: logit of the target, float32.
        log_sum_exp: log-sum-exp of the logits, float32.
        mean: mean of the logits, float32.
        entropy: entropy of their softmax in nats, float32.
        highest: the highest logit, float32; without gradient.
        best: the first id with the highest logit, int32; without gradient.
    """

    target: Float[Array, "B T"]
    log_sum_exp: Float[Array, "B T"]
    mean: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    highest: Float[Array, "B T"]
    best: Int[Array, "B T"]


class Tile(NamedTuple):
    """Tokens and vocabulary entries whose logits a TPU kernel holds at a time."""

    tokens: int
    vocabulary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyConfig:
    """Block sizes and what to leave out.

    The paper's filters for bfloat16 are ``skip_below=2**-12, sort_vocabulary=True``, with
    ``skip_weight=False`` for pretraining; the defaults are exact.

    Attributes:
        block_vocabulary: vocabulary entries whose logits are alive at a time: for all tokens
            with ``"xla"``, for ``block_tokens`` of them with ``"tpu"``; ``None`` takes what was
            tuned for the TPU, or else derives it from the shapes.
        block_tokens: tokens of a tile of ``"tpu"``; ``None`` likewise.
        skip_below: ``"tpu"`` leaves a tile out of the matrix products of the backward pass where
            every gradient by a logit is at most this, as a share of the largest of the token's
            incoming gradients ``s[n] = max(|by target|, |by log_sum_exp|, |by entropy|)``; so
            ``|error of by_hidden[n, d]| <= skip_below · s[n] · Σ_v |weight[v, d]|``. A tile
            with a token whose ``mean`` has a gradient is never left out: that gradient is as
            small everywhere, and not small in sum. 0 is exact; the paper has 2**-12 for bfloat16.
        skip_weight: whether ``skip_below`` holds for the gradients by weight and bias too; the
            paper advises against it for pretraining, where rare entries live on small gradients.
        sort_vocabulary: ``"tpu"`` sorts the vocabulary by mean logit before it skips, so that
            negligible entries share tiles; costs a sorted copy of the weight and of its gradient.
        interpret: of ``pallas_call``: ``True`` or ``pltpu.InterpretParams`` for a machine
            without a TPU.
    """

    block_vocabulary: int | None = None
    block_tokens: int | None = None
    skip_below: float = 0.0
    skip_weight: bool = True
    sort_vocabulary: bool = False
    interpret: Any = False

    def block(self, tokens: int, vocabulary: int) -> int:
        """The block size for ``tokens`` rows: about 16 MiB of logits, blocks of about one size.

        Smaller tiles cost matrix-product efficiency, larger ones only memory.
        """
        limit = self.block_vocabulary or min(max(2**22 // tokens, 512), 4096)
        blocks = -(-vocabulary // limit)
        return -(-vocabulary // blocks)

    def tile(
        self, which: Pass, *, tokens: int, vocabulary: int, width: int, itemsize: int
    ) -> Tile | None:
        """The tile of a TPU kernel, or ``None`` where not even the smallest fits VMEM.

        What was tuned holds for one kernel, width and size of element, at any shape that is not
        smaller than the tile. Else tiles are tried from large to small.
        The side that stays while the other streams is the long one: each byte that streams
        is used once per entry of it, and HBM keeps up from some 600 entries on (v6e).
        """
        stays, streams = (1024, 512, 256, 128), (512, 256, 128)
        tiles = [(stay, stream) for stay in stays for stream in streams if stream <= stay]
        if which == "by_weight":
            sides = [Tile(tokens=stream, vocabulary=stay) for stay, stream in tiles]
        else:
            sides = [Tile(tokens=stay, vocabulary=stream) for stay, stream in tiles]
        tuned = lookup("linear_cross_entropy", tuned_key(which, itemsize, width))
        if tuned and tuned["tokens"] <= tokens and tuned["vocabulary"] <= vocabulary:
            sides = [Tile(tokens=tuned["tokens"], vocabulary=tuned["vocabulary"]), *sides]
        for side in sides:
            tile = Tile(
                tokens=self.block_tokens or min(side.tokens, _rounded(tokens)),
                vocabulary=self.block_vocabulary or min(side.vocabulary, _rounded(vocabulary)),
            )
            if vmem_bytes(which, tile, width, itemsize) <= VMEM_BYTES:
                return tile
        return None


def tuned_key(which: Pass, itemsize: int, width: int) -> str:
    """The name of an entry of ``tuned.json``."""
    return f"{which} {'bfloat16' if itemsize == 2 else 'float32'} {width}"


def vmem_bytes(which: Pass, tile: Tile, width: int, itemsize: int) -> int:
    """Estimate of what a TPU kernel holds: blocks twice for the pipeline, sums and products once.

    Args:
        which: the kernel.
        tile: its tile.
        width: model width.
        itemsize: bytes of an element of the wider of the hidden states and the weight.
    """
    width = _rounded(width)
    products = 1 if which == "forward" else 2
    held = 4 * 4 * tile.tokens * tile.vocabulary
    held += 2 * itemsize * (tile.tokens + tile.vocabulary) * width
    if itemsize == 4:
        # Exact float32 products are made of three bfloat16 parts of each operand.
        held += products * 3 * 2 * (tile.tokens + tile.vocabulary) * width
    if which != "forward":
        rows = tile.tokens if which == "by_hidden" else tile.vocabulary
        held += 2 * itemsize * rows * width + 2 * 4 * rows * width
    return held


def _rounded(size: int) -> int:
    return -(-size // 128) * 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: rows.
        length: positions of a row.
        width: model width.
        vocabulary: vocabulary size.
    """

    batch: int
    length: int
    width: int
    vocabulary: int


SHAPES = {
    "laptop-8k": Shape(batch=8, length=512, width=384, vocabulary=8192),
    "laptop-32k": Shape(batch=8, length=512, width=384, vocabulary=32768),
    "laptop-128k": Shape(batch=8, length=512, width=384, vocabulary=128256),
    "gemma-2-2b": Shape(batch=1, length=8192, width=2304, vocabulary=256_000),
}


def program(
    *, shape: str, dtype: str, backward: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A mean loss of a named shape, or its gradient, for ``kernels_pallas.common.schedule``."""
    # Above this module: the operation itself takes the config from here.
    from kernels_pallas.linear_cross_entropy import linear_cross_entropy

    named = SHAPES[shape]
    hidden = jax.ShapeDtypeStruct((named.batch, named.length, named.width), dtype)
    weight = jax.ShapeDtypeStruct((named.vocabulary, named.width), dtype)
    targets = jax.ShapeDtypeStruct((named.batch, named.length), jnp.int32)

    def loss(hidden: Any, weight: Any, targets: Any) -> Any:
        out = linear_cross_entropy(hidden=hidden, weight=weight, targets=targets, impl="tpu")
        return jnp.mean(out.log_sum_exp - out.target)

    return jax.grad(loss, (0, 1)) if backward else loss, (hidden, weight, targets)
