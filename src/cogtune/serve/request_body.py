"""Read a request's body: within the size limit, within the time limit, and as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from cogtune.serve.refusals import Refusal
from cogtune.system.byte_sizes import format_size

_DRAINED = 4  # times the largest body is read of one that is too large


class LimitedBody:
    """ASGI middleware that refuses a body above the limit while it arrives, whatever its header says."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen <= self.most:
                return message
            while message.get("more_body") and seen < _DRAINED * self.most:  # one that still sends reads no answer
                message = await receive()
                seen += len(message.get("body", b""))
            raise Refusal(413, f"the request is larger than {format_size(self.most)}", reason="request_too_large")

        await self.app(scope, counted, send)


async def read_json(request: Request, seconds: float) -> Any:
    """Return a request's body, parsed.

    Raises:
        Refusal: it is not JSON, or has not arrived whole within ``seconds``.
    """
    try:
        content = await asyncio.wait_for(request.body(), seconds)
        text = content.decode(json.detect_encoding(content))
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is no character, and no answer could repeat it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except TimeoutError as error:
        raise Refusal(408, f"the request did not arrive within {seconds:g} s", reason="timeout") from error
    except ClientDisconnect as error:
        raise Refusal(400, "the client left before its request was whole", reason="client_gone") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", reason="invalid_json") from error
