"""Which tokens a computation is given to."""

from tokenlab.routing.base import Route, Router
from tokenlab.routing.expert_choice import ExpertChoiceRouter, ThresholdRouter

__all__ = ["ExpertChoiceRouter", "Route", "Router", "ThresholdRouter"]
