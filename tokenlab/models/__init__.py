"""Pure Linen models and their parts."""

from tokenlab.models.adapters import ADAPTERS, adapted, merged, with_adapter
from tokenlab.models.attention import Attention, Mixer
from tokenlab.models.branches import Thoughts
from tokenlab.models.capsule import CapsuleTransformer
from tokenlab.models.expert_schedules import (
    AscendingExperts,
    DescendingExperts,
    ExpertSchedule,
    InversePyramidExperts,
    PyramidExperts,
    UniformExperts,
    WaveExperts,
    with_expert_schedule,
)
from tokenlab.models.experts import MixtureOfExperts
from tokenlab.models.flex_ma import FlexMA
from tokenlab.models.forecasters import fit_forecasters, reduced_rank, with_forecasters
from tokenlab.models.grid import Grid, Window
from tokenlab.models.heads import Head, LinearHead, TiedHead, VQHead
from tokenlab.models.informativeness import (
    Informativeness,
    KeptAbove,
    KeptBlocks,
    KeptShare,
    PooledScores,
    PredictedScores,
    RandomScores,
)
from tokenlab.models.layers import (
    FeedForward,
    GatedFeedForward,
    GeGLU,
    Linear,
    LinearScaling,
    Llama3Scaling,
    LowRank,
    RMSNorm,
    Rotary,
    RotaryScaling,
    SwiGLU,
    rotate,
)
from tokenlab.models.linmu import MMATE, linmu, with_teacher
from tokenlab.models.local_windows import LocalWindows
from tokenlab.models.presets import llama, transformer_1m, transformer_15m, transformer_135m
from tokenlab.models.pruned_backward import PrunedSwiGLU
from tokenlab.models.rounded import RoundedTransformer, rounded
from tokenlab.models.routed import given_options, with_base, with_stand_ins
from tokenlab.models.stand_ins import Forecaster, RoutedFeedForward, RoutedMixer
from tokenlab.models.thinking import ThinkingTransformer, thinking
from tokenlab.models.token_dropping import TokenDroppingAttention, lemo, shrunk
from tokenlab.models.token_former import (
    Pattention,
    PattentionAttention,
    PattentionFeedForward,
    token_former,
)
from tokenlab.models.transformer import (
    Block,
    BlockPattern,
    ModelOutput,
    Transformer,
    for_decoding,
    layered,
    unrolled,
)

__all__ = [
    "ADAPTERS",
    "MMATE",
    "AscendingExperts",
    "Attention",
    "Block",
    "BlockPattern",
    "CapsuleTransformer",
    "DescendingExperts",
    "ExpertSchedule",
    "FeedForward",
    "FlexMA",
    "Forecaster",
    "GatedFeedForward",
    "GeGLU",
    "Grid",
    "Head",
    "Informativeness",
    "InversePyramidExperts",
    "KeptAbove",
    "KeptBlocks",
    "KeptShare",
    "Linear",
    "LinearHead",
    "LinearScaling",
    "Llama3Scaling",
    "LocalWindows",
    "LowRank",
    "Mixer",
    "MixtureOfExperts",
    "ModelOutput",
    "Pattention",
    "PattentionAttention",
    "PattentionFeedForward",
    "PooledScores",
    "PredictedScores",
    "PrunedSwiGLU",
    "PyramidExperts",
    "RMSNorm",
    "RandomScores",
    "Rotary",
    "RotaryScaling",
    "RoundedTransformer",
    "RoutedFeedForward",
    "RoutedMixer",
    "SwiGLU",
    "ThinkingTransformer",
    "Thoughts",
    "TiedHead",
    "TokenDroppingAttention",
    "Transformer",
    "UniformExperts",
    "VQHead",
    "WaveExperts",
    "Window",
    "adapted",
    "fit_forecasters",
    "for_decoding",
    "given_options",
    "layered",
    "lemo",
    "linmu",
    "llama",
    "merged",
    "reduced_rank",
    "rotate",
    "rounded",
    "shrunk",
    "thinking",
    "token_former",
    "transformer_1m",
    "transformer_15m",
    "transformer_135m",
    "unrolled",
    "with_adapter",
    "with_base",
    "with_expert_schedule",
    "with_forecasters",
    "with_stand_ins",
    "with_teacher",
]
