"""Which tokens a computation is given to."""

from tokenlab.routing.base import Route, Router
from tokenlab.routing.chance import ChanceRouter, RandomRouter
from tokenlab.routing.expert_choice import ExpertChoiceRouter, ThresholdRouter
from tokenlab.routing.scores import LinearScores, MLPScores, Scores

__all__ = [
    "ChanceRouter",
    "ExpertChoiceRouter",
    "LinearScores",
    "MLPScores",
    "RandomRouter",
    "Route",
    "Router",
    "Scores",
    "ThresholdRouter",
]
