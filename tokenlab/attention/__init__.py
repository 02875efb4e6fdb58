"""Attention that chooses what it computes, and attention over rows split over devices."""

from tokenlab.attention.budget import BlockBudget, CountBudget, MassBudget, ShareBudget
from tokenlab.attention.prefill import Blocks, PrefillAttention, Prefilled, Selection
from tokenlab.attention.ring import (
    RingAttention,
    SequenceAttention,
    StepCost,
    TokenRing,
    step_cost,
    zigzag,
)
from tokenlab.attention.selectors import (
    MeanPooledBlocks,
    PermutedBlocks,
    VerticalSlash,
    WindowBlocks,
)

__all__ = [
    "BlockBudget",
    "Blocks",
    "CountBudget",
    "MassBudget",
    "MeanPooledBlocks",
    "PermutedBlocks",
    "PrefillAttention",
    "Prefilled",
    "RingAttention",
    "Selection",
    "SequenceAttention",
    "ShareBudget",
    "StepCost",
    "TokenRing",
    "VerticalSlash",
    "WindowBlocks",
    "step_cost",
    "zigzag",
]
