"""Build a checked configuration from a YAML file, flags and Python values.

Errors name file, flag or key, what was found and what was expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.keys import Key, aliases, known_keys, nearest_key, sections
from cogtune.configuration.problems import Entry, explain, keys_hint
from cogtune.configuration.run_config import RunConfig
from cogtune.configuration.values import Section
from cogtune.configuration.withdrawn import CONSTANT, INSTEAD
from cogtune.configuration.yaml_text import describe, parse_value, read_mapping
from cogtune.errors import ConfigError
from cogtune.language import tr

_EXTRA = "lora.extra"
_ROOTS: tuple[type[Section], ...] = (RunConfig, AnswerConfig)
"""Configurations whose keys may share a file; each command ignores the others' keys."""

Config = TypeVar("Config", RunConfig, AnswerConfig)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's configuration.

    A text among ``overrides`` is read as one that is typed after the flag: ``"3e-4"`` is a number, ``"a,b"`` a list of
    two, and so are the texts in a list. Every other value is used as it is.

    Example:
        >>> config = cogtune.load_config("run.yaml", {"train.lr": 3e-4, "lora": {"rank": 8, "targets": ["experts"]}})
        >>> config = cogtune.load_config(None, {"model": "cogvlm2", "data": "my-data", "output": "output"})
        >>> config.train.lr

    Args:
        path: a YAML file with nested sections or dotted keys, or None.
        overrides: values of dotted keys (``train.lr``), of short flags (``model``) or, as a mapping, of a whole
            section. They win over the file.

    Raises:
        ConfigError: an unknown key, with the nearest known one; a wrong type or a value out of range; a contradiction;
            a key that is required and missing. The file, flag or key is named.
    """
    return from_entries(_entries(path, overrides or {}, RunConfig), RunConfig)


def load_config_with(
    path: str | Path | None, overrides: Mapping[str, Any], defaults: Mapping[str, str]
) -> tuple[RunConfig, dict[str, str]]:
    """Like `load_config`, with default texts for keys that were not set; also returns which ``defaults`` were used."""
    entries = _entries(path, overrides, RunConfig)
    used = {key: text for key, text in defaults.items() if key not in entries}
    entries |= {key: Entry(parse_flag(known_keys()[key], text, key), key) for key, text in used.items()}
    return from_entries(entries, RunConfig), used


def load_answer_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> AnswerConfig:
    """Read the configuration of answering.

    ``path`` may be a run's file: keys that do not concern answering are ignored. Otherwise like `load_config`.
    """
    return from_entries(_entries(path, overrides or {}, AnswerConfig), AnswerConfig)


def from_entries(entries: Mapping[str, Entry], root: type[Config]) -> Config:
    """Build the configuration from dotted keys and their values.

    Raises:
        ConfigError: listing every problem.
    """
    wrong = [text for key, entry in entries.items() if (text := _wrong_type(key, entry, root))]
    if wrong:
        raise ConfigError("\n  ".join(wrong), hint=keys_hint(root), code="config-value")
    tree: dict[str, Any] = {name: {} for name in sections(root)}
    for key, entry in entries.items():
        section, _, name = key.partition(".")
        if key.startswith(f"{_EXTRA}."):
            tree["lora"].setdefault("extra", {})[key.removeprefix(f"{_EXTRA}.")] = entry.value
        else:
            tree[section][name] = dict(entry.value) if key == _EXTRA else entry.value
    try:
        return root(**tree)
    except ConfigError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise explain(error.__cause__, root, entries, aliases(root)) from error.__cause__


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a checked copy with some dotted keys replaced; keys stay explicit or default as they were.

    Raises:
        ConfigError: as `load_config` does.
    """
    entries = {key: Entry(value, key) for key, value in explicit_values(config).items()}
    entries |= {key: Entry(_plain(value), key) for key, value in values.items()}
    return from_entries(entries, type(config))


def explicit_values(config: Section) -> dict[str, Any]:
    """Return the keys that were set explicitly, with plain values."""
    given = config.model_dump(mode="json", exclude_unset=True)
    return {f"{section}.{name}": value for section, fields in given.items() for name, value in fields.items()}


def unknown_key(
    name: str, message: str, *, flag: bool = False, extra: Sequence[str] = (), root: type[Section] = RunConfig
) -> ConfigError:
    """Return the error for an unknown key or flag, with the nearest known one."""
    dashes = "--" if flag else ""
    elsewhere = [
        other for other in _ROOTS if other is not root and (name in known_keys(other) or name in aliases(other))
    ]
    near = nearest_key(name, extra, root)
    if name in INSTEAD:
        hint = tr(INSTEAD[name])
    elif elsewhere and (near is None or near.rpartition(".")[2] != name.rpartition(".")[2].replace("-", "_")):
        hint = tr("it belongs to another command: `{command} --help`", command=elsewhere[0].command)
    else:
        hint = tr("did you mean `{dashes}{near}`?", dashes=dashes, near=near) if near else keys_hint(root)
    return ConfigError(message, hint=hint, code="config-unknown-key")


