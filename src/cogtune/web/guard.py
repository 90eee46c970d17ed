"""ASGI middleware around the page: who may use it, how much may be sent, and that nothing comes from outside.

A browser is told to load nothing but this server's own files (Content-Security-Policy), so a page that would ask
another host, for fonts say, could not. With keys it asks for one as HTTP's Basic scheme does, any name and a key as the
password; programs may send it as a bearer token. Without keys only this machine's own names are answered to, so that a
page of another site cannot reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.responses import PlainTextResponse

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:;"
    " worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""The page's own scripts are inline; its chat has no Markdown, so a model's answer cannot bring any."""
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Guarded:
    """Checks keys, host names and the size of bodies, and adds headers to every answer.

    Args:
        keys: of which a visitor has to give one; none: everybody on this machine is welcome.
        most: bytes of a body.
    """

    def __init__(self, app: Any, keys: Sequence[str], most: int) -> None:
        self.app, self.most = app, most
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            return await refusal(scope, receive, send)
        seen, begun = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise _TooLarge
            return message

        async def guarded(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = [(name, value) for name, value in message["headers"] if name.lower() not in _HEADERS]
                message = {**message, "headers": [*own, *_HEADERS.items()]}
            await send(message)

        try:
            await self.app(scope, counted, guarded)
        except _TooLarge:
            if begun:
                raise
            await _too_large(self.most)(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> PlainTextResponse | None:
        if path == "/health":
            return None
        if not self._digests:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            return None if name in _LOCAL else PlainTextResponse("this page is for its own machine only", 421)
        digest = hashlib.sha256(_given_key(headers.get(b"authorization", b""))).digest()
        good = sum(hmac.compare_digest(digest, known) for known in self._digests)  # with every key, in constant time
        if good:
            length = headers.get(b"content-length", b"0")
            return _too_large(self.most) if length.isdigit() and int(length) > self.most else None
        asked = {"WWW-Authenticate": 'Basic realm="cogtune: any name, and an API key as the password"'}
        return PlainTextResponse("give an API key as the password", 401, asked)


class _TooLarge(Exception):
    """A body is larger than it may be."""


def _too_large(most: int) -> PlainTextResponse:
    return PlainTextResponse(f"larger than {most} bytes", 413, {"Connection": "close"})


def _given_key(header: bytes) -> bytes:
    scheme, _, value = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
