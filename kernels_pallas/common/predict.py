"""Predicted time of a whole kernel call: its schedule, its grid steps and the peaks of the device.

The schedule says what each part of a grid step costs, the list of steps which parts run and what
is copied. A step takes the longest of its bundles, its bytes and its multiply-adds: copies run
beside bundles, and bundles do not show where a matrix unit that is still busy holds them back.
Of branches that exclude each other each step names the one that it takes.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from kernels_pallas.common.schedule import Schedule, Segment

# Every step; what has no other name.
EVERY = "every"
# A part that does less than this with vectors is the pipeline's own: copies, waits, addresses.
_FEW_STORES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """What one core of a TPU can do, from the vendor's figures.

    Attributes:
        hertz: bundles a second.
        bytes_per_second: between main memory and VMEM.
        multiply_adds: in bfloat16, each bundle.
    """

    hertz: float
    bytes_per_second: float
    multiply_adds: int

    @property
    def bytes_per_cycle(self) -> float:
        """Bytes that arrive while one bundle runs."""
        return self.bytes_per_second / self.hertz


# 197, 459 / 2, 918 and 2307 / 2 TFLOP/s over multiply-adds and their two operations.
PEAKS = {
    "v5e": Peak(hertz=1.50e9, bytes_per_second=819e9, multiply_adds=4 * 128 * 128),
    "v5p": Peak(hertz=1.75e9, bytes_per_second=2765e9 / 2, multiply_adds=4 * 128 * 128),
    "v6e": Peak(hertz=1.75e9, bytes_per_second=1640e9, multiply_adds=4 * 256 * 256),
    "tpu7x": Peak(hertz=2.20e9, bytes_per_second=7380e9 / 2, multiply_adds=4 * 256 * 256),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A kind of grid step.

    Attributes:
        parts: names of the conditional parts that it runs.
        bytes: copied from and to main memory for it.
        multiply_adds: of its matrix products.
    """

    parts: frozenset[str]
    bytes: float
    multiply_adds: float


def part_cycles(
    schedule: Schedule, *, before: Sequence[str], bodies: Sequence[str], after: Sequence[str]
) -> dict[str, int]:
    """Bundles of each part of a grid step, with :data:`EVERY` for what no name is given to.

    Names go to the parts next to those that multiply. What lies further out counts in each step:
    the compiler moves stores of a rare part into the pipeline's own, whose cost is then too high
    rather than too low.

    Args:
        schedule: of the kernel; loops inside a grid step count as one pass.
        before: names of the conditional parts ahead of the first that multiplies, in order;
            the same name, or :data:`EVERY`, may come again.
        bodies: names of those that multiply.
        after: names of those behind the last.

    Raises:
        ValueError: the kernel has fewer parts, or multiplies in another number of them.
    """
    inside = [one for one in schedule.segments if one.loops]
    multiply = [i for i, one in enumerate(inside) if one.conditional and one.slots["MATMUL"]]
    if not multiply:
        raise ValueError(f"{schedule.kernel} has no conditional part that multiplies")
    ahead = [i for i, one in enumerate(inside) if i < multiply[0] and _works(one)]
    behind = [i for i, one in enumerate(inside) if i > multiply[-1] and _works(one)]
    named = {
        "before": ahead[max(0, len(ahead) - len(before)) :],
        "bodies": multiply,
        "after": behind[: len(after)],
    }
    cycles = {EVERY: sum(one.bundles for one in inside)}
    for place, names in (("before", before), ("bodies", bodies), ("after", after)):
        if len(names) != len(named[place]):
            found = [inside[i].bundles for i in named[place]]
            raise ValueError(f"{schedule.kernel} has {place}={found}, not {list(names)}")
        for name, i in zip(names, named[place], strict=True):
            cycles[EVERY] -= inside[i].bundles
            cycles[name] = cycles.get(name, 0) + inside[i].bundles
    return cycles


def loop_cycles(schedule: Schedule) -> dict[str, int]:
    """Bundles of a kernel whose products are not conditional.

    Under :data:`EVERY` what each step runs, under ``"edges"`` all that is conditional and works
    with vectors: a first step that clears sums, a last one that writes results.
    """
    edges = sum(one.bundles for one in schedule.segments if one.loops and _works(one))
    inside = sum(one.bundles for one in schedule.segments if one.loops)
    return {EVERY: inside - edges, "edges": edges}


def call_cycles(steps: Mapping[Step, int], parts: Mapping[str, int], peak: Peak) -> float:
    """Predicted cycles of a call.

    Args:
        steps: how many there are of each kind.
        parts: from :func:`part_cycles`.
        peak: of the device.
    """
    return sum(count * step_cycles(step, parts, peak) for step, count in steps.items())


def step_cycles(step: Step, parts: Mapping[str, int], peak: Peak) -> float:
    """Predicted cycles of one step."""
    bundles = parts[EVERY] + sum(parts[name] for name in step.parts)
    return max(bundles, step.bytes / peak.bytes_per_cycle, step.multiply_adds / peak.multiply_adds)


def body_cycles(steps: Mapping[Step, int], parts: Mapping[str, int], names: Iterable[str]) -> int:
    """Bundles of the parts ``names`` in a call, without what their steps cost besides."""
    names = set(names)
    return sum(count * parts[name] for step, count in steps.items() for name in step.parts & names)


def _works(segment: Segment) -> bool:
    return segment.conditional and segment.slots["VSTORE"] > _FEW_STORES
