"""The override grammar, JSON round trips and error messages."""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.block_sparse_attention import SlidingWindow
from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.files import experiment_of
from tokenlab.objectives import AuxiliaryTerm


class Shape(nn.Module, abc.ABC):
    @abc.abstractmethod
    def __call__(self): ...


class Square(Shape):
    """A square.

    Attributes:
        side: length of a side,
            in metres.
    """

    side: float = 1.0

    def __call__(self): ...


class Circle(Shape):
    radius: float = 1.0
    inner: Shape | None = None

    def __call__(self): ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part.

    Attributes:
        count: how many.
    """

    count: int = 3
    label: str = "a"
    rate: float | None = 0.5
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = Part()
    shape: Shape = Square()
    parts: Mapping[str, Part] = dataclasses.field(default_factory=lambda: {"x": Part()})
    either: int | Part = 1


def test_scalars_are_typed_by_their_field():
    changed = config.replace(
        Whole(),
        {
            "part.count": "7",
            "part.label": "12",
            "part.rate": "2",
            "part.mode": "slow",
            "part.flag": "True",
            "part.sizes": "(4, 5, 6)",
        },
    )
    assert changed.part == Part(
        count=7, label="12", rate=2.0, mode="slow", flag=True, sizes=(4, 5, 6)
    )
    assert isinstance(changed.part.rate, float)
    assert config.replace(Whole(), {"part.rate": "None"}).part.rate is None


def test_several_fields_of_one_part_are_set_together():
    whole = config.replace(Whole(), {"part": "Part(count=1)", "part.label": "z"})
    assert whole.part == Part(count=1, label="z")


def test_parts_are_swapped_by_class_name_and_nested():
    changed = config.replace(Whole(), {"shape": "Circle(radius=2, inner=Square(side=3.5))"})
    assert changed.shape == Circle(radius=2.0, inner=Square(side=3.5))
    assert config.replace(changed, {"shape.inner.side": "4"}).shape.inner == Square(side=4.0)
    assert config.replace(Whole(), {"shape": "Circle"}).shape == Circle()
    assert config.replace(Whole(), {"either": "Part(count=2)"}).either == Part(count=2)


def test_a_mask_rule_is_swapped_by_class_name():
    quickstart = experiment_of(pathlib.Path("experiments/quickstart.py"))
    changed = config.replace(quickstart, {"model.block.mixer.rule": "SlidingWindow(size=128)"})
    assert changed.model.block.mixer.rule == SlidingWindow(size=128)
    with pytest.raises(UserError, match="did you mean 'SlidingWindow'"):
        config.replace(quickstart, {"model.block.mixer.rule": "SlideWindow(size=128)"})


def test_mappings_take_changes_and_new_whole_parts():
    changed = config.replace(Whole(), {"parts.x.count": "9", "parts.y": "Part(count=1)"})
    assert changed.parts == {"x": Part(count=9), "y": Part(count=1)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"part.cuont": "1"}, "Part has no field 'cuont' (part.cuont); did you mean 'count'?"),
        ({"prat.count": "1"}, "did you mean 'part'?"),
        ({"part.count": "ten"}, "part.count takes int, not 'ten'"),
        ({"part.count": "1.5"}, "part.count takes int"),
        ({"part.count": True}, "part.count takes int, not True"),
        ({"part.count": "True"}, "part.count takes int"),
        ({"part.mode": "fsat"}, "part.mode takes Literal['fast', 'slow']"),
        ({"part.flag": "1"}, "part.flag takes bool"),
        ({"part.count": "-1"}, "part: count must not be negative"),
        ({"shape": "Cirle(radius=1)"}, "unknown part 'Cirle'; did you mean 'Circle'?"),
        ({"shape": "Circle(radus=1)"}, "Circle has no field 'radus'; did you mean 'radius'?"),
        ({"shape": "Circle(2)"}, "write Circle(field=value, ...)"),
        ({"shape": "Part(count=1)"}, "unknown part 'Part'"),
        ({"shape": "__import__('os').getcwd()"}, "shape takes Shape"),
        ({"shape": "Circle(radius=open('x'))"}, "unknown part 'open'"),
        ({"shape.inner.side": "1"}, "Square has no field 'inner'"),
        ({"parts.z.count": "1"}, "has no entry 'z'"),
        ({"parts.z": "3"}, "has no entry 'z'"),
        ({"part.count.x": "3"}, "part.count is 3 and has no fields"),
    ],
)
def test_errors_name_the_field_and_the_remedy(overrides, message):
    with pytest.raises(UserError) as caught:
        config.replace(Whole(), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_abstract_families_are_not_offered():
    with pytest.raises(UserError, match="unknown part 'Shape'"):
        config.replace(Whole(), {"shape": "Shape()"})


def test_dump_and_load_are_inverse_and_fingerprints_follow_equality():
    whole = config.replace(
        Whole(), {"shape": "Circle(inner=Square(side=0.1))", "parts.y": "Part(rate=None)"}
    )
    assert config.load(config.dump(whole)) == whole
    assert config.fingerprint(config.load(config.dump(whole))) == config.fingerprint(whole)
    other = config.replace(whole, {"part.count": 4})
    assert config.fingerprint(other) != config.fingerprint(whole)
    assert config.fingerprint(other, ignore=("part.count",)) == config.fingerprint(
        whole, ignore=("part.count",)
    )


def test_a_field_at_its_default_does_not_count_in_the_fingerprint():
    """So a class may gain a field; a default that changes shows in the full dump."""
    whole = Whole(part=Part(count=5))
    tree = config.dump(whole)
    del tree["part"]["flag"], tree["either"], tree["parts"]
    older = config.load(tree)
    assert older == whole
    assert config.fingerprint(older) == config.fingerprint(whole)
    marks = {config.fingerprint(part) for part in (Whole(), whole, Whole(part=Part(flag=True)))}
    assert len(marks) == 3
    some = Whole(parts={}), Whole(parts={"x": Part()}), Whole(parts={"x": Part(), "y": Part()})
    assert len({config.fingerprint(part) for part in some}) == 3
    ignored = {
        config.fingerprint(part, ignore=("part.count", "shape.side"))
        for part in (Whole(), whole, Whole(shape=Square(side=4.0)))
    }
    assert len(ignored) == 1


@given(
    st.builds(
        Part,
        count=st.integers(0, 10**9),
        label=st.text(),
        rate=st.none() | st.floats(allow_nan=False),
        sizes=st.lists(st.integers()).map(tuple),
    )
)
def test_any_part_survives_json(part):
    import json

    assert config.load(json.loads(json.dumps(config.dump(part)))) == part


def test_load_refuses_what_is_not_a_part():
    for tag in ("os:system", "tokenlab.config:replace", "subprocess:Popen", "nowhere:Thing"):
        with pytest.raises(UserError, match="which is not here"):
            config.load({"__type__": tag})


def test_help_lists_every_field_with_its_meaning():
    lines = {line.path: line for line in config.describe(Whole())}
    assert lines["part.count"].doc == "how many."
    assert lines["shape.side"].doc == "length of a side, in metres."
    assert lines["part.rate"].type == "float | None"
    assert lines["parts.x.count"].value == "3"
    assert {"part", "part.mode", "shape", "parts", "parts.x", "either"} <= set(lines)


def test_an_entry_may_be_any_member_of_the_family_that_its_field_names():
    experiment = experiment_of(pathlib.Path(__file__).parent / "tiny.py")
    written = "AuxiliaryTerm(name='membership', coefficient=0.5)"
    for entry in ("router", "z_loss"):  # a new one, and one that was a Term
        made = config.replace(experiment, {f"objective.terms.{entry}": written})
        assert made.objective.terms[entry] == AuxiliaryTerm(name="membership", coefficient=0.5)
    with pytest.raises(UserError, match="unknown part 'ByteTokenizer'"):
        config.replace(experiment, {"objective.terms.router": "ByteTokenizer()"})
