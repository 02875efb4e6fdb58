"""What the command line says about every field of a part."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenlab.config.parts import fields, is_part
from tokenlab.config.values import type_name


class FieldHelp(NamedTuple):
    """One line of ``--help``: dotted path, type, current value, documentation."""

    path: str
    type: str
    value: str
    doc: str


def describe(part: Any, prefix: str = "") -> Iterator[FieldHelp]:
    """Every field of a resolved part, depth first, documented by its class docstring."""
    for name, hint in fields(part).items():
        path, value = f"{prefix}{name}", getattr(part, name)
        shown = type(value).__name__ if is_part(value) else repr(value)
        if isinstance(value, Mapping):
            shown = "{" + ", ".join(map(str, value)) + "}"
        yield FieldHelp(path, type_name(hint), shown, field_doc(type(part), name))
        if is_part(value):
            yield from describe(value, f"{path}.")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if is_part(item):
                    doc = (inspect.getdoc(type(item)) or "").partition("\n")[0]
                    kind = type(item).__name__
                    yield FieldHelp(f"{path}.{key}", kind, kind, doc)
                    yield from describe(item, f"{path}.{key}.")


def field_doc(cls: type, name: str) -> str:
    """What the ``Attributes`` section of ``cls`` or a base class says about ``name``."""
    for base in cls.__mro__:
        section = (inspect.getdoc(base) or "").partition("Attributes:\n")[2]
        found = re.search(rf"^    {name}: (.*(?:\n {{5,}}.*)*)", section, re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return ""
