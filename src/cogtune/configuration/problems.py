"""Collects all problems of a configuration in one error: each place, what was found, and what was expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cogtune.configuration.field_types import fields_of, is_section, type_text
from cogtune.configuration.suggestions import nearest
from cogtune.configuration.withdrawn import INSTEAD
from cogtune.configuration.yaml_text import describe
from cogtune.errors import ConfigError
from cogtune.language import tr


@dataclass(frozen=True)
class Entry:
    """A value and where it was set: ``run.yaml: lora.rank``, ``--lora.rank``, or in Python ``lora.rank``."""

    value: Any
    source: str


def explain(
    error: ValidationError,
    model: type[BaseModel],
    entries: Mapping[str, Entry] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> ConfigError:
    """Convert a pydantic error into a ConfigError.

    Args:
        model: the configuration or section that was being made.
        entries: what was given for each dotted key, and where; None: the values of a call in Python.
        aliases: short flag -> key, for the flags that are to be given.
    """
    problems: dict[str, str] = {}
    missing: list[str] = []
    unknown: list[str] = []
    instead: str | None = None
    for detail in _details(error):
        key = _key(detail, model)
        instead = instead or INSTEAD.get(key) or INSTEAD.get(f"{key}={detail['input']}")
        if detail["type"] == "missing" and not _inside(detail, key):
            missing += _required(key, model)
        elif detail["type"] == "extra_forbidden" and key not in fields_of(model):
            problems[key] = tr("unknown key `{key}`", key=key)
            unknown.append(key)
        elif not detail["loc"]:
            problems[""] = str(detail["ctx"]["error"])
        else:
            problems.setdefault(key, _problem(key, detail, model, entries or {}))
    lines = [line for text in problems.values() for line in text.split("\n")]
    hint: str | None = None
    sections = [name for name, field in model.model_fields.items() if is_section(field.annotation)]
    near = [found for key in unknown if (found := nearest(key, list(fields_of(model)), sections))]
    missing = [key for key in missing if key.partition(".")[0] not in near]  # those of a section that is misspelt
    if missing:
        lines.append(tr("missing: {missing}", missing=", ".join(missing)))
        short = {key: alias for alias, key in (aliases or {}).items()}
        if aliases:
            hint = tr("give {flags}", flags=" ".join(f"--{short.get(key, key)} ..." for key in missing))
        else:
            hint = tr("give them: they have no default")
    if near:
        hint = tr("did you mean {near}?", near=", ".join(f"`{key}`" for key in near))
    hint = tr(instead) if instead else hint or keys_hint(model)
    return ConfigError("\n  ".join(lines), hint=hint, code=_code(problems, missing, unknown))


running: ContextVar[str | None] = ContextVar("running", default=None)
"""The command under way, ``cogtune web`` for example, if its help lists the keys of an `AnswerConfig`."""


def keys_hint(model: type[BaseModel]) -> str:
    """Return a hint where to look up the keys."""
    command = getattr(model, "command", "cogtune train")
    if command == "cogtune predict":
        command = running.get() or command
    return tr("`{command} --help` lists every key with its type, default and meaning", command=command)


def _code(problems: Mapping[str, str], missing: list[str], unknown: list[str]) -> str:
    if "" in problems:
        return "config-contradiction"
    if missing and not problems:
        return "config-missing"
    return "config-unknown-key" if unknown else "config-value"


def _details(error: ValidationError) -> Iterator[ErrorDetails]:
    """Yield all problems; a nested section has its own error, which is the cause of the outer one."""
    for detail in error.errors():
        inner = getattr(detail.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(inner, ValidationError):
            for within in _details(inner):
                yield {**within, "loc": (*detail["loc"], *within["loc"])}
        else:
            yield detail


def _key(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """Return the key of a problem: the part of its location that consists of field names, plus an unknown name."""
    names = [str(part) for part in detail["loc"][:2]]
    return names[0] if names and names[0] in fields_of(model) else ".".join(names)


def _inside(detail: ErrorDetails, key: str) -> bool:
    """Return whether the problem is inside the key's value, for example in one of several folders."""
    return len(detail["loc"]) > key.count(".") + 1


def _required(key: str, model: type[BaseModel]) -> list[str]:
    """Return ``key`` or, for a missing section, its required keys."""
    section = model.model_fields.get(key)
    if section is None or not is_section(section.annotation):
        return [key]
    return [name for name, field in fields_of(model).items() if name.startswith(f"{key}.") and field.is_required()]


def _problem(key: str, detail: ErrorDetails, model: type[BaseModel], entries: Mapping[str, Entry]) -> str:
    entry = entries.get(key)
    where = entry.source if entry else key
    field = fields_of(model).get(key)
    expected = type_text(field) if field is not None else tr("a mapping of keys")
    whole = detail["type"] == "missing" or detail["type"].startswith("too_")  # a list of the wrong length
    item = detail["loc"][key.count(".") + 1 :][:1]
    inside = "".join(f"[{part}]" for part in item if isinstance(part, int) and not whole)
    if detail["type"] == "value_error":
        return tr("{where}{inside}: {error}", where=where, inside=inside, error=detail["ctx"]["error"])
    if detail["type"] == "extra_forbidden":
        return tr(
            "{where}{inside}: unknown key `{loc}`, expected {expected}",
            where=where,
            inside=inside,
            loc=detail["loc"][-1],
            expected=expected,
        )
    found = describe(entry.value if entry and inside == "" else detail["input"])
    return tr(
        "{where}{inside}: found {found}, expected {expected}",
        where=where,
        inside=inside,
        found=found,
        expected=expected,
    )
