"""Copies of parts with dotted fields set."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from flax import linen as nn

from tokenlab.config.parts import fields, is_part, nearest
from tokenlab.config.values import coerce, item_type
from tokenlab.core.errors import UserError

P = TypeVar("P")


def replace(part: P, overrides: Mapping[str, Any]) -> P:
    """A copy of ``part`` with dotted fields set; the only way anything is overridden.

    Args:
        part: any part, usually an experiment.
        overrides: ``{"model.depth.scan": True, "objective.terms.next_token.coefficient": 0.5}``.
            Strings are parsed by the type of their field; a part is swapped by writing its class
            with arguments, ``"Cosine(peak=1e-3)"`` (read, never evaluated).

    Raises:
        UserError: unknown field or class (with the nearest name), or a value of the wrong type.
    """
    return _replace(part, Any, dict(overrides), where="")


def _replace(part: Any, annotation: Any, overrides: dict[str, Any], where: str) -> Any:
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        head, _, rest = path.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    children = _children(part, annotation, where)
    changes: dict[str, Any] = {}
    for name in dict.fromkeys([*direct, *nested]):
        path = f"{where}.{name}" if where else name
        hint, child = _child(part, annotation, children, name, path, new=direct.get(name))
        if name in direct:
            child = coerce(direct[name], hint, path)
        if name in nested:
            child = _replace(child, hint, nested[name], path)
        changes[name] = child
    return _with(part, changes, where)


def _children(part: Any, annotation: Any, where: str) -> dict[str, tuple[Any, Any]]:
    """Annotation and value of everything a path may step into from ``part``."""
    if is_part(part):
        return {name: (hint, getattr(part, name)) for name, hint in fields(part).items()}
    if isinstance(part, Mapping | tuple):
        named = part.items() if isinstance(part, Mapping) else enumerate(part)
        item = item_type(annotation)
        return {str(k): (type(v) if item is Any else item, v) for k, v in named}
    raise UserError(f"{where} is {part!r} and has no fields; set {where} itself first")


def _child(
    part: Any, annotation: Any, children: dict, name: str, path: str, new: Any
) -> tuple[Any, Any]:
    if name in children:
        return children[name]
    # A mapping takes a new entry only as a whole part, so a mistyped key is still an error.
    if isinstance(part, Mapping) and _looks_like_part(new):
        return item_type(annotation), None
    owner = type(part).__name__ if is_part(part) else path.rpartition(".")[0]
    kind = "field" if is_part(part) else "entry"
    raise UserError(f"{owner} has no {kind} {name!r} ({path}){nearest(name, children)}")


def _looks_like_part(value: Any) -> bool:
    return is_part(value) or (isinstance(value, str) and re.match(r"[A-Z]\w*\(", value) is not None)


def _with(part: Any, changes: dict[str, Any], where: str) -> Any:
    try:
        if isinstance(part, nn.Module):
            return part.clone(**changes)
        if is_part(part):
            return dataclasses.replace(part, **changes)
    except ValueError as error:
        raise UserError(f"{where or type(part).__name__}: {error}") from error
    if isinstance(part, tuple):
        return tuple(changes.get(str(i), value) for i, value in enumerate(part))
    return {**part, **changes}
