"""``cogtune serve`` as a process: it answers, needs a key beyond this machine, and ends when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cogtune.cli.main import main
from tests.unit.serve.test_pictures import data_url


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_it_answers_and_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port, keys = _free_port(), tmp_path / "keys.txt"
    keys.write_text("one\ntwo\n")
    command = [sys.executable, "-m", "cogtune", "serve", "--model", str(tiny_checkpoint), "--port", str(port)]
    options = [
        "--api-key-file",
        str(keys),
        "--name",
        "mine",
        "--slots",
        "2",
        "--columns",
        "400",
        "--max-new-tokens",
        "8",
    ]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        _wait(f"http://127.0.0.1:{port}/health", process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="two", max_retries=0)
        content: list[Any] = [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": data_url()}},
        ]
        found = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": content}])
        assert found.usage is not None
        assert 0 < found.usage.completion_tokens <= 8
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="three").models.list()
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    finally:
        process.kill()
    assert process.stderr is not None
    told = process.stderr.read()
    assert f"serving mine on http://127.0.0.1:{port}/v1" in told
    assert "Traceback" not in told


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError(f"the server did not start: {process.stderr.read() if process.stderr else ''}")


def test_layers_that_the_engine_does_not_call_are_refused_before_loading(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(tiny_checkpoint), "--port", "0", "--quant.stream", "all"]) == 2
    told = capsys.readouterr().err
    assert "not with quant.stream all" in told
    assert "loading" not in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "there is no API key"),
        (("--host", "example.org"), "there is no API key"),
        (("--api-key-file", "nowhere.txt"), "--api-key-file nowhere.txt"),
        (("--slots", "0"), "--slots"),
        (("--max-body", "12"), "--max-body: `12` is not a size"),
        (("--parallel.tensor", "2"), "not with --parallel.tensor"),
        (("--adapter", "a=x", "--adapter", "y"), "--adapter y: several adapters have different names"),
        (("--adapter", "a=x", "--adapter", "a=y"), "--adapter a=y: several adapters have different names"),
        (("--adapter", "a=nowhere"), "nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_loading(
    flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COGTUNE_API_KEY", raising=False)
    assert main(["serve", "--model", "nowhere", *flags]) == 2
    assert words in capsys.readouterr().err
