"""Pure Linen models and their parts."""

from tokenlab.models.attention import Attention, Mixer
from tokenlab.models.heads import Head, LinearHead, TiedHead, VQHead
from tokenlab.models.layers import (
    FeedForward,
    GatedFeedForward,
    GeGLU,
    Linear,
    LinearScaling,
    Llama3Scaling,
    RMSNorm,
    Rotary,
    RotaryScaling,
    SwiGLU,
    rotate,
)
from tokenlab.models.transformer import (
    Block,
    BlockPattern,
    ModelOutput,
    Transformer,
    for_decoding,
    llama,
    transformer_1m,
    transformer_15m,
    transformer_135m,
    unrolled,
)

__all__ = [
    "Attention",
    "Block",
    "BlockPattern",
    "FeedForward",
    "GatedFeedForward",
    "GeGLU",
    "Head",
    "Linear",
    "LinearHead",
    "LinearScaling",
    "Llama3Scaling",
    "Mixer",
    "ModelOutput",
    "RMSNorm",
    "Rotary",
    "RotaryScaling",
    "SwiGLU",
    "TiedHead",
    "Transformer",
    "VQHead",
    "for_decoding",
    "llama",
    "rotate",
    "transformer_1m",
    "transformer_15m",
    "transformer_135m",
    "unrolled",
]
