"""The texts of ``--help``, built from the descriptions of commands, flags and keys."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from cogtune.cli.command import Command, Flag, own_flags
from cogtune.cli.options import root_of

_WIDTH = 110
_ABOUT = "Fine-tune CogVLM2 with LoRA and run the result: one GPU, many, or a laptop's CPU."
_ENDINGS = "`cogtune COMMAND --help` explains one. Exit codes: 0 done, 1 the run failed, 2 the input is wrong."


def overview(commands: Iterable[Command], groups: Iterable[tuple[str, str]]) -> list[str]:
    """Yield ``cogtune --help``. ``groups``: the first word of two-word commands, with a summary."""
    of_group = dict(groups)
    shown: dict[str, str] = {}
    for command in commands:
        first, _, second = command.name.partition(" ")
        shown.setdefault(first, of_group[first] if second else command.summary)
    return [
        "usage: cogtune COMMAND [...]",
        "",
        _ABOUT,
        "",
        "Commands:",
        *_columns(shown.items()),
        "",
        "Flags:",
        *_columns([("--help, -h", "This text."), ("--version", "The version.")]),
        "",
        "From nothing to an answer:",
        "  cogtune demo",
        "  cogtune init my-data --model cogvlm2 --output run.yaml",
        "  cogtune train run.yaml",
        "  cogtune chat --last --image photo.jpg",
        "",
        _ENDINGS,
    ]


def group_help(name: str, about: str, commands: Sequence[Command]) -> list[str]:
    """Return ``cogtune data --help``."""
    rows = [(command.name.partition(" ")[2], command.summary) for command in commands]
    ending = _ENDINGS.replace("COMMAND", f"{name} COMMAND")
    return [f"usage: cogtune {name} COMMAND [...]", "", about, "", "Commands:", *_columns(rows), "", ending]


def command_help(command: Command) -> list[str]:
    """Return ``cogtune train --help``."""
    flags = list(own_flags(command.flags))
    lines = [f"usage: {_usage(command, flags)}", "", *command.about.strip().split("\n"), ""]
    lines += ["Examples:", *(f"  {example}" for example in command.examples), ""]
    lines += ["Flags of this command:", *_columns(_flag_rows(command, flags))]
    if command.keys == "none":
        return lines
    if command.most_used:
        lines += ["", "Most used keys:", *_most_used(command)]
    if not command.keys_explained:
        return [*lines, "", "Configuration keys: as for `cogtune train --help`"]
    if command.counted != ("",):
        title = "Configuration keys used here (a file may hold others):"
    else:
        title = "Configuration keys:"
    return [*lines, "", title, *_all_keys(command)]


def _usage(command: Command, flags: Sequence[Flag]) -> str:
    words = ["cogtune", command.name, *command.places, *(flag.usage for flag in flags if flag.required)]
    if command.keys != "none":
        words.append("[--section.key value ...]")
    if any(not flag.required for flag in flags):
        words.append("[flags]")
    return " ".join(words)


def _flag_rows(command: Command, flags: Sequence[Flag]) -> Iterator[tuple[str, str]]:
    for flag in flags:
        text = flag.help + (" May be repeated." if flag.many else "")
        yield flag.usage, text + (" Required." if flag.required else "")
    if command.places and command.keys != "none" and "yaml" in command.places[0]:
        yield "--config FILE", "The configuration file, as the first argument."
    yield "--help, -h", "This text."


def _most_used(command: Command) -> list[str]:
    from cogtune.configuration.keys import known_keys

    root = root_of(command.keys)
    assert root is not None
    rows = []
    for name in command.most_used:
        key = known_keys(root)[name]
        about = re.split(r"(?<!\.)\.(?=\s|$)", key.description)[0]
        default = "" if key.default in ("required", "null", "[]") else f" [{key.default.strip('[]')}]"
        rows.append((key.alias or f"--{key.key}", f"{about}.{default}"))
    return _columns(rows)


def _all_keys(command: Command) -> Iterator[str]:
    """Yield every key of the command with type, default and meaning, by section."""
    from cogtune.configuration.keys import describe_keys, sections

    root = root_of(command.keys)
    assert root is not None
    section = ""
    for key in describe_keys(root):
        if not key.key.startswith(command.counted):
            continue
        if key.section != section:
            section = key.section
            yield from ("", f"{section}: {_first_paragraph(sections(root)[section].__doc__)}")
        flags = f"--{key.key}" if key.alias is None else f"--{key.key}, {key.alias}"
        shown = f"[{key.default if key.required else 'default: ' + key.default}]"
        gap = "  " if len(f"  {flags}  <{key.type}>  {shown}") <= _WIDTH else "\n      "
        yield f"  {flags}  <{key.type}>{gap}{shown}"
        yield from textwrap.wrap(key.description, _WIDTH - 10, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Format two columns. The second is wrapped, and starts on its own line if the first is long."""
    rows = list(rows)
    column = min(max(len(left) for left, _ in rows), 34) + 4
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, _WIDTH - column) or [""]
        if len(left) > column - 4:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left:<{column - 2}}{wrapped.pop(0)}")
        lines += [" " * column + line for line in wrapped]
    return lines
