"""Time to the first token of a long prompt, sparse against dense, and what the text behind costs.

python -m benchmarks.prefill [--length 7680] [--new 512] [--thresholds 0.9 0.8]

SmolLM2-135M on a held-out document of english_prose; its context is 8192 tokens, so a perplexity
beyond that says nothing. All prefills run in turn in one process.
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
from tokenlab.data import TfdsCorpus
from tokenlab.decode.passes import logits_of, prefill, read
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
    cache = model.empty_cache(FullCache(), batch=1, capacity=capacity)
    cache, last, _ = prefill(model, params, cache, tokens, jnp.asarray([tokens.shape[1]]))
    return cache, logits_of(model, params, last)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def continuation(model, params, cache, logits, tokens, start):
    """Nats of every token after the prompt, read over its cache in one pass."""
    positions = (start + jnp.arange(tokens.shape[1]))[None]
    segments = jnp.ones_like(tokens)
    out = read(model, params, cache, tokens, positions=positions, segments=segments)
    ahead = logits_of(model, params, out.hidden[:, :-1])
    logp = jax.nn.log_softmax(jnp.concatenate([logits[:, None], ahead], axis=1))
    return -jnp.take_along_axis(logp, tokens[..., None], axis=-1)[0, :, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def shares(model, capacity, params, tokens):
    """Density of earlier spans, and blocks computed over causal ones, means of layers and heads."""
    cache = model.empty_cache(FullCache(), batch=1, capacity=capacity)
    positions = jnp.arange(tokens.shape[1])[None]
    _, seen = model.apply(
        {"params": params}, tokens, positions=positions, segments=jnp.ones_like(tokens),
        cache=cache, mutable="prefill",
    )  # fmt: skip
    found = jax.tree_util.tree_leaves_with_path(seen["prefill"])
    return {
        name: jnp.mean(jnp.stack([x for path, x in found if name in jax.tree_util.keystr(path)]))
        for name in ("density", "visited")
    }


def measure(options):
    """Prints a row per selector."""
    model, params, tokenizer = load_pretrained(fetch_model("smollm2_135m"))
    model, params = unrolled(model, params)
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
    nats = {
        name: float(jnp.mean(continuation(model, params, *run[name](), rest, options.length)))
        for name in models
    }
    timings = in_turn(run, repeats=options.repeats)
    print(f"{options.length} tokens, {options.new} after them at {np.exp(nats['dense']):.3f} each")
    for name, timing in timings.items():
        line = f"  {name:14} {timing.best:6.2f} s"
        if name != "dense":
            found = shares(models[name], capacity, params, prompt)
            line += f"  dense/this best {timings['dense'].best / timing.best:.2f}"
            line += f" median {timings['dense'].median / timing.median:.2f}"
            line += f"  perplexity {100 * np.expm1(nats[name] - nats['dense']):+.2f} %"
            line += f"  density {found['density']:.3f}  blocks computed {found['visited']:.3f}"
        print(line, flush=True)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=7680)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--span", type=int, default=256)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9])
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--repeats", type=int, default=2)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
