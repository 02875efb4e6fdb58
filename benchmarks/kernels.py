"""All kernels in one table per device: accelerators by their compilers, this CPU by the clock.

python -m benchmarks.kernels [v5e] [v6e] [h100] [cpu]

No accelerator is needed: cycles are predicted from static schedules (docs/kernels.md says how to
read them). The table of the H100 needs the environment that ``make test-gpu-aot`` builds.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention, decode_attention, loss, splash
from benchmarks.timing import in_turn
from kernels_pallas import token_routing
from kernels_pallas.block_sparse_attention import (
    BlockSparseAttentionConfig,
    Causal,
    SlidingWindow,
)
from kernels_pallas.block_sparse_attention import cost as attention_cost
from kernels_pallas.block_sparse_attention.specs import GPU_SHAPES, SHAPES
from kernels_pallas.common import aot, predict
from kernels_pallas.common.resources import resources
from kernels_pallas.common.schedule import Schedule, schedules
from kernels_pallas.decode_attention.specs import SHAPES as DECODE_SHAPES
from kernels_pallas.decode_attention.specs import TPU_SHAPES as TPU_DECODE_SHAPES
from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig
from kernels_pallas.linear_cross_entropy import cost as loss_cost
from kernels_pallas.linear_cross_entropy.specs import SHAPES as LOSS_SHAPES
from kernels_pallas.linear_cross_entropy.specs import program as loss_program
from kernels_pallas.token_routing.specs import SHAPES as ROUTING_SHAPES

DTYPE = "bfloat16"
LOSS = "gemma-2-2b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table.

    Attributes:
        kernel: the operation and its pass.
        shape: name of the shape.
        figure: what was predicted or measured, with its unit.
        share: of what the device could do, or empty.
        ratio: to the peer; below 1 is better than it.
        peer: what it is compared with.
    """

    kernel: str
    shape: str
    figure: str
    share: str = ""
    ratio: str = ""
    peer: str = ""


def _print(device: str, rows: Iterator[Row]) -> None:
    names = [field.name for field in dataclasses.fields(Row)]
    print(f"\n### {device}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(dataclasses.astuple(row))} |", flush=True)


# ---------------------------------------------------------------- TPUs


def tpu_rows(generation: str) -> Iterator[Row]:
    """Predicted by the compiler of an absent TPU."""
    peak = predict.PEAKS[generation]
    yield from _attention_rows(generation, peak)
    yield from _loss_rows(generation, peak)
    yield _loss_memory(generation)
    yield _decode_row(generation, peak)
    yield from _routing_rows()


def _on(generation: str) -> contextlib.AbstractContextManager[Any]:
    """In here sizes are looked up as they are tuned for that device; nothing can be computed."""
    device = np.asarray(aot.tpu_devices(aot.TPUS[generation])[:1])
    return jax.set_mesh(jax.sharding.Mesh(device, ("device",)))


def _schedule(generation: str, program: str, **options: Any) -> Schedule:
    (found,) = schedules(
        f"kernels_pallas.{program}", topology=aot.TPUS[generation], dtype=DTYPE, **options
    )
    return found


def _attention_rows(generation: str, peak: predict.Peak) -> Iterator[Row]:
    name, splash_passes = "tpu-4096", {"forward": "forward", "backward": "fused"}
    shape = attention_cost.SHAPES[name]
    rule = attention_cost.rule_of(shape)
    for which in attention_cost.PASSES:
        with _on(generation):
            block_q, block_k = BlockSparseAttentionConfig().tiles(
                which,
                queries=shape.length,
                keys=shape.length,
                width=shape.width,
                dtype=DTYPE,
                rule=rule,
            )
        sizes = {"block_q": block_q, "block_k": block_k}
        program = "block_sparse_attention.cost:kernel"
        found = _schedule(generation, program, which=which, shape=name, **sizes)
        cycles = attention_cost.predicted(found, peak, which, name, DTYPE, sizes)
        pairs = shape.heads * shape.length * (shape.length + 1) / 2
        products = (2 if which == "forward" else 5) * pairs * shape.width
        best = splash.BEST.get((generation, splash_passes[which]))
        yield Row(
            kernel=f"attention {which} {block_q}x{block_k}",
            shape=name,
            figure=_cycles(cycles, peak),
            share=f"{products / peak.multiply_adds / cycles:.0%} of matmul peak",
            ratio=f"{cycles / (best[1] * shape.heads):.3f}" if best else "",
            peer="splash at its best" if best else "",
        )


