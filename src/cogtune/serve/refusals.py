"""What a server answers instead of doing what was asked: a status, and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from cogtune.errors import CogtuneError, InputError, OutOfMemoryError


class Refusal(Exception):
    """A request that is not served.

    Attributes:
        status: the HTTP status.
        param: the field of the request that is to blame, if one is.
        reason: a word for programs, OpenAI's ``code``.
        retry_after: seconds after which the same request may be served.
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
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(param: str | None, message: str, reason: str = "invalid_value") -> Refusal:
    """A 400 that names the field."""
    return Refusal(400, message, param=param, reason=reason)


def refusal_of(error: BaseException) -> Refusal:
    """The answer to a request that ended in ``error``. What is not the request's fault says no more than that."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(400, str(error), reason=error.code)
    if isinstance(error, OutOfMemoryError):
        return Refusal(503, error.message, reason=error.code, retry_after=5)
    if isinstance(error, CogtuneError):
        return Refusal(503, error.message, reason=error.code, retry_after=1)
    return Refusal(500, "the server failed on this request; its log says why", reason="internal_error")
