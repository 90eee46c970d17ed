"""The table of configuration keys: what help, error messages, documentation and continuation rules are made from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from cogtune.configuration.run_config import DataFolder, RunConfig, Shown

ALIASES = {
    "model": "model.path",
    "data": "data.path",
    "output": "train.output",
    "adapter": "lora.start_from",
    "resume": "train.resume",
}
"""The short flags (``--model`` ...) and the keys they stand for; the only ones there are."""

_NAMES_ELSEWHERE = {
    "learning_rate": "train.lr",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.accumulation",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "lr_scheduler_type": "train.schedule",
    "output_dir": "train.output",
    "save_path": "train.output",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "target_modules": "lora.targets",
    "model_path": "model.path",
    "dataset_path": "data.path",
    "torch_type": "model.dtype",
    "logging_steps": "log.steps",
    "eval_steps": "eval.steps",
}
"""What other trainers call some of our keys, so that a habit gets the right answer."""


@dataclass(frozen=True)
class Key:
    """One configuration key."""

    key: str
    type: str
    default: str
    description: str
    required: bool
    alias: str | None
    kinds: frozenset[str]
    """Kinds of value it takes, of: bool, int, float, text, list, mapping, null."""
    item_kinds: frozenset[str]
    """For a list: the kinds of its items."""

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]


@cache
def describe_keys() -> tuple[Key, ...]:
    """All keys in the order of the sections."""
    alias_of = {key: f"--{alias}" for alias, key in ALIASES.items()}
    found = []
    for section, fields in sections().items():
        for name, field in fields.items():
            key = f"{section}.{name}"
            kinds, item_kinds = _kinds(field.annotation)
            found.append(
                Key(
                    key=key,
                    type=_type_text(field),
                    default="required" if field.is_required() else _value_text(field.default),
                    description=field.description or "",
                    required=field.is_required(),
                    alias=alias_of.get(key),
                    kinds=kinds,
                    item_kinds=item_kinds,
                )
            )
    return tuple(found)


@cache
def sections() -> dict[str, dict[str, FieldInfo]]:
    """Section name to its fields."""
    found = {}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        found[name] = field.annotation.model_fields
    return found


@cache
def known_keys() -> dict[str, Key]:
    return {key.key: key for key in describe_keys()}


def nearest_key(name: str, extra: Iterable[str] = ()) -> str | None:
    """The key (or one of ``extra``, such as a command's own flags) a misspelt or foreign name most likely means."""
    name = name.lower().strip("-").replace("-", "_")
    last = name.rpartition(".")[2]
    keys = list(known_keys())
    if name in keys or name in ALIASES:
        return name
    if last in _NAMES_ELSEWHERE:
        return _NAMES_ELSEWHERE[last]
    same_last = [key for key in keys if key.endswith(f".{last}")]
    if same_last:
        return max(same_last, key=lambda key: difflib.SequenceMatcher(None, name, key).ratio())
    close = difflib.get_close_matches(name, [*keys, *ALIASES, *extra], n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None


def _strip(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation without Annotated, and the metadata it carried."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def _kinds(annotation: Any) -> tuple[frozenset[str], frozenset[str]]:
    annotation, _ = _strip(annotation)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        parts = [_kinds(part) for part in get_args(annotation)]
        return frozenset().union(*(p[0] for p in parts)), frozenset().union(*(p[1] for p in parts))
    if origin is tuple:
        return frozenset({"list"}), _kinds(get_args(annotation)[0])[0]
    if annotation is DataFolder:
        return frozenset({"text", "mapping"}), frozenset()
    simple = {bool: "bool", int: "int", float: "float", NoneType: "null", str: "text", Path: "text"}
    kind = "text" if origin is Literal else "mapping" if origin is dict else simple[annotation]
    return frozenset({kind, "int"} if kind == "float" else {kind}), frozenset()


def _type_text(field: FieldInfo) -> str:
    shown = [item.text for item in field.metadata if isinstance(item, Shown)]
    if shown:
        return shown[0]
    return _annotation_text(field.annotation, list(field.metadata))


def _annotation_text(annotation: Any, metadata: list[Any]) -> str:
    annotation, more = _strip(annotation)
    bounds = _bounds([*metadata, *more])
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return " or ".join(
            "null" if part is NoneType else _annotation_text(part, metadata) for part in get_args(annotation)
        )
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin is tuple:
        items = get_args(annotation)
        item = _annotation_text(items[0], [])
        return f"list of {item}" if items[-1] is Ellipsis else f"list of {len(items)}: {item}"
    if origin is dict:
        return "mapping"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text", Path: "path"}
    return "path or {path, weight}" if annotation is DataFolder else names[annotation] + bounds


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    texts = [f"{sign} {getattr(item, name):g}" for name, sign in signs.items() for item in flat if hasattr(item, name)]
    return f" {' and '.join(texts)}" if texts else ""


def _value_text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(_value_text, value))}]"
        case float():
            return f"{value:g}"
    return str(value)
