"""Synthetic tasks: small alphabets, exact answers, a known difficulty for every answer token."""

from tokenlab.data.tasks.addition import Addition
from tokenlab.data.tasks.alphabet import AlphabetTokenizer
from tokenlab.data.tasks.associative_recall import AssociativeRecall
from tokenlab.data.tasks.base import Problem, Task, TaskBatch
from tokenlab.data.tasks.brackets import Brackets
from tokenlab.data.tasks.graph_order import GraphOrder
from tokenlab.data.tasks.grid_questions import GridQuestions
from tokenlab.data.tasks.minimum_sum import MinimumNonNegativeSum
from tokenlab.data.tasks.planted_facts import PlantedFacts
from tokenlab.data.tasks.pointer_chase import PointerChase
from tokenlab.data.tasks.programs import Programs
from tokenlab.data.tasks.role_grammar import RoleGrammar
from tokenlab.data.tasks.slot_text import SlotText
from tokenlab.data.tasks.source import TaskSource
from tokenlab.data.tasks.word_arithmetic import WordArithmetic

__all__ = [
    "Addition",
    "AlphabetTokenizer",
    "AssociativeRecall",
    "Brackets",
    "GraphOrder",
    "GridQuestions",
    "MinimumNonNegativeSum",
    "PlantedFacts",
    "PointerChase",
    "Problem",
    "Programs",
    "RoleGrammar",
    "SlotText",
    "Task",
    "TaskBatch",
    "TaskSource",
    "WordArithmetic",
]