def _loss_rows(generation: str, peak: predict.Peak) -> Iterator[Row]:
    shape = LOSS_SHAPES[LOSS]
    count = shape.batch * shape.length
    for which in loss_cost.PASSES:
        with _on(generation):
            tile = LinearCrossEntropyConfig().tile(
                which, tokens=count, vocabulary=shape.vocabulary, width=shape.width, itemsize=2
            )
        if tile is None:
            raise ValueError(f"no tile of {LOSS} fits")
        program = "linear_cross_entropy.cost:kernel"
        found = _schedule(generation, program, which=which, shape=LOSS, **tile._asdict())
        cycles = loss_cost.predicted(found, peak, which, LOSS, DTYPE, tile._asdict())
        products = count * shape.width * shape.vocabulary * (1 if which == "forward" else 2)
        least = products / peak.multiply_adds
        yield Row(
            kernel=f"loss {which} {tile.tokens}x{tile.vocabulary}",
            shape=LOSS,
            figure=_cycles(cycles, peak),
            share=f"{least / cycles:.0%} of matmul peak",
            ratio=f"{cycles / least:.3f}",
            peer="its bare products",
        )


def _loss_memory(generation: str) -> Row:
    function, arguments = loss_program(shape=LOSS, dtype=DTYPE, backward=True)
    compiled = aot.compile_tpu(function, *arguments, topology=aot.TPUS[generation])
    used, shape = compiled.memory_analysis().temp_size_in_bytes, LOSS_SHAPES[LOSS]
    whole = 4 * shape.batch * shape.length * shape.vocabulary
    return Row(
        kernel="loss, temporary HBM",
        shape=LOSS,
        figure=f"{used / 1e6:.2f} MB",
        ratio=f"{used / whole:.5f}",
        peer="whole float32 logits",
    )


def _decode_row(generation: str, peak: predict.Peak) -> Row:
    name = "tpu-32k-paged"
    shape = TPU_DECODE_SHAPES[name]
    program = "decode_attention.specs:program"
    found = _schedule(generation, program, shape=name, backward=False)
    computing = sum(segment.bundles for segment in found.segments if segment.loops == 2)
    block = 2 * shape.kv_heads * 512 * shape.width * 2 / peak.bytes_per_cycle
    return Row(
        kernel="decode attention",
        shape=name,
        figure=f"{max(computing, block):,.0f} cycles a block of 512",
        share=f"{block / max(computing, block):.0%} of memory bandwidth",
        ratio=f"{computing / block:.2f}",
        peer="computing over reading",
    )


