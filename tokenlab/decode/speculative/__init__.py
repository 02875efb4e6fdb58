"""Drafts that the target judges: lossless, and fewer passes."""

from tokenlab.decode.speculative.decoder import Speculative
from tokenlab.decode.speculative.drafters import Chains, Drafter, ModelDrafter
from tokenlab.decode.speculative.dynamic import DynamicTree, FixedTree
from tokenlab.decode.speculative.lookup import Goose, PromptLookup
from tokenlab.decode.speculative.tree import Tree, Verdict
from tokenlab.decode.speculative.verify import KSequential, RecursiveRejection, Verifier

__all__ = [
    "Chains",
    "Drafter",
    "DynamicTree",
    "FixedTree",
    "Goose",
    "KSequential",
    "ModelDrafter",
    "PromptLookup",
    "RecursiveRejection",
    "Speculative",
    "Tree",
    "Verdict",
    "Verifier",
]
