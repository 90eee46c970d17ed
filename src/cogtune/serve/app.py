"""The HTTP application: OpenAI's chat completions, closed questions, health and metrics, on one engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_usage import CompletionUsage
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.history import prompt_limit
from cogtune.generate.requests import Request as Question
from cogtune.serve.answer import Answer, forward
from cogtune.serve.clips import check_kind, open_clips
from cogtune.serve.metrics import Metrics
from cogtune.serve.pictures import PictureLimits, open_pictures
from cogtune.serve.protocol import ChatCall, ScoreCall, read_chat, read_score
from cogtune.serve.refusals import Refusal, refusal_of
from cogtune.serve.request_body import LimitedBody, read_json

log = logging.getLogger("cogtune.serve")
MIB = 2**20
Awaited = TypeVar("Awaited")


@dataclass(frozen=True)
class ServerOptions:
    """Settings of a server.

    Attributes:
        model: the name of the model in ``/v1/models``; requests may name it, or leave ``model`` out.
        adapters: names of the engine's adapters, which requests may name as their model.
        template: of the prompts; None: the checkpoint's own.
        decoding: default for requests that set nothing.
        most_tokens: maximum tokens of one answer.
        most_waiting: maximum length of the queue; further requests are answered 429.
        seconds: time limit of a request from its arrival to its last token.
        body_bytes: maximum size of a request body.
        keys: API keys; none: no key is required.
    """

    model: str
    template: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    most_tokens: int = 2048
    most_waiting: int = 64
    seconds: float = 120.0
    body_bytes: int = 32 * MIB
    keys: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    pictures: PictureLimits = field(default_factory=PictureLimits)


def make_app(engine: InferenceEngine, options: ServerOptions) -> FastAPI:
    """Return the application of a running engine; it closes the engine at shutdown.

    Running answers are finished first; new requests are answered 503 meanwhile.
    """
    server = _Server(engine, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.closing = True
        await run_in_threadpool(engine.close)

    app = FastAPI(title="cogtune", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitedBody, most=options.body_bytes)
    app.add_exception_handler(Refusal, server.refuse)
    app.add_exception_handler(HTTPException, server.refuse)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"])
    for path, work in (("/v1/chat/completions", server.chat), ("/v1/score", server.score)):
        app.add_api_route(path, server.guarded(path, work), methods=["POST"])
    app.add_api_route("/v1/models", server.guarded("/v1/models", server.models), methods=["GET"])
    return app


class _Server:
    def __init__(self, engine: InferenceEngine, options: ServerOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine)
        self.closing = False
        self._scoring = 0
        self._began = int(time.time())
        self._digests = [hashlib.sha256(key.encode()).digest() for key in options.keys]

    async def refuse(self, _: Request, error: Exception) -> Response:
        """OpenAI's error object."""
        found = refusal_of(error)
        return JSONResponse(found.body(), found.status, found.headers())

    def guarded(self, route: str, work: Callable[[Request], Any]) -> Any:
        """Run ``work`` after the key check; turn errors into responses, and record count and time."""

        async def answered(request: Request) -> Response:
            began = time.perf_counter()
            try:
                self._check_key(request)
                if self.closing:
                    raise Refusal(503, "the server is shutting down", reason="shutting_down", retry_after=5)
                response: Response = await work(request)
            except Exception as error:
                found = refusal_of(error)
                if found.status == 500:
                    log.exception("%s failed", route)
                response = JSONResponse(found.body(), found.status, found.headers())
            self.metrics.requests.labels(route, response.status_code).inc()
            if not isinstance(response, StreamingResponse):
                self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
            return response

        return answered

    def _check_key(self, request: Request) -> None:
        if not self._digests:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        # compare with every key, in constant time
        good = sum(hmac.compare_digest(digest, known) for known in self._digests)
        if scheme.lower() != "bearer" or not good:
            raise Refusal(401, "give a valid API key: Authorization: Bearer KEY", reason="invalid_api_key")

    async def health(self) -> Response:
        """200 while requests are taken."""
        if self.closing or not self.engine.alive:
            return JSONResponse({"status": "closing"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self) -> Response:
        """Prometheus' text format."""
        return PlainTextResponse(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: Request) -> Response:
        """The models a request may name."""
        every = {"object": "model", "created": self._began, "owned_by": "cogtune"}
        base = {"id": self.options.model, **every}
        adapters = [{"id": name, **every, "parent": self.options.model} for name in self.options.adapters]
        return JSONResponse({"object": "list", "data": [base, *adapters]})

    def _adapter(self, name: str | None) -> str | None:
        """Return the adapter that a request names as its model, None for the model itself."""
        if name in self.options.adapters:
            return name
        if name not in (None, self.options.model):
            there = ", ".join(repr(known) for known in (self.options.model, *self.options.adapters))
            raise Refusal(
                404,
                f"there is no model {name!r}; /v1/models lists {there}",
                param="model",
                reason="model_not_found",
            )
        return None

    def _check_room(self, asked: int) -> None:
        """Refuse a request beyond the queue's limit: before its pictures are opened, and again when it would join.

        Many may be in between.
        """
        waiting = self.engine.waiting + self._scoring
        if waiting + asked > self.options.most_waiting:
            raise Refusal(429, f"{waiting} requests wait already", reason="queue_full", retry_after=1 + asked)

    async def score(self, request: Request) -> Response:
        """Closed questions about a picture, in one pass."""
        deadline = time.perf_counter() + self.options.seconds
        call = read_score(await read_json(request, self.options.seconds))
        adapter = self._adapter(call.model)
        self._check_room(1)
        images = await run_in_threadpool(self._images, call)
        self._check_room(1)
        self._scoring += 1
        try:
            asked = images, call.questions, self.options.template, adapter
            scores_of = await run_in_threadpool(self.engine.submit_score, *asked)
            found = await self._in_time(request, asyncio.wrap_future(scores_of), deadline)
        finally:
            self._scoring -= 1
        answers = [
            {"question": question.query, "choices": list(scores.choices), "best": scores.best,
             "probabilities": list(scores.probabilities), "log_probabilities": list(scores.log_probabilities)}
            for question, scores in zip(call.questions, found, strict=True)
        ]  # fmt: skip
        return JSONResponse(
            {"object": "score", "model": call.model or self.options.model, "calibrated": False, "data": answers}
        )

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or as a stream."""
        began = time.perf_counter()
        call = read_chat(
            await read_json(request, self.options.seconds), self.options.decoding, self.options.most_tokens
        )
        adapter = self._adapter(call.model)
        self._check_room(call.answers)
        images = await run_in_threadpool(self._images, call)
        questions = self._questions(call, images, adapter)
        self._check_room(call.answers)
        answers = [Answer(self.engine, question) for question in questions]
        self.metrics.prompt_tokens.inc(len(questions[0].encoded))
        deadline = began + self.options.seconds
        if call.stream:
            events = self._events(call, answers, deadline, began)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(request, answers, deadline, began)

    def _images(self, call: ChatCall | ScoreCall) -> tuple[Any, ...]:
        """Return a request's pictures, or the frames of its clip."""
        processor, limits = self.engine.processor, self.options.pictures
        check_kind(call.images, call.clips, reads_clips=processor.config.numbered_images)
        return open_clips(call.clips, limits, processor) if call.clips else open_pictures(call.images, limits)

    def _questions(self, call: ChatCall, images: tuple[Any, ...], adapter: str | None) -> list[Question]:
        processor = self.engine.processor
        encoded = processor.encode(call.question, call.history, images=len(images), template=self.options.template)
        head = processor.encoder.head_tokens(len(images), self.options.template)
        room = prompt_limit(processor.config, head=head, max_new_tokens=call.decoding.max_new_tokens)
        if len(encoded) - head > room:
            raise Refusal(
                400,
                f"the conversation has {len(encoded) - head} tokens of text; {room} fit together with an answer of up"
                f" to "
                f"{call.decoding.max_new_tokens}",
                param="messages",
                reason="context_length_exceeded",
            )
        first = secrets.randbits(62) if call.seed is None else call.seed
        return [
            Question(encoded, images, call.decoding, seed=(first + number) % 2**62, stop=call.stop, adapter=adapter)
            for number in range(call.answers)
        ]

    async def _whole(self, request: Request, answers: list[Answer], deadline: float, began: float) -> Response:
        try:
            texts = asyncio.gather(*(answer.text() for answer in answers))
            found = await self._in_time(request, texts, deadline)
        finally:
            for answer in answers:
                answer.pending.cancel()
        self._note(answers, began)
        completion = ChatCompletion.model_validate({
            **_about(self._name(answers)), "object": "chat.completion", "usage": _usage(answers),
            "choices": [
                {"index": number, "message": {"role": "assistant", "content": text},
                 "finish_reason": answer.pending.finish_reason}
                for number, (text, answer) in enumerate(zip(found, answers, strict=True))
            ],
        })  # fmt: skip
        return JSONResponse(completion.model_dump(exclude_unset=True))

    async def _in_time(self, request: Request, work: asyncio.Future[Awaited], deadline: float) -> Awaited:
        """Return what ``work`` does; it is cancelled if that takes too long or its client leaves.

        Raises:
            Refusal: 504.
        """
        gone = asyncio.ensure_future(_gone(request))
        try:
            waited: set[asyncio.Future[Any]] = {gone, work}
            await asyncio.wait(waited, timeout=_left(deadline), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                reason = "the client is gone" if gone.done() else f"no answer within {self.options.seconds:g} s"
                raise Refusal(504, reason, reason="timeout")
            return work.result()
        finally:
            for task in (gone, work):
                task.cancel()

    async def _events(
        self, call: ChatCall, answers: list[Answer], deadline: float, began: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events; whatever ends them, the slots are given back."""
        about = {**_about(self._name(answers)), "object": "chat.completion.chunk"}
        merged: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        tasks = [asyncio.ensure_future(forward(number, answer, merged)) for number, answer in enumerate(answers)]

        def event(number: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
            choice = {"index": number, "delta": delta, "finish_reason": reason}
            chunk = ChatCompletionChunk.model_validate({**about, "choices": [choice]})
            return _event(chunk.model_dump(exclude_unset=True))

        try:
            for number in range(len(answers)):
                yield event(number, {"role": "assistant", "content": ""})
            open_answers = len(answers)
            while open_answers:
                number, piece = await asyncio.wait_for(merged.get(), _left(deadline))
                if piece is not None:
                    yield event(number, {"content": piece})
                    continue
                await tasks[number]  # an error of this answer is raised here
                open_answers -= 1
                yield event(number, {}, answers[number].pending.finish_reason)
            if call.include_usage:
                chunk = ChatCompletionChunk.model_validate({**about, "choices": [], "usage": _usage(answers)})
                yield _event(chunk.model_dump(exclude_unset=True))
            yield b"data: [DONE]\n\n"
        except TimeoutError:
            late = Refusal(504, f"the answer took longer than {self.options.seconds:g} s", reason="timeout")
            yield _event(late.body())
        except Exception as error:  # the status is sent already: the error is the last event
            yield _event(refusal_of(error).body())
        finally:
            for task, answer in zip(tasks, answers, strict=True):
                answer.pending.cancel()
                task.cancel()
            self._note(answers, began)

    def _name(self, answers: list[Answer]) -> str:
        return answers[0].pending.request.adapter or self.options.model

    def _note(self, answers: list[Answer], began: float) -> None:
        self.metrics.tokens.inc(sum(len(answer.pending.token_ids) for answer in answers))
        self.metrics.seconds.labels("/v1/chat/completions").observe(time.perf_counter() - began)
        for answer in answers:
            if answer.first is not None:
                self.metrics.first.observe(answer.first - began)


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _left(deadline: float) -> float:
    return max(deadline - time.perf_counter(), 0.001)


def _about(model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _usage(answers: list[Answer]) -> dict[str, int]:
    prompt = len(answers[0].pending.request.encoded)
    completion = sum(len(answer.pending.token_ids) for answer in answers)
    usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
    return usage.model_dump(exclude_unset=True)


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
