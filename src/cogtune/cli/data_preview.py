"""``cogtune data preview``: what the model will see, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cogtune.errors import CheckpointError, ConfigError, OutputFolderError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from cogtune.data.preview import RowPreview, Segment

_USAGE = "usage: cogtune data preview [CONFIG.yaml | DATA] --model BASE [--section.key value ...]"
_ABOUT = """\
Show rows as training builds them: the picture, and the tree of its questions and answers with every token coloured by
whether it is trained. Only the model's tokenizer file is needed.

  cogtune data preview my-data --model cogvlm2
  cogtune data preview my-data --model cogvlm2 --record 00000017.jpg --html preview.html"""
_FLAGS = {
    "--count N": "How many pictures, from the first. Default: 3.",
    "--record ID": "Show this one: a record's id, or the name of its picture's file.",
    "--html FILE": "Write one page that needs nothing else, instead of printing.",
    "--width N": "Columns of the picture in the terminal. 0: none. Default: 40.",
    "--config FILE": "The configuration file, as the first argument.",
    "--help, -h": "This text.",
}
_VALUES = ("count", "record", "html", "width")
_BRANCHES = ("blue", "yellow", "magenta", "cyan", "red", "bright_black")


def add_to(group: typer.Typer) -> None:
    """Add the command. Its flags are configuration keys, so they are split by `cogtune.cli.options`."""
    group.command(
        "preview",
        help="Show what the model will see, token by token.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_preview)


def _preview(ctx: typer.Context) -> None:
    from cogtune.cli.data_check import data_config, print_help
    from cogtune.cli.options import split_arguments

    if {"--help", "-h"} & set(ctx.args):
        print_help(_USAGE, _ABOUT, _FLAGS)
        return
    arguments = split_arguments(ctx.args, values=_VALUES)
    config, model = data_config(arguments)
    count, width = _number(arguments.values, "count", 3), _number(arguments.values, "width", 40)
    target = Path(arguments.values["html"]) if "html" in arguments.values else None
    if target is not None and target.exists() and target.suffix.lower() not in (".html", ".htm"):
        raise OutputFolderError(f"{target}: exists and is no page", hint="name an .html file", code="convert-target")

    from cogtune.data.preview import preview_rows
    from cogtune.data.sources import read_sources
    from cogtune.processing.token_file import find_token_file

    tokens = find_token_file(model, config.model.template)
    if not tokens.exact:
        raise CheckpointError(
            "tokens are shown with the model's tokenizer, and there is none" + (f" at {model}" if model else ""),
            hint="name the model's folder with --model; tokenizer.json and config.json are enough",
            code="checkpoint-tokenizer",
        )
    examples, _ = read_sources(config.data, max_images=tokens.encoder().max_images)
    rows = preview_rows(examples, config.data, tokens, count, arguments.values.get("record"))
    if target is None:
        _print(rows, width, config.data.exif)
        return
    from cogtune.data.preview_html import page
    from cogtune.system import files

    title = f"{', '.join(str(folder.path) for folder in config.data.path)}: what the model sees"
    files.write_text(target, page(rows, title=title, exif=config.data.exif))
    print(f"wrote {target}")


def _number(values: Mapping[str, str], flag: str, default: int) -> int:
    text = values.get(flag, str(default))
    if not text.isdigit():
        raise ConfigError(f"--{flag}: found `{text}`, expected a whole number", code="config-value")
    return int(text)


def _print(rows: object, width: int, exif: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print("grey: context; green: trained; violet: special token; underlined: every other token", style="dim")
    for row in rows:  # type: ignore[attr-defined]
        _print_row(console, row, width, exif)


def _print_row(console: Console, row: RowPreview, width: int, exif: str) -> None:
    console.print()
    console.print(row.key, style="bold", markup=False)
    dropped = f"; {row.dropped} answers left out for their length" if row.dropped else ""
    console.print(f"{row.tokens} tokens, {row.trained} trained{dropped}", markup=False)
    for source in row.sources:
        console.print(f"from {source}", style="dim", markup=False)
    for image in row.images if width else ():
        _print_picture(console, image, width, exif)
    for segment in row.segments:
        _print_segment(console, segment)


def _print_picture(console: Console, path: Path, width: int, exif: str) -> None:
    """The square the model sees, two pixels a character."""
    from rich.text import Text

    from cogtune.processing.image import read_image

    image = read_image(path, exif=exif)
    console.print(f"{path} ({image.width} x {image.height}, made square)", style="dim", markup=False)
    if not console.is_terminal:
        return
    pixels = image.resize((width, width)).load()
    for y in range(0, width - 1, 2):
        line = Text()
        for x in range(width):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*pixels[x, y + half]) for half in (0, 1))  # type: ignore[index,misc]
            line.append("▀", style=f"{upper} on {lower}")
        console.print(line)


def _print_segment(console: Console, segment: Segment) -> None:
    from rich.padding import Padding
    from rich.text import Text

    colour = _BRANCHES[segment.number % len(_BRANCHES)]
    follows = "" if segment.parent < 0 else f" after {segment.parent}"
    what = f"{segment.trained} trained" if segment.trained else "context"
    line = Text()
    line.append(f"┃ {segment.number}{follows}, {what}: ", style=f"bold {colour}")
    for place, token in enumerate(segment.tokens):
        if token.kind == "picture":
            line.append(f"[picture: {token.count} positions]", style="yellow")
            continue
        style = "bold green" if token.trained else "magenta" if token.kind == "special" else "bright_black"
        shown = token.text.replace("\n", "↵\n")
        line.append(shown, style=f"{style} {'underline' if place % 2 else ''}".strip())
    console.print(Padding(line, (0, 0, 0, 2 * segment.depth)))
