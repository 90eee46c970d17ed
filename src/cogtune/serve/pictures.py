"""Pictures in requests: data URLs, and URLs of hosts that the operator has allowed.

Only hosts on the list are contacted. A host's name is resolved once, every address must be a global one, and the
connection uses that address. So neither a DNS change between check and connection nor a redirect can reach a machine in
the server's own network. A few redirects are followed, each checked like the first URL.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from PIL import Image, UnidentifiedImageError

from cogtune.errors import DataError
from cogtune.processing.image import to_rgb
from cogtune.processing.picture_formats import open_header, unknown_picture
from cogtune.serve.refusals import Refusal, bad_request

_REDIRECTS = 3
_MIB = 2**20


@dataclass(frozen=True)
class PictureLimits:
    """Limits on a request's pictures.

    Attributes:
        pixels: maximum of all pictures of a request together, read from their headers before anything is decoded.
        bytes: maximum size of one picture's file.
        hosts: names of hosts that pictures are fetched from; none: nothing is fetched.
        seconds: time limit for fetching one picture.
        exif: ``apply`` rotates pictures by their orientation tag, ``ignore`` does not, as in training.
        bit_depth: as in `read_image`.
    """

    pixels: int = 40_000_000
    bytes: int = 20 * _MIB
    hosts: tuple[str, ...] = ()
    seconds: float = 10.0
    exif: str = "ignore"
    bit_depth: str = "clip"


def open_pictures(addresses: Sequence[str], limits: PictureLimits) -> tuple[Image.Image, ...]:
    """Decode a request's pictures to RGB.

    Raises:
        Refusal: 400 for data that is no picture, a source that is not allowed, or a picture that is too large.
    """
    opened = [_opened(content_of(address, limits)) for address in addresses]
    pixels = sum(image.width * image.height for image in opened)
    if pixels > limits.pixels:
        raise bad_request("messages", f"the pictures have {pixels} pixels together; at most {limits.pixels}")
    try:
        return tuple(to_rgb(image, "the picture", exif=limits.exif, bit_depth=limits.bit_depth) for image in opened)
    except DataError as error:
        raise bad_request("messages", error.message, error.code) from error


def _opened(content: bytes) -> Image.Image:
    try:
        return open_header(io.BytesIO(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bad_request("messages", f"the picture is too large: {error}", "image-too-large") from error
    except UnidentifiedImageError as error:
        raise bad_request("messages", f"the picture is {unknown_picture(content)}", "image-unreadable") from error
    except Exception as error:  # Pillow's plugins answer broken headers with nearly any exception
        raise bad_request("messages", f"the picture cannot be read: {error}", "image-unreadable") from error


def content_of(address: str, limits: PictureLimits, what: str = "picture") -> bytes:
    """Return the file behind an address: of a data URL, or fetched from an allowed host.

    Args:
        what: ``picture`` or ``clip``, for messages.

    Raises:
        Refusal: 400, as `open_pictures`.
    """
    scheme = address[:16].partition(":")[0].lower()
    if scheme == "data":
        return _from_data_url(address, limits, what)
    if scheme in ("http", "https"):
        return _fetched(address, limits, what)
    raise bad_request("messages", f"a {what} is a data: URL{'' if limits.hosts else ', nothing else'}", "image-url")


def _from_data_url(address: str, limits: PictureLimits, what: str) -> bytes:
    head, comma, text = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        kind = "video" if what == "clip" else "image"
        raise bad_request("messages", f"a data URL of a {what} is data:{kind}/...;base64,...", "image-url")
    if len(text) > limits.bytes * 4 // 3 + 4:
        raise _too_large(limits, what)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request("messages", f"the {what}'s base64 is wrong: {error}", "image-url") from error


def _too_large(limits: PictureLimits, what: str) -> Refusal:
    return bad_request("messages", f"the {what}'s file is larger than {limits.bytes // _MIB} MiB", "image-too-large")


def _fetched(address: str, limits: PictureLimits, what: str) -> bytes:
    deadline = time.monotonic() + limits.seconds
    for _ in range(_REDIRECTS + 1):
        parts = urlsplit(address)
        try:
            host, port = (parts.hostname or "").rstrip(".").lower(), parts.port
        except ValueError as error:
            raise bad_request("messages", f"the {what}'s address is wrong: {error}", "image-url") from error
        if parts.scheme not in ("http", "https") or host not in limits.hosts or parts.username is not None:
            raise bad_request("messages", f"{what}s are not fetched from {host or address[:40]!r}", "image-host")
        connection = _connected(host, port, parts.scheme == "https", deadline)
        try:
            path, kind = parts.path or "/", "video/*" if what == "clip" else "image/*"
            connection.request("GET", path + (f"?{parts.query}" if parts.query else ""), headers={"Accept": kind})
            answer = connection.getresponse()
            target = answer.getheader("Location")
            if answer.status in (301, 302, 303, 307, 308) and target:
                address = urljoin(address, target)
                continue
            if answer.status != 200:
                raise bad_request("messages", f"{host} answers {answer.status} for the {what}", "image-fetch")
            return _read_some(answer, limits, deadline, what)
        except (OSError, http.client.HTTPException) as error:
            raise bad_request("messages", f"the {what} did not come from {host}: {error}", "image-fetch") from error
        finally:
            connection.close()
    raise bad_request("messages", f"more than {_REDIRECTS} redirects on the way to the {what}", "image-fetch")


def _connected(host: str, port: int | None, secure: bool, deadline: float) -> http.client.HTTPConnection:
    """Return a connection to the checked address, whatever the name resolves to later."""
    place = port or (443 if secure else 80)
    left = max(deadline - time.monotonic(), 0.01)
    try:
        found = socket.getaddrinfo(host, place, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(_is_global(address) for address in addresses):
            raise bad_request("messages", f"{host} is not a public host", "image-host")
        plain = socket.create_connection((addresses[0], place), timeout=left)
    except OSError as error:
        raise bad_request("messages", f"{host} cannot be reached: {error}", "image-fetch") from error
    connection = http.client.HTTPConnection(host, place, timeout=left)
    connection.sock = _wrapped(plain, host) if secure else plain
    return connection


def _wrapped(plain: socket.socket, host: str) -> Any:
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def _is_global(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_global and not found.is_multicast


def _read_some(answer: http.client.HTTPResponse, limits: PictureLimits, deadline: float, what: str) -> bytes:
    content = bytearray()
    while piece := answer.read(65536):
        content += piece
        if len(content) > limits.bytes:
            raise _too_large(limits, what)
        if time.monotonic() > deadline:
            raise bad_request("messages", f"the {what} took too long to arrive", "image-fetch")
    return bytes(content)
