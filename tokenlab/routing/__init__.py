"""Which tokens a computation is given to, and which experts run on a token."""

from tokenlab.routing.base import Route, Router
from tokenlab.routing.chance import ChanceRouter, RandomRouter
from tokenlab.routing.expert_choice import ExpertChoiceRouter, ThresholdRouter
from tokenlab.routing.experts import BiasedTopKGate, ExpertChoice, ExpertGate, TopKGate
from tokenlab.routing.scores import LinearScores, MLPScores, Scores
from tokenlab.routing.thresholds import (
    FixedThresholdGate,
    PooledThresholdGate,
    ThresholdGate,
    TokenThresholdGate,
)

__all__ = [
    "BiasedTopKGate",
    "ChanceRouter",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "ExpertGate",
    "FixedThresholdGate",
    "LinearScores",
    "MLPScores",
    "PooledThresholdGate",
    "RandomRouter",
    "Route",
    "Router",
    "Scores",
    "ThresholdGate",
    "ThresholdRouter",
    "TokenThresholdGate",
    "TopKGate",
]
