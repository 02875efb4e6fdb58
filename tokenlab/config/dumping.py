"""Parts as JSON trees, and their fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from tokenlab.config.parts import fields, is_part, nearest
from tokenlab.core.errors import UserError


def dump(value: Any) -> Any:
    """A JSON tree of a part; ``load(dump(part)) == part``."""
    if is_part(value):
        cls = type(value)
        return {"__type__": tag(cls)} | {name: dump(getattr(value, name)) for name in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [dump(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} of {type(value).__name__} cannot be part of a config")


def load(tree: Any) -> Any:
    """The part that ``dump`` wrote; classes come from tokenlab or from modules already loaded."""
    if isinstance(tree, dict) and "__type__" in tree:
        cls = class_of(tree["__type__"])
        known = fields(cls)
        values = {key: load(item) for key, item in tree.items() if key != "__type__"}
        for name in values:
            if name not in known:
                raise UserError(f"{cls.__name__} has no field {name!r}{nearest(name, known)}")
        return cls(**values)
    if isinstance(tree, dict):
        return {key: load(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return tuple(load(item) for item in tree)
    return tree


def tag(cls: type) -> str:
    """``module:Class``, by which a dumped part names its class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def class_of(tag: str) -> type:
    """The class that ``tag`` names.

    Raises:
        UserError: it is not a dataclass of tokenlab or of a module already loaded.
    """
    module_name, _, qualname = tag.partition(":")
    if module_name.partition(".")[0] in ("tokenlab", "kernels_pallas"):
        importlib.import_module(module_name)
    target: Any = sys.modules.get(module_name)
    for name in qualname.split("."):
        target = vars(target).get(name) if target is not None else None
    if not (isinstance(target, type) and dataclasses.is_dataclass(target)):
        raise UserError(f"config names {tag}, which is not here; run its experiment file instead")
    return target


def fingerprint(part: Any, *, ignore: tuple[str, ...] = ()) -> str:
    """Twelve hex digits that are equal for equal parts.

    Fields that have their default value do not count, so that a new field of a class leaves the
    fingerprints of older parts as they were.

    Args:
        part: any part.
        ignore: dotted paths left out, such as ``"steps"``.
    """
    tree = dump(part)
    for path in ignore:
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.get(name, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
    text = json.dumps(_essential(tree), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _essential(tree: Any) -> Any:
    """A dumped tree without the fields that have their default value."""
    if isinstance(tree, list):
        return [_essential(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    defaults = _defaults(class_of(tree["__type__"])) if "__type__" in tree else {}
    return {
        name: _essential(item)
        for name, item in tree.items()
        if not (name in defaults and _same(item, defaults[name]))
    }


def _defaults(cls: type) -> dict[str, Any]:
    """Dumped default values by field, of those fields that have one."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.name not in fields(cls):
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = dump(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = dump(field.default_factory())
    return found


def _same(tree: Any, default: Any) -> bool:
    """Whether two dumped trees are equal, but for fields that ``tree`` leaves out."""
    if not (isinstance(tree, dict) and isinstance(default, dict)):
        return tree == default
    keys_fit = (
        tree.keys() <= default.keys() if "__type__" in tree else tree.keys() == default.keys()
    )
    return keys_fit and all(_same(item, default[name]) for name, item in tree.items())
