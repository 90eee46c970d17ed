"""Boxes that a data set names in pixels, fractions or thousandths, made the thousandths that the model writes.

What a file's numbers are is told by ``data.boxes`` and ``data.box_form``, or found from all of its boxes and pictures:
only what every other reading contradicts is taken, and the report says what was. A box is checked as it is written
(outside its picture, inverted, without an area), then brought into the picture as the model sees it: a record's own
width and height are those that its pixels count in, and a picture that EXIF turns takes its boxes along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from cogtune.data.boxes import GROUP, LARGEST, Box, box_text, group_of
from cogtune.data.picture_headers import ORIENTATION, in_threads
from cogtune.data.problems import BadRecordError, Problem, Problems
from cogtune.data.records import Conversation, Example, RawBoxes, Turn
from cogtune.language import phrase, tr
from cogtune.processing.frames import Frame
from cogtune.processing.picture_formats import open_header

Unit = Literal["pixels", "fractions", "thousandths"]
Form = Literal["corners", "size"]
UNITS: dict[Unit, str] = {
    "pixels": phrase("pixels"), "fractions": phrase("fractions of the picture"), "thousandths": phrase("thousandths"),
}  # fmt: skip
FORMS: dict[Form, str] = {"corners": phrase("x0, y0, x1, y1"), "size": phrase("x, y, width, height")}
_SINGLE = re.compile(r"(?<!\[)\[(\s*-?[\d.]+(?:\s*,\s*-?[\d.]+){3}\s*)\](?!\])")
"""Four numbers in single brackets, as LLaVA's and Shikra's texts have them."""
_MOST_BAD, _AS_GOOD = 0.5, 0.01
"""Share of a file's boxes that may contradict what its numbers are taken for: those are then bad records. And below
which share two readings count as equally good."""
_SLACK: dict[Unit, float] = {"pixels": 1.0, "fractions": 0.001, "thousandths": 1.0}
"""How far over the picture's edge a coordinate may be before its box counts as outside: rounding, not more."""


@dataclass(frozen=True)
class Settings:
    """``data.boxes``, ``data.box_form`` and ``data.exif``."""

    unit: Unit | Literal["auto"]
    form: Form | Literal["auto"]
    exif: str


@dataclass(frozen=True)
class _Picture:
    """A picture's size as it is stored, in pixels, and its EXIF orientation, 1 to 8."""

    width: int
    height: int
    orientation: int

    def frame(self, size: tuple[float, float] | None, exif: str) -> tuple[bool, float, float, bool]:
        """Return what boxes count in: whether the turned picture, its width and height, and whether that is known.

        ``size``: what the record says of its picture. Only a picture that is turned on its side shows by it which
        of the two is meant; where nothing does, it is the one that the model sees.
        """
        swaps = self.orientation >= 5
        turned, known = exif == "apply", self.orientation == 1
        if size is not None and swaps and self.width != self.height:
            ratio = size[0] / size[1]
            turned = abs(ratio - self.height / self.width) < abs(ratio - self.width / self.height)
            known = True
        if size is None:
            size = (self.height, self.width) if turned and swaps else (self.width, self.height)
        return turned, size[0], size[1], known


def convert_boxes(
    examples: Iterable[Example], settings: Settings, problems: Problems, where: Path
) -> tuple[list[Example], list[str], int]:
    """Return examples with all boxes in thousandths, lines for the report, and the number of boxes.

    Conversations with a box that is none are left out and reported. Texts are read in ``[[...]]`` as thousandths, which
    the notation means; with ``data.boxes`` set, also four numbers in single brackets, in that unit. Where it is not
    set, a text's boxes that are none are only counted: they may be no boxes.

    Raises:
        DataError: ``data-box-unit``: what the records' numbers are cannot be told.
    """
    examples = list(examples)
    pictures = _pictures(examples, settings)
    written = [
        (turn.boxes, pictures[example.images[0]])
        for example in examples
        if example.images and example.images[0] in pictures
        for talk in example.conversations
        for turn in talk.turns
        if turn.boxes is not None
    ]
    unit, form, lines = _meaning(written, settings, where)
    reader = _Reader(unit, form, settings)
    kept = []
    for example in examples:
        picture = pictures.get(example.images[0]) if example.images else None
        talks = tuple(reader.conversations(example, picture, problems))
        if talks:
            kept.append(example if talks == example.conversations else replace(example, conversations=talks))
    return kept, [*lines, *reader.lines()], reader.count


def _pictures(examples: Sequence[Example], settings: Settings) -> dict[object, _Picture]:
    """Return the pictures of examples with boxes; those that cannot be read are known to whoever reads them."""
    wanted: dict[Path, None] = {}
    mark = "[[" if settings.unit == "auto" else "["
    for example in examples:
        image = example.images[0] if len(example.images) == 1 else None
        if image is None or isinstance(image, Frame):
            continue
        texts = (text for talk in example.conversations for turn in talk.turns for text in (turn.question, turn.answer))
        records = any(turn.boxes is not None for talk in example.conversations for turn in talk.turns)
        if records or any(mark in text for text in texts):
            wanted[image] = None
    sizes = zip(wanted, in_threads(_picture, wanted), strict=True)
    return {image: size for image, size in sizes if size is not None}


