"""Which tokens a computation is given to, and which experts run on a token."""

from tokenlab.routing.base import Route, Router
from tokenlab.routing.chance import ChanceRouter, RandomRouter
from tokenlab.routing.expert_choice import ExpertChoiceRouter, ThresholdRouter
from tokenlab.routing.experts import BiasedTopKGate, ExpertChoice, ExpertGate, TopKGate
from tokenlab.routing.options import (
    GIVEN,
    FixedOption,
    LearnedOption,
    OptionChoice,
    OptionRouter,
    RandomOption,
)
from tokenlab.routing.scores import LinearScores, MLPScores, NarrowScores, Scores
from tokenlab.routing.thresholds import (
    FixedThresholdGate,
    PooledThresholdGate,
    ThresholdGate,
    TokenThresholdGate,
)

__all__ = [
    "GIVEN",
    "BiasedTopKGate",
    "ChanceRouter",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "ExpertGate",
    "FixedOption",
    "FixedThresholdGate",
    "LearnedOption",
    "LinearScores",
    "MLPScores",
    "NarrowScores",
    "OptionChoice",
    "OptionRouter",
    "PooledThresholdGate",
    "RandomOption",
    "RandomRouter",
    "Route",
    "Router",
    "Scores",
    "ThresholdGate",
    "ThresholdRouter",
    "TokenThresholdGate",
    "TopKGate",
]
