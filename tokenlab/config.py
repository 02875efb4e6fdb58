"""The object is its own config: dotted overrides, typed parsing, JSON, fingerprints, help.

A *part* is a frozen dataclass or a Linen module (which is a dataclass). Everything here walks
the fields of parts; nothing here knows what any part does.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union

from flax import linen as nn

from tokenlab.core.errors import UserError

P = TypeVar("P")
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


# ---------------------------------------------------------------- overrides


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
        item = _item_type(annotation)
        return {str(k): (type(v) if item is Any else item, v) for k, v in named}
    raise UserError(f"{where} is {part!r} and has no fields; set {where} itself first")


def _child(
    part: Any, annotation: Any, children: dict, name: str, path: str, new: Any
) -> tuple[Any, Any]:
    if name in children:
        return children[name]
    # A mapping takes a new entry only as a whole part, so a mistyped key is still an error.
    if isinstance(part, Mapping) and _looks_like_part(new):
        return _item_type(annotation), None
    owner = type(part).__name__ if is_part(part) else path.rpartition(".")[0]
    kind = "field" if is_part(part) else "entry"
    raise UserError(f"{owner} has no {kind} {name!r} ({path}){_nearest(name, children)}")


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


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(names)) or 'none'}"


# ---------------------------------------------------------------- typed values


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as the type ``annotation`` asks for; strings are parsed.

    Raises:
        UserError: it cannot be read as that type.
    """
    arms = _arms(annotation)
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


def _arms(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for a in typing.get_args(annotation) for arm in _arms(a))
    return (annotation,)


def _is_literal(arm: Any) -> bool:
    return typing.get_origin(arm) is Literal


def _from_node(node: ast.expr, annotation: Any, where: str, text: str) -> Any:
    """Reads a literal, or a class name with keyword arguments, from a syntax tree."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _construct(node, annotation, where, text)
    if isinstance(node, ast.Name) and node.id in _classes(annotation):
        return _construct(ast.Call(node, [], []), annotation, where, text)
    if isinstance(node, ast.Tuple | ast.List):
        item = _item_type(annotation)
        return tuple(_from_node(n, item, where, text) for n in node.elts)
    if isinstance(node, ast.Dict):
        item = _item_type(annotation)
        keys = [ast.literal_eval(k) for k in node.keys if k is not None]
        return {k: _from_node(v, item, where, text) for k, v in zip(keys, node.values, strict=True)}
    try:
        literal = ast.literal_eval(node)
    except ValueError as error:
        raise _wrong(text, annotation, where) from error
    return _checked(literal, annotation, where)


def _construct(node: ast.Call, annotation: Any, where: str, text: str) -> Any:
    classes = _classes(annotation)
    name = typing.cast(ast.Name, node.func).id
    if name not in classes:
        raise UserError(f"{where}: unknown part {name!r}{_nearest(name, classes)}")
    cls = classes[name]
    hints = fields(cls)
    if node.args:
        raise UserError(f"{where}: write {name}(field=value, ...); it has {', '.join(hints)}")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg not in hints:
            raise UserError(
                f"{where}: {name} has no field {keyword.arg!r}{_nearest(str(keyword.arg), hints)}"
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


def _classes(annotation: Any) -> dict[str, type]:
    """Every part class that ``annotation`` admits, by name, subclasses included."""
    found: dict[str, type] = {}

    def visit(cls: type) -> None:
        if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls) and cls is not nn.Module:
            found.setdefault(cls.__name__, cls)
        for child in cls.__subclasses__():
            visit(child)

    for arm in _arms(annotation):
        if isinstance(arm, type) and arm not in (int, float, bool, str, object, type(None)):
            visit(arm)
    return found


def _item_type(annotation: Any) -> Any:
    for arm in _arms(annotation):
        arguments = [a for a in typing.get_args(arm) if a is not Ellipsis]
        if arguments and not _is_literal(arm):
            return arguments[-1]
    return Any


def _checked(value: Any, annotation: Any, where: str) -> Any:
    arms = _arms(annotation)
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
    classes = _classes(annotation)
    hint = f" (or one of {', '.join(sorted(classes))})" if classes else ""
    return UserError(f"{where} takes {type_name(annotation)}{hint}, not {value!r}")


def type_name(annotation: Any) -> str:
    """How an annotation is shown to a user."""
    if annotation is type(None):
        return "None"
    arms = _arms(annotation)
    if len(arms) > 1:
        return " | ".join(type_name(arm) for arm in arms)
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(annotation))


# ---------------------------------------------------------------- JSON


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
                raise UserError(f"{cls.__name__} has no field {name!r}{_nearest(name, known)}")
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
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------------- help


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
