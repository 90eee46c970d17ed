"""Value types of configuration fields: for checks, help and messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cogtune.language import tr


@dataclass(frozen=True)
class Shown:
    """An annotation that gives the type's name in help and messages, if the type itself would not say it."""

    text: str


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether a field holds a section, with fields of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@cache
def fields_of(model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """Return a configuration's fields by dotted key (``train.lr``), or a section's by name (``lr``)."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            found |= {f"{name}.{inner}": inside for inner, inside in fields_of(field.annotation).items()}
        else:
            found[name] = field
    return found


def kinds(annotation: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return the kinds of value that an annotation accepts (bool, int, float, text, list, mapping, null), and the kinds
    of a list's items.
    """
    annotation, _ = _strip(annotation)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        parts = [kinds(part) for part in get_args(annotation)]
        return frozenset().union(*(p[0] for p in parts)), frozenset().union(*(p[1] for p in parts))
    if origin is tuple:
        return frozenset({"list"}), kinds(get_args(annotation)[0])[0]
    if is_section(annotation):  # an item such as a data folder can be just a path
        return frozenset({"text", "mapping"}), frozenset()
    simple = {bool: "bool", int: "int", float: "float", NoneType: "null", str: "text", Path: "text"}
    kind = "text" if origin is Literal else "mapping" if origin is dict else simple[annotation]
    return frozenset({kind, "int"} if kind == "float" else {kind}), frozenset()


def type_text(field: FieldInfo) -> str:
    """Return a field's type with its bounds: ``whole number >= 1``."""
    return _annotation_text(field.annotation, list(field.metadata))


def value_text(value: Any) -> str:
    """Format a default value for help."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(value_text, value))}]"
        case float():
            return f"{value:g}"
    return str(value)


def _strip(annotation: Any) -> tuple[Any, list[Any]]:
    """Strip Annotated and return the annotation and its metadata."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def _annotation_text(annotation: Any, metadata: list[Any]) -> str:
    annotation, more = _strip(annotation)
    metadata = [*metadata, *more]
    if shown := [item.text for item in metadata if isinstance(item, Shown)]:
        return tr(shown[0])
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return tr(" or ").join(
            "null" if part is NoneType else _annotation_text(part, metadata) for part in get_args(annotation)
        )
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin is tuple:
        items = get_args(annotation)
        item = _annotation_text(items[0], [])
        return (
            tr("list of {item}", item=item)
            if items[-1] is Ellipsis
            else tr("list of {items}: {item}", items=len(items), item=item)
        )
    if origin is dict:
        return tr("mapping")
    names = {bool: "true | false", int: tr("whole number"), float: tr("number"), str: tr("text"), Path: tr("path")}
    return names[annotation] + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    texts = [f"{sign} {getattr(item, name):g}" for name, sign in signs.items() for item in flat if hasattr(item, name)]
    return " " + tr(" and ").join(texts) if texts else ""
