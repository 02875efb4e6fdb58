"""Greedy decoding: tokens per second, share of memory bandwidth, peers.

python -m benchmarks.decode [--model PATH] [--dtype bfloat16] [--peer PYTHON] [--llama-cpp PYTHON]
                            [--batches 1 16] [--prompt 128] [--new 128]

The model is a published one, or else the 15M preset. The peer is ``generate()`` of transformers, on
the same model in float32 or on a Llama of the preset's shape, under an interpreter that has torch
and transformers. llama.cpp runs a model that is a GGUF file, once with its weights as they are
stored and once with the same weights in float32, under an interpreter that has xllamacpp and gguf.
All write exactly ``--new`` tokens and take turns in one process tree.
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


def _peers(
    options: argparse.Namespace, sizes: tuple[int, int, int], folder: pathlib.Path | None
) -> dict[str, Peer]:
    """The peers that were asked for; ``folder`` holds the published model for transformers."""
    peers = {}
    if options.peer:
        given = [] if folder is None else ["--model", folder]
        peers["transformers"] = Peer(options.peer, "llama.py", "decode", *sizes, *given)
    if options.llama_cpp:
        call = ("llama_cpp.py", "decode", *sizes, "--model", options.model)
        peers["llama.cpp, stored"] = Peer(options.llama_cpp, *call)
        peers["llama.cpp, float32"] = Peer(options.llama_cpp, *call, "--float32")
    return peers


def measure(view: View, sizes: tuple[int, int, int], peers: dict[str, Peer], repeats: int) -> None:
    """Prints the rows of one batch size."""
    batch, _, new = sizes
    reading, size = _sum_of_bytes()
    ours, read = _decoder(view, *sizes)
    timings = in_turn({"reading": reading, "ours": ours} | peers, repeats=repeats)
    bandwidth = size / timings.pop("reading").best
    print(f"batch {batch}: memory is read at {bandwidth / 1e9:.1f} GB/s in the same run")
    ours = timings["ours"]
    share = read * new / ours.best / bandwidth
    print(f"  ours reads {share:.2f} of it")
    for name, timing in timings.items():
        print(
            f"  {name:18} {batch * new / timing.best:,.0f} tokens/s best,"
            f" {batch * new / timing.median:,.0f} median; ours over it"
            f" {timing.best / ours.best:.2f}x best, {timing.median / ours.median:.2f}x median"
        )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, help="a published model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peer", help="an interpreter with torch and transformers")
    parser.add_argument("--llama-cpp", help="an interpreter with xllamacpp and gguf")
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
            peers = _peers(options, sizes, folder)
            measure(view, sizes, peers, options.repeats)
            for peer in peers.values():
                peer.close()


if __name__ == "__main__":
    main()
