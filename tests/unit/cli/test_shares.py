"""Processes that share a prediction: all end together, whoever fails or stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cogtune.cli import shares
from cogtune.errors import RunError, Stopped


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Instead of predictions, processes that do what the first word says."""
    found: list[subprocess.Popen[bytes]] = []

    def start(words: list[str], number: int, count: int) -> subprocess.Popen[bytes]:
        found.append(subprocess.Popen([sys.executable, "-c", words[0].format(number=number)]))
        return found[-1]

    monkeypatch.setattr(shares, "_start", start)
    monkeypatch.setattr(shares, "_POLL_SECONDS", 0.05)
    return found


def run(code: str, output: Path, tell: list[tuple[int, int]]) -> None:
    shares.run_shares([code], 2, output, 4, lambda done, total: tell.append((done, total)))


def test_all_are_waited_for_and_their_answers_counted(started, tmp_path) -> None:
    told: list[tuple[int, int]] = []
    code = "open('{{}}/out.{number}-of-2.jsonl','w').write('x\\n' * 2); import time; time.sleep(0.3)"
    run(code.replace("{{}}", str(tmp_path)), tmp_path / "out.jsonl", told)
    assert told[-1] == (4, 4)
    assert [process.returncode for process in started] == [0, 0]


def test_one_that_fails_ends_the_others(started, tmp_path) -> None:
    with pytest.raises(RunError, match="process 1 of 2 ended with exit code 3"):
        run("import sys, time; sys.exit(3) if {number} else time.sleep(60)", tmp_path / "out.jsonl", [])
    assert all(process.poll() is not None for process in started)


def test_a_signal_ends_all(started, tmp_path) -> None:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped) as caught:
        run("import time; time.sleep(60)", tmp_path / "out.jsonl", [])
    assert caught.value.exit_code == 143
    assert all(process.poll() is not None for process in started)


def test_flags_of_the_parent_are_left_out() -> None:
    words = ["--cards", "4", "--data", "d", "--captions=c", "--output", "o", "--captions", "x"]
    assert shares._without(words, "--cards", "--captions") == ["--data", "d", "--output", "o"]
