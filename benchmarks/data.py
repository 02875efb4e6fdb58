"""How fast each source makes batches, and how much of them is padding.

    python benchmarks/data.py [--pattern "notes/**/*.txt"] [--length 512] [--batches 200]

Without a pattern the text is the source code of Python's standard library. A model of 15 million
parameters takes about 1,800 tokens/s on two CPU cores; a source should give 20 times that, so that
it costs training a twentieth of the time at most. Tokens are the positions that hold no padding.
"""

import argparse
import glob
import sysconfig
import time

import numpy as np

from tokenlab.data.corpora import TextFiles
from tokenlab.data.mixture import Mixture
from tokenlab.data.packing import PackedText, PaddedText
from tokenlab.data.tasks.addition import Addition
from tokenlab.data.tasks.associative_recall import AssociativeRecall
from tokenlab.data.tasks.pointer_chase import PointerChase
from tokenlab.data.tasks.source import TaskSource
from tokenlab.tokenizers.byte import ByteTokenizer
from tokenlab.tokenizers.sentence_piece import SentencePieceTrainer

BATCH_SIZE = 8
WARM_UP = 10


def measure(source, tokenizer, batches):
    """Tokens per second of wall clock and of CPU time over all threads, and the padding share."""
    iterator = iter(source.batches(tokenizer=tokenizer, batch_size=BATCH_SIZE, seed=0))
    for _ in range(WARM_UP):
        next(iterator)
    wall, cpu = time.perf_counter(), time.process_time()
    used = [np.count_nonzero(next(iterator)["segments"]) for _ in range(batches)]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    iterator.close()
    positions = batches * BATCH_SIZE * source.tokens_per_row
    return sum(used) / wall, sum(used) / cpu, 1 - sum(used) / positions


def main():
    """Prints one line per source and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    library = f"{glob.escape(sysconfig.get_path('stdlib'))}/*.py"
    parser.add_argument("--pattern", default=library, help="text files to read, as a glob")
    parser.add_argument("--length", type=int, default=512, help="positions of a row of text")
    parser.add_argument("--batches", type=int, default=200, help="batches timed per line")
    arguments = parser.parse_args()

    corpus = TextFiles(pattern=arguments.pattern, separator="\n\n\n")
    train = corpus.documents("train")
    pieces = SentencePieceTrainer(max_bytes=1_000_000).fit(document.text for document in train)
    size = sum(len(document.text) for document in train) / 1e6
    print(f"{len(train)} documents, {size:.1f} MB; {BATCH_SIZE} rows of {arguments.length}\n")

    packed = PackedText(corpus=corpus, length=arguments.length)
    padded = PaddedText(corpus=corpus, length=arguments.length)
    mixed = Mixture(parts={"one": packed, "two": padded}, proportions={"one": 0.7, "two": 0.3})
    lines = [
        ("PackedText", packed, "SentencePiece", pieces),
        ("PaddedText", padded, "SentencePiece", pieces),
        ("Mixture 7:3", mixed, "SentencePiece", pieces),
        ("PackedText", packed, "bytes", ByteTokenizer()),
    ]
    for task in (PointerChase(), Addition(), AssociativeRecall()):
        name = f"{type(task).__name__} ({task.length})"
        lines.append((name, TaskSource(task=task), "own", task.tokenizer))

    print(f"{'source':24}{'tokenizer':16}{'tokens/s':>12}{'per CPU s':>12}{'padding':>10}")
    for name, source, spelling, tokenizer in lines:
        rate, cpu_rate, padding = measure(source, tokenizer, arguments.batches)
        print(f"{name:24}{spelling:16}{rate:12,.0f}{cpu_rate:12,.0f}{padding:10.2%}")


if __name__ == "__main__":
    main()
