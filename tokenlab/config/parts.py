"""What a part is: a frozen dataclass or a Linen module, which is a dataclass too."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from flax import linen as nn

_LINEN_FIELDS = ("parent", "name")


def is_part(value: object) -> bool:
    """Whether ``value`` is an instance of a dataclass, Linen modules included."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields(part: Any) -> dict[str, Any]:
    """Annotation of each field of a part (class or instance) by name, in declaration order."""
    cls = part if isinstance(part, type) else type(part)
    skipped = _LINEN_FIELDS if issubclass(cls, nn.Module) else ()
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in skipped]
    return {name: hints[name] for name in names}


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(names)) or 'none'}"
