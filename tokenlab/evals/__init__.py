"""Numbers about a model that a sceptic would accept."""

from tokenlab.evals.base import Evaluation
from tokenlab.evals.continuation import Continuation
from tokenlab.evals.depth import DepthAllocation, DepthHistogram, Fit, depth_fit, token_depth
from tokenlab.evals.objective import ObjectiveValue
from tokenlab.evals.plans import PlanReadBack, probed
from tokenlab.evals.references import ByteNgram, Compressor, witten_bell
from tokenlab.evals.roles import RoleAccuracy, class_probe
from tokenlab.evals.routes import (
    all_patterns,
    best_by_budget,
    difficulty,
    executed,
    pattern_nats,
    random_routes,
)
from tokenlab.evals.shares import RoutedPass, at_share, routed_pass
from tokenlab.evals.task import TaskAccuracy
from tokenlab.evals.text import HeldOutText, token_nats, windows

__all__ = [
    "ByteNgram",
    "Compressor",
    "Continuation",
    "DepthAllocation",
    "DepthHistogram",
    "Evaluation",
    "Fit",
    "HeldOutText",
    "ObjectiveValue",
    "PlanReadBack",
    "RoleAccuracy",
    "RoutedPass",
    "TaskAccuracy",
    "all_patterns",
    "at_share",
    "best_by_budget",
    "class_probe",
    "depth_fit",
    "difficulty",
    "executed",
    "pattern_nats",
    "probed",
    "random_routes",
    "routed_pass",
    "token_depth",
    "token_nats",
    "windows",
    "witten_bell",
]
