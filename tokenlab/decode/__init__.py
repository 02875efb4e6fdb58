"""Everything that writes tokens."""

from tokenlab.decode.autoregressive import Autoregressive
from tokenlab.decode.base import Decoder, Generation
from tokenlab.decode.processors import (
    FirstTokens,
    History,
    MinP,
    Processor,
    Temperature,
    TopK,
    TopP,
)
from tokenlab.decode.samplers import Categorical, Draw, Greedy, Sampler
from tokenlab.decode.text import Completion, Samples, complete

__all__ = [
    "Autoregressive",
    "Categorical",
    "Completion",
    "Decoder",
    "Draw",
    "FirstTokens",
    "Generation",
    "Greedy",
    "History",
    "MinP",
    "Processor",
    "Sampler",
    "Samples",
    "Temperature",
    "TopK",
    "TopP",
    "complete",
]
