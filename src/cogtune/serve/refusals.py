"""Error responses: a status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from cogtune.errors import CogtuneError, InputError, OutOfMemoryError


class Refusal(Exception):
    """An error response to a request.

    Attributes:
        status: the HTTP status.
        param: the field of the request that caused it, if one did.
        reason: a machine-readable code, OpenAI's ``code``.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, reason: str, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.reason, self.retry_after = (
            status,
            message,
            param,
            reason,
            retry_after,
        )

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}

    def headers(self) -> dict[str, str]:
        """Return the headers of this response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body may still be on its way
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(param: str | None, message: str, reason: str = "invalid_value") -> Refusal:
    """Return a 400 that names the field."""
    return Refusal(400, message, param=param, reason=reason)


def refusal_of(error: BaseException) -> Refusal:
    """Return the response to a request that failed with ``error``. Internal errors reveal no details."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):  # no such path, or another method
        return Refusal(error.status_code, error.detail, reason=error.detail.lower().replace(" ", "_"))
    if isinstance(error, InputError):
        return Refusal(400, str(error), reason=error.code)
    if isinstance(error, OutOfMemoryError):
        return Refusal(503, error.message, reason=error.code, retry_after=5)
    if isinstance(error, CogtuneError):
        return Refusal(503, error.message, reason=error.code, retry_after=1)
    return Refusal(500, "the server failed on this request; its log says why", reason="internal_error")
