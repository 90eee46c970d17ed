"""HTTP requests to a hub with the standard library: proxies from the environment, redirects, one time-out."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_LONGEST_JSON = 1 << 26

BROKEN = (OSError, http.client.HTTPException)
"""Exceptions of a request or a read when connection or hub fails (URLError and time-outs are OSErrors)."""


@dataclass(frozen=True)
class Client:
    """An HTTP client.

    ``token`` is sent to the hub itself, never to a redirect's target; nothing else about this machine is.
    """

    token: str | None = None
    timeout: float = 30.0
    headers: dict[str, str] = field(default_factory=lambda: {"User-Agent": "cogtune"})

    def open(self, url: str, start: int = 0) -> http.client.HTTPResponse:
        """Open ``url`` from byte ``start`` on. Raises HTTPError for a refusal, and the exceptions in `BROKEN`."""
        request = Request(url, headers=self.headers | ({"Range": f"bytes={start}-"} if start else {}))
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        answer: http.client.HTTPResponse = urlopen(request, timeout=self.timeout)
        return answer

    def json(self, url: str) -> Any:
        """Return the JSON at ``url``; None if it does not exist or access is denied."""
        try:
            with self.open(url) as answer:
                return json.loads(answer.read(_LONGEST_JSON))  # what is cut off is no JSON
        except HTTPError as error:
            if error.code in (401, 403, 404):
                return None
            raise
