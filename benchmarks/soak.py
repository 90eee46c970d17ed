"""A soak of the server: ``python -m benchmarks.soak [--requests 20000] [--concurrency 32] [--json FILE]``.

OpenAI's own client asks ``cogtune serve`` on the tiny model on a CPU. One request in twenty is broken and has to be
refused with its own status; in one of twenty the client leaves. Every other answer is compared with the one that is
known beforehand: for greedy ones what transformers' ``generate()`` answers, for drawn ones and for closed questions
what the engine answers when it is asked nothing else. At the end all slots have to be back, and the server's memory
has to be what it was after the first fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
from PIL import Image

from cogtune.bench.report import circumstances, write_result
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.processing.processor import CogVLM2Processor

RESULT = Path(__file__).parent / "results" / "soak.json"
KEY = "soak"
SLOTS, COLUMNS, MOST_BODY = 16, 640, 200_000
PICTURES, QUESTIONS = 12, ("What is this?", "Is it red or blue?", "这是什么颜色？", "How many circles are there?")
CHOICES = ("yes", "no", "perhaps")
GROWTH = 1.05
"""Of the server's resident memory, between the second fifth of the requests and the last: what counts as flat."""


@dataclass(frozen=True)
class Known:
    """A request with its right answer: a text, or the probabilities of closed questions."""

    body: dict[str, Any]
    answer: Any


