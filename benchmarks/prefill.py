"""Time to the first token of a long prompt, sparse against dense, and what the text behind costs.

python -m benchmarks.prefill [--length 7680] [--new 512] [--thresholds 0.9 0.8] [--stretch 1]

SmolLM2-135M on held-out documents of english_prose. Its context is 8192 tokens; beyond that,
``--stretch s`` raises the rotary base b to ``b * s ** (width / (width - 2))``, which makes the
slowest wave s times longer and needs no training. All prefills run in turn in one process.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import in_turn
from tokenlab import config
from tokenlab.attention import MassBudget, MeanPooledBlocks, PermutedBlocks
from tokenlab.cache import FullCache
from tokenlab.core.context import View
from tokenlab.data import TfdsCorpus
from tokenlab.decode import score_continuation
from tokenlab.decode.passes import begin
from tokenlab.interop import load_pretrained
from tokenlab.interop.assets import fetch_model
from tokenlab.models import unrolled

SELECTORS = {"permuted": PermutedBlocks, "pooled": MeanPooledBlocks}


def text(tokenizer, count):
    """Tokens of the longest held-out documents, one after the other as far as they are needed."""
    corpus = TfdsCorpus(name="english_prose").documents("held_out")
    documents = sorted((corpus[i].text for i in range(len(corpus))), key=len, reverse=True)
    ids = [tokenizer.bos_id]
    for document in documents:
        if len(ids) >= count:
            break
        ids += tokenizer.encode(document)
    return np.asarray(ids[:count], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def first_token(model, capacity, params, tokens):
    """The cache of a prompt and the logits of the token after it."""
    lengths = jnp.asarray([tokens.shape[1]])
    begun = begin(model, params, FullCache(), tokens, lengths, capacity=capacity)
    return begun.cache, begun.logits


def measure(options):
    """Prints a row per selector."""
    model, params, tokenizer = load_pretrained(fetch_model("smollm2_135m"))
    model, params = unrolled(model, params)
    mixer, width = model.block.mixer, model.attentions()[0].width(model.dim)
    base = mixer.rope_base * options.stretch ** (width / (width - 2))
    context = int(model.max_length * options.stretch)
    model = config.replace(model, {"block.mixer.rope_base": base, "max_length": context})
    ids = text(tokenizer, options.length + options.new)
    prompt, rest = ids[None, : options.length], ids[None, options.length :]
    sizes = {"block": options.block, "span": options.span}
    models = {"dense": model}
    for threshold in options.thresholds:
        for name in options.selectors:
            chosen = SELECTORS[name](budget=MassBudget(threshold=threshold), **sizes)
            sparse = config.replace(model, {"block.mixer.prefill": chosen})
            models[f"{name} {threshold:g}"] = sparse
    capacity = len(ids)
    run = {
        name: functools.partial(first_token, one, capacity, params, prompt)
        for name, one in models.items()
    }
    scores = {
        name: score_continuation(
            View(model=one, params=params), FullCache(), prompt.tolist(), rest.tolist(),
            chunk=options.new,
        )
        for name, one in models.items()
    }  # fmt: skip
    nats = {name: -float(np.mean(found.logp)) for name, found in scores.items()}
    timings = in_turn(run, repeats=options.repeats)
    print(f"{options.length} tokens, {options.new} after them at {np.exp(nats['dense']):.3f} each")
    for name, timing in timings.items():
        line = f"  {name:14} {timing.best:6.2f} s"
        if name != "dense":
            found = {key: float(x[0]) for key, x in scores[name].statistics.items()}
            line += f"  dense/this best {timings['dense'].best / timing.best:.2f}"
            line += f" median {timings['dense'].median / timing.median:.2f}"
            line += f"  perplexity {100 * np.expm1(nats[name] - nats['dense']):+.2f} %"
            line += f"  density {found['prefill_density']:.3f}"
            line += f"  blocks computed {found['prefill_visited']:.3f}"
        print(line, flush=True)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=7680)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--span", type=int, default=256)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9])
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--repeats", type=int, default=2)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
