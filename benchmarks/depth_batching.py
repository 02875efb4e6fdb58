"""Depth-wise batching: tokens per second over what the mean depth predicts from full depth.

python -m benchmarks.depth_batching [--batch 16] [--prompt 16] [--new 128] [--repeats 5]

A loop of three recursions with the width of the 15M preset, random parameters. Tokens leave it by
chance, in the shares of expert choice: all of them have one recursion, 2/3 two, 1/3 three. Full
depth is the same loop without a router, decoded a batch at a time. All take turns.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.timing import in_turn
from tokenlab.core.context import View
from tokenlab.core.ledger import Ledger
from tokenlab.decode import Autoregressive, DepthBatched, Greedy
from tokenlab.depth import DepthProgram, MixtureOfRecursions, Recursive
from tokenlab.models import llama
from tokenlab.routing import RandomRouter


def _view(depth: DepthProgram) -> View:
    model = llama(
        vocab_size=8192, dim=384, num_layers=8, num_heads=6, num_kv_heads=6, hidden_dim=1024,
        depth=depth,
    )  # fmt: skip
    one = jnp.zeros((1, 1), jnp.int32)
    variables = model.init(jax.random.key(0), one, positions=one, segments=one + 1)
    return View(model=model, params=nn.meta.unbox(variables["params"]))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 16), ("prompt", 16), ("new", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows = np.random.default_rng(0).integers(3, 8192, (2 * given.batch, given.prompt)).tolist()
    usual = {"max_new_tokens": given.new, "sampler": Greedy(), "end_ids": ()}
    mixture = _view(MixtureOfRecursions(recursions=3, router=RandomRouter()))
    full = _view(Recursive(recursions=3))
    spent: dict[str, Ledger] = {}

    def decode(name, decoder, view, batches):
        def run():
            made = [decoder(view, batch, key=jax.random.key(0)) for batch in batches]
            spent[name] = made[0].ledger
            return [each.tokens for each in made]

        return run

    batches = [rows[: given.batch], rows[given.batch :]]
    timings = in_turn(
        {
            "full depth": decode("full depth", Autoregressive(**usual), full, batches),
            "mixture, all computed": decode("all", Autoregressive(**usual), mixture, batches),
            "mixture, depth-batched": decode(
                "mixture", DepthBatched(batch=given.batch, **usual), mixture, [rows]
            ),
        },
        repeats=given.repeats,
    )
    depth = {name: each.block_tokens / each.tokens for name, each in spent.items()}
    flops = {name: each.flops / each.tokens for name, each in spent.items()}
    slow, fast = timings["full depth"], timings["mixture, depth-batched"]
    for name, timing in timings.items():
        rate = len(rows) * given.new / timing.best
        print(f"{name:24} {rate:,.0f} tokens/s best, {slow.median / timing.median:.2f}x median")
    for name, per_token in (("mean depth", depth), ("operations", flops)):
        predicted = per_token["full depth"] / per_token["mixture"]
        print(
            f"{name}: {predicted:.2f}x predicted; reached {slow.best / fast.best / predicted:.2f} "
            f"of it best, {slow.median / fast.median / predicted:.2f} median"
        )


if __name__ == "__main__":
    main()