def _picture(path: Path) -> _Picture | None:
    try:
        with open_header(path) as image:
            orientation = int(image.getexif().get(ORIENTATION, 1))
            return _Picture(*image.size, orientation if orientation in range(2, 9) else 1)
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins answer broken headers with nearly any exception
        return None


def _meaning(
    written: Sequence[tuple[RawBoxes, _Picture]], settings: Settings, where: Path
) -> tuple[Unit, Form, list[str]]:
    """Return unit and form of the records' boxes, and a line that says so."""
    rows: list[tuple[Box, float, float, bool]] = []
    for raw, picture in written:
        _, width, height, _ = picture.frame(raw.size, settings.exif)
        rows += [(box, width, height, raw.size is not None) for box in raw.boxes]
    unit: Unit = "thousandths" if settings.unit == "auto" else settings.unit
    if not rows:
        return unit, "corners", []
    units: list[Unit] = [settings.unit] if settings.unit != "auto" else list(UNITS)
    forms: list[Form] = [settings.form] if settings.form != "auto" else list(FORMS)
    fitting = list(product(units, forms))
    if len(fitting) > 1:
        bad = {one: _share_bad(rows, *one) for one in fitting}
        least = min(bad.values())
        fitting = [one for one in fitting if bad[one] <= max(least, _AS_GOOD)] if least <= _MOST_BAD else []
    if settings.unit == "auto":
        fitting = _likelier(fitting, rows)
    if len(fitting) != 1:
        found = tr(" or ").join(tr("{unit} ({form})", unit=tr(UNITS[u]), form=tr(FORMS[f])) for u, f in fitting)
        what = tr("the numbers of its boxes can be {found}; the first is {box}", found=found or tr("nothing known"),
                  box=list(rows[0][0]))  # fmt: skip
        raise Problem("box-unit", str(where), what).error()
    (unit, form), count = fitting[0], len(rows)
    said = tr("{where}: {count} boxes, read as {unit} ({form})", where=where, count=count, unit=tr(UNITS[unit]),
              form=tr(FORMS[form]))  # fmt: skip
    return unit, form, [said]


def _likelier(
    fitting: list[tuple[Unit, Form]], rows: Sequence[tuple[Box, float, float, bool]]
) -> list[tuple[Unit, Form]]:
    """Return those of the readings that nothing in the numbers speaks against."""
    numbers = [value for box, _, _, _ in rows for value in box]
    if max(numbers) <= 1 + _SLACK["fractions"]:  # whole boxes within one pixel are none
        return [one for one in fitting if one[0] == "fractions"]
    sized = any(size for _, _, _, size in rows)  # who names a picture's size counts in its pixels
    if sized or any(value != int(value) for value in numbers):
        fitting = [one for one in fitting if one[0] != "thousandths"]
    return [one for one in fitting if one[0] != "fractions"]


def _share_bad(rows: Sequence[tuple[Box, float, float, bool]], unit: Unit, form: Form) -> float:
    bad = 0
    for box, width, height, _ in rows:
        try:
            _checked(box, width, height, unit, form)
        except BadRecordError:
            bad += 1
    return bad / len(rows)


def _checked(box: Box, width: float, height: float, unit: Unit, form: Form) -> Box:
    """Return a box's corners in fractions of its picture, 0 to 1.

    Raises:
        BadRecordError: ``box-inverted``, ``box-empty`` or ``box-outside``.
    """
    x0, y0, x1, y1 = box if form == "corners" else (box[0], box[1], box[0] + box[2], box[1] + box[3])
    shown = [int(value) if value == int(value) else value for value in box]
    if x1 < x0 or y1 < y0:
        raise BadRecordError("box-inverted", tr("the box {box} ends before it begins", box=shown))
    if x1 == x0 or y1 == y0:
        raise BadRecordError("box-empty", tr("the box {box} has no area", box=shown))
    limits = {"pixels": (width, height), "fractions": (1.0, 1.0), "thousandths": (1000.0, 1000.0)}[unit]
    slack = _SLACK[unit]
    if min(x0, y0) < -slack or x1 > limits[0] + slack or y1 > limits[1] + slack:
        size = tr("{width} x {height} pixels", width=round(width), height=round(height))
        raise BadRecordError(
            "box-outside",
            tr("the box {box}, in {unit}, reaches out of its picture of {size}", box=shown, unit=tr(UNITS[unit]),
               size=size),
        )  # fmt: skip
    found = [min(max(value / limit, 0.0), 1.0) for value, limit in zip((x0, y0, x1, y1), limits * 2, strict=True)]
    return found[0], found[1], found[2], found[3]


