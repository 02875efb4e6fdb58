"""A block of Mixture-of-Recursions, forward and backward, against a twin of it in PyTorch.

python -m benchmarks.routed_block --peer PYTHON [--batch 8] [--length 512] [--repeats 7]

PYTHON is an interpreter with torch and numpy. The twin has our parameters; its result and its
gradients are compared with ours first. It comes twice: computing the tokens that a recursion keeps,
and computing all of them and throwing the rest away, as the released code does with shared keys.
All take turns in one process tree, in float32.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import Peer
from benchmarks.timing import in_turn
from tokenlab.core.context import View
from tokenlab.depth import MixtureOfRecursions, Recursive
from tokenlab.models import Transformer, llama
from tokenlab.models.adapters import drawn

WIDTH, MODES = 384, ("gathered", "masked")


def model_of(depth: Recursive) -> Transformer:
    """One layer of the 15M preset, shared by all recursions."""
    return llama(
        vocab_size=8, dim=WIDTH, num_layers=3, num_heads=6, num_kv_heads=6, hidden_dim=1024,
        depth=depth,
    )  # fmt: skip


def work_of(model: Transformer, params: dict, x: jax.Array, weight: jax.Array):
    """The stream and the gradient of its product with ``weight``, as one compiled function."""
    tokens = jnp.zeros(x.shape[:2], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], tokens.shape)

    @jax.jit
    def work(params):
        def total(params):
            out = View(model=model, params=params)(
                tokens, positions=positions, segments=tokens + 1, embeddings=x, train=True
            )
            return jnp.sum(out.hidden * weight), out.hidden

        gradient, hidden = jax.grad(total, has_aux=True)(params)
        return hidden, gradient

    return lambda: work(params)


def named(params: dict) -> dict[str, np.ndarray]:
    """Arrays under the names that the twin has for them."""
    layer, depth = params["block_0"], params.get("depth", {})
    flat = {
        ".".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(layer)
    }
    routers = {name: np.asarray(router["scores"]["kernel"]) for name, router in depth.items()}
    return flat | routers | {"norm": np.asarray(params["norm"]["scale"])}


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The greatest, relative to the greatest entry of each array."""
    return max(
        float(np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max()) for name in ours
    )


def main() -> None:
    """Parses the command line, compares, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="an interpreter with torch and numpy")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = (jax.random.normal(key, (options.batch, options.length, WIDTH)) for key in keys[:2])
    routed = model_of(MixtureOfRecursions(recursions=3, sharing="cycle"))
    params = drawn(routed, keys[2])
    # Gates are a tenth at most, so routers that differ among tokens are larger than at first.
    params["depth"] = jax.tree.map(lambda leaf: 20 * leaf, params["depth"])
    full = model_of(Recursive(recursions=3, sharing="cycle"))
    functions = {
        "ours": work_of(routed, params, x, weight),
        "ours at full depth": work_of(full, drawn(full, keys[2]), x, weight),
    }
    hidden, gradient = functions["ours"]()
    ours = named(gradient) | {"out": np.asarray(hidden)}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        np.savez(path / "given.npz", x=np.asarray(x), weight=np.asarray(weight), **named(params))
        peers = {mode: Peer(options.peer, "mor.py", mode, path) for mode in MODES}
        for mode in MODES:
            apart = difference(ours, dict(np.load(path / f"{mode}.npz")))
            print(f"{mode}: values and gradients differ by {apart:.1e} of the greatest entry")
            if apart > 1e-3:
                raise SystemExit("the twin computes something else")
        timings = in_turn(functions | peers, repeats=options.repeats)
        for peer in peers.values():
            peer.close()
    print(f"{options.batch} x {options.length} tokens, width {WIDTH}, three recursions")
    for name, timing in timings.items():
        ratios = (timing.best / timings["ours"].best, timing.median / timings["ours"].median)
        print(f"  {name:19} {ratios[0]:.2f}x of our time, best; {ratios[1]:.2f}x, median")


if __name__ == "__main__":
    main()
