"""Text and plain values, read by the annotation of the field that takes them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from typing import Any, Literal, Union

from flax import linen as nn

from tokenlab.config.parts import fields, nearest
from tokenlab.core.errors import UserError


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as the type ``annotation`` asks for; strings are parsed.

    Raises:
        UserError: it cannot be read as that type.
    """
    arms = arms_of(annotation)
    if isinstance(value, str):
        if value in {c for arm in arms for c in typing.get_args(arm) if _is_literal(arm)}:
            return value
        if value == "None" and type(None) in arms:
            return None
        if str in arms:
            return value
        try:
            node = ast.parse(value.strip(), mode="eval").body
        except SyntaxError as error:
            raise _wrong(value, annotation, where) from error
        return _from_node(node, annotation, where, value)
    return _checked(value, annotation, where)


def arms_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, nested ones included; of anything else, itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for a in typing.get_args(annotation) for arm in arms_of(a))
    return (annotation,)


def _is_literal(arm: Any) -> bool:
    return typing.get_origin(arm) is Literal


def _from_node(node: ast.expr, annotation: Any, where: str, text: str) -> Any:
    """Reads a literal, or a class name with keyword arguments, from a syntax tree."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _construct(node, annotation, where, text)
    if isinstance(node, ast.Name) and node.id in classes_in(annotation):
        return _construct(ast.Call(node, [], []), annotation, where, text)
    if isinstance(node, ast.Tuple | ast.List):
        item = item_type(annotation)
        return tuple(_from_node(n, item, where, text) for n in node.elts)
    if isinstance(node, ast.Dict):
        item = item_type(annotation)
        keys = [ast.literal_eval(k) for k in node.keys if k is not None]
        return {k: _from_node(v, item, where, text) for k, v in zip(keys, node.values, strict=True)}
    try:
        literal = ast.literal_eval(node)
    except ValueError as error:
        raise _wrong(text, annotation, where) from error
    return _checked(literal, annotation, where)


def _construct(node: ast.Call, annotation: Any, where: str, text: str) -> Any:
    classes = classes_in(annotation)
    name = typing.cast(ast.Name, node.func).id
    if name not in classes:
        raise UserError(f"{where}: unknown part {name!r}{nearest(name, classes)}")
    cls = classes[name]
    hints = fields(cls)
    if node.args:
        raise UserError(f"{where}: write {name}(field=value, ...); it has {', '.join(hints)}")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg not in hints:
            raise UserError(
                f"{where}: {name} has no field {keyword.arg!r}{nearest(str(keyword.arg), hints)}"
            )
        path = f"{where}.{keyword.arg}"
        if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str):
            arguments[keyword.arg] = coerce(keyword.value.value, hints[keyword.arg], path)
        else:
            arguments[keyword.arg] = _from_node(keyword.value, hints[keyword.arg], path, text)
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name}: {error}") from error


def classes_in(annotation: Any) -> dict[str, type]:
    """Every part class that ``annotation`` admits, by name, subclasses included."""
    found: dict[str, type] = {}

    def visit(cls: type) -> None:
        if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls) and cls is not nn.Module:
            found.setdefault(cls.__name__, cls)
        for child in cls.__subclasses__():
            visit(child)

    for arm in arms_of(annotation):
        if isinstance(arm, type) and arm not in (int, float, bool, str, object, type(None)):
            visit(arm)
    return found


def item_type(annotation: Any) -> Any:
    """Of what a tuple, a list or the values of a mapping are."""
    for arm in arms_of(annotation):
        arguments = [a for a in typing.get_args(arm) if a is not Ellipsis]
        if arguments and not _is_literal(arm):
            return arguments[-1]
    return Any


def _checked(value: Any, annotation: Any, where: str) -> Any:
    arms = arms_of(annotation)
    for arm in arms:
        if arm is Any or arm is object:
            return value
        if _is_literal(arm):
            if value in typing.get_args(arm):
                return value
            continue
        origin = typing.get_origin(arm) or arm
        if arm is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, bool) and arm is not bool:
            continue
        if isinstance(origin, type) and isinstance(value, origin):
            return value
        if origin is tuple and isinstance(value, list):
            return tuple(value)
    raise _wrong(value, annotation, where)


def _wrong(value: Any, annotation: Any, where: str) -> UserError:
    classes = classes_in(annotation)
    hint = f" (or one of {', '.join(sorted(classes))})" if classes else ""
    return UserError(f"{where} takes {type_name(annotation)}{hint}, not {value!r}")


def type_name(annotation: Any) -> str:
    """How an annotation is shown to a user."""
    if annotation is type(None):
        return "None"
    arms = arms_of(annotation)
    if len(arms) > 1:
        return " | ".join(type_name(arm) for arm in arms)
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(annotation))
