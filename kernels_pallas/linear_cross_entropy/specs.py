"""The result, the block sizes, and the shapes that tests and benchmarks share."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyConfig:
    """Block sizes.

    Attributes:
        block_vocabulary: vocabulary entries whose logits are alive at a time, for all tokens;
            ``None`` derives it from the shapes.
    """

    block_vocabulary: int | None = None

    def block(self, tokens: int, vocabulary: int) -> int:
        """The block size for ``tokens`` rows: about 16 MiB of logits, blocks of about one size.

        Smaller tiles cost matrix-product efficiency, larger ones only memory.
        """
        limit = self.block_vocabulary or min(max(2**22 // tokens, 512), 4096)
        blocks = -(-vocabulary // limit)
        return -(-vocabulary // blocks)


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
}
