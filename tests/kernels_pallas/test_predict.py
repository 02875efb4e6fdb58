"""Predicted time: parts of a step by name, and the longest of bundles, bytes and products."""

import pytest

from kernels_pallas.common import predict
from kernels_pallas.common.predict import EVERY, Step
from kernels_pallas.common.schedule import Schedule, Segment

PEAK = predict.Peak(hertz=1e9, bytes_per_second=2e9, multiply_adds=100)


def _segment(start, bundles, *, loops=1, conditional=True, products=0, stores=0):
    slots = {"MATMUL": products, "VSTORE": stores}
    return Segment(
        start=start, stop=start + bundles, loops=loops, conditional=conditional, slots=slots
    )


SCHEDULE = Schedule(
    kernel="k",
    capacity={"MATMUL": 4, "VSTORE": 1},
    segments=(
        _segment(0, 50, loops=0, conditional=False),
        _segment(50, 10, conditional=False),
        _segment(60, 5),  # waits for a copy
        _segment(65, 40, stores=30),
        _segment(105, 200, products=100, stores=20),
        _segment(305, 100, products=100),
        _segment(405, 30, stores=16),
        _segment(435, 7, conditional=False),
    ),
    steps=None,
    windows=(),
)
NAMES = {"before": ("first",), "bodies": ("masked", "whole"), "after": ("last",)}


def test_parts_are_named_in_order_and_the_rest_is_every_step():
    parts = predict.part_cycles(SCHEDULE, **NAMES)
    assert parts == {EVERY: 10 + 5 + 7, "first": 40, "masked": 200, "whole": 100, "last": 30}


def test_a_part_of_every_step_and_parts_of_one_name_are_added():
    parts = predict.part_cycles(SCHEDULE, before=(EVERY,), bodies=("body", "body"), after=("last",))
    assert parts == {EVERY: 10 + 5 + 7 + 40, "body": 300, "last": 30}


@pytest.mark.parametrize(
    "other",
    [{"before": ("start", "first")}, {"bodies": ("whole",)}, {"after": ("last", "more")}],
    ids=str,
)
def test_a_kernel_of_other_parts_is_an_error(other):
    with pytest.raises(ValueError, match=r"k has (before|bodies|after)=\["):
        predict.part_cycles(SCHEDULE, **(NAMES | other))


def test_what_has_no_name_is_paid_in_every_step():
    parts = predict.part_cycles(SCHEDULE, before=(), bodies=NAMES["bodies"], after=())
    assert parts == {EVERY: 10 + 5 + 7 + 40 + 30, "masked": 200, "whole": 100}


def test_a_loop_without_conditional_products_has_edges():
    plain = Schedule(
        kernel="k",
        capacity=SCHEDULE.capacity,
        segments=(
            _segment(0, 20, stores=16),
            _segment(20, 100, conditional=False, products=100, stores=20),
            _segment(120, 30, stores=16),
        ),
        steps=None,
        windows=(),
    )
    assert predict.loop_cycles(plain) == {EVERY: 100, "edges": 50}


def test_a_step_takes_the_longest_of_bundles_bytes_and_products():
    parts = predict.part_cycles(SCHEDULE, **NAMES)
    whole = frozenset({"whole"})
    assert predict.step_cycles(Step(parts=whole, bytes=0, multiply_adds=0), parts, PEAK) == 122
    assert predict.step_cycles(Step(parts=whole, bytes=400, multiply_adds=0), parts, PEAK) == 200
    slow = Step(parts=whole, bytes=400, multiply_adds=30_000)
    assert predict.step_cycles(slow, parts, PEAK) == 300


def test_a_call_is_its_steps_and_bodies_are_counted_alone():
    parts = predict.part_cycles(SCHEDULE, **NAMES)
    steps = {
        Step(parts=frozenset({"first", "masked"}), bytes=0, multiply_adds=0): 2,
        Step(parts=frozenset({"whole", "last"}), bytes=0, multiply_adds=0): 3,
        Step(parts=frozenset(), bytes=0, multiply_adds=0): 4,
    }
    assert predict.call_cycles(steps, parts, PEAK) == 2 * 262 + 3 * 152 + 4 * 22
    assert predict.body_cycles(steps, parts, ("masked", "whole")) == 2 * 200 + 3 * 100


def test_peaks_are_the_published_ones():
    """TFLOP/s in bfloat16 and GB/s of a chip; v5p and tpu7x have two cores."""
    published = {"v5e": (197, 819), "v5p": (459 / 2, 2765 / 2), "v6e": (918, 1640)}
    published["tpu7x"] = (2307 / 2, 7380 / 2)
    assert set(published) == set(predict.PEAKS)
    for name, (teraflops, gigabytes) in published.items():
        peak = predict.PEAKS[name]
        assert 2 * peak.multiply_adds * peak.hertz == pytest.approx(teraflops * 1e12, rel=0.01)
        assert peak.bytes_per_second == pytest.approx(gigabytes * 1e9)
