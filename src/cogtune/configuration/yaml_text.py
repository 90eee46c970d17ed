"""YAML with numbers as people write them (``1e-4``), an error for a repeated key, and line numbers in errors."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.system.reading import read_text
from cogtune.system.terminal import typed


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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number; a leading zero is no octal number, which YAML 1.2 writes 0o17."""
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        return _whole(text, 16 if "0x" in text else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_MOST_NODES = 10_000


def _whole(text: str, base: int = 10) -> int:
    value = int(text, base)
    if not -(2**63) <= value < 2**63:
        raise ValueError(tr("no key takes a whole number that large"))
    return value


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
        return _load(text)
    except yaml.YAMLError as error:
        raise ValueError(_problem(error)) from error


def _load(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        yaml.YAMLError: no YAML, too deep, or large beyond use once its aliases are written out.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(tr("nested too deeply")) from error
    except yaml.YAMLError:
        raise
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(tr("a value that cannot be read ({error:.80})", error=str(error))) from error
    except (TypeError, AttributeError, LookupError) as error:  # of the library's own parsers of tagged values
        raise yaml.YAMLError(tr("a value that its tag (`!!...`) does not allow")) from error
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many nodes ``node`` has if every alias is written out.

    Raises:
        yaml.YAMLError: too many, or an alias within what it names.
    """
    if id(node) in known:
        size = known[id(node)]
    else:
        known[id(node)] = _MOST_NODES  # an alias inside it
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        size = known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    if size >= _MOST_NODES:
        raise yaml.YAMLError(tr("more than {most} values once its aliases are written out", most=_MOST_NODES))
    return size


def read_mapping(path: str | Path, what: str | None = None) -> dict[str, Any]:
    """Return the mapping at the root of a YAML file (or JSON, by suffix); an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or no mapping.
    """
    path = Path(path)
    if what is None and path.is_dir():
        raise ConfigError(
            tr("{path}: a folder, and a configuration file was expected", path=path),
            hint=tr("name a folder of data by --data {path}, an adapter by --adapter {path}", path=typed(path)),
            code="config-file",
        )
    what = what or tr("configuration file")
    try:
        text = path.read_text("utf-8-sig") if _is_stream(path) else read_text(path, "utf-8-sig")
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
        value = json.loads(text, parse_int=_whole) if path.suffix == ".json" else _load(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            tr("{path}:{lineno}: not JSON: {msg}", path=path, lineno=error.lineno, msg=error.msg), code="config-file"
        ) from error
    except (ValueError, RecursionError) as error:  # of the JSON parser: too many digits, too deep
        raise ConfigError(tr("{path}: not JSON: {msg}", path=path, msg=error), code="config-file") from error
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


def _is_stream(path: Path) -> bool:
    """Return whether the user names an open stream, as ``/dev/stdin`` or a shell's ``<(...)`` do: it has a writer."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))


def describe(value: object) -> str:
    """Format a value for an error message, with its YAML type."""
    match value:
        case None:
            return "null"
        case bool():
            return tr("true/false value {value}", value=str(value).lower())
        case int():
            return tr("whole number {value}", value=_short(value))
        case float():
            return tr("number {value}", value=value)
        case str():
            return tr("text {short!r}", short=_short(value))
        case list() | tuple():
            return tr("list {short}", short=_short(value))
        case dict():
            return tr("mapping {short}", short=_short(value))
    return f"{type(value).__name__} {_short(value)}"


def _short(value: object, limit: int = 60) -> Any:
    """Return ``value`` for a message, with at most ``limit`` characters, without writing all of a large one."""
    if isinstance(value, int) and abs(value) >= 10**limit:
        return tr("of more than {digits} digits", digits=limit)
    text = value if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Short(reprlib.Repr):
    """Texts as they are, and no more than a message needs of anything nested."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxdict = self.maxtuple = 30
        self.maxlevel, self.maxstring, self.maxother = 5, 100, 100


_SHORT = _Short()


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = tr(" (line {line}, column {column})", line=mark.line + 1, column=mark.column + 1) if mark else ""
        return f"{error.problem}{place}"
    return str(error)
