"""A command of ``cogtune``: its texts, its own flags, and the configuration keys it accepts.

A command's own flags are the fields of a dataclass, so their names, types and defaults are part of the code:

    @dataclass(frozen=True)
    class _Flags:
        count: int = flag(3, "How many pictures, from the first.", "N", least=1)
        json: bool = flag(False, "Print everything as JSON.")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from cogtune.cli.options import Arguments, KeysOf, split_arguments
from cogtune.errors import ConfigError
from cogtune.language import english, tr


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    metavar: str = "VALUE",
    *,
    least: float | None = None,
    choices: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> Any:
    """Declare a dataclass field that is a flag; required if it has no ``default``. ``also``: other names for it."""
    metadata = {"help": help, "metavar": metavar, "least": least, "choices": choices, "also": also}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


@dataclass(frozen=True)
class NoFlags:
    """Flags of a command that has none."""


@dataclass(frozen=True)
class Flag:
    """One of a command's own flags.

    Attributes:
        kind: bool, int, float, str or Path.
        many: whether it can be repeated.
        default: as it is typed; empty if there is none.
    """

    name: str
    field: str
    kind: type[Any]
    many: bool
    required: bool
    default: str
    help: str
    metavar: str
    least: float | None
    choices: tuple[str, ...]
    also: tuple[str, ...]

    @property
    def usage(self) -> str:
        """Format for a usage line: ``--count N``."""
        return f"--{self.name}" if self.kind is bool else f"--{self.name} {self.metavar}"

    def read(self, text: str) -> Any:
        """Parse ``text`` into the flag's value.

        Raises:
            ConfigError: not a valid value.
        """
        if self.choices and text not in self.choices:
            raise self._wrong(text, tr(" or ").join(self.choices))
        if self.kind not in (int, float):
            return self.kind(text)
        bound = "" if self.least is None else f" >= {self.least:g}"
        what = tr("a whole number") if self.kind is int else tr("a number")
        expected = f"{what}{bound}"
        try:
            value = self.kind(text)
        except ValueError:
            raise self._wrong(text, expected) from None
        if not (self.least is None or value >= self.least):
            raise self._wrong(text, expected)
        return value

    def _wrong(self, text: str, expected: str) -> ConfigError:
        return ConfigError(
            tr("--{name}: found `{text}`, expected {expected}", name=self.name, text=text, expected=expected),
            code="config-value",
        )


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: ``train``, or with its group ``data check``.
        summary: what it is for, in a list of commands.
        about: what its help says.
        examples: command lines.
        run: called with the own flags and the whole command line; returns the exit code, None for 0.
        flags: the dataclass of its own flags.
        places: names of the words that are no flags; one in brackets may be left out.
        keys: whose configuration keys it takes.
        counted: how the keys begin that mean something here; of the others a file may hold some.
        strict: whether a key that means nothing here is refused when it is typed.
        most_used: keys that the help shows first.
        optional: keys that a run requires and this command does not, or takes from its places.
        keys_explained: whether the help lists the keys; else it names the help that does.
        needs_model: False for a command that is wanted where a library is broken.
    """

    name: str
    summary: str
    about: str
    examples: tuple[str, ...]
    run: Callable[[Any, Arguments], int | None]
    flags: type[Any] = NoFlags
    places: tuple[str, ...] = ()
    keys: KeysOf = "none"
    counted: tuple[str, ...] = ("",)
    strict: bool = False
    most_used: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    keys_explained: bool = True
    needs_model: bool = True

    def __call__(self, words: list[str]) -> int:
        """Run the command with the words after its name.

        Raises:
            ConfigError: the words are wrong; and whatever the command raises.
        """
        if self.keys != "answer":
            return self._called(words)
        from cogtune.configuration.problems import running

        before = running.set(f"cogtune {self.name}")
        try:
            return self._called(words)
        finally:
            running.reset(before)

    def _called(self, words: list[str]) -> int:
        flags = list(own_flags(self.flags))
        line = split_arguments(
            words,
            [flag.name for flag in flags if flag.kind is bool],
            [name for flag in flags if flag.kind is not bool for name in (flag.name, *flag.also)],
            places=len(self.places),
            keys=self.keys,
            config=any(place.startswith("[CONFIG") for place in self.places),
        )
        needed = [place for place in self.places if not place.startswith("[")]
        if len(line.places) < len(needed):
            raise self._missing(needed[len(line.places)])
        if self.strict:
            self._refuse_uncounted(line)
        own = self._read(flags, line)
        with english() if getattr(own, "json", False) is True else nullcontext():  # programs read it
            return self.run(own, line) or 0

    def _read(self, flags: list[Flag], line: Arguments) -> Any:
        values: dict[str, Any] = {flag.field: True for flag in flags if flag.name in line.switches}
        for flag in flags:
            texts = [text for name in (flag.name, *flag.also) for text in line.values.get(name, ())]
            if len(texts) > 1 and not flag.many:
                raise ConfigError(
                    tr("{flag} is given {texts} times", flag=f"--{flag.name}", texts=len(texts)),
                    hint=tr("it takes one value; keep one"),
                    code="usage",
                )
            if texts:
                values[flag.field] = tuple(map(flag.read, texts)) if flag.many else flag.read(texts[0])
            elif flag.required:
                raise self._missing(flag.usage)
        return self.flags(**values)

    def _missing(self, what: str) -> ConfigError:
        return ConfigError(
            tr("missing: {what}", what=what),
            hint=tr("`cogtune {name} --help` shows examples", name=self.name),
            code="config-missing",
        )

    def _refuse_uncounted(self, line: Arguments) -> None:
        from cogtune.cli.options import root_of
        from cogtune.configuration.keys import aliases

        root = root_of(self.keys)
        assert root is not None
        for name in line.overrides:
            if not aliases(root).get(name, name).startswith(self.counted):
                raise ConfigError(
                    tr("--{name} has no effect in `cogtune {self_name}`", name=name, self_name=self.name),
                    hint=tr("leave it out; `cogtune {name} --help` lists the keys that have one", name=self.name),
                    code="config-unknown-key",
                )


def own_flags(kind: type[Any]) -> Iterator[Flag]:
    """Yield the flags that a dataclass declares."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner, many = _plain(types[field.name])
        meta = field.metadata
        yield Flag(
            name=field.name.replace("_", "-"),
            field=field.name,
            kind=inner,
            many=many,
            required=field.default is dataclasses.MISSING,
            default=_typed(field.default),
            help=meta["help"],
            metavar=meta["metavar"],
            least=meta["least"],
            choices=meta["choices"],
            also=meta["also"],
        )


def _typed(default: Any) -> str:
    """Return a flag's default as a user would type it; empty for none, and for a flag without a value."""
    if default is dataclasses.MISSING or default is None or isinstance(default, bool | tuple):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _plain(annotation: Any) -> tuple[type[Any], bool]:
    """Return the type of a single value, and whether several are allowed."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True
    assert annotation in (bool, int, float, str, Path), annotation
    return annotation, False
