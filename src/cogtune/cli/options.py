"""Command lines whose flags are configuration keys: ``[CONFIG.yaml] [--section.key value ...]``.

They are split here, by hand, because the keys come from `RunConfig` and not from a function's parameters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cogtune.errors import ConfigError

_BOOLEANS = frozenset({"true", "false", "yes", "no", "on", "off"})


@dataclass
class Arguments:
    """What stood on the command line."""

    config: str | None = None
    overrides: dict[str, list[str]] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)


def split_arguments(arguments: Sequence[str], switches: Sequence[str] = (), values: Sequence[str] = ()) -> Arguments:
    """Sort arguments into the configuration file, keys with their texts, and this command's own ``switches`` and flags
    that take a value (``values``; the last one counts).

    A key of type true/false needs no value. Raises ConfigError for unknown flags, a flag without its value, and a
    second positional argument.
    """
    from cogtune.configuration.keys import ALIASES, known_keys
    from cogtune.configuration.load import unknown_key

    found = Arguments()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            _take_config(found, word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if name in switches and not equals:
            found.switches.add(name)
            continue
        if name in values:
            found.values[name] = value if equals else _next_value(flag, rest)
            continue
        if name == "config":
            _take_config(found, value if equals else _next_value(flag, rest))
            continue
        key = ALIASES.get(name, name)
        if not flag.startswith("--") or not (key in known_keys() or key.startswith("lora.extra.")):
            raise unknown_key(
                flag.lstrip("-"), f"unknown flag `{flag}`", flag=True, extra=[*switches, *values, "config"]
            )
        if not equals:
            kinds = known_keys()[key].kinds if key in known_keys() else frozenset()
            value = "true" if "bool" in kinds and _stands_alone(kinds, rest) else _next_value(flag, rest)
        found.overrides.setdefault(name, []).append(value)
    return found


def _take_config(found: Arguments, word: str) -> None:
    if found.config is not None:
        hint = "values of keys follow their flag: --section.key value"
        raise ConfigError(
            f"unexpected argument `{word}`: the configuration file is already `{found.config}`", hint=hint
        )
    found.config = word


def _stands_alone(kinds: frozenset[str], rest: Sequence[str]) -> bool:
    """Whether a flag that may be true or false has no value behind it. Where it may be a text as well, any word that
    is no flag is its value."""
    if not rest or rest[0].startswith("--"):
        return True
    return kinds == {"bool"} and rest[0].lower() not in _BOOLEANS


def _next_value(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{flag} needs a value", hint=f"{flag} VALUE, or {flag}=VALUE where it starts with `--`")
    return rest.pop(0)


def keys_help(width: int = 100, only: tuple[str, ...] = ("",)) -> Iterator[str]:
    """Every key with type, default and meaning, by section, as lines of text; or those that begin as ``only`` says."""
    from cogtune.configuration.keys import describe_keys
    from cogtune.configuration.run_config import RunConfig

    section = ""
    for key in describe_keys():
        if not key.key.startswith(only):
            continue
        if key.section != section:
            section = key.section
            about = (RunConfig.model_fields[section].annotation.__doc__ or "").strip()
            yield ""
            yield f"{section}: {about}"
        flags = f"--{key.key}" if key.alias is None else f"--{key.key}, {key.alias}"
        yield f"  {flags}  <{key.type}>  [{key.default if key.required else 'default: ' + key.default}]"
        yield from textwrap.wrap(key.description, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def flags_help(flags: Mapping[str, str]) -> Iterator[str]:
    """Lines of two columns: a flag and what it does."""
    column = max(map(len, flags)) + 2
    for flag, text in flags.items():
        yield f"  {flag:<{column}}{text}"
