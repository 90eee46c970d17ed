"""Records and tables of clips in other formats: a clip stands where a record's pictures would."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogtune.data.formats.pictures import PICTURE_SUFFIXES
from cogtune.data.problems import BadRecordError, Problem
from cogtune.language import tr
from cogtune.processing.clip import is_clip

_PARTS = {"video": "image", "video_url": "image_url", "input_video": "input_image"}
_NAMES = {"video": "image", "videos": "images"}
_ANSWERS = {"answer", "response", "output", "completion", "messages", "conversations"}


def refuse_other_kind(name: str | Path, *, clips: bool) -> None:
    """Raise BadRecordError for a file whose name says that it is a clip, for a model of pictures, or the other way
    round.
    """
    if not clips and is_clip(name):
        raise BadRecordError("media-clips", tr("{name} is a clip, and this model reads pictures", name=name))
    if clips and str(name).lower().endswith(PICTURE_SUFFIXES):
        raise BadRecordError("media-pictures", tr("{name} is a picture, and this model reads clips", name=name))


def as_pictures(record: Any) -> Any:
    """Return a record of messages whose clips stand where its pictures would: ``videos``, ``<video>``, video parts.

    Raises:
        BadRecordError: ``media-pictures``, for a record that names pictures.
    """
    if not isinstance(record, dict):
        return record
    for key in ("image", "images"):
        if record.get(key):
            raise BadRecordError("media-pictures", tr('"{key}" is given, and this model reads clips', key=key))
    names = _names(record)
    return {names.get(key, key): _renamed(value) for key, value in record.items()}


def _names(keys: Collection[str]) -> dict[str, str]:
    """Return the keys that are read under another name. A ``prompt`` without an answer is a clip's caption."""
    captioned = "prompt" in keys and not (_ANSWERS | {"caption"}) & set(keys)
    return _NAMES | ({"prompt": "caption"} if captioned else {})


def _renamed(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("<video>", "<image>") if "<video>" in value else value
    if isinstance(value, list | tuple):
        return [_renamed(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type")
    if kind in ("image", "image_url", "input_image"):
        raise BadRecordError("media-pictures", tr("a part is a picture, and this model reads clips"))
    if kind in _PARTS:
        inner = next((value[key] for key in ("video_url", "video", "url", "path") if value.get(key)), None)
        return {"type": _PARTS[kind], "image": inner}
    return {key: _renamed(one) for key, one in value.items()}


def columns(header: Sequence[str], where: str, *, clips: bool) -> list[str]:
    """Return a table's columns by the names that the readers know; for clips ``video`` is ``image``.

    Raises:
        DataError: ``data-media-clips`` or ``data-media-pictures``, for a table of the other kind.
    """
    pictures, videos = {"image", "images"} & set(header), {"video", "videos"} & set(header)
    if {"messages", "conversations"} & set(header):
        return list(header)
    if not clips:
        if videos and not pictures:
            raise Problem("media-clips", where, tr("a column of clips, and this model reads pictures")).error()
        return list(header)
    if pictures and not videos:
        raise Problem("media-pictures", where, tr("a column of pictures, and this model reads clips")).error()
    names = _names(header)
    return [names.get(name, name) for name in header]


def refuse_clips(record: Any) -> None:
    """Raise BadRecordError for a record of messages or texts that names a clip, for a model of pictures."""
    key = next((key for key in _NAMES if isinstance(record, dict) and record.get(key)), None)
    if key is None and isinstance(record, dict) and is_clip(str(record.get("file_name"))):
        key = "file_name"
    if key is not None:
        raise BadRecordError("media-clips", tr('"{key}" is given; the model takes pictures only', key=key))
