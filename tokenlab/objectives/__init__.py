"""What training minimises: token losses, token weights, and their sum."""

from tokenlab.objectives.base import (
    AllTokens,
    AuxiliaryTerm,
    Objective,
    Summand,
    TargetRange,
    Term,
    TokenLoss,
    TokenWeights,
)
from tokenlab.objectives.budget import BudgetPenalty
from tokenlab.objectives.distill import StreamError, TeacherKL
from tokenlab.objectives.mixtures import DistributionKL, MixturePolicy, group_advantages
from tokenlab.objectives.next_token import (
    ExpectedNextToken,
    NextToken,
    SmoothedNextToken,
    ZLoss,
)

__all__ = [
    "AllTokens",
    "AuxiliaryTerm",
    "BudgetPenalty",
    "DistributionKL",
    "ExpectedNextToken",
    "MixturePolicy",
    "NextToken",
    "Objective",
    "SmoothedNextToken",
    "StreamError",
    "Summand",
    "TargetRange",
    "TeacherKL",
    "Term",
    "TokenLoss",
    "TokenWeights",
    "ZLoss",
    "group_advantages",
]