def parse_flag(key: Key | None, text: str | Sequence[Any], flag: str) -> Any:
    """Parse a flag's text (or its texts, if it was repeated) into a value of its key's type.

    Args:
        key: None for a field of lora.extra, whose text is plain YAML.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if key is not None and "list" in key.kinds:
        return [item for one in texts for item in (_items(key, one, flag) if isinstance(one, str) else [_plain(one)])]
    if len(texts) != 1:
        raise ConfigError(
            tr("{flag} is given {texts} times", flag=flag, texts=len(texts)), hint=tr("it takes one value; keep one")
        )
    return _scalar(key.kinds if key else frozenset(), texts[0], flag)


def _entries(path: str | Path | None, overrides: Mapping[str, Any], root: type[Section]) -> dict[str, Entry]:
    entries = dict(_file_entries(Path(path), root)) if path is not None else {}
    return entries | _override_entries(overrides, root)


def _file_entries(path: Path, root: type[Section]) -> Iterator[tuple[str, Entry]]:
    seen: set[str] = set()
    for key, value in _flatten(read_mapping(path), path):
        if key in seen:
            raise ConfigError(tr("{path}: `{key}` is given twice", path=path, key=key), hint=tr("keep one of the two"))
        seen.add(key)
        if _is_key(key, root):
            yield key, Entry(value, f"{path}: {key}")
        elif not any(_is_key(key, other) for other in _ROOTS) and (key not in CONSTANT or value != CONSTANT[key]):
            raise unknown_key(key, tr("{path}: unknown key `{key}`", path=path, key=key), root=root)


def _flatten(mapping: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    names = {name for root in _ROOTS for name in sections(root)}
    short = aliases()
    for top, value in mapping.items():
        if top not in names:
            yield str(top), value
        elif isinstance(value, dict):
            yield from ((f"{top}.{name}", inner) for name, inner in value.items())
        elif value is not None:  # None: a section with only comments
            hint = (
                tr("write `{short}: {value}`", short=short[top], value=value)
                if top in short
                else tr("indent the keys of {top} under it", top=top)
            )
            raise ConfigError(
                tr("{path}: `{top}` is a section, found {found}", path=path, top=top, found=describe(value)),
                hint=hint,
            )


def _is_key(name: str, root: type[Section]) -> bool:
    return name in known_keys(root) or (
        _EXTRA in known_keys(root) and name.startswith(f"{_EXTRA}.") and len(name) > len(_EXTRA) + 1
    )


def _override_entries(overrides: Mapping[str, Any], root: type[Section]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, value in _sections_apart(overrides, root):
        typed = _is_typed(value)
        bare = name.removeprefix("--")
        source = f"--{bare}" if typed else bare
        key = aliases(root).get(bare, bare)
        if not _is_key(key, root):
            what = tr("unknown flag `{flag}`", flag=source) if typed else tr("unknown key `{key}`", key=source)
            raise unknown_key(bare, what, flag=typed, root=root)
        if key in entries:
            raise ConfigError(
                tr("{source} and {other} are the same key", source=entries[key].source, other=source),
                hint=tr("give one of them"),
            )
        plain = parse_flag(known_keys(root).get(key), value, source) if typed else _plain(value)
        entries[key] = Entry(plain, source)
    return entries


def _sections_apart(overrides: Mapping[str, Any], root: type[Section]) -> Iterator[tuple[str, Any]]:
    """Yield names and values, with a section that is given as a mapping split into its keys."""
    for name, value in overrides.items():
        if name in sections(root) and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", inside) for inner, inside in value.items())
        else:
            yield name, value


def _is_typed(value: Any) -> bool:
    """Return whether a value is a flag's text, or a list that contains texts: these are parsed as if typed."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(isinstance(item, str) for item in value))


def _plain(value: Any) -> Any:
    """Convert a Python value to its form in a file."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, Integral | Real) and not isinstance(value, bool):  # including numpy's numbers
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _wrong_type(key: str, entry: Entry, root: type[Section]) -> str | None:
    """Reject types that pydantic would coerce (the text "16" to a number, true to 1)."""
    if key.startswith(f"{_EXTRA}."):
        return None
    known = known_keys(root)[key]
    kind = _kind(entry.value)
    if "list" in known.kinds:
        items = entry.value if kind == "list" else [entry.value]
        if all(_kind(item) in known.item_kinds for item in items):
            return None
    elif kind in known.kinds and entry.value != "":  # an empty path would mean the current folder
        return None
    return tr(
        "{source}: found {value}, expected {type}", source=entry.source, value=describe(entry.value), type=known.type
    )


def _kind(value: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "text", list: "list", dict: "mapping", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _scalar(kinds: frozenset[str], text: str, flag: str) -> Any:
    if "text" in kinds and not (text[:1] == text[-1:] and text[:1] in ("'", '"') and len(text) > 1):
        return None if "null" in kinds and text in ("null", "~", "") else text
    return _yaml(text, flag)


def _items(key: Key, text: str, flag: str) -> list[Any]:
    if "text" in key.item_kinds and _is_path(text):  # whose name has a comma or a bracket in it
        return [text]
    if text.startswith("["):
        value = _yaml(text, flag)
        return value if isinstance(value, list) else [value]
    if text.startswith("{") and "mapping" in key.item_kinds:
        return [_yaml(text, flag)]
    # a comma inside brackets belongs to a pattern such as `layers\.[0-9]{1,2}\.`
    parts = [part.strip() for part in re.split(r",(?![^\[({]*[\])}])", text) if part.strip()]
    return parts if "text" in key.item_kinds else [_yaml(part, flag) for part in parts]


def _is_path(text: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(text))
    except ValueError:  # a NUL in it
        return False


def _yaml(text: str, flag: str) -> Any:
    try:
        return parse_value(text)
    except ValueError as error:
        if text.strip().lstrip("+-").isdecimal():
            raise ConfigError(
                tr("{flag}: no key takes a whole number as large as {text:.40}", flag=flag, text=text.strip()),
                hint=tr("give a smaller one"),
                code="config-value",
            ) from error
        raise ConfigError(
            tr("{flag}: `{text}` is not a YAML value: {error}", flag=flag, text=text, error=error),
            hint=tr("put quotes around it"),
        ) from error
