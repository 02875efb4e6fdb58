"""Greedy decoding: tokens per second, share of memory bandwidth, a peer.

python -m benchmarks.decode [--model PATH] [--dtype bfloat16] [--peer PYTHON] [--batches 1 16]
                            [--prompt 128] [--new 128]

The model is a published one, or else the 15M preset. PYTHON is an interpreter with torch and
transformers; the peer is ``generate()`` of the same model in float32, or of a Llama of the preset's
shape. Both write exactly ``--new`` tokens and take turns in one process tree.
"""

import argparse
import pathlib
import tempfile
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.peers import Peer
from benchmarks.timing import in_turn
from tokenlab.core.context import View
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.interop import load_pretrained, save_pretrained
from tokenlab.models import Transformer, transformer_15m


def _preset() -> View:
    model = transformer_15m()
    one = jnp.zeros((1, 1), jnp.int32)
    variables = model.init(jax.random.key(0), one, positions=one, segments=one + 1)
    return View(model=model, params=nn.meta.unbox(variables["params"]))


def _published(path: pathlib.Path, dtype: Literal["float32", "bfloat16"]) -> View:
    found = load_pretrained(path, dtype=dtype)
    return View(model=found.model, params=found.params)


def _decoder(view: View, batch: int, prompt: int, new: int):
    """Our decoder on random prompts, and the bytes that one of its steps has to read."""
    model = cast(Transformer, view.model)
    prompts = np.random.default_rng(0).integers(3, model.vocab_size, (batch, prompt)).tolist()
    decoder = Autoregressive(max_new_tokens=new, sampler=Greedy(), end_ids=())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(view.params))
    mixers = model.attentions()
    entry = (
        2
        * jnp.dtype(model.dtype).itemsize
        * sum(mixer.num_kv_heads * mixer.width(model.dim) for mixer in mixers)
    )
    read = weights + batch * (prompt + new / 2) * entry
    return lambda: decoder(view, prompts, key=jax.random.key(0)).tokens, read


def _sum_of_bytes(size: int = 2**28):
    """A sum over a large array: the rate of reading that others are a share of."""
    array = jnp.ones(size // 4)
    total = jax.jit(jnp.sum)
    return lambda: total(array), size


def measure(
    view: View,
    sizes: tuple[int, int, int],
    peer_python: str | None,
    folder: pathlib.Path | None,
    repeats: int,
) -> None:
    """Prints the rows of one batch size; ``folder`` holds the model for the peer."""
    batch, _, new = sizes
    reading, size = _sum_of_bytes()
    ours, read = _decoder(view, *sizes)
    functions = {"reading": reading, "ours": ours}
    if peer_python:
        given = [] if folder is None else ["--model", folder]
        functions["peer"] = peer = Peer(peer_python, "llama.py", "decode", *sizes, *given)
    timings = in_turn(functions, repeats=repeats)
    bandwidth = size / timings.pop("reading").best
    print(f"batch {batch}: memory is read at {bandwidth / 1e9:.1f} GB/s in the same run")
    for name, timing in timings.items():
        print(
            f"  {name:5} {batch * new / timing.best:,.0f} tokens/s best,"
            f" {batch * new / timing.median:,.0f} median,"
            f" share of memory bandwidth {read * new / timing.best / bandwidth:.2f}"
        )
    if peer_python:
        peer.close()
        ours, theirs = timings["ours"], timings["peer"]
        print(
            f"  ours over peer, tokens/s: {theirs.best / ours.best:.2f}x best,"
            f" {theirs.median / ours.median:.2f}x median"
        )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, help="a published model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peer", help="an interpreter with torch and transformers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    view = _preset() if options.model is None else _published(options.model, options.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = None
        if options.model is not None and options.peer:
            folder, found = pathlib.Path(name), load_pretrained(options.model)
            save_pretrained(folder, found.model, found.params, tokenizer=found.tokenizer)
        for batch in options.batches:
            sizes = (batch, options.prompt, options.new)
            measure(view, sizes, options.peer, folder, options.repeats)


if __name__ == "__main__":
    main()