def _routing_rows() -> Iterator[Row]:
    """Counted from a random route; tests count the kernels' own copies and find the same."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", DTYPE):
        for name in ("wide-2-of-3", "wide-1-of-3"):
            shape = ROUTING_SHAPES[name]
            index = np.sort(rng.permutation(shape.length)[: shape.slots])
            config = token_routing.TokenRoutingConfig()
            block, packing = config.slots(shape.slots, shape.width), 4 // jnp.dtype(dtype).itemsize
            # A row of words is as many tokens; what two blocks share is read for each.
            words = index // packing
            shared = np.sum(words[block::block] == words[block - 1 : -1 : block])
            held, again = packing * len(np.unique(words)), packing * shared
            # A gather reads and writes the rows; the other also reads what it adds to them.
            for op, moved, must in (
                ("gather", held + again + shape.slots, 2 * shape.slots),
                ("scatter-add", 2 * held + again + shape.slots, 3 * shape.slots),
            ):
                yield Row(
                    kernel=f"{op} {dtype}",
                    shape=name,
                    figure=f"{moved:,} rows moved",
                    ratio=f"{moved / must:.2f}",
                    peer=f"the {must:,} that it must",
                )


def _cycles(cycles: float, peak: predict.Peak) -> str:
    return f"{cycles / 1e3:,.0f} k cycles, {cycles / peak.hertz * 1e3:.2f} ms"


# ---------------------------------------------------------------- GPUs


def gpu_rows(gpu: str) -> Iterator[Row]:
    """What the compiler of an absent GPU gives each kernel."""
    program = "kernels_pallas.block_sparse_attention.specs:program"
    for name in GPU_SHAPES:
        options = {"shape": name, "dtype": DTYPE, "backward": True, "impl": "gpu"}
        for one in resources(program, gpu=gpu, **options):
            yield Row(
                kernel=one.kernel,
                shape=name,
                figure=f"{one.registers} registers, {one.spill_bytes} bytes spilled",
                share=f"{one.shared_bytes / (227 << 10):.0%} of shared memory",
            )


# ---------------------------------------------------------------- this CPU


Call = tuple[Callable[..., Any], Sequence[Any]]


def cpu_rows(repeats: int) -> Iterator[Row]:
    """Measured beside a peer in the same process, in turn."""
    name = "laptop-8192"
    shape = SHAPES[name]
    arrays = [
        jax.random.normal(key, (shape.batch, shape.length, shape.heads, shape.width))
        for key in jax.random.split(jax.random.key(0), 3)
    ]
    # A window of 2240 shows a quarter of all pairs.
    for label, rule in (("causal", Causal()), ("density 1/4", SlidingWindow(size=2240))):
        ours = functools.partial(attention.attend, rule=rule, impl="xla")
        peer = functools.partial(attention.peer, rule=rule)
        kernel = f"attention, {label}"
        calls = (ours, arrays), (peer, arrays)
        yield _compared(f"{kernel}, forward", name, *calls, "jax.nn", repeats)
        calls = (attention.both(ours), arrays), (attention.both(peer), arrays)
        yield _compared(f"{kernel}, forward+backward", name, *calls, "jax.nn", repeats)
    name = "laptop-32k"
    arrays = loss.arrays_of(LOSS_SHAPES[name], "float32")
    calls = ((jax.grad(function, (0, 1)), arrays) for function in (loss.ours, loss.naive))
    yield _compared("loss, forward+backward", name, *calls, "whole logits", repeats)
    name = "laptop-full"
    decode = decode_attention.calls(DECODE_SHAPES[name], "float32")
    pair = decode["selected"], decode["full"]
    yield _compared("decode, 2k selected", name, *pair, "all 32k", repeats)
    yield _compared("decode, all 32k", name, decode["full"], decode["jax.nn"], "jax.nn", repeats)


def _compared(kernel: str, shape: str, ours: Call, other: Call, peer: str, repeats: int) -> Row:
    calls = {"ours": ours, "peer": other}
    compiled = {
        who: jax.jit(function).lower(*arrays).compile() for who, (function, arrays) in calls.items()
    }
    runs = {who: functools.partial(compiled[who], *calls[who][1]) for who in calls}
    timings = in_turn(runs, repeats=repeats)
    mine, theirs = timings["ours"], timings["peer"]
    memory = [each.memory_analysis().temp_size_in_bytes for each in compiled.values()]
    return Row(
        kernel=kernel,
        shape=shape,
        figure=f"{theirs.median / mine.median:.1f}x as fast, best {theirs.best / mine.best:.1f}x",
        share=f"{memory[0] / 2**20:.0f} MiB temporary",
        ratio=f"{mine.median / theirs.median:.3f} time, {memory[0] / max(memory[1], 1):.3f} memory",
        peer=peer,
    )


def main() -> None:
    """Parses the command line and prints a table per device."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ("v5e", "v6e", *aot.GPUS, "cpu")
    parser.add_argument("devices", nargs="*", metavar="DEVICE", help=f"of {', '.join(known)}")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed on the CPU")
    options = parser.parse_args()
    for device in options.devices or ("v5e", "v6e", "cpu"):
        if device not in known:
            parser.error(f"no device {device!r}; use one of {', '.join(known)}")
        if device == "cpu":
            _print(f"this CPU, {jax.__version__}", cpu_rows(options.repeats))
        elif device in aot.GPUS:
            _print(device, gpu_rows(device))
        else:
            _print(device, tpu_rows(device))


if __name__ == "__main__":
    main()
