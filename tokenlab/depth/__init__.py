"""How often each token goes through the blocks of a model."""

from tokenlab.depth.base import DepthProgram, DepthTrace
from tokenlab.depth.mixture_of_recursions import MixtureOfRecursions
from tokenlab.depth.recursive import Recursive
from tokenlab.depth.sequential import Sequential

__all__ = ["DepthProgram", "DepthTrace", "MixtureOfRecursions", "Recursive", "Sequential"]
