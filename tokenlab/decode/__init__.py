"""Everything that writes tokens."""

from tokenlab.decode.autoregressive import Autoregressive
from tokenlab.decode.base import Decoder, Generation
from tokenlab.decode.beam import BeamSearch
from tokenlab.decode.constraints import BannedStrings, Constraint, ForcedText
from tokenlab.decode.depth_batched import DepthBatched
from tokenlab.decode.feeds import Fed, Feed, ThoughtFeed, TokenFeed
from tokenlab.decode.grammar import Grammar
from tokenlab.decode.penalties import PresencePenalty, RepetitionPenalty
from tokenlab.decode.processors import (
    FirstTokens,
    History,
    MinP,
    Processor,
    Temperature,
    TopK,
    TopP,
    Typical,
)
from tokenlab.decode.samplers import Categorical, Draw, Greedy, Sampler, usual_sampler
from tokenlab.decode.scoring import Scored, score_continuation
from tokenlab.decode.step_entropy import ReSET, StepEnds, StepEntropy
from tokenlab.decode.switching import SwitchCap, SwitchingFeed, SwitchSignals
from tokenlab.decode.text import Completion, Samples, complete

__all__ = [
    "Autoregressive",
    "BannedStrings",
    "BeamSearch",
    "Categorical",
    "Completion",
    "Constraint",
    "Decoder",
    "DepthBatched",
    "Draw",
    "Fed",
    "Feed",
    "FirstTokens",
    "ForcedText",
    "Generation",
    "Grammar",
    "Greedy",
    "History",
    "MinP",
    "PresencePenalty",
    "Processor",
    "ReSET",
    "RepetitionPenalty",
    "Sampler",
    "Samples",
    "Scored",
    "StepEnds",
    "StepEntropy",
    "SwitchCap",
    "SwitchSignals",
    "SwitchingFeed",
    "Temperature",
    "ThoughtFeed",
    "TokenFeed",
    "TopK",
    "TopP",
    "Typical",
    "complete",
    "score_continuation",
    "usual_sampler",
]
