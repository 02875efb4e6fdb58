"""Everything that writes tokens."""

from tokenlab.decode.autoregressive import Autoregressive, Generation
from tokenlab.decode.sampling import (
    Categorical,
    Draw,
    FirstTokens,
    Greedy,
    MinP,
    Processor,
    Sampler,
    Temperature,
    TopK,
    TopP,
)
from tokenlab.decode.text import Completion, Samples, complete

__all__ = [
    "Autoregressive",
    "Categorical",
    "Completion",
    "Draw",
    "FirstTokens",
    "Generation",
    "Greedy",
    "MinP",
    "Processor",
    "Sampler",
    "Samples",
    "Temperature",
    "TopK",
    "TopP",
    "complete",
]
