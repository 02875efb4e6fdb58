"""Documents and how they become batches."""

from tokenlab.data.base import Batch, Corpus, Document, Source, first_rows
from tokenlab.data.corpora import JsonLines, TextFiles, TfdsCorpus
from tokenlab.data.mixture import Mixture
from tokenlab.data.packing import PackedText, PaddedText
from tokenlab.data.tasks import TaskSource

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "JsonLines",
    "Mixture",
    "PackedText",
    "PaddedText",
    "Source",
    "TaskSource",
    "TextFiles",
    "TfdsCorpus",
    "first_rows",
]
