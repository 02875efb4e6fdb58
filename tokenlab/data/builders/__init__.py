"""Builders of tokenlab's own data sets, prepared from packages of real data."""

from tokenlab.data.builders.base import CorpusBuilder
from tokenlab.data.builders.english_prose import EnglishProse
from tokenlab.data.builders.math_word_problems import MathWordProblems
from tokenlab.data.builders.python_stdlib import PythonStdlib
from tokenlab.data.builders.udhr import Udhr

BUILDERS: tuple[type[CorpusBuilder], ...] = (EnglishProse, PythonStdlib, Udhr, MathWordProblems)

__all__ = ["BUILDERS", "CorpusBuilder", "EnglishProse", "MathWordProblems", "PythonStdlib", "Udhr"]
