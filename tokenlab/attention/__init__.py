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
from tokenlab.attention.ssd import Scanned, associative_ssd, quadratic_ssd, ssd, ssd_flops

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
    "Scanned",
    "Selection",
    "SequenceAttention",
    "ShareBudget",
    "StepCost",
    "TokenRing",
    "VerticalSlash",
    "WindowBlocks",
    "associative_ssd",
    "quadratic_ssd",
    "ssd",
    "ssd_flops",
    "step_cost",
    "zigzag",
]
