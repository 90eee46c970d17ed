"""Parses a command line: positional words, a command's own flags, and configuration keys ``--section.key value``.

The parser is our own because the keys come from the fields of `RunConfig` and `AnswerConfig`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.configuration.keys import Key
    from cogtune.configuration.values import Section

KeysOf = Literal["run", "answer", "none"]
"""The configuration whose keys a command accepts as flags: `RunConfig`, `AnswerConfig`, or none."""

_BOOLEANS = frozenset({"true", "false", "yes", "no", "on", "off"})


@dataclass
class Arguments:
    """A parsed command line.

    Attributes:
        words: the whole command line.
        places: positional words, in order.
        overrides: configuration key or short flag -> its texts.
        switches: the command's own flags without a value.
        values: its own flags with a value -> their texts.
    """

    words: tuple[str, ...] = ()
    places: list[str] = field(default_factory=list)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    values: dict[str, list[str]] = field(default_factory=dict)

    @property
    def config(self) -> str | None:
        """The configuration file, if the command takes one."""
        return self.places[0] if self.places else None


def root_of(keys: KeysOf) -> type[Section] | None:
    """Return the configuration class that has the keys."""
    if keys == "none":
        return None
    from cogtune.configuration.answer_config import AnswerConfig
    from cogtune.configuration.run_config import RunConfig

    return RunConfig if keys == "run" else AnswerConfig


def split_arguments(
    arguments: Sequence[str],
    switches: Sequence[str] = (),
    values: Sequence[str] = (),
    *,
    places: int = 1,
    keys: KeysOf = "run",
    config: bool = True,
) -> Arguments:
    """Parse the words of a command line. A true/false key needs no value.

    Args:
        switches: the command's own flags without a value.
        values: its own flags with a value.
        places: the most positional words; ``--config FILE`` also counts as the first of them.
        config: they are files or folders, so a word behind a true/false key that can be neither is its wrong value.

    Raises:
        ConfigError: an unknown flag, a flag without its value, or too many words.
    """
    splitter = _Splitter(keys, [*switches, *values, *(["config"] if places and keys != "none" else [])])
    found = Arguments(tuple(arguments))
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            _take_place(found, word, places)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if name in switches:
            if equals or (rest and rest[0].lower() in _BOOLEANS):
                raise ConfigError(
                    tr("{flag} takes no value, found `{value}`", flag=flag, value=value if equals else rest[0]),
                    hint=tr("write {flag} alone", flag=flag),
                    code="usage",
                )
            found.switches.add(name)
        elif name in values:
            found.values.setdefault(name, []).append(value if equals else _next_value(flag, rest))
        elif name == "config" and name in splitter.own:
            _take_place(found, value if equals else _next_value(flag, rest), places)
        else:
            kinds = splitter.kinds(flag)
            if not equals:
                value = "true" if "bool" in kinds and _stands_alone(kinds, rest, config) else _next_value(flag, rest)
            found.overrides.setdefault(name, []).append(value)
    return found


class _Splitter:
    """Knows which flags are keys; imports the configuration only if the command accepts keys."""

    def __init__(self, keys: KeysOf, own: list[str]) -> None:
        self.own = own
        self.root = root_of(keys)
        self.known: dict[str, Key] = {}
        self.short: dict[str, str] = {}
        if self.root is not None:
            from cogtune.configuration.keys import aliases, known_keys

            self.known, self.short = dict(known_keys(self.root)), dict(aliases(self.root))

    def kinds(self, flag: str) -> frozenset[str]:
        """Return the kinds of value that the key of ``flag`` accepts.

        Raises:
            ConfigError: not a key; the message names the nearest flag.
        """
        name = flag.removeprefix("--")
        key = self.short.get(name, name)
        if flag.startswith("--") and key in self.known:
            return self.known[key].kinds
        if flag.startswith("--lora.extra.") and "lora.extra" in self.known:
            return frozenset()
        if self.root is None:
            near = difflib.get_close_matches(name.lstrip("-"), self.own, n=1)
            hint = tr("did you mean `--{near}`?", near=near[0]) if near else None
            raise ConfigError(tr("unknown flag `{flag}`", flag=flag), hint=hint, code="usage")
        from cogtune.configuration.load import unknown_key

        raise unknown_key(
            flag.lstrip("-"), tr("unknown flag `{flag}`", flag=flag), flag=True, extra=self.own, root=self.root
        )


def _take_place(found: Arguments, word: str, most: int) -> None:
    if len(found.places) == most:
        before = tr(": the place before it is taken by `{places}`", places=found.places[-1]) if found.places else ""
        hint = tr("values follow their flag: --flag value")
        raise ConfigError(tr("unexpected argument `{word}`{before}", word=word, before=before), hint=hint, code="usage")
    found.places.append(word)


def _stands_alone(kinds: frozenset[str], rest: Sequence[str], config: bool) -> bool:
    """Return whether a true/false flag has no value after it.

    If it also accepts text, any following word that is not a flag is its value; else one that is true, false, or with
    ``config`` no path.
    """
    if not rest or rest[0].startswith("--"):
        return True
    word = rest[0].lower()
    if kinds != {"bool"} or word in _BOOLEANS:
        return False
    return not config or os.sep in word or word.endswith((".yaml", ".yml", ".json")) or os.path.exists(rest[0])


def _next_value(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(
            tr("{flag} needs a value", flag=flag),
            hint=tr("{flag} VALUE, or {flag}=VALUE where it starts with `--`", flag=flag),
            code="usage",
        )
    return rest.pop(0)
