"""A training step of the 15M preset: tokens per second, share of the matmul rate, against a peer.

python -m benchmarks.train_step [--peer PYTHON] [--routed] [--batch 8] [--length 512] [--repeats 5]

PYTHON is an interpreter with torch and transformers; the peer is its Llama of the same shape. Both
do forward, backward, clipping and AdamW in float32, and take turns in one process tree. With
--routed, two more steps take part: eight layers of the preset, plain and as Mixture-of-Recursions.
"""

import argparse

import jax
import numpy as np

from benchmarks.peers import Peer
from benchmarks.timing import in_turn, square_product
from tokenlab.core.duration import Clock
from tokenlab.depth import MixtureOfRecursions
from tokenlab.models import Transformer, transformer_15m
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.train.mesh import MeshShape
from tokenlab.train.optimizer import AdamW, Constant
from tokenlab.train.step import Trainer


class Step:
    """Our step of a model on random tokens."""

    def __init__(self, model: Transformer, batch: int, length: int) -> None:
        """Initialises the state and the batch."""
        optimizer = AdamW(learning_rate=Constant(peak=1e-3))
        clock = Clock(tokens_per_step=batch * length, tokens_per_epoch=None, total_steps=1000)
        schedule = optimizer.learning_rate.build(clock)
        self.trainer = Trainer(
            model=model,
            objective=Objective(terms=_terms(model)),
            optimizer=optimizer.build(clock),
            schedule=schedule,
            mesh=MeshShape().build(),
        )
        self.state = self.trainer.init()
        ids = np.random.default_rng(0).integers(0, 8192, (batch, length + 1), np.int32)
        rows = np.arange(length, dtype=np.int32)[None].repeat(batch, 0)
        self.batch = self.trainer.put(
            {
                "tokens": ids[:, :-1],
                "targets": ids[:, 1:],
                "positions": rows,
                "segments": np.ones_like(rows),
                "weights": np.ones(rows.shape, np.float32),
            }
        )

    def __call__(self) -> jax.Array:
        """One step."""
        self.state, self.metrics = self.trainer.step(self.state, self.batch)
        return self.metrics.loss


def _terms(model: Transformer) -> dict[str, Term | AuxiliaryTerm]:
    routed = isinstance(model.depth, MixtureOfRecursions)
    membership = AuxiliaryTerm(name="membership", coefficient=1e-3)
    return {"next_token": Term(loss=NextToken())} | ({"membership": membership} if routed else {})


def _routed(batch: int, length: int) -> dict[str, Step]:
    """Eight layers, each run once on every token, and the same layers in a routed loop."""
    plain = transformer_15m().clone(num_layers=8)
    loop = plain.clone(depth=MixtureOfRecursions(recursions=3))
    return {"plain": Step(plain, batch, length), "routed": Step(loop, batch, length)}


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="an interpreter with torch and transformers")
    parser.add_argument("--routed", action="store_true", help="Mixture-of-Recursions as well")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    product, product_flops = square_product()
    step = Step(transformer_15m(), options.batch, options.length)
    loops = _routed(options.batch, options.length) if options.routed else {}
    functions = {"product": product, "ours": step} | loops
    if options.peer:
        functions["peer"] = peer = Peer(
            options.peer, "llama.py", "train", options.batch, options.length
        )
    timings = in_turn(functions, repeats=options.repeats)
    rate = product_flops / timings.pop("product").best
    flops = 3 * float(step.metrics.ledger.flops)

    def spent(name: str) -> float:
        return 3 * float(loops[name].metrics.ledger.flops) if name in loops else flops

    size = sum(leaf.size for leaf in jax.tree.leaves(step.state.params))
    tokens = options.batch * options.length
    print(f"{options.batch} x {options.length} tokens, {flops / 1e9:.0f} GFLOP a step")
    print(f"float32 matrix product in the same run: {rate / 1e9:.0f} GFLOP/s")
    for name, timing in timings.items():
        print(
            f"  {name:6} best {timing.best:.3f} s  median {timing.median:.3f} s"
            f"  {tokens / timing.best:,.0f} tokens/s"
            f"  share of matmul rate {spent(name) / timing.best / rate:.2f}"
        )
    if loops:
        routed, plain = timings["routed"], timings["plain"]
        share = spent("routed") / spent("plain")
        print(
            f"routed: {share:.2f} of the plain operations; over the time that these predict"
            f" {routed.best / plain.best / share:.2f}x best,"
            f" {routed.median / plain.median / share:.2f}x median"
        )
    if options.peer:
        print(f"parameters: ours {size:,}, peer {peer.parameters:,}")
        ours, theirs = timings["ours"], timings["peer"]
        print(
            f"ours over peer, tokens/s: {theirs.best / ours.best:.2f}x best,"
            f" {theirs.median / ours.median:.2f}x median"
        )
        peer.close()


if __name__ == "__main__":
    main()
