"""YAML with numbers as people write them (``1e-4``), an error for a repeated key, and line numbers in errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from cogtune.errors import ConfigError
from cogtune.language import tr


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers, no dates or base-60 integers, and an error for repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", key))
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, tr("key `{name}` is given twice", name=name), key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(([0-9][0-9_]*)?\.[0-9][0-9_]*|[0-9][0-9_]*\.?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """Return the value of ``text`` in a YAML file. Raises ValueError if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from error


def read_mapping(path: str | Path, what: str | None = None) -> dict[str, Any]:
    """Return the mapping at the root of a YAML file (or JSON, by suffix); an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or no mapping.
    """
    path = Path(path)
    what = what or tr("configuration file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml"))[:5] if path.parent.is_dir() else []
        hint = (
            tr("in {parent}/ there is: {near}", parent=path.parent, near=", ".join(near))
            if near
            else tr("check the path")
        )
        raise ConfigError(
            tr("{path}: this {what} does not exist", path=path, what=what), hint=hint, code="config-file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            tr("{path}: not UTF-8 text at byte {start}", path=path, start=error.start),
            hint=tr("save it as UTF-8"),
            code="config-file",
        ) from error
    except OSError as error:
        raise ConfigError(
            tr("{path}: cannot read this {what}: {strerror}", path=path, what=what, strerror=error.strerror),
            code="config-file",
        ) from error
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except json.JSONDecodeError as error:
        raise ConfigError(
            tr("{path}:{lineno}: not JSON: {msg}", path=path, lineno=error.lineno, msg=error.msg), code="config-file"
        ) from error
    except yaml.YAMLError as error:
        hint = tr("indent with spaces; put text with special characters in quotes")
        raise ConfigError(
            tr("{path}: not YAML: {problem}", path=path, problem=_problem(error)), hint=hint, code="config-file"
        ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            tr("{path}: found {found}, expected `key: value` lines", path=path, found=describe(value)),
            code="config-file",
        )
    return value


def describe(value: object) -> str:
    """Format a value for an error message, with its YAML type."""
    match value:
        case None:
            return "null"
        case bool():
            return tr("true/false value {value}", value=str(value).lower())
        case int():
            return tr("whole number {value}", value=value)
        case float():
            return f"number {value}"
        case str():
            return f"text {_short(value)!r}"
        case list() | tuple():
            return f"list {_short(value)}"
        case dict():
            return f"mapping {_short(value)}"
    return f"{type(value).__name__} {_short(value)}"


def _short(value: object, limit: int = 60) -> Any:
    text = str(value)
    return value if len(text) <= limit else text[: limit - 3] + "..."


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return f"{error.problem}{place}"
    return str(error)
