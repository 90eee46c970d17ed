"""Rows of `benchmarks.eight_cards` that answer: decode steps, a folder of questions, a server a card."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import watched
from cogtune.bench.report import shown_command

if TYPE_CHECKING:
    from benchmarks.eight_cards import Machine

QUESTIONS = 96  # a card
TOKENS = 32  # an answer
CLIENTS = 16  # that ask a server at once
SERVED = 20.0  # seconds that are measured
COGTUNE = [sys.executable, "-m", "cogtune"]


def free_port() -> int:
    """Return a port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def decode(machine: Machine, cards: int, seconds: float) -> dict[str, Any]:
    """One answer at a time, by the engine: on one card, or by the ranks that hold a model together."""
    with tempfile.TemporaryDirectory(dir=machine.work) as folder:
        file = Path(folder) / "decode.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)]
        words = [sys.executable, *(launch if cards > 1 else []), "-m", "cogtune", "bench", "decode"]
        words += ["--tiny"] if machine.small else ["--model", "random"]
        words += ["--json", str(file), *(["--parallel.tensor", str(cards)] if cards > 1 else [])]
        found, seen = _watched(words, machine, seconds, Path(folder))
        if seen.code != 0:
            return found
        rows = {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    keep = ("step_ms", "tokens_per_second", "new_picture_ms", "known_picture_ms", "reserved_gib")
    kept = {key: rows["engine x1"][key] for key in keep}
    return {**found, **kept, "generate_step_ms": rows["generate()"]["step_ms"]}


def predict(machine: Machine, cards: int, seconds: float) -> dict[str, Any]:
    """A folder of questions about new pictures: answers a second while all processes answer, without their start."""
    data = machine.questions(QUESTIONS * cards)
    with tempfile.TemporaryDirectory(dir=machine.work) as folder:
        words = [*COGTUNE, "predict", "--model", str(machine.model), "--data", str(data), "--cards", str(cards)]
        words += [
            "--max-new-tokens",
            str(TOKENS),
            "--batch-size",
            "16",
            "--output",
            str(Path(folder) / "answers.jsonl"),
        ]
        with _counted(Path(folder), cards) as counts:
            found, seen = _watched(words, machine, seconds, Path(folder))
        if seen.code != 0:
            return found
    return {**found, **_rate(counts, cards), "card_mib": seen.card_mib[:cards]}


def serve(machine: Machine, cards: int, seconds: float) -> dict[str, Any]:
    """A server a card, each asked by its own clients as fast as it answers: tokens a second of all of them."""
    began = time.monotonic()
    ports = [free_port() for _ in range(cards)]
    with tempfile.TemporaryDirectory(dir=machine.work) as folder, ThreadPoolExecutor(cards * CLIENTS) as pool:
        running = [_server(machine, number, port, Path(folder)) for number, port in enumerate(ports)]
        try:
            for port in ports:
                _ready(port, running, began + seconds - SERVED)
            ends = time.monotonic() + (5.0 if machine.small else SERVED)
            started = time.monotonic()
            ask = partial(_ask_until, machine.model.name, ends)
            asked = [pool.submit(ask, port, client) for port in ports for client in range(CLIENTS)]
            tokens = sum(one.result() for one in asked)
            took = time.monotonic() - started
        except (RuntimeError, OSError) as error:
            logs = "".join(path.read_text(errors="replace")[-500:] for path in sorted(Path(folder).glob("*.log")))
            return {"wall_s": round(time.monotonic() - began, 1), "error": f"{error}: {logs}"}
        finally:
            for process in running:
                process.terminate()
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
    words = ["cogtune", "serve", "--model", str(machine.model), "--slots", str(CLIENTS)]
    wall = round(time.monotonic() - began, 1)
    return {"command": shown_command(words), "wall_s": wall, "tokens_per_second": round(tokens / took, 1)}


def _watched(
    words: list[str], machine: Machine, seconds: float, folder: Path
) -> tuple[dict[str, Any], watched.Watched]:
    from benchmarks.eight_cards import ROOT, cause

    seen = watched.run(words, ROOT, machine.environment(), seconds, folder / "console.log")
    shown = shown_command([word.replace(str(machine.work), "WORK") for word in words])
    found = {"command": shown, "wall_s": round(seen.seconds, 1)}
    return (found if seen.code == 0 else {**found, "error": cause(seen)}), seen


@contextmanager
def _counted(folder: Path, cards: int) -> Iterator[list[tuple[float, list[int]]]]:
    """Moments, and the number of answers in every process's file then."""
    name = "answers.jsonl" if cards == 1 else f"answers.[0-9]*-of-{cards}.jsonl"
    counts: list[tuple[float, list[int]]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            with suppress(OSError):  # the parts are removed when they were joined
                counts.append(
                    (time.monotonic(), [file.read_bytes().count(b"\n") for file in sorted(folder.glob(name))])
                )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


def _rate(looks: list[tuple[float, list[int]]], cards: int) -> dict[str, Any]:
    """Answers a second while every process answers: from the last one's first answers to the first one's last."""
    looks = [(when, counts) for when, counts in looks if len(counts) == cards and min(counts) > 0]
    last = [max(counts) for counts in zip(*(counts for _, counts in looks), strict=True)]
    together = [look for look in looks if all(count < most for count, most in zip(look[1], last, strict=True))]
    if len(together) < 2 or together[-1][1] == together[0][1]:
        return {"error": f"{sum(last)} answers were written within a few looks: too few to tell a rate"}
    (start, first), (end, count) = together[0], together[-1]
    return {"answers": sum(last), "answers_per_second": round((sum(count) - sum(first)) / (end - start), 3)}


def _server(machine: Machine, number: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = {} if machine.small else {"CUDA_VISIBLE_DEVICES": (seen or ",".join(map(str, range(64)))).split(",")[number]}
    words = [*COGTUNE, "serve", "--model", str(machine.model), "--port", str(port), "--slots", str(CLIENTS)]
    with (folder / f"server-{number}.log").open("wb") as log:
        environment = {**os.environ, **machine.environment(), **own}
        return subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _ready(port: int, running: list[subprocess.Popen[bytes]], until: float) -> None:
    while True:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        if any(process.poll() is not None for process in running) or time.monotonic() > until:
            raise RuntimeError("a server did not start")
        time.sleep(0.5)


def _ask_until(model: str, ends: float, port: int, client: int) -> int:
    """Ask one question after the other; the tokens of the answers that came before ``ends``."""
    tokens = asked = 0
    while time.monotonic() < ends:
        asked += 1
        content = f"Question {asked} of client {client}: what do you see?"
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        url, kind = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), kind), timeout=120
        ) as answer:
            tokens += json.load(answer)["usage"]["completion_tokens"]
    return tokens


ANSWER_ROWS: dict[str, tuple[Callable[[Machine, int, float], dict[str, Any]], bool]] = {
    "decode": (decode, True),
    "decode-tensor": (decode, False),
    "predict": (predict, True),
    "predict-cards": (predict, False),
    "serve": (serve, True),
    "serve-cards": (serve, False),
}
"""Name -> what runs it, and whether on one card alone; the row of one card is what the one behind it is held to."""
