"""From a YAML file and flags to a checked `RunConfig`, with errors that name file or flag, key, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cogtune.configuration.keys import ALIASES, Key, known_keys, nearest_key, sections
from cogtune.configuration.run_config import RunConfig
from cogtune.configuration.yaml_text import describe, parse_value, read_mapping
from cogtune.errors import ConfigError

_EXTRA = "lora.extra"


@dataclass(frozen=True)
class Entry:
    """One value and where it was given: ``run.yaml: lora.rank`` or ``--lora.rank``."""

    value: Any
    source: str


def build(path: str | Path | None, overrides: Mapping[str, str | Sequence[str]]) -> RunConfig:
    """See `cogtune.configuration.run_config.load_config`."""
    entries = dict(_file_entries(Path(path))) if path is not None else {}
    entries |= _override_entries(overrides)
    return from_entries(entries)


def build_with_defaults(
    path: str | Path | None, overrides: Mapping[str, str | Sequence[str]], defaults: Mapping[str, str]
) -> tuple[RunConfig, dict[str, str]]:
    """As `build`, with texts for keys that nobody gave; also returns which of ``defaults`` were used."""
    entries = dict(_file_entries(Path(path))) if path is not None else {}
    entries |= _override_entries(overrides)
    used = {key: text for key, text in defaults.items() if key not in entries}
    entries |= {key: Entry(parse_flag(known_keys()[key], text, key), key) for key, text in used.items()}
    return from_entries(entries), used


_KEYS_HINT = "`cogtune train --help` lists every key with its type, default and meaning"


def from_entries(entries: Mapping[str, Entry]) -> RunConfig:
    """The configuration of dotted keys and their values; raises ConfigError listing every problem."""
    wrong = [text for key, entry in entries.items() if (text := _wrong_type(key, entry))]
    if wrong:
        raise ConfigError("\n  ".join(wrong), hint=_KEYS_HINT, code="config-value")
    tree: dict[str, dict[str, Any]] = {name: {} for name in sections()}
    for key, entry in entries.items():
        section, _, name = key.partition(".")
        if key.startswith(f"{_EXTRA}."):
            tree["lora"].setdefault("extra", {})[key.removeprefix(f"{_EXTRA}.")] = entry.value
        else:
            tree[section][name] = dict(entry.value) if key == _EXTRA else entry.value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, entries) from error


def _wrong_type(key: str, entry: Entry) -> str | None:
    """pydantic would take the text "16" for a number and true for 1; a configuration file means what it says."""
    if key.startswith(f"{_EXTRA}."):
        return None
    known = known_keys()[key]
    kind = _kind(entry.value)
    if "list" in known.kinds:
        items = entry.value if kind == "list" else [entry.value]
        if all(_kind(item) in known.item_kinds for item in items):
            return None
    elif kind in known.kinds and entry.value != "":  # an empty path would mean the current folder
        return None
    return f"{entry.source}: found {describe(entry.value)}, expected {known.type}"


def _kind(value: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "text", list: "list", dict: "mapping", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def replace(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """``config`` with dotted keys replaced; keys keep being explicit or default as they were."""
    entries = {key: Entry(value, key) for key, value in explicit_values(config).items()}
    entries |= {key: Entry(value, key) for key, value in values.items()}
    return from_entries(entries)


def explicit_values(config: RunConfig) -> dict[str, Any]:
    """The keys that were given, not left at their defaults, with their values as plain data."""
    given = config.model_dump(mode="json", exclude_unset=True)
    return {f"{section}.{name}": value for section, fields in given.items() for name, value in fields.items()}


def _file_entries(path: Path) -> Iterator[tuple[str, Entry]]:
    seen: set[str] = set()
    for key, value in _flatten(read_mapping(path), path):
        if key in seen:
            raise ConfigError(f"{path}: `{key}` is given twice", hint="keep one of the two")
        seen.add(key)
        yield key, Entry(value, f"{path}: {key}")


def _flatten(mapping: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    for top, value in mapping.items():
        if top in sections():
            if value is None:  # a section whose lines are all commented out
                continue
            if not isinstance(value, dict):
                hint = f"write `{ALIASES[top]}: {value}`" if top in ALIASES else f"indent the keys of {top} under it"
                raise ConfigError(f"{path}: `{top}` is a section, found {describe(value)}", hint=hint)
            for name, inner in value.items():
                yield _checked(f"{top}.{name}", f"{path}: "), inner
        else:
            yield _checked(str(top), f"{path}: "), value


def _checked(key: str, where: str) -> str:
    if key in known_keys() or (key.startswith(f"{_EXTRA}.") and len(key) > len(_EXTRA) + 1):
        return key
    raise unknown_key(key, f"{where}unknown key `{key}`")


def unknown_key(name: str, message: str, *, flag: bool = False, extra: Sequence[str] = ()) -> ConfigError:
    """The error for a key or flag that does not exist, with the nearest one that does."""
    near = nearest_key(name, extra)
    dashes = "--" if flag else ""
    hint = f"did you mean `{dashes}{near}`?" if near else "`cogtune train --help` lists every key"
    return ConfigError(message, hint=hint, code="config-unknown-key")


def _override_entries(overrides: Mapping[str, str | Sequence[str]]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, text in overrides.items():
        flag = name if name.startswith("--") else f"--{name}"
        bare = flag.removeprefix("--")
        if bare not in ALIASES and bare not in known_keys() and not bare.startswith(f"{_EXTRA}."):
            raise unknown_key(bare, f"unknown flag `{flag}`", flag=True)
        key = ALIASES.get(bare, bare)
        if key in entries:
            raise ConfigError(f"{entries[key].source} and {flag} are the same key", hint="give one of them")
        entries[key] = Entry(parse_flag(known_keys().get(key), text, flag), flag)
    return entries


def parse_flag(key: Key | None, text: str | Sequence[str], flag: str) -> Any:
    """A flag's text as a value of its key's type. ``key`` None: a field of lora.extra, plain YAML."""
    texts = [text] if isinstance(text, str) else list(text)
    if key is not None and "list" in key.kinds:
        return [item for one in texts for item in _items(key, one, flag)]
    if len(texts) != 1:
        raise ConfigError(f"{flag} is given {len(texts)} times", hint="it takes one value; keep one")
    return _scalar(key.kinds if key else frozenset(), texts[0], flag)


def _scalar(kinds: frozenset[str], text: str, flag: str) -> Any:
    if "text" in kinds and not (text[:1] == text[-1:] and text[:1] in ("'", '"') and len(text) > 1):
        return None if "null" in kinds and text in ("null", "~", "") else text
    return _yaml(text, flag)


def _items(key: Key, text: str, flag: str) -> list[Any]:
    if text.startswith("["):
        value = _yaml(text, flag)
        return value if isinstance(value, list) else [value]
    if text.startswith("{") and "mapping" in key.item_kinds:
        return [_yaml(text, flag)]
    # commas inside brackets belong to a pattern such as `layers\.[0-9]{1,2}\.`
    parts = [part.strip() for part in re.split(r",(?![^\[({]*[\])}])", text) if part.strip()]
    return parts if "text" in key.item_kinds else [_yaml(part, flag) for part in parts]


def _yaml(text: str, flag: str) -> Any:
    try:
        return parse_value(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: `{text}` is not a YAML value: {error}", hint="put quotes around it") from error


def _explain(error: ValidationError, entries: Mapping[str, Entry]) -> ConfigError:
    problems: dict[str, str] = {}
    missing: list[str] = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"][:2])
        if detail["type"] == "missing" and len(detail["loc"]) == 2:
            missing.append(key)
        elif not detail["loc"]:
            problems[""] = str(detail["ctx"]["error"])
        else:
            problems.setdefault(key, _problem(key, detail, entries))
    lines = [line for text in problems.values() for line in text.split("\n")]
    hint = None
    if missing:
        lines.append(f"missing: {', '.join(missing)}")
        alias_of = {key: alias for alias, key in ALIASES.items()}
        hint = "give " + " ".join(f"--{alias_of.get(key, key)} ..." for key in missing)
    code = (
        "config-contradiction" if "" in problems else "config-missing" if missing and not problems else "config-value"
    )
    return ConfigError("\n  ".join(lines), hint=hint or _KEYS_HINT, code=code)


def _problem(key: str, detail: ErrorDetails, entries: Mapping[str, Entry]) -> str:
    entry = entries.get(key)
    where = entry.source if entry else key
    whole = detail["type"] == "missing" or detail["type"].startswith("too_")  # a list of the wrong length
    inside = "".join(f"[{part}]" for part in detail["loc"][2:3] if isinstance(part, int) and not whole)
    if detail["type"] == "value_error":
        return f"{where}{inside}: {detail['ctx']['error']}"
    if detail["type"] == "extra_forbidden":
        return f"{where}{inside}: unknown key `{detail['loc'][-1]}`, expected {known_keys()[key].type}"
    found = describe(entry.value if entry and inside == "" else detail["input"])
    return f"{where}{inside}: found {found}, expected {known_keys()[key].type}"
