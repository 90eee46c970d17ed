"""COCO captions: ``images`` with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and ``caption``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cogtune.data.formats.item import Content, Item, RecordRules
from cogtune.data.formats.jsonfiles import read_json
from cogtune.data.formats.pictures import picture_sources
from cogtune.data.problems import BadRecordError, Problem
from cogtune.data.record_json import by_identity, checked_identity, checked_text, kind_of, shown
from cogtune.data.records import Turn
from cogtune.language import tr


def items(file: Path, rules: RecordRules) -> Iterator[Item]:
    """Yield one record per annotation, in the file's order; its question is ``data.caption_question``.

    For prediction, a file without annotations (a test set) gives one record per picture.

    Raises:
        DataError: the file is not in this format.
    """
    root, repaired = read_json(file)
    images, annotations = (root.get(key) if isinstance(root, dict) else None for key in ("images", "annotations"))
    if rules.open_questions and isinstance(images, list) and not annotations:
        for number, image in enumerate(images, start=1):
            name = image.get("file_name") if isinstance(image, dict) else None
            identity = image.get("id") if isinstance(image, dict) else None
            yield Item(
                number,
                tr("{file}, image {number}", file=file, number=number),
                partial(_picture_alone, name, identity, rules),
            )
        return
    if not isinstance(images, list) or not isinstance(annotations, list):
        what = tr(
            '{kind_of} found, an object with the lists "images" and "annotations" was expected (coco)',
            kind_of=kind_of(root),
        )
        raise Problem("wrong-root", str(file), what).error()
    names, repeated = by_identity(images, "id")
    later = partial(_later, names=names, repeated=repeated, rules=rules)
    for number, annotation in enumerate(annotations, start=1):
        yield Item(
            number,
            tr("{file}, annotation {number}", file=file, number=number),
            later(annotation, repaired=repaired and number == 1),
        )


def _picture_alone(name: Any, identity: Any, rules: RecordRules) -> Content:
    """Return a picture with the question for captions and no answer."""
    if not isinstance(name, str) or not name:
        raise BadRecordError("image-path", tr("the image has no file_name"))
    if not rules.caption_question:
        raise BadRecordError("caption-question", tr("captions, and data.caption_question is empty"))
    turn = Turn(rules.caption_question, "")
    return Content([(turn,)], picture_sources((name,)), None if identity is None else f"image-{identity}")


def _later(
    annotation: Any,
    names: dict[str | float, dict[str, Any]],
    repeated: set[str | float],
    rules: RecordRules,
    repaired: bool,
) -> Callable[[], Content]:
    def read() -> Content:
        if not isinstance(annotation, dict):
            raise BadRecordError(
                "wrong-root", tr("{kind_of} found, an object was expected", kind_of=kind_of(annotation))
            )
        for key in ("image_id", "caption"):
            if key not in annotation:
                raise BadRecordError(
                    "missing-key", tr('the annotation has no "{key}" (coco captions were expected)', key=key)
                )
        name = names.get(checked_identity(annotation["image_id"], repeated, "image_id"), {}).get("file_name")
        if not isinstance(name, str) or not name:
            raise BadRecordError(
                "image-path",
                tr('no file_name in "images" for image_id {image_id}', image_id=shown(annotation["image_id"])),
            )
        if not rules.caption_question:
            raise BadRecordError("caption-question", tr("captions, and data.caption_question is empty"))
        caption = checked_text(annotation["caption"], tr("the caption"))
        own = annotation.get("id")
        identity = None if own is None else f"caption-{own}"
        return Content([(Turn(rules.caption_question, caption),)], picture_sources((name,)), identity, repaired)

    return read
