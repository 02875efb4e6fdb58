"""How often each token goes through the blocks of a model."""

from tokenlab.depth.base import DepthProgram, DepthTrace
from tokenlab.depth.halting import (
    EarlyHalting,
    FixedHalting,
    Halting,
    OnlineHalting,
    TokenChoice,
)
from tokenlab.depth.halting_loop import HaltingLoop
from tokenlab.depth.mixture_of_recursions import MixtureOfRecursions
from tokenlab.depth.recursive import Recursive
from tokenlab.depth.sequential import Sequential
from tokenlab.depth.sharing import share_layers
from tokenlab.depth.skip_decode import SkipDecode, linear_decay

__all__ = [
    "DepthProgram",
    "DepthTrace",
    "EarlyHalting",
    "FixedHalting",
    "Halting",
    "HaltingLoop",
    "MixtureOfRecursions",
    "OnlineHalting",
    "Recursive",
    "Sequential",
    "SkipDecode",
    "TokenChoice",
    "linear_decay",
    "share_layers",
]
