"""Speculation by the wall clock: greedy tokens per second over those of plain decoding.

python -m benchmarks.speculation [--dtype bfloat16] [--batches 1] [--new 64] [--repeats 3]

SmolLM2-135M on code that repeats and on prose that does not, the texts of the study of Goose. All
decoders write the same tokens, which is checked, and take turns in one process.
"""

import argparse
import functools
import pathlib

import jax
import numpy as np

from benchmarks.timing import in_turn
from tokenlab.core.context import View
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.decode.speculative import Goose, PromptLookup, Speculative
from tokenlab.files import load_module
from tokenlab.interop import load_pretrained
from tokenlab.interop.assets import fetch_model

GOOSE = pathlib.Path("experiments/decode/goose.py")
DRAFTERS = {
    "lookup of 4": PromptLookup(length=4),
    "lookup of 8": PromptLookup(length=8),
    "goose of 8": Goose(size=8),
    "goose of 16": Goose(size=16),
    "goose of 32": Goose(size=32),
}


def measure(view, prompts, *, new, repeats):
    """Prints a row per drafter."""
    common = {"max_new_tokens": new, "sampler": Greedy(), "end_ids": ()}
    decoders = {"plain": Autoregressive(**common)} | {
        name: Speculative(drafter=drafter, **common) for name, drafter in DRAFTERS.items()
    }
    found = {}

    def run(name, decoder):
        found[name] = decoder(view, prompts, key=jax.random.key(0))
        return found[name].tokens

    timings = in_turn(
        {name: functools.partial(run, name, one) for name, one in decoders.items()},
        repeats=repeats,
    )
    plain = timings["plain"]
    for name, timing in timings.items():
        line = f"  {name:12} {len(prompts) * new / timing.best:6.1f} tokens/s best"
        if name != "plain":
            passes = found[name].statistics["passes"].sum()
            same = np.array_equal(found[name].tokens, found["plain"].tokens)
            line += f"  over plain {plain.best / timing.best:.2f}x best"
            line += f" {plain.median / timing.median:.2f}x median"
            line += f"  tokens per pass {len(prompts) * new / passes:.2f}"
            line += "" if same else "  OTHER TOKENS THAN PLAIN DECODING"
        print(line, flush=True)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--texts", nargs="+", default=["code", "prose"])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, params, tokenizer = load_pretrained(fetch_model("smollm2_135m"), dtype=options.dtype)
    view, goose = View(model=model, params=params), load_module(GOOSE)
    for text in options.texts:
        for batch in options.batches:
            print(f"{text}, batch {batch}")
            prompts = goose.texts(tokenizer, text, count=batch, seed=0)
            measure(view, prompts, new=options.new, repeats=options.repeats)


if __name__ == "__main__":
    main()