@dataclass
class Tally:
    """What came of the requests."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def data_url(image: Image.Image) -> str:
    """Return a picture as a data URL."""
    content = io.BytesIO()
    image.save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _messages(question: str, image: Image.Image | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": data_url(image)}})
    return [{"role": "user", "content": parts}]


def known_answers(model: Path, rng: Random) -> tuple[list[Known], list[Known]]:
    """Return chats and closed questions with the answers that each has on its own."""
    parts = load_model(model), CogVLM2Processor.from_pretrained(model)
    oracle, alone = TransformersGenerator(*parts), Generator(*parts, slots=1)
    images = [Image.frombytes("RGB", (24, 24), rng.randbytes(24 * 24 * 3)) for _ in range(PICTURES)]
    chats, closed = [], []
    for number, image in enumerate([*images, None, None]):
        for question in QUESTIONS:
            tokens = rng.choice((1, 2, 4, 8, 8, 20))
            body = {"messages": _messages(question, image), "max_tokens": tokens}
            shown = () if image is None else image
            if number % 3:
                greedy = oracle.answer_batch([(shown, question, [])], Decoding(tokens))[0]
                chats.append(Known({**body, "temperature": 0}, greedy))
                continue
            drawn = Decoding(tokens, sample=True, temperature=0.9, top_p=0.8)
            seed = rng.randrange(10**6)
            text = alone.answer_batch([(shown, question, [])], drawn, [seed])[0]
            sampled = {"temperature": 0.9, "top_p": 0.8, "seed": seed, "extra_body": {"top_k": 0}}
            chats.append(Known({**body, **sampled}, text))
        if image is not None:
            scores = alone.score(image, [ClosedQuestion(question, CHOICES) for question in QUESTIONS])
            asked = [{"question": question, "choices": list(CHOICES)} for question in QUESTIONS]
            body = {"image": data_url(image), "questions": asked}
            closed.append(Known(body, [list(one.probabilities) for one in scores]))
    alone.close()
    return chats, closed


def broken_requests(good: Known) -> list[tuple[str, bytes, int, str]]:
    """Return (path, body, expected status, key) of requests that have to be refused."""
    messages = good.body["messages"]
    text = messages[0]["content"][0]
    chat = "/v1/chat/completions"

    def shown(url: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": url}}]}]}

    bodies: list[tuple[dict[str, Any], int]] = [
        ({"messages": [*messages, *messages]}, 400),
        ({**good.body, "model": "another"}, 404),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
        (shown("data:image/png;base64,!!!"), 400),
        (shown("data:image/png;base64," + base64.b64encode(b"no picture at all").decode()), 400),
        (shown("http://127.0.0.1:1/a.png"), 400),
        ({**good.body, "nonsense": True}, 400),
        ({**good.body, "temperature": "warm"}, 400),
        ({"messages": []}, 400),
        ({"messages": [{"role": "user", "content": "x" * (MOST_BODY + 1)}]}, 413),
    ]
    whole = json.dumps(good.body).encode()
    found = [(chat, json.dumps(body).encode(), status, KEY) for body, status in bodies]
    found += [(chat, whole[: len(whole) // 2], 400, KEY), (chat, b"", 400, KEY), (chat, whole, 401, "wrong")]
    return [*found, ("/v1/score", b'{"questions": []}', 400, KEY), ("/v1/nothing", b"{}", 404, KEY)]


class Soak:
    """Sends requests to a server at ``url`` and compares what comes back."""

    def __init__(self, url: str, pid: int, chats: list[Known], closed: list[Known], seed: int) -> None:
        self.url, self.pid, self.chats, self.closed, self.seed = url, pid, chats, closed, seed
        self.tally = Tally()
        plain = (one for one in chats if one.body["temperature"] == 0)
        self.broken = broken_requests(next(one for one in plain if len(one.body["messages"][0]["content"]) == 2))
        self.http = httpx.AsyncClient(base_url=url, timeout=120)
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)

    async def run(self, requests: int, concurrency: int, every: int) -> None:
        """Send ``requests``, ``concurrency`` at once; look at the server's memory after every ``every``."""
        numbers = iter(range(requests))

        async def worker() -> None:
            for number in numbers:
                rng = Random(f"{self.seed}/{number}")
                share = rng.random()
                kind: Callable[[Random], Awaitable[str]] = (
                    self._broken if share < 0.05 else self._leaves if share < 0.10 else self._closed
                    if share < 0.15 else self._streamed if share < 0.45 else self._whole
                )  # fmt: skip
                began = time.perf_counter()
                try:
                    name = await kind(rng)
                except Exception as error:
                    name = f"{kind.__name__}: {type(error).__name__}"
                    self.tally.wrong.append(f"request {number}: {name}: {error!s:.200}")
                self.tally.done[name] += 1
                self.tally.seconds.append(time.perf_counter() - began)
                if number % every == 0:
                    self.tally.memory.append(resident(self.pid))

        await asyncio.gather(*(worker() for _ in range(concurrency)))

    def _check(self, found: Any, wanted: Any, what: str) -> None:
        if found != wanted:
            self.tally.wrong.append(f"{what}: {found!r:.100} instead of {wanted!r:.100}")

    async def _whole(self, rng: Random) -> str:
        one = rng.choice(self.chats)
        answer = await self.client.chat.completions.create(model="tiny", **one.body)
        self._check(answer.choices[0].message.content, one.answer, "whole answer")
        return "whole answer"

    async def _streamed(self, rng: Random) -> str:
        one = rng.choice(self.chats)
        body: dict[str, Any] = {**one.body, "stream": True, "stream_options": {"include_usage": True}}
        stream: Any = await self.client.chat.completions.create(model="tiny", **body)
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self._check(text, one.answer, "streamed answer")
        self._check(chunks[-1].usage is not None, True, "usage of a stream")
        return "streamed answer"

    async def _closed(self, rng: Random) -> str:
        one = rng.choice(self.closed)
        answer = await self.http.post("/v1/score", json=one.body, headers={"Authorization": f"Bearer {KEY}"})
        found = [entry["probabilities"] for entry in answer.json()["data"]]
        close = all(
            abs(a - b) < 1e-5 for row, wanted in zip(found, one.answer, strict=True)
            for a, b in zip(row, wanted, strict=True)
        )  # fmt: skip
        self._check(close, True, "closed questions")
        return "closed questions"

    async def _broken(self, rng: Random) -> str:
        path, body, status, key = rng.choice(self.broken)
        answer = await self.http.post(path, content=body, headers={"Authorization": f"Bearer {key}"})
        self._check(answer.status_code, status, f"broken request {body!r:.60}")
        return "broken, refused"

    async def _leaves(self, rng: Random) -> str:
        one = rng.choice(self.chats)
        body = {**one.body, "max_tokens": 200}
        if rng.random() < 0.5:
            stream = await self.client.chat.completions.create(model="tiny", stream=True, **body)
            async for _ in stream:
                break
            await stream.close()
            return "left while streaming"
        asked = self.client.chat.completions.create(model="tiny", **body)
        try:
            await asyncio.wait_for(asked, rng.choice((0.01, 0.05, 0.2)))
        except TimeoutError:
            return "left while waiting"
        return "answered before it left"

    async def close(self) -> None:
        """Close all connections."""
        await self.client.close()
        await self.http.aclose()


