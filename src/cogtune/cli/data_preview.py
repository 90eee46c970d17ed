"""``cogtune data preview``: show what the model will see, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.cli.command import Command, flag
from cogtune.cli.data_config import KEYS, data_config
from cogtune.cli.options import Arguments
from cogtune.cli.progress import rich_console
from cogtune.errors import CheckpointError, OutputFolderError
from cogtune.language import phrase, tr
from cogtune.system.terminal import visible

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from cogtune.data.preview import RowPreview, Segment
    from cogtune.data.records import ImageRef

_ABOUT = """\
Show rows as training builds them: the picture, and the tree of its questions and answers with every token coloured by
whether it is trained. Only the model's tokenizer file is needed."""
_TITLE = phrase("{data}: what the model sees")
_BRANCHES = ("blue", "yellow", "magenta", "cyan", "red", "bright_black")


@dataclass(frozen=True)
class _Flags:
    count: int = flag(3, "How many pictures, from the first.", "N", least=0)
    record: str | None = flag(None, "Show this one: a record's id, or the name of its picture's file.", "ID")
    html: Path | None = flag(None, "Write one page that needs nothing else, instead of printing.", "FILE")
    width: int = flag(40, "Columns of the picture in the terminal. 0: none.", "N", least=0)


def _preview(flags: _Flags, line: Arguments) -> None:
    config, model = data_config(line)
    target = flags.html
    if target is not None:
        _require_own(target)

    from cogtune.data.preview import preview_rows
    from cogtune.data.sources import read_sources
    from cogtune.processing.token_file import find_token_file

    tokens = find_token_file(model, config.model.template, config.model.tokenizer)
    if not tokens.exact:
        raise CheckpointError(
            tr("tokens are shown with the model's tokenizer, and there is none at {model}", model=model)
            if model
            else tr("tokens are shown with the model's tokenizer, and there is none"),
            hint=tr("name the model's folder with --model; tokenizer.json and config.json are enough"),
            code="checkpoint-tokenizer",
        )
    examples, _ = read_sources(config.data, max_images=tokens.encoder().max_images, clips=tokens.reads_clips)
    rows = preview_rows(examples, config.data, tokens, flags.count, flags.record)
    if target is None:
        _print(rows, flags.width, config.data.exif, config.data.bit_depth)
        return
    from cogtune.data.preview_html import page
    from cogtune.system import files
    from cogtune.system.file_errors import explained

    title = tr(_TITLE, data=", ".join(str(folder.path) for folder in config.data.path))
    with explained(target):
        files.write_text(target, page(rows, title=title, exif=config.data.exif, bit_depth=config.data.bit_depth))
    print(tr("wrote {target}", target=target))


def _require_own(target: Path) -> None:
    """Refuse to overwrite anything but a page that ``--html`` wrote."""
    try:
        head = target.read_bytes()[:65536] if target.is_file() else b""
    except OSError:
        return  # the error when it is written says more
    from cogtune.data.preview_html import MARK

    if head and MARK.encode() not in head and b": what the model sees</title>" not in head:  # as earlier versions did
        raise OutputFolderError(
            tr("{target}: exists, and `cogtune data preview` did not write it", target=target),
            hint=tr("name another .html file"),
            code="convert-target",
        )


def _print(rows: object, width: int, exif: str, bit_depth: str) -> None:
    console = rich_console()
    console.soft_wrap = not console.is_terminal
    if console.is_terminal and not console.no_color:
        legend = tr("grey: context; green: trained; violet: special token; underlined: every other token")
        console.print(legend, style="dim")
    for row in rows:  # type: ignore[attr-defined]
        _print_row(console, row, width, exif, bit_depth)


def _print_row(console: Console, row: RowPreview, width: int, exif: str, bit_depth: str) -> None:
    console.print()
    console.print(row.key, style="bold", markup=False)
    console.print(row.counts(), markup=False)
    for place in row.places():
        console.print(tr("from {source}", source=place), style="dim", markup=False)
    if width:
        _print_images(console, row.images, width, exif, bit_depth)
    for segment in row.segments:
        _print_segment(console, segment)


def _print_images(console: Console, images: Sequence[ImageRef], width: int, exif: str, bit_depth: str) -> None:
    """Print what the model sees, two pixels per character: a picture's square, or a clip's frames as a strip."""
    from cogtune.data.picture_headers import turned_note
    from cogtune.data.pixels import shown_squares
    from cogtune.processing.frames import Frame

    frames = [image for image in images if isinstance(image, Frame)]
    side = width if not frames else max(8, min(width, console.width // 6))
    squares = list(shown_squares(images, side, exif=exif, bit_depth=bit_depth))
    if frames:
        text = tr("{path} ({size}), frames {frames}", path=frames[0].path, size=squares[0][1],
                  frames=", ".join(str(frame.index) for frame in frames))  # fmt: skip
        console.print(text, style="dim", markup=False)
        each = max(1, console.width // side)
        for start in range(0, len(squares), each):
            _print_strip(console, [square for square, _ in squares[start : start + each]])
        return
    for image, (square, size) in zip(images, squares, strict=True):
        assert not isinstance(image, Frame)
        note = turned_note(image, exif)
        console.print(tr("{path} ({size}, made square)", path=image, size=size), style="dim", markup=False)
        if note is not None:
            console.print(note, style="bold red", markup=False)
        _print_strip(console, [square])


def _print_strip(console: Console, squares: Sequence[Image.Image]) -> None:
    from rich.text import Text

    if not console.is_terminal:
        return
    grids: list[Any] = [square.load() for square in squares]
    side = squares[0].height
    for y in range(0, side - 1, 2):
        line = Text()
        for pixels in grids:
            for x in range(side):
                upper, lower = ("#{:02x}{:02x}{:02x}".format(*pixels[x, y + half]) for half in (0, 1))
                line.append("▀", style=f"{upper} on {lower}")
        console.print(line)


def _print_segment(console: Console, segment: Segment) -> None:
    from rich.padding import Padding
    from rich.text import Text

    colour = _BRANCHES[segment.number % len(_BRANCHES)]
    what = tr("{count} trained", count=segment.trained) if segment.trained else tr("context")
    place = f"{segment.number}"
    if segment.parent >= 0:
        place = tr("{number} after {parent}", number=segment.number, parent=segment.parent)
    # into a pipe nothing is broken or filled up with blanks for a width that nobody has
    indent = "" if console.is_terminal else "  " * segment.depth
    line = Text(indent)
    line.append(tr("┃ {place}, {what}: ", place=place, what=what), style=f"bold {colour}")
    for index, token in enumerate(segment.tokens):
        if token.kind == "picture":
            line.append(tr("[picture: {count} positions]", count=token.count), style="yellow")
            continue
        style = "bold green" if token.trained else "magenta" if token.kind == "special" else "bright_black"
        shown = visible(token.text).replace("\n", f"↵\n{indent}")
        line.append(shown, style=f"{style} {'underline' if index % 2 else ''}".strip())
    console.print(Padding(line, (0, 0, 0, 2 * segment.depth)) if console.is_terminal else line)


COMMANDS = (
    Command(
        name="data preview",
        summary="Show what the model will see, token by token.",
        about=_ABOUT,
        examples=(
            "cogtune data preview my-data --model cogvlm2",
            "cogtune data preview my-data --model cogvlm2 --record 00000017.jpg --html preview.html",
        ),
        run=_preview,
        flags=_Flags,
        places=("[CONFIG.yaml|DATA]",),
        keys="run",
        counted=KEYS,
        optional=("data.path",),
    ),
)
