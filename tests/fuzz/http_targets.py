"""Requests to the server, straight to its ASGI application: bodies, headers, paths, and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from tests.fuzz.harness import Fault, Input, Place, Session
from tests.fuzz.mutations import CHARACTERS, TEXTS, json_text, mutate_bytes, mutate_text, mutate_tree

KEY = "fuzz"
CHAT, SCORE = "/v1/chat/completions", "/v1/score"
STATUSES = (200, 400, 401, 404, 405, 413, 429, 503, 504)
HEADERS = (b"authorization", b"content-type", b"content-length", b"accept", b"transfer-encoding", b"host", b"range")
WORDS = (
    "model", "tiny", "messages", "role", "user", "assistant", "system", "developer", "tool", "content", "type", "text",
    "image_url", "url", "detail", "image", "questions", "question", "choices", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options", "include_usage", "logprobs",
    "tools", "response_format", "min_p", "repetition_penalty", 1, 2, 3, 16, 0.5, True, False, None,
    "data:image/png;base64,", "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "http://169.254.169.254/latest/meta-data",
)  # fmt: skip


def _picture(kind: str, size: int) -> str:
    content = io.BytesIO()
    Image.new("RGB", (size, size), 7).save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def good_requests() -> list[tuple[str, Any]]:
    """(path, body) of requests that are answered."""
    picture = {"type": "image_url", "image_url": {"url": _picture("png", 4)}}
    asked = {"role": "user", "content": [{"type": "text", "text": "What?"}, picture]}
    plain = {"role": "user", "content": "Hi"}
    turns = [{"role": "system", "content": "Be kind."}, asked, {"role": "assistant", "content": "A"}, plain]
    chats: list[dict[str, Any]] = [
        {"messages": [plain], "max_tokens": 2},
        {"model": "tiny", "messages": [asked], "max_tokens": 1, "temperature": 0, "user": "me"},
        {"messages": turns, "max_completion_tokens": 1, "stop": ["."], "tools": [], "logprobs": False},
        {"messages": [plain], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": [plain], "max_tokens": 2, "temperature": 1.2, "top_p": 0.5, "top_k": 3, "seed": 4, "n": 2},
    ]
    scored = [{"question": "Red?", "choices": ["yes", "no"]}, {"question": "Big?", "choices": ["a", "b"]}]
    return [*((CHAT, body) for body in chats), (SCORE, {"image": _picture("gif", 3), "questions": scored}),
            (SCORE, {"questions": scored[:1]})]  # fmt: skip


@dataclass
class HttpTarget:
    """A request; whatever it is, it gets one clear answer, and its slot comes back."""

    name: str = "http"
    weight: int = 16

    def prepare(self, place: Place) -> None:
        from cogtune.checkpoint.load import load_model
        from cogtune.checkpoint.random import make_tiny
        from cogtune.generate.decoding import Decoding
        from cogtune.generate.engine import InferenceEngine
        from cogtune.processing.processor import CogVLM2Processor
        from cogtune.serve.app import ServerOptions, make_app
        from cogtune.serve.pictures import PictureLimits

        folder = make_tiny(place.fixed / "tiny", seed=0)
        processor = CogVLM2Processor.from_pretrained(folder)
        model = load_model(folder)
        model.config.max_position_embeddings = 1000  # one long text takes seconds otherwise
        self.engine = InferenceEngine(model, processor, slots=4, columns=400)
        limits = PictureLimits(pixels=20_000, bytes=50_000)
        options = ServerOptions(
            "tiny", decoding=Decoding(2), most_tokens=3, seconds=20, body_bytes=60_000, keys=(KEY,), pictures=limits
        )
        self.app = make_app(self.engine, options)
        self.loop = asyncio.new_event_loop()
        self.good = good_requests()
        for path, body in self.good:  # threads and libraries that the first requests start
            wire = _Wire(path, b"POST", _headers(), [json.dumps(body).encode()], None)
            self.loop.run_until_complete(asyncio.wait_for(self.app(wire.scope, wire.receive, wire.send), 60))
            if wire.status != 200:
                raise Fault(f"a good request is answered {wire.status}: {wire.body!r:.200}")

    def write(self, given: Input, place: Place) -> None:
        rng = given.rng
        path, body = json.loads(json.dumps(rng.choice(self.good)))
        content: bytes | None = None
        headers = _headers()
        method = b"POST"
        for mutation in given.mutations():
            choice = mutation.random()
            if choice < 0.7 and content is None:
                body = mutate_tree(mutation, body, WORDS)
            elif choice < 0.82:
                content = mutate_bytes(mutation, json_text(mutation, body) if content is None else content)
            elif choice < 0.93:
                headers = _other_headers(mutation, headers)
            elif choice < 0.97:
                path = mutate_text(mutation, mutation.choice((CHAT, SCORE, "/v1/models", "/health", "/metrics", path)))
            else:
                method = mutation.choice((b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"PATCH", b"X"))
        content = json_text(rng, body) if content is None else content
        self.wire = _Wire(
            path, method, headers, _pieces(rng, content), rng.randrange(4) if rng.random() < 0.1 else None
        )
        (place.input / "request.http").write_bytes(method + b" " + repr((path, headers)).encode() + b"\n\n" + content)

    def run(self, given: Input, place: Place, session: Session) -> None:
        wire = self.wire
        try:
            self.loop.run_until_complete(self.app(wire.scope, wire.receive, wire.send))
        except Exception as error:
            raise Fault(f"{type(error).__name__} came through: {error!s:.200}") from error
        session.ended[f"{wire.status} {wire.check(str(place.root))}"] = 1
        deadline = time.monotonic() + 5
        while self.engine.running or self.engine.waiting:
            if time.monotonic() > deadline:
                raise Fault("its slot did not come back")
            time.sleep(0.001)


def _headers() -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + KEY.encode()), (b"content-type", b"application/json")]


def _other_headers(rng: Random, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    headers = list(headers)
    place = rng.randrange(len(headers) + 1)
    match rng.randrange(4):
        case 0 if headers:
            del headers[place % len(headers)]
        case 1 if headers:
            name, value = headers[place % len(headers)]
            headers[place % len(headers)] = (name, mutate_bytes(rng, value))
        case 2:
            value = rng.choice((rng.choice(TEXTS), rng.choice(CHARACTERS) * 9, "Bearer " + "x" * 9000, "0", "-1"))
            headers.insert(place, (rng.choice(HEADERS), value.encode("utf-8", "replace")))
        case _:
            headers.insert(place, (b"x-" + bytes([97 + rng.randrange(26)]), b"v" * rng.choice((0, 1, 70000))))
    return headers


def _pieces(rng: Random, content: bytes) -> list[bytes]:
    """A body as it arrives: whole, in two pieces, or byte by byte at its start."""
    place = rng.randrange(len(content) + 1)
    if rng.random() < 0.8:
        return [content]
    return [content[:place], content[place:]] if rng.random() < 0.7 else [b"", *(bytes([b]) for b in content[:5]),
                                                                             content[5:]]  # fmt: skip


class _Wire:
    """One connection. ``leaves``: after so many messages of the body or of the answer the client is gone."""

    def __init__(
        self, path: str, method: bytes, headers: list[tuple[bytes, bytes]], pieces: list[bytes], leaves: int | None
    ) -> None:
        where, _, query = path.partition("?")
        self.scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method.decode(), "path": where, "raw_path": where.encode("utf-8", "surrogatepass"),
            "query_string": query.encode("utf-8", "surrogatepass"), "headers": headers, "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        self._pieces, self._leaves, self._messages = list(pieces), leaves, 0
        self._gone = asyncio.Event()
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.ended = False

    async def receive(self) -> dict[str, Any]:
        if self._leaves is not None and self._messages >= self._leaves:
            self._gone.set()
        if self._gone.is_set() or not self._pieces:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        self._messages += 1
        piece = self._pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}

    async def send(self, message: dict[str, Any]) -> None:
        self._messages += 1
        if self._leaves is not None and self._messages >= self._leaves:
            self._gone.set()
        if message["type"] == "http.response.start":
            if self.status is not None:
                raise Fault("two answers to one request")
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message.get("body", b"")
            self.ended = self.ended or not message.get("more_body", False)
            if self.ended:
                self._gone.set()

    def check(self, private: str) -> str:
        """Return a word for how it was answered; raise `Fault` for what must not be said."""
        if self._leaves is not None and not (self.ended and self.status is not None):
            return "left"
        if self.status not in STATUSES:
            raise Fault(f"status {self.status}: {self.body!r:.300}")
        if not self.ended:
            raise Fault("the answer has no end")
        if b"Traceback" in self.body or private.encode() in self.body:
            raise Fault(f"the server's own business is told: {self.body!r:.300}")
        if self.status in (429, 503) and b"retry-after" not in self.headers:
            raise Fault(f"{self.status} without Retry-After")
        if self.scope["method"] == "HEAD":
            return "head"
        if self.status >= 400:
            return self._code(self.body)
        if self.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            last = self.body.rstrip().split(b"\n\n")[-1].removeprefix(b"data: ")
            return "stream" if last == b"[DONE]" else self._code(last)
        return "ok"

    def _code(self, content: bytes) -> str:
        try:
            error = json.loads(content)["error"]
            code, message = error["code"], error["message"]
        except (ValueError, KeyError, TypeError) as fault:
            raise Fault(f"{self.status} without an error object: {content!r:.200}") from fault
        if not message or not re.fullmatch(r"[a-z][a-z_-]+", code):
            raise Fault(f"an error without a code and a message: {content!r:.200}")
        return str(code)


TARGETS = (HttpTarget(),)
