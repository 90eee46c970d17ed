"""A live server on loopback, asked by OpenAI's own client."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from PIL import Image

from cogtune.adapters.stacking import stack_adapters
from cogtune.checkpoint.load import load_model
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.decode_steps import DecodeSteps
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.generator import Generator
from cogtune.generate.requests import Request
from cogtune.processing.processor import CogVLM2Processor
from cogtune.serve.app import ServerOptions, make_app
from tests.support.adapters import write_adapter
from tests.unit.serve.test_pictures import data_url

KEY = "secret"
Start = Callable[..., "Running"]


class Running:
    """A server in a thread, its engine, and clients."""

    def __init__(self, engine: InferenceEngine, options: ServerOptions) -> None:
        self.engine = engine
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        config = uvicorn.Config(make_app(engine, options), port=self.port, log_level="error", lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)

    def free(self) -> bool:
        """Whether all slots come back within five seconds."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if (self.engine.running, self.engine.waiting) == (0, 0):
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> tuple[Any, CogVLM2Processor]:
    return load_model(tiny_checkpoint), CogVLM2Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def start(parts: tuple[Any, CogVLM2Processor]) -> Iterator[Start]:
    running: list[Running] = []

    def begin(slots: int = 2, columns: int = 600, **options: Any) -> Running:
        settings = {"model": "tiny", "keys": (KEY,), "decoding": Decoding(max_new_tokens=20), "most_tokens": 400}
        running.append(
            Running(InferenceEngine(*parts, slots=slots, columns=columns), ServerOptions(**(settings | options)))
        )
        return running[-1]

    yield begin
    for one in running:
        one.stop()


@pytest.fixture(scope="module")
def running(start: Start) -> Running:
    return start()


def _messages(text: str = "What is this?", picture: bool = True) -> list[Any]:
    parts: list[Any] = [{"type": "text", "text": text}]
    if picture:
        parts.append({"type": "image_url", "image_url": {"url": data_url()}})
    return [{"role": "user", "content": parts}]


def _chat(running: Running, **fields: Any) -> Any:
    return running.client.chat.completions.create(**({"model": "tiny", "messages": _messages()} | fields))


def test_an_answer_is_generates_with_its_usage(running: Running, parts: tuple[Any, CogVLM2Processor]) -> None:
    found = _chat(running)
    picture = Image.new("RGB", (8, 6), 1)
    wanted = Generator(*parts).answer_batch([(picture, "What is this?", [])], Decoding(max_new_tokens=20))[0]
    choice = found.choices[0]
    assert choice.message.content == wanted
    prompt = len(running.engine.processor.encode("What is this?", images=1))
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (prompt, prompt + found.usage.completion_tokens)
    assert choice.finish_reason in ("stop", "length")
    assert running.free()


