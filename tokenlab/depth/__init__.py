"""How often each token goes through the blocks of a model."""

from tokenlab.depth.base import DepthProgram, DepthTrace
from tokenlab.depth.sequential import Sequential

__all__ = ["DepthProgram", "DepthTrace", "Sequential"]