def resident(pid: int) -> int:
    """Return a process's resident memory, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def growth(memory: list[int]) -> float:
    """Return the last fifth's resident memory over the second fifth's, medians."""
    fifth = max(1, len(memory) // 5)
    return statistics.median(memory[-fifth:]) / statistics.median(memory[fifth : 2 * fifth] or memory[:1])


def start_server(model: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start ``cogtune serve`` and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "cogtune", "serve", "--model", str(model), "--name", "tiny", "--port", str(port),
        "--device", "cpu", "--slots", str(SLOTS), "--columns", str(COLUMNS), "--max-body", f"{MOST_BODY // 1000}KB",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"COGTUNE_API_KEY": KEY}, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=1).status_code == 200:
                return process, url
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(f"the server ended with {process.returncode}")


def slots_in_use(url: str) -> int:
    """Return how many answers are computed or wait, once that has settled or ten seconds have passed."""
    deadline = time.monotonic() + 10
    while True:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        values = [float(line.split()[1]) for line in lines if line.startswith(("cogtune_running ", "cogtune_waiting "))]
        if not any(values) or time.monotonic() > deadline:
            return int(sum(values))
        time.sleep(0.1)


def soak(requests: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Run it; ``wrong`` in what is returned lists what was not as it has to be."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model = make_tiny(Path(folder) / "tiny", seed=0)
        chats, closed = known_answers(model, Random(seed))
        process, url = start_server(model)
        try:
            began = time.monotonic()

            async def work() -> Tally:
                run = Soak(url, process.pid, chats, closed, seed)
                await run.run(requests, concurrency, max(1, requests // 200))
                await run.close()
                return run.tally

            tally = asyncio.run(work())
            seconds = time.monotonic() - began
            in_use = slots_in_use(url)
            process.send_signal(signal.SIGTERM)
            ended = process.wait(60)
        finally:
            process.kill()
    times = sorted(tally.seconds)
    return {
        "requests": sum(tally.done.values()),
        "concurrency": concurrency,
        "seed": seed,
        "seconds": round(seconds, 1),
        "kinds": dict(tally.done.most_common()),
        "known_answers": len(chats) + len(closed),
        "wrong": tally.wrong[:20],
        "wrong_count": len(tally.wrong),
        "slots_in_use": in_use,
        "exit_code": ended,
        "request_seconds": [round(times[len(times) * share // 100], 3) for share in (50, 99)],
        "resident_mib": [round(value / 2**20, 1) for value in tally.memory],
        "memory_growth": round(growth(tally.memory), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    found = soak(options.requests, options.concurrency, options.seed)
    rows = [[name, count] for name, count in found["kinds"].items()]
    table = {"columns": ["request", "number"], "columns_zh": ["请求", "数量"], "rows": rows}
    command = f"python -m benchmarks.soak --requests {options.requests} --concurrency {options.concurrency}"
    write_result(options.json, {**circumstances(command), "memory_growth_limit": GROWTH, **found, "table": table})
    print(json.dumps({name: value for name, value in found.items() if name != "resident_mib"}, indent=1))
    return 0 if is_good(found) else 1


def is_good(found: dict[str, Any]) -> bool:
    """Return whether everything was as it has to be; after SIGTERM a server ends by that signal."""
    whole = not found["wrong_count"] and not found["slots_in_use"]
    ended = found["exit_code"] in (0, -signal.SIGTERM)
    return whole and ended and found["memory_growth"] <= GROWTH


if __name__ == "__main__":
    sys.exit(main())
