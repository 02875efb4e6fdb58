"""Everything that writes tokens."""

from tokenlab.decode.autoregressive import Autoregressive, Generation
from tokenlab.decode.sampling import (
    Categorical,
    Draw,
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
