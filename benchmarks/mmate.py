"""LinMU's M-MATE block against the attention that it takes the place of, over lengths.

python -m benchmarks.mmate [--lengths 512 1024 ...] [--backward 2048] [--chunk 64] [--work]

A prompt of one row is all video: frames of 16 x 16 patches, windows of 2 x 8 x 8, both branches.
Attention is the plain causal one of equal width and heads, in blocks as a CPU runs it. All take
turns in one process, in float32. Printed are ratios of attention's time over M-MATE's: above 1
M-MATE is the faster one. ``--work`` takes the time of all cores in place of the clock's, which a
busy machine leaves alone.

On two CPU cores beside other work, width 256 and 4 heads, best (median):

length            512          1024         2048         4096         8192
forward           0.61 (0.61)  0.96 (0.91)  1.33 (1.25)  1.25 (1.36)  2.06 (2.09)
and its gradient  0.50 (0.50)  0.52 (0.50)  0.77 (0.76)  1.50 (1.48)  1.69 (1.72)

Another run had 1.73 (1.85) and 2.96 (2.21) forward at the last two lengths. By all cores' time it
was 0.61, 0.85, 1.38, 1.22 and 1.97 forward, and 0.48, 0.50 and 0.78 with the gradient.
M-MATE projects twice, as each branch does, and scans in both directions: 1.4 million operations a
token at any length, as many as attention at 1,800 tokens. Its temporary memory is three times as
large.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.timing import in_turn
from tokenlab.models import Grid, Window, linmu, llama

SIDE, WINDOW = 16, Window(frames=2, height=8, width=8)


def mixers(options, length):
    """The attention of a layer, and the M-MATE block in its place."""
    teacher = llama(
        vocab_size=8, dim=options.dim, num_layers=1, num_heads=options.heads,
        num_kv_heads=options.heads, hidden_dim=options.dim, max_length=length,
    )  # fmt: skip
    grid = Grid(frames=length // SIDE**2, height=SIDE, width=SIDE)
    student = linmu(teacher, grid=grid, window=WINDOW, chunk=options.chunk)
    return {"attention": teacher.block.mixer, "mmate": student.block.kinds()[0].mixer}


def work_of(mixer, x, *, backward):
    """What the layer makes of ``x``, or its gradient as well, compiled."""
    segments = jnp.ones(x.shape[:2], jnp.int32)
    positions = jnp.arange(x.shape[1])[None]
    prompt = segments > 0

    def forward(params, x):
        out, _ = mixer.apply(
            {"params": params}, x, positions=positions, segments=segments, prompt=prompt
        )
        return out

    def both(params, x):
        out, pull_back = jax.vjp(forward, params, x)
        return out, pull_back(out)

    made = jax.eval_shape(
        functools.partial(mixer.init, positions=positions, segments=segments, prompt=prompt),
        jax.random.key(0), x,
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(nn.meta.unbox(made["params"]))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    drawn = [0.05 * jax.random.normal(key, one.shape) for key, one in pairs]
    params = jax.tree.unflatten(tree, drawn)
    compiled = jax.jit(both if backward else forward).lower(params, x).compile()
    return functools.partial(compiled, params, x), compiled.memory_analysis().temp_size_in_bytes


def measure(options, length):
    """Prints a row of a length."""
    x = jax.random.normal(jax.random.key(2), (1, length, options.dim))
    passes = [False] + [True] * (length <= options.backward)
    run, memory = {}, {}
    for name, mixer in mixers(options, length).items():
        for backward in passes:
            run[name, backward], memory[name, backward] = work_of(mixer, x, backward=backward)
    clock = time.process_time if options.work else time.perf_counter
    timings = in_turn(run, repeats=options.repeats, clock=clock)
    for backward in passes:
        dense, ours = timings["attention", backward], timings["mmate", backward]
        which = "forward+backward" if backward else "forward"
        print(
            f"{length:6} {which:17} attention/M-MATE best {dense.best / ours.best:5.2f}"
            f" median {dense.median / ours.median:5.2f}, temporary memory"
            f" {memory['attention', backward] / memory['mmate', backward]:5.2f}",
            flush=True,
        )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--backward", type=int, default=2048, help="the longest with a gradient")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--work", action="store_true", help="count the time of all cores")
    options = parser.parse_args()
    for length in options.lengths:
        measure(options, length)


if __name__ == "__main__":
    main()
