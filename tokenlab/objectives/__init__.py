"""What training minimises: token losses, token weights, and their sum."""

from tokenlab.objectives.base import AllTokens, Objective, Term, TokenLoss, TokenWeights
from tokenlab.objectives.next_token import NextToken, SmoothedNextToken, ZLoss

__all__ = [
    "AllTokens",
    "NextToken",
    "Objective",
    "SmoothedNextToken",
    "Term",
    "TokenLoss",
    "TokenWeights",
    "ZLoss",
]
