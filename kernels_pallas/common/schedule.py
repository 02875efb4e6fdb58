"""What a kernel costs on a TPU that is not there, read from the compiler's own schedule.

A TPU core issues one *bundle* of instructions a cycle, in an order fixed at compile time. So the
bundles of a grid step, and which slots of them are filled, are known without running anything, and
are the same on every machine: kernels can be compared and guarded in tests.

python -m kernels_pallas.common.schedule OP --shape NAME [--topology v5e:2x2] [--backward]

What a schedule does not say: how long copies between HBM and VMEM take. They run beside the
bundles, so a step takes the longer of its bundles and its bytes. Nor does it say where a unit that
is still busy holds a bundle back, so cycles here are a lower bound.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kernels_pallas.common.aot import TPUS
from kernels_pallas.common.programs import compile_apart, shape_parser

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:LH|LB|LE|PB|PF|CT)?\s*:\s")
_BRANCH = re.compile(r"sbr\.\w+ .*?target = \$region(\d+)")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder %s\w+, (\d+)  */\* loop exit test \*/")
_WINDOW = re.compile(r"kind: (\w+),.*?The window shape is (\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Bundles that run one after the other.

    Attributes:
        start: address of the first.
        stop: address behind the last.
        loops: how many loops they lie in; the grid is the first.
        conditional: whether a branch may pass over them.
        slots: instructions by slot, such as ``"MATMUL"`` and ``"VALU"``.
    """

    start: int
    stop: int
    loops: int
    conditional: bool
    slots: Mapping[str, int]

    @property
    def bundles(self) -> int:
        """Cycles of one pass."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The schedule of one kernel.

    Attributes:
        kernel: its name in the program.
        capacity: instructions that a bundle can hold, by slot.
        segments: all of it, in order.
        steps: passes of the grid loop, one or two of them to fill and drain its pipeline; None
            where the bound is not a constant.
        windows: bytes of the blocks of each operand, inputs first.
    """

    kernel: str
    capacity: Mapping[str, int]
    segments: tuple[Segment, ...]
    steps: int | None
    windows: tuple[int, ...]

    @property
    def computing(self) -> tuple[Segment, ...]:
        """What a grid step that computes runs: all that is not conditional, and what multiplies.

        Left out are conditional parts without a matrix product: a first step that clears its
        accumulators, a last one that writes results. Parts that multiply and exclude each other
        are all counted: a kernel with such branches is judged by its ``segments``.
        """
        return tuple(
            segment
            for segment in self.segments
            if segment.loops and (not segment.conditional or segment.slots["MATMUL"])
        )

    @property
    def cycles(self) -> int:
        """Bundles of a grid step that computes; a loop inside it counts as one pass."""
        return sum(segment.bundles for segment in self.computing)

    @property
    def idle_cycles(self) -> int:
        """Bundles of a grid step whose conditional parts are all passed over."""
        return sum(s.bundles for s in self.segments if s.loops and not s.conditional)

    def share(self, slot: str) -> float:
        """Filled part of ``slot`` in a grid step that computes, 0 to 1.

        A product may hold its unit for longer than the bundle that starts it.
        """
        used = sum(segment.slots[slot] for segment in self.computing)
        return used / (self.capacity[slot] * max(1, self.cycles))

    @property
    def spills(self) -> int:
        """Registers stored to VMEM for want of room, in a grid step that computes."""
        return sum(segment.slots["VSTORE:SPILL"] for segment in self.computing)


def read(folder: pathlib.Path) -> list[Schedule]:
    """Schedules of all Pallas kernels whose compilation was dumped into ``folder``."""
    found = []
    for path in sorted(folder.glob("*schedule-analysis_final_bundles.txt")):
        stamp, name = path.name.partition("-")[0], path.name.partition("-")[2]
        name = re.sub(r"-\d+-schedule-analysis_final_bundles\.txt", "", name)
        whole_program = name == "TLP"
        if whole_program or "tpu_custom_call" not in path.read_text():
            continue
        (bundles,) = folder.glob(f"{stamp}-{name}-*[0-9]-final_bundles.txt")
        (slots,) = folder.glob(f"{stamp}-{name}-*-final_hlo-static-per-bundle-utilization.txt")
        found.append(parse(name, bundles.read_text(), slots.read_text()))
    return found


