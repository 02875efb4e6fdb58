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
from tokenlab.objectives.rollouts import ThoughtRollouts
from tokenlab.objectives.thoughts import (
    AfterThought,
    BeforeThought,
    ThoughtPolicy,
    thought_rewards,
)

__all__ = [
    "AfterThought",
    "AllTokens",
    "AuxiliaryTerm",
    "BeforeThought",
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
    "ThoughtPolicy",
    "ThoughtRollouts",
    "TokenLoss",
    "TokenWeights",
    "ZLoss",
    "group_advantages",
    "thought_rewards",
]
