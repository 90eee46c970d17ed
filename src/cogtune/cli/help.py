"""The texts of ``--help``, built from the descriptions of commands, flags and keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from cogtune.cli.command import Command, Flag, own_flags
from cogtune.cli.options import root_of
from cogtune.language import padded, phrase, tr, width, wrapped

_WIDTH = 110
_ABOUT = phrase("Fine-tune CogVLM2 with LoRA and run the result: one GPU, many, or a laptop's CPU.")
_ENDINGS = phrase("`{command} --help` explains one. Exit codes: 0 done, 1 the run failed, 2 the input is wrong.")


def overview(commands: Iterable[Command], groups: Iterable[tuple[str, str]]) -> list[str]:
    """Yield ``cogtune --help``. ``groups``: the first word of two-word commands, with a summary."""
    of_group = dict(groups)
    shown: dict[str, str] = {}
    for command in commands:
        first, _, second = command.name.partition(" ")
        shown.setdefault(first, tr(of_group[first] if second else command.summary))
    return [
        tr("usage: {usage}", usage="cogtune COMMAND [...]"),
        "",
        tr(_ABOUT),
        "",
        tr("Commands:"),
        *_columns(shown.items()),
        "",
        tr("Flags:"),
        *_columns([("--help, -h", tr("This text.")), ("--version", tr("The version."))]),
        "",
        tr("From nothing to an answer:"),
        "  cogtune demo",
        "  cogtune init my-data --model cogvlm2 --output run.yaml",
        "  cogtune train run.yaml",
        "  cogtune chat --last --image photo.jpg",
        "",
        tr(_ENDINGS, command="cogtune COMMAND"),
    ]


def group_help(name: str, about: str, commands: Sequence[Command]) -> list[str]:
    """Return ``cogtune data --help``."""
    rows = [(command.name.partition(" ")[2], tr(command.summary)) for command in commands]
    usage = tr("usage: {usage}", usage=f"cogtune {name} COMMAND [...]")
    ending = tr(_ENDINGS, command=f"cogtune {name} COMMAND")
    return [usage, "", tr(about), "", tr("Commands:"), *_columns(rows), "", ending]


def command_help(command: Command) -> list[str]:
    """Return ``cogtune train --help``."""
    flags = list(own_flags(command.flags))
    lines = [tr("usage: {usage}", usage=_usage(command, flags)), "", *_about(command), ""]
    lines += [tr("Examples:"), *(f"  {example}" for example in command.examples), ""]
    lines += [tr("Flags of this command:"), *_columns(_flag_rows(command, flags))]
    if command.keys == "none":
        return lines
    if command.most_used:
        lines += ["", tr("Most used keys:"), *_most_used(command)]
    if not command.keys_explained:
        return [*lines, "", tr("Configuration keys: as for `cogtune train --help`")]
    if command.counted != ("",):
        title = tr("Configuration keys used here (a file may hold others):")
    else:
        title = tr("Configuration keys:")
    return [*lines, "", title, *_all_keys(command)]


def _about(command: Command) -> list[str]:
    """Return what a command's help says. English has its own lines; Chinese is broken here."""
    said = tr(command.about).strip().split("\n")
    return (
        said
        if tr(command.about) == command.about
        else [line for part in said for line in wrapped(part, _WIDTH) or [""]]
    )


def _usage(command: Command, flags: Sequence[Flag]) -> str:
    words = ["cogtune", command.name, *command.places, *(flag.usage for flag in flags if flag.required)]
    if command.keys != "none":
        words.append(tr("[--section.key value ...]"))
    if any(not flag.required for flag in flags):
        words.append(tr("[flags]"))
    return " ".join(words)


def _flag_rows(command: Command, flags: Sequence[Flag]) -> Iterator[tuple[str, str]]:
    for flag in flags:
        text = tr(flag.help) + (tr(" May be repeated.") if flag.many else "")
        text += tr(" Default: {value}.", value=flag.default) if flag.default else ""
        yield flag.usage, text + (tr(" Required.") if flag.required else "")
    if command.places and command.keys != "none" and "yaml" in command.places[0]:
        yield "--config FILE", tr("The configuration file, as the first argument.")
    yield "--help, -h", tr("This text.")


def _most_used(command: Command) -> list[str]:
    from cogtune.configuration.keys import known_keys

    root = root_of(command.keys)
    assert root is not None
    rows = []
    for name in command.most_used:
        key = known_keys(root)[name]
        about = re.match(r".*?(?:(?<!\.)\.(?=\s|$)|。|$)", tr(key.description), re.S)
        assert about is not None
        default = "" if key.default in ("required", "null", "[]") else f" [{key.default.strip('[]')}]"
        rows.append((key.alias or f"--{key.key}", f"{about.group()}{default}"))
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
            yield from ("", f"{section}: {tr(first_paragraph(sections(root)[section].__doc__))}")
        flags = f"--{key.key}" if key.alias is None else f"--{key.key}, {key.alias}"
        default = tr("required") if key.required else tr("default: {value}", value=key.default)
        shown = "" if key.key in command.optional else f"[{default}]"
        gap = "  " if width(f"  {flags}  <{key.type}>  {shown}") <= _WIDTH else "\n      "
        yield f"  {flags}  <{key.type}>{gap}{shown}".rstrip()
        yield from wrapped(tr(key.description), _WIDTH - 10, " " * 6)


def first_paragraph(text: str | None) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Format two columns. The second is wrapped, and starts on its own line if the first is long."""
    rows = list(rows)
    column = min(max(width(left) for left, _ in rows), 34) + 4
    lines = []
    for left, right in rows:
        lines_right = wrapped(right, _WIDTH - column) or [""]
        if width(left) > column - 4:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {padded(left, column - 2)}{lines_right.pop(0)}")
        lines += [" " * column + line for line in lines_right]
    return lines
