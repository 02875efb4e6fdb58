"""Pure Linen models and their parts."""

from tokenlab.models.attention import Attention, Mixer
from tokenlab.models.heads import Head, LinearHead, TiedHead
from tokenlab.models.layers import FeedForward, Linear, RMSNorm, SwiGLU, rotate
from tokenlab.models.transformer import (
    Block,
    ModelOutput,
    Transformer,
    llama,
    transformer_1m,
    transformer_15m,
    transformer_135m,
    unrolled,
)

__all__ = [
    "Attention",
    "Block",
    "FeedForward",
    "Head",
    "Linear",
    "LinearHead",
    "Mixer",
    "ModelOutput",
    "RMSNorm",
    "SwiGLU",
    "TiedHead",
    "Transformer",
    "llama",
    "rotate",
    "transformer_1m",
    "transformer_15m",
    "transformer_135m",
    "unrolled",
]
