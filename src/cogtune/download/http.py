"""Requests to a hub, through the standard library: proxies from the environment, redirects followed, one time-out."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_LONGEST_JSON = 1 << 26

BROKEN = (OSError, http.client.HTTPException)
"""What a request or a read may raise when the line or the hub fails (URLError and time-outs are OSErrors)."""


@dataclass(frozen=True)
class Client:
    """``token`` goes to the hub itself and to no place it redirects to; nothing else about this machine is sent."""

    token: str | None = None
    timeout: float = 30.0
    headers: dict[str, str] = field(default_factory=lambda: {"User-Agent": "cogtune"})

    def open(self, url: str, start: int = 0) -> http.client.HTTPResponse:
        """The answer, from byte ``start`` on. Raises HTTPError for a refusal, and what `BROKEN` names."""
        request = Request(url, headers=self.headers | ({"Range": f"bytes={start}-"} if start else {}))
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        answer: http.client.HTTPResponse = urlopen(request, timeout=self.timeout)
        return answer

    def json(self, url: str) -> Any:
        """The JSON at ``url``; None when the hub says there is no such thing, or none for us."""
        try:
            with self.open(url) as answer:
                return json.loads(answer.read(_LONGEST_JSON))  # what is cut off is no JSON
        except HTTPError as error:
            if error.code in (401, 403, 404):
                return None
            raise
