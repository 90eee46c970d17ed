"""Previewed rows as one self-contained HTML page: no script, no font, no external address."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from cogtune.data.boxes import Box
from cogtune.data.picture_headers import turned_note
from cogtune.data.pixels import shown_squares
from cogtune.data.preview import RowPreview, Segment, Token
from cogtune.data.records import ImageRef
from cogtune.language import html_language, tr
from cogtune.processing.frames import Frame

_SIDE, _STRIP_SIDE = 448, 112
_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2.5rem 0 .3rem; word-break: break-all; }
p.about { color: #666; margin: 0 0 .6rem; word-break: break-all; }
.row { display: flex; gap: 1.2rem; align-items: flex-start; flex-wrap: wrap; } .tree { flex: 1; min-width: 20rem; }
figure { margin: 0; position: relative; }
.strip { display: flex; flex-wrap: wrap; gap: .3rem; width: 30rem; max-width: 100%; } .strip img { width: 7rem; }
.turned { position: absolute; top: 0; left: 0; background: #c0392b; color: #fff; font-size: .8rem; padding: 1px 6px; }
 figcaption { font-size: .8rem; color: #666; } img { max-width: 16rem; border: 1px solid #ccc; }
.segment { border-left: 4px solid var(--branch); margin: .35rem 0 .35rem 0; padding: .1rem 0 .1rem .7rem; }
.name { font-size: .78rem; color: #666; display: block; }
.t { white-space: pre-wrap; border-radius: 3px; padding: 1px 0; }
.context { background: #eee; } .context:nth-child(even) { background: #e2e2e2; }
.trained { background: #b9e8c0; } .trained:nth-child(even) { background: #9fdcaa; }
.special { background: #d8d3f5; font-family: ui-monospace, monospace; font-size: .85em; }
.special.trained { background: #9fdcaa; outline: 1px solid #2a8a3e; }
.picture { background: #fbe3b5; font-size: .85em; padding: 1px 6px; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } p.about, .name, figcaption { color: #999; }
  .context { background: #333; } .context:nth-child(even) { background: #3c3c3c; }
  .trained { background: #1f5a2b; } .trained:nth-child(even) { background: #286b35; } .special { background: #443c78; }
  .special.trained { background: #286b35; } .picture { background: #6a5320; }
}
"""
MARK = '<meta name="generator" content="cogtune data preview">'
"""What tells the command's own pages from others."""
_BRANCHES = ("#4878a8", "#c0603a", "#5a9a5a", "#9a5a9a", "#a8892c", "#4a9a9a")


def page(rows: Iterable[RowPreview], *, title: str, exif: str = "ignore", bit_depth: str = "clip") -> str:
    """Return the page, with small copies of the squares that the model sees; ``exif`` as in `read_image`."""
    body = "\n".join(_row(row, exif, bit_depth) for row in rows)
    marks = (
        f'<span class="t context">{tr("context")}</span> <span class="t trained">{tr("trained")}</span> '
        f'<span class="t special">{tr("special token")}</span> '
        f'<span class="t special trained">{tr("trained special token")}</span> '
        f'<span class="picture">{tr("positions of the picture")}</span>'
    )
    bars = tr(
        "every bar on the left is one branch of the tree, and a token sees what stands before it on its own branch and"
        " on those around it."
    )
    legend = f"<p>{marks}</p><p>{bars}</p>"
    return (
        f'<!DOCTYPE html>\n<html lang="{html_language()}"><head><meta charset="utf-8">{MARK}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>{legend}\n{body}\n</body></html>\n"
    )


def _row(row: RowPreview, exif: str, bit_depth: str) -> str:
    about = tr("{where}: {what}", where=tr(", ").join(row.places()), what=row.counts())
    children: dict[int, list[Segment]] = {}
    for segment in row.segments:
        children.setdefault(segment.parent, []).append(segment)
    tree = "".join(_segment(segment, children) for segment in children.get(-1, []))
    return (
        f'<h2>{html.escape(row.key)}</h2><p class="about">{html.escape(about)}</p>'
        f'<div class="row">{_figures(row, exif, bit_depth)}<div class="tree">{tree}</div></div>'
    )


def _segment(segment: Segment, children: dict[int, list[Segment]]) -> str:
    colour = _BRANCHES[segment.number % len(_BRANCHES)]
    what = tr("{count} trained", count=segment.trained) if segment.trained else tr("context")
    named = tr("segment {number}, {what}", number=segment.number, what=what)
    inner = "".join(_segment(child, children) for child in children.get(segment.number, []))
    tokens = "".join(_token(token) for token in segment.tokens)
    return f'<div class="segment" style="--branch: {colour}"><span class="name">{named}</span>{tokens}{inner}</div>'


def _token(token: Token) -> str:
    if token.kind == "picture":
        return f'<span class="picture">{tr("picture: {count} positions", count=token.count)}</span>'
    kind = token.kind if token.kind != "special" or not token.trained else "special trained"
    shown = html.escape(token.text).replace("\n", "&#8629;\n")
    return f'<span class="t {kind}">{shown}</span>'


def _figures(row: RowPreview, exif: str, bit_depth: str) -> str:
    if not row.images:
        return f"<figure><figcaption>{tr('no picture')}</figcaption></figure>"
    return images_html(row.images, exif, bit_depth, row.boxes)


def images_html(images: Sequence[ImageRef], exif: str, bit_depth: str = "clip", boxes: Sequence[Box] = ()) -> str:
    """Return what the model sees: a picture's square with ``boxes`` drawn on it, or a clip's frames as a strip."""
    strip = len(images) > 1
    shown: Iterable[tuple[Image.Image, str]] = shown_squares(
        images, _STRIP_SIDE if strip else _SIDE, exif=exif, bit_depth=bit_depth
    )
    if boxes and not strip:
        shown = [(_with_boxes(square, boxes), size) for square, size in shown]
    figures = [_figure(image, square, size, exif) for image, (square, size) in zip(images, shown, strict=True)]
    return f'<div class="strip">{"".join(figures)}</div>' if strip else "".join(figures)


def _with_boxes(square: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw boxes (thousandths) on a copy of a picture, each in a colour of its own on white."""
    drawn = square.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    for number, box in enumerate(boxes):
        corners = [value * side / 1000 for value, side in zip(box, drawn.size * 2, strict=True)]
        pen.rectangle(corners, outline="white", width=4)
        pen.rectangle(corners, outline=_BRANCHES[number % len(_BRANCHES)], width=2)
    return drawn


def _figure(image: ImageRef, square: Image.Image, size: str, exif: str) -> str:
    stream = io.BytesIO()
    square.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    note = None if isinstance(image, Frame) else turned_note(image, exif)
    mark = f'<span class="turned">{html.escape(note)}</span>' if note else ""
    caption = html.escape(tr("{name}, {size}, made square as the model sees it", name=image.name, size=size))
    if isinstance(image, Frame):
        caption = html.escape(f"{image.name.rpartition('#')[2]}")
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}">{mark}<figcaption>{caption}</figcaption></figure>'
