"""Every public part of the package is frozen, documented field by field, and its own config."""

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import sys
import typing
from collections.abc import Mapping

import pytest
from flax import linen as nn

import tokenlab
from tokenlab import config
from tokenlab.files import load_module

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]


def public_dataclasses():
    """Every public dataclass that a module of the package defines."""
    found = {}
    for info in pkgutil.walk_packages(tokenlab.__path__, "tokenlab."):
        if info.name == "tokenlab.__main__":
            continue  # importing it runs the command line
        for name, member in vars(importlib.import_module(info.name)).items():
            own = inspect.isclass(member) and member.__module__ == info.name
            if own and dataclasses.is_dataclass(member) and not name.startswith("_"):
                found[f"{info.name.removeprefix('tokenlab.')}.{name}"] = member
    return found


EVERY = public_dataclasses()
# Flax struct dataclasses hold arrays: they are what functions pass on, not what users write.
PARTS = {name: cls for name, cls in EVERY.items() if not vars(cls).get("_flax_dataclass")}
every = pytest.mark.parametrize("cls", EVERY.values(), ids=EVERY)
# Linen makes dataclasses of its modules in its own way: positional, and frozen in use.
PLAIN = {name: cls for name, cls in PARTS.items() if not issubclass(cls, nn.Module)}
every_plain = pytest.mark.parametrize("cls", PLAIN.values(), ids=PLAIN)


def has_defaults(cls):
    return not inspect.isabstract(cls) and all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(cls)
        if field.init
    )


def parts_of(value):
    """A part and all parts inside it."""
    if config.is_part(value):
        yield value
        value = [getattr(value, name) for name in config.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from parts_of(item)


MODULES = {}  # experiment files, whose classes are those of the instances


@pytest.fixture(autouse=True)
def _same_classes(monkeypatch):
    """Another test may have loaded an experiment file again."""
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)


def instances():
    """A default instance of each part that has one, and all parts of the experiments."""
    made = [cls() for cls in PARTS.values() if has_defaults(cls)]
    files = [CHECKOUT / "tests/tiny.py", *(CHECKOUT / "experiments").rglob("*.py")]
    for path in sorted(files):
        # Where another experiment has loaded the file, its classes are the ones to have.
        module = sys.modules.get(".".join(path.with_suffix("").parts[-2:])) or load_module(path)
        MODULES[module.__name__] = module
        made.extend(parts_of(module.config() if "config" in vars(module) else module.study()))
    return {f"{type(part).__name__}-{number}": part for number, part in enumerate(made)}


INSTANCES = instances()
every_instance = pytest.mark.parametrize("part", INSTANCES.values(), ids=INSTANCES)


def test_the_walk_finds_the_families():
    names = {name.rpartition(".")[2] for name in PARTS}
    assert {"NextToken", "FullCache", "TopP", "Transformer", "Experiment", "Study"} <= names
    assert len(EVERY) > len(PARTS) > 40
    assert len(INSTANCES) > 30


@every
def test_documents_every_field(cls):
    doc = inspect.getdoc(cls) or ""
    assert doc and not doc.startswith(f"{cls.__name__}("), "dataclass wrote this line, nobody else"
    for name in config.fields(cls):
        assert config.field_doc(cls, name), f"no line for {name} under Attributes"


@every
def test_documents_no_field_that_is_not_there(cls):
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    named = [line.strip().partition(":")[0] for line in section.splitlines() if line[4:5].strip()]
    assert set(named) <= set(config.fields(cls))


@every_plain
def test_is_frozen_and_built_by_keyword_alone(cls):
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


def holds_a_mapping(part):
    return any(
        isinstance(getattr(inner, name), Mapping)
        for inner in parts_of(part)
        for name in config.fields(inner)
    )


@every_instance
def test_round_trips_and_hashes(part):
    loaded = config.load(config.dump(part))
    assert loaded == part and type(loaded) is type(part)
    assert config.fingerprint(loaded) == config.fingerprint(part)
    if holds_a_mapping(part):
        with pytest.raises(TypeError):
            hash(part)
    else:
        assert hash(loaded) == hash(part)


@every_instance
def test_every_field_can_be_overridden_with_its_own_value(part):
    current = {name: getattr(part, name) for name in config.fields(part)}
    assert config.replace(part, current) == part
    for name, hint in typing.get_type_hints(type(part)).items():
        value = current.get(name)
        if isinstance(value, bool | int | float) and hint in (bool, int, float):
            assert config.replace(part, {name: str(value)}) == part