def parse(kernel: str, bundles: str, slots: str) -> Schedule:
    """The schedule that the compiler wrote down.

    Args:
        kernel: its name.
        bundles: text of ``final_bundles``.
        slots: text of ``final_hlo-static-per-bundle-utilization``.
    """
    names, use = _slots(slots)
    regions, branches, exits = _control_flow(bundles)
    loops = [(regions[target], at + 1) for at, target in branches if regions[target] <= at]
    skips = [(at + 1, regions[target]) for at, target in branches if regions[target] > at]
    edges = sorted({0, len(use), *(edge for pair in loops + skips for edge in pair)})
    segments = []
    for start, stop in itertools.pairwise(edges):
        inside = [pair for pair in loops if _depth(start, [pair])]
        # A branch over the whole body of a loop is that loop's own test for no passes at all.
        passed = [
            (low, high)
            for low, high in skips
            if low <= start < high and not any(low <= a and b <= high for a, b in inside)
        ]
        total = [sum(column) for column in zip(*use[start:stop], strict=True)]
        segments.append(
            Segment(
                start=start,
                stop=stop,
                loops=len(inside),
                conditional=bool(passed),
                slots=dict(zip(names, total, strict=True)),
            )
        )
    return Schedule(
        kernel=kernel,
        capacity=dict(zip(names, _capacity(slots), strict=True)),
        segments=tuple(segments),
        steps=next((bound for at, bound in exits if _depth(at, loops) == 1), None),
        windows=tuple(_windows(bundles)),
    )


def _depth(address: int, loops: Sequence[tuple[int, int]]) -> int:
    """How many of ``loops`` hold ``address``."""
    return sum(low <= address < high for low, high in loops)


def _slots(text: str) -> tuple[list[str], list[list[int]]]:
    """Names of the slots, and for each bundle how many instructions each one holds."""
    lines = text.splitlines()
    names = lines[1].split(", ")
    start = lines.index(next(line for line in lines if line.startswith("== UTILIZATION"))) + 1
    return names, [[int(n) for n in line.split()] for line in lines[start:] if line.strip()]


def _capacity(text: str) -> list[int]:
    return [int(n) for n in text.splitlines()[2].split()]


def _control_flow(
    text: str,
) -> tuple[dict[int, int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Address of each region; (address, region) of branches; (address, bound) of loop exits."""
    regions: dict[int, int] = {}
    branches, exits, address = [], [], 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle:
            address = int(bundle[1], 16)
        for number in _REGION.findall(line):
            regions.setdefault(int(number), address)
        branches += [(address, int(number)) for number in _BRANCH.findall(line)]
        exits += [(address, int(bound)) for bound in _EXIT.findall(line)]
    return regions, branches, exits


def _windows(text: str) -> Iterator[int]:
    head = text.partition("/* entry bundle")[0]
    for kind, dtype, shape in _WINDOW.findall(head):
        if kind in ("input", "output"):
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            yield bits * math.prod(map(int, filter(None, shape.split(",")))) // 8


# ---------------------------------------------------------------- in a process of its own


def schedules(program: str, *, topology: str = TPUS["v5e"], **options: Any) -> list[Schedule]:
    """Compiles a program in a new process and reads the schedules of its kernels.

    The compiler writes schedules only if it is told so before libtpu is loaded.

    Args:
        program: ``module:function`` (see :mod:`kernels_pallas.common.programs`).
        topology: of the absent slice.
        **options: JSON-able.

    Raises:
        CannotCompile: the compiler refuses, or is not installed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        compile_apart(program, {"topology": topology}, {"LIBTPU_INIT_ARGS": flags}, options)
        return read(pathlib.Path(folder))


def table(found: Sequence[Schedule]) -> str:
    """One line per kernel: cycles of a step, filled slots, spills, bytes of its windows."""
    lines = [f"{'kernel':40}{'steps':>7}{'cycles':>8}{'idle':>6}{'MXU':>6}{'VALU':>6}{'EUP':>6}"]
    lines[0] += f"{'load':>6}{'store':>6}{'spills':>7}{'window bytes':>14}"
    for one in found:
        shares = [one.share(slot) for slot in ("MATMUL", "VALU", "EUP", "VLOAD", "VSTORE")]
        lines.append(
            f"{one.kernel:40}{one.steps or '?':>7}{one.cycles:8}{one.idle_cycles:6}"
            + "".join(f"{share:6.0%}" for share in shares)
            + f"{one.spills:7}{sum(one.windows):14,}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and prints the table."""
    parser = shape_parser(__doc__)
    parser.add_argument("--topology", default=TPUS["v5e"])
    options = parser.parse_args(arguments)
    found = schedules(
        f"kernels_pallas.{options.op}.specs:program",
        topology=options.topology,
        shape=options.shape,
        dtype=options.dtype,
        backward=options.backward,
    )
    print(table(found))  # noqa: T201


if __name__ == "__main__":
    main()
