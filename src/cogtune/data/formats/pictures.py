"""Pictures as records name them (paths, URLs, bytes), and content that looks like a picture under an unknown key."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlparse

from cogtune.data.formats.item import Embedded, PictureSource
from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import MARKS, shown
from cogtune.language import tr
from cogtune.system.names import is_unicode

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".heic", ".avif")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# start of these formats in base64; BMP's two bytes would match too much
_BASE64_MAGIC = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_PICTURE_KEY = re.compile(r"(image|img|picture|photo|pic)s?(_?(path|url|file|list)s?)?_?\d*", re.IGNORECASE)
_CONTENT_KEYS = (
    "system",
    "history",
    "image",
    "images",
    "audio",
    "audios",
    "tool_calls",
    "function_call",
    "reasoning_content",
)
_LONGEST_PATH = 4096


def picture_sources(images: Sequence[Any]) -> tuple[PictureSource, ...]:
    """Return the pictures that a record names; None entries are skipped.

    Raises:
        BadRecordError: see `picture_source`.
    """
    return tuple(source for image in images if (source := picture_source(image)) is not None)


def picture_source(image: Any) -> str | Embedded | None:
    """Return a record's picture as a path or bytes.

    Supported are paths, ``file:`` and ``data:`` URLs, ``{"bytes": ..., "path": ...}`` and ``{"url": ...}``.

    Raises:
        BadRecordError: ``image-path``, ``image-url``.
    """
    if image is None:
        return None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Embedded(bytes(image))
    if isinstance(image, Mapping):
        for key in ("bytes", "path", "url", "image"):
            if image.get(key) is not None:
                return picture_source(image[key])
        raise BadRecordError(
            "image-path",
            tr("the picture is an object with {keys_text}, bytes or a path expected", keys_text=keys_text(image)),
        )
    if not isinstance(image, str) or not image.strip() or "\0" in image or not is_unicode(image):
        raise BadRecordError("image-path", tr("the picture is {image}, a path was expected", image=shown(image)))
    if is_base64_picture(image):
        return Embedded(_base64(image, "image-unreadable", "a picture"))
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", image)
    scheme = match[1].lower() if match else ""
    if scheme == "data":
        return Embedded(_data_url(image))
    if scheme == "file":
        path = unquote(_url_path(image))
        if not path or "\0" in path:
            raise BadRecordError("image-path", tr("the picture is {image}, which names no file", image=shown(image)))
        return path
    if scheme in ("http", "https", "ftp", "s3", "gs", "oss"):
        raise BadRecordError(
            "image-url", tr("the picture is on the web ({image:.80}); a file was expected", image=image)
        )
    return image


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise BadRecordError("image-url", tr("a data: URL without a comma before its content"))
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    return _base64(body, "image-url", "a data: URL")


def _base64(text: str, kind: str, what: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecordError(kind, tr("{what} that is not valid base64 ({error})", what=what, error=error)) from error


def _url_path(url: str) -> str:
    try:
        return urlparse(url).path
    except ValueError as error:
        raise BadRecordError(
            "image-url", tr("the picture is {url}, which is no URL ({error})", url=shown(url), error=error)
        ) from error


def refuse_unread(
    record: Mapping[Any, Any], read: Sequence[str], pictures: Sequence[Any], form: str, where: str = ""
) -> None:
    """Refuse a record with content under a key that ``form`` does not read, so that nothing is lost silently.

    Content is a picture or a text of the conversation. If ``pictures`` were read, a file name under a key that is not
    named like a picture is further information about them, and is allowed.

    Args:
        read: the keys that the format reads.
        pictures: the record's pictures that were read.
        where: start of the message, for a key inside one of the record's messages.

    Raises:
        BadRecordError: ``unread-key``, naming the key.
    """
    for key, value in record.items():
        if key in read or value is None or not isinstance(key, str):
            continue
        if key in _CONTENT_KEYS and value:
            raise BadRecordError(
                "unread-key", tr('{where}"{key:.80}" is not read here (format {form})', where=where, key=key, form=form)
            )
        named = _PICTURE_KEY.fullmatch(key) is not None and not _same_file(value, pictures)
        if _is_picture(value, paths=named or not pictures):
            what = tr(
                '{where}"{key:.80}" looks like a picture and is not read (format {form}), {value}',
                where=where,
                key=key,
                form=form,
                value=shown(value),
            )
            raise BadRecordError("unread-key", what)


def refuse_unread_own(record: Mapping[str, Any], read: Sequence[str], pictures: Sequence[Any], form: str) -> None:
    """Apply `refuse_unread` to a record in cogtune's own format, and to its messages.

    Raises:
        BadRecordError: ``unread-key``.
    """
    refuse_unread(record, ("id", "conversations", "captions", *read), pictures, form)
    for number, entry in enumerate(record["conversations" if "conversations" in record else "captions"], start=1):
        where = tr("message {number}: ", number=number)
        refuse_unread(entry, ("role", "content", *MARKS), pictures, form, where)


def _is_picture(value: Any, *, paths: bool, levels: int = 4) -> bool:
    """Return whether a value, or one inside it up to ``levels`` deep, looks like a picture."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value[:8]).startswith(_MAGIC)
    if isinstance(value, str):
        text = value.strip()
        if text.lower().startswith("data:image/") or is_base64_picture(text):
            return True
        return paths and len(text) <= _LONGEST_PATH and "\n" not in text and text.lower().endswith(PICTURE_SUFFIXES)
    inside: Sequence[Any] = value[:8] if isinstance(value, list | tuple) else ()
    if isinstance(value, Mapping):
        inside = [value.get(key) for key in ("bytes", "path", "url", "image", "image_url")]
    return levels > 0 and any(_is_picture(one, paths=paths, levels=levels - 1) for one in inside)


def _same_file(value: Any, pictures: Sequence[Any]) -> bool:
    """Return whether ``value`` is the name of one of the pictures; often several keys name the same file."""
    names = {_base_name(picture) for picture in pictures if isinstance(picture, str)}
    return isinstance(value, str) and _base_name(value) in names


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1].strip()


def is_base64_picture(text: str) -> bool:
    """Return whether ``text`` is a picture file in base64, by its first letters; paths of such a length do not look
    like it.
    """
    return text.startswith(_BASE64_MAGIC) and _BASE64.fullmatch(text) is not None


def keys_text(mapping: Mapping[Any, Any]) -> str:
    """List an object's keys for a message."""
    return ", ".join(map(str, mapping)) or "nothing"