def turned_box(box: Box, orientation: int) -> Box:
    """Return where a box (fractions of the stored picture) lies in the picture turned by its EXIF orientation."""
    turn: dict[int, Callable[[float, float], tuple[float, float]]] = {
        2: lambda x, y: (1 - x, y), 3: lambda x, y: (1 - x, 1 - y), 4: lambda x, y: (x, 1 - y), 5: lambda x, y: (y, x),
        6: lambda x, y: (1 - y, x), 7: lambda x, y: (1 - y, 1 - x), 8: lambda x, y: (y, 1 - x),
    }  # fmt: skip
    if orientation not in turn:
        return box
    (a, b), (c, d) = turn[orientation](box[0], box[1]), turn[orientation](box[2], box[3])
    return min(a, c), min(b, d), max(a, c), max(b, d)


def thousandths(box: Box) -> Box:
    """Return a box of fractions in whole thousandths, at most `LARGEST`; one narrower than that keeps one."""
    x0, y0, x1, y1 = (min(LARGEST, round(1000 * value)) for value in box)
    x0, y0 = min(x0, LARGEST - 1), min(y0, LARGEST - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


class _Reader:
    """Converts the boxes of conversations; counts them, and what its texts hold that is none."""

    def __init__(self, unit: Unit, form: Form, settings: Settings) -> None:
        self.count = 0
        self._unit, self._form, self._settings = unit, form, settings
        self._named = settings.unit != "auto"
        self._strange: dict[str, int] = {}
        self._first = ""
        self._unknown: set[object] = set()

    def conversations(self, example: Example, picture: _Picture | None, problems: Problems) -> Iterator[Conversation]:
        """Yield the conversations whose boxes are right, with them converted."""
        for talk in example.conversations:
            if picture is None:
                yield talk
                continue
            try:
                turns = tuple(self._turn(turn, picture, example.images[0], talk.source) for turn in talk.turns)
            except BadRecordError as bad:
                problems.add(bad.kind, talk.source, bad.what)
                continue
            yield talk if turns == talk.turns else replace(talk, turns=turns)

    def lines(self) -> list[str]:
        """Return what the report says of the texts."""
        lines = []
        if self._unknown:
            lines.append(
                tr("{count} pictures with boxes have an EXIF orientation, and no record says in which of the two their"
                   " boxes count: taken as in the picture that the model sees (data.exif {exif})",
                   count=len(self._unknown), exif=self._settings.exif)
            )  # fmt: skip
        if self._strange:
            kinds = tr(", ").join(f"{count} {kind}" for kind, count in self._strange.items())
            lines.append(
                tr("four numbers in [[...]] that are no box in thousandths: {kinds}; the first: {first}; data.boxes"
                   " names another unit, or makes them errors", kinds=kinds, first=self._first)
            )  # fmt: skip
        return lines

    def _turn(self, turn: Turn, picture: _Picture, image: object, source: str) -> Turn:
        if turn.boxes is not None:
            boxes = [
                self._box(box, picture, image, turn.boxes.size, self._unit, self._form) for box in turn.boxes.boxes
            ]
            self.count += len(boxes)
            return replace(turn, answer=box_text(boxes), boxes=None, references=())
        if "[" not in turn.question and "[" not in turn.answer:
            return turn
        texts = [self._text(text, picture, image, source) for text in (turn.question, turn.answer)]
        if texts == [turn.question, turn.answer]:
            return turn
        right = tuple(self._text(text, picture, image, source) for text in turn.references)
        return replace(turn, question=texts[0], answer=texts[1], references=right)

    def _box(
        self, box: Box, picture: _Picture, image: object, size: tuple[float, float] | None, unit: Unit, form: Form
    ) -> Box:
        turned, width, height, known = picture.frame(size, self._settings.exif)
        if not known:
            self._unknown.add(image)
        found = _checked(box, width, height, unit, form)
        if turned != (self._settings.exif == "apply"):
            back = {6: 8, 8: 6}.get(picture.orientation, picture.orientation)
            found = turned_box(found, back if turned else picture.orientation)
        return thousandths(found)

    def _text(self, text: str, picture: _Picture, image: object, source: str) -> str:
        """Return a text with its boxes in thousandths; where no unit is named they are that, and stay as written."""
        if not self._named:
            for match in GROUP.finditer(text):
                for box in group_of(match[1]):
                    try:
                        if max(box) > LARGEST + 1 or (0 < max(box) <= 1):
                            raise BadRecordError("box-outside", "")
                        _checked(box, picture.width, picture.height, "thousandths", "corners")
                        self.count += 1
                    except BadRecordError as bad:
                        self._strange[bad.kind] = self._strange.get(bad.kind, 0) + 1
                        self._first = self._first or f"{source}: {match[0]:.60}"
            return text

        def replaced(inside: str, whole: str) -> str:
            boxes = group_of(inside)
            if len(boxes) != inside.count(";") + 1:
                raise BadRecordError("box-form", tr("{text:.60} is no box: four numbers were expected", text=whole))
            self.count += len(boxes)
            return box_text([self._box(box, picture, image, None, self._unit, "corners") for box in boxes])

        text = GROUP.sub(lambda match: replaced(match[1], match[0]), text)
        return _SINGLE.sub(lambda match: replaced(match[1], match[0]), text)