def test_a_stream_is_the_whole_answer(running: Running) -> None:
    whole = _chat(running)
    chunks = list(_chat(running, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_answers_have_seeds_of_their_own(running: Running) -> None:
    drawn = {"temperature": 1.5, "seed": 5, "n": 3, "max_tokens": 12}
    first, again = _chat(running, **drawn), _chat(running, **drawn)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    chunks = list(_chat(running, stream=True, **drawn))
    pieces = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(3)]
    assert pieces == texts


def test_turns_stops_and_limits(running: Running) -> None:
    turns = [*_messages(), {"role": "assistant", "content": "A bus."}, {"role": "user", "content": "Why?"}]
    assert _chat(running, messages=turns, max_tokens=1).choices[0].finish_reason in ("length", "stop")
    whole = _chat(running, messages=_messages("Hello there", picture=False)).choices[0].message.content
    found = _chat(running, messages=_messages("Hello there", picture=False), stop=[whole[3:6]]).choices[0]
    assert (found.message.content, found.finish_reason) == (whole[: whole.find(whole[3:6])].rstrip(), "stop")


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "there is no model 'other'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"messages": [_messages()[0], _messages()[0]]}, openai.BadRequestError, "2 pictures given"),
        ({"messages": _messages("word " * 2000, picture=False)}, openai.BadRequestError, "tokens"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
    ],
)
def test_what_cannot_be_answered_is_said(running: Running, fields: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        _chat(running, **fields)
    assert _chat(running, max_tokens=2).choices
    assert running.free()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        *((content, "invalid_json") for content in (b"{half", b"", b"\xff\xfe", b"[" * 100_000)),
        *((content, "invalid_json") for content in (b'{"\\ud800": 1}', b'{"\xed\xa0\x80": 1}')),
        *((content, "invalid_value") for content in (b"[]", b"{}")),
    ],
)
def test_a_body_that_is_no_request(running: Running, content: bytes, code: str) -> None:
    answer = httpx.post(
        f"{running.url}/v1/chat/completions", content=content, headers={"Authorization": f"Bearer {KEY}"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/chat/completions", 405), ("POST", "/v2", 404)])
def test_no_such_route_is_an_error_object_too(running: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, running.url + path, headers={"Authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_half_a_request_is_no_failure_of_the_server(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A client that leaves in the middle of its body."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 900\r\n\r\n"
    )
    counted = 'cogtune_requests_total{route="/v1/chat/completions",status="%d"}'
    before = httpx.get(f"{running.url}/metrics").text.count(counted % 500)
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(head.encode() + b'{"messages": [')
        time.sleep(0.1)
    deadline = time.monotonic() + 5
    while counted % 400 not in (text := httpx.get(f"{running.url}/metrics").text) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert text.count(counted % 500) == before
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert _chat(running, max_tokens=2).choices


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x"])
def test_a_key_is_needed(running: Running, key: str) -> None:
    answer = httpx.get(f"{running.url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert httpx.get(f"{running.url}/health").status_code == 200  # a load balancer has none
    assert [model.id for model in running.client.models.list()] == ["tiny"]


def test_closed_questions(running: Running) -> None:
    body = {"image": data_url(), "questions": [{"question": "Is it red?", "choices": ["yes", "no"]}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{running.url}/v1/score", json=body, headers=headers, timeout=60)
    (found,) = answer.json()["data"]
    picture = Image.new("RGB", (8, 6), 1)
    (wanted,) = running.engine.score([picture], [ClosedQuestion("Is it red?", ("yes", "no"))])
    assert found["probabilities"] == pytest.approx(wanted.probabilities)
    assert (found["best"], answer.json()["calibrated"]) == (wanted.best, False)


def test_closed_questions_that_are_late_or_left_are_not_computed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    late = start(seconds=0.5)
    scored = []
    monkeypatch.setattr("cogtune.generate.engine.score_choices", lambda *_: scored.append(1))
    body = {"questions": [{"question": "Is it red?", "choices": ["yes", "no"]}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    free = threading.Event()
    busy = threading.Thread(target=late.engine.run, args=(free.wait,))
    busy.start()
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{late.url}/v1/score", json=body, headers=headers, timeout=0.2)
        answer = httpx.post(f"{late.url}/v1/score", json=body, headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    finally:
        free.set()
        busy.join()
    late.engine.run(lambda: None)
    assert not scored


def test_a_large_body_is_refused(start: Start) -> None:
    small = start(body_bytes=2000)
    with pytest.raises(openai.APIStatusError) as caught:
        _chat(small, messages=_messages("x" * 5000, picture=False))
    assert caught.value.status_code == 413
    with httpx.Client(base_url=small.url, headers={"Authorization": f"Bearer {KEY}"}) as one:
        for size in (3000, 200_000):  # one that is read to its end, and one that is not
            answer = one.post("/v1/chat/completions", content=b" " * size)
            assert (answer.status_code, answer.headers["connection"]) == (413, "close")
            assert one.get("/health").status_code == 200


def _slow_down(running: Running, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Steps take so long, and answers are as long as they may be."""
    step = DecodeSteps.step
    monkeypatch.setattr(running.engine, "ends", frozenset())
    monkeypatch.setattr(DecodeSteps, "step", lambda *arguments: (time.sleep(seconds), step(*arguments))[1])


def _busy(running: Running, count: int) -> list[Any]:
    """Answers that keep the engine busy for a while."""
    engine = running.engine
    encoded = engine.processor.encode("Hello", images=0)
    endless = Decoding(max_new_tokens=500, sample=True, temperature=5.0)
    return [engine.submit(Request(encoded, (), endless, seed=seed)) for seed in range(count)]


def test_a_full_queue_and_a_late_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded = start(slots=1, most_waiting=1, seconds=0.5)
    _slow_down(crowded, monkeypatch, 0.005)
    running = _busy(crowded, 2)
    with pytest.raises(openai.RateLimitError) as caught:
        _chat(crowded)
    assert caught.value.response.headers["retry-after"]
    running[1].cancel()
    while crowded.engine.waiting:
        time.sleep(0.01)
        if running[0].done:
            break
        running[0].cancel()
    running += _busy(crowded, 1)
    with pytest.raises(openai.APIStatusError) as late:
        _chat(crowded)
    assert late.value.status_code == 504
    for pending in running:
        pending.cancel()
    assert crowded.free()


def test_a_client_that_leaves_frees_its_slot(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = start(slots=1)
    _slow_down(slow, monkeypatch, 0.02)
    for stream in (True, False):
        body = json.dumps({"messages": _messages(picture=False), "stream": stream, "max_tokens": 400}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        with socket.create_connection(("127.0.0.1", slow.port)) as raw:
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not slow.engine.running:
                time.sleep(0.01)
        assert slow.free()


def test_adapters_are_models(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, parts: tuple[Any, CogVLM2Processor]
) -> None:
    """Each by its name, also after its folder is gone; the base under its own."""
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    folders = {
        name: write_adapter(tiny_checkpoint, root / name, targets=targets, seed=seed, size=0.2)
        for seed, (name, targets) in enumerate({"cats": ("vision-experts",), "dogs": ("experts",)}.items())
    }
    model = load_model(tiny_checkpoint)
    engine = InferenceEngine(model, parts[1], slots=3, columns=400, adapters=stack_adapters(model, folders))
    options = ServerOptions(model="tiny", keys=(KEY,), decoding=Decoding(max_new_tokens=12), adapters=("cats", "dogs"))
    served = Running(engine, options)
    try:
        shutil.rmtree(root)
        listed = served.client.models.list().data
        assert [(model.id, getattr(model, "parent", None)) for model in listed] == [
            ("tiny", None), ("cats", "tiny"), ("dogs", "tiny"),
        ]  # fmt: skip
        answers = {name: _chat(served, model=name) for name in ("tiny", "cats", "dogs")}
        assert [answer.model for answer in answers.values()] == list(answers)
        assert len({answer.choices[0].message.content for answer in answers.values()}) == 3
        pieces = [c.choices[0].delta.content or "" for c in _chat(served, model="dogs", stream=True)]
        assert "".join(pieces) == answers["dogs"].choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="'birds'; /v1/models lists 'tiny', 'cats', 'dogs'"):
            _chat(served, model="birds")
    finally:
        served.stop()


def test_metrics_count_what_was_done(running: Running) -> None:
    _chat(running, max_tokens=3)
    text = httpx.get(f"{running.url}/metrics").text
    assert 'cogtune_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "cogtune_running 0.0" in text
    tokens = next(line for line in text.splitlines() if line.startswith("cogtune_generated_tokens_total"))
    assert float(tokens.split()[1]) > 0


def test_an_error_of_the_engine_is_no_leak_and_no_end(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise ValueError("private detail")

    monkeypatch.setattr(DecodeSteps, "step", fail)
    with pytest.raises(openai.InternalServerError) as caught:
        _chat(running)
    assert "private detail" not in str(caught.value)
    assert _chat(running, max_tokens=2).choices


def test_a_request_that_finds_no_memory_fails_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prefill only that one, in a decode step those that take part in it; the next ones are answered."""

    def full(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for place, name in ((DecodeSteps, "step"), (DecodeSteps, "begin")):
        monkeypatch.setattr(place, name, full)
        with pytest.raises(openai.APIStatusError) as caught:
            _chat(running)
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
        assert caught.value.code == "out-of-memory"
        assert running.free()
        assert _chat(running, max_tokens=2).choices


def test_a_slow_client_holds_up_nobody(start: Start) -> None:
    """Neither one whose request arrives a byte at a time, nor one that does not read its answer."""
    patient = start(seconds=1.0)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: %d\r\n\r\n"
    body = json.dumps({"messages": _messages(picture=False), "stream": True, "max_tokens": 100}).encode()
    with socket.create_connection(("127.0.0.1", patient.port)) as slow, \
            socket.create_connection(("127.0.0.1", patient.port)) as deaf:  # fmt: skip
        slow.sendall(head.encode() % 500 + b"{")
        deaf.sendall(head.encode() % len(body) + body)
        assert _chat(patient, max_tokens=2).choices
        assert patient.free()
        slow.settimeout(20)
        answer = b""
        while piece := slow.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 1 s" in answer


def test_a_thousand_connections_each_get_an_answer(start: Start) -> None:
    crowded = start(slots=2, most_waiting=4)
    body = json.dumps({"messages": _messages(picture=False), "max_tokens": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", crowded.port), 60)) for _ in range(1000)]
        for one in opened:
            one.sendall(request)
        answers = [_all_of(one) for one in opened]
    status = Counter(answer.split(b" ", 2)[1] for answer in answers)
    assert status.keys() == {b"200", b"429"}
    assert all(b"retry-after" in answer.lower() for answer in answers if b" 429 " in answer[:20])
    assert crowded.free()
    assert _chat(crowded, max_tokens=2).choices


def _all_of(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def test_a_shutdown_finishes_what_was_accepted(start: Start) -> None:
    ending = start()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_chat(ending, max_tokens=200)))
    thread.start()
    while not ending.engine.running and not found:
        time.sleep(0.005)
    ending.stop()
    thread.join(20)
    assert found[0].choices[0].finish_reason in ("stop", "length")
    assert not ending.engine.alive
