"""The schedule reader, on a matrix product whose cost is known beforehand."""

import os
import pathlib
import subprocess
import sys

import pytest

from kernels_pallas.common import aot
from kernels_pallas.common.schedule import parse, schedules, table

PROGRAMS = "tests.kernels_pallas.programs"
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = x [index: 0, kind: input, shape index: {}] /* The window shape is bf16[4,8] */ }
/* entry bundle: %k */
   0x1   :  { %a = vadd } /* Start region 1 */
   0x2 LB: > { %b = vadd } /* Start region 2 */
   0x3   : > { %c = vadd ;;  %1 = sbr.rel (%p0) target = $region3 }
   0x4   : > { %d = vst }
   0x5 PF: > { %e = vadd ;;  %2 = sbr.rel (%p1) target = $region4 } /* Start region 3 */
   0x6   : > { %f = vmatmul }
   0x7   : > { %g = vmatmul }
   0x8 PF: > { %p9 = scmp.ge.s32.totalorder %s2, 34  /* loop exit test */ }
   /* Start/End empty region 4 */
   0x9   : > { %3 = sbr.rel (!%p9) target = $region2 }
   0xa   :  { %h = vadd }
"""
SLOTS = """== CAPACITY:
MATMUL, VALU, VSTORE, VSTORE:SPILL
    4     4     1     1
== UTILIZATION:
0 0 0 0
0 1 0 0
0 1 0 0
0 1 0 0
0 0 1 0
0 1 0 0
2 0 0 1
2 0 0 0
0 0 0 0
0 0 0 0
0 1 0 0
"""


def test_segments_loops_and_conditions_of_a_schedule_written_by_hand():
    found = parse("k", BUNDLES, SLOTS)
    assert [(s.start, s.stop, s.loops, s.conditional) for s in found.segments] == [
        (0, 2, 0, False),
        (2, 4, 1, False),
        (4, 5, 1, True),  # passed over by the first branch, and without a product
        (5, 6, 1, False),
        (6, 8, 1, True),
        (8, 10, 1, False),
        (10, 11, 0, False),
    ]
    assert (found.cycles, found.idle_cycles, found.steps, found.spills) == (7, 5, 34, 1)
    assert found.share("MATMUL") == 4 / (4 * 7) and found.share("VSTORE") == 0
    assert found.windows == (4 * 8 * 2,)


@pytest.fixture(scope="module")
def product():
    return lambda **options: schedules(f"{PROGRAMS}:product", **options)


def test_a_matrix_product_costs_what_its_multiply_adds_need(product):
    """A v5e has four units of 128 x 128 multiply-adds a cycle."""
    (one,) = product(block=512, inner=512)
    assert one.cycles == pytest.approx(512**3 / (4 * 128 * 128), rel=0.1)
    assert 0.85 < one.share("MATMUL") <= 1
    assert one.idle_cycles < 0.1 * one.cycles
    assert one.windows == (512 * 512 * 2,) * 3
    assert one.kernel.startswith("product")
    assert one.kernel in table([one])
    # The same everywhere and always.
    assert product(block=512, inner=512) == [one]


def test_half_the_work_is_half_the_cycles_and_twice_the_steps(product):
    (whole,), (half,) = product(block=512, inner=512), product(block=512, inner=256)
    assert 0.45 < half.cycles / whole.cycles < 0.6
    assert half.steps - 2 == 2 * (whole.steps - 2)


@pytest.mark.parametrize("name", ["v6e", pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_newer_generations_need_fewer_cycles(product, name):
    (old,), (new,) = (product(block=512, inner=512, topology=aot.TPUS[n]) for n in ("v5e", name))
    assert new.cycles < 0.6 * old.cycles


def test_a_program_without_kernels_has_no_schedules():
    assert schedules(f"{PROGRAMS}:nothing") == []


def test_what_does_not_compile_says_why():
    with pytest.raises(aot.CannotCompile, match="divisible by 8 and 128"):
        schedules(f"{PROGRAMS}:broken")


def test_the_command_prints_a_line_per_kernel():
    command = [sys.executable, "-m", "kernels_pallas.common.schedule", "token_routing"]
    done = subprocess.run(
        [*command, "--shape", "wide-2-of-3", "--topology", aot.TPUS["v6e"]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-500:]
    head, *kernels = done.stdout.splitlines()
    assert head.split()[:3] == ["kernel", "steps", "cycles"] and kernels
