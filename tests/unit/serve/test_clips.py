"""Clips in requests: a video model is asked about a clip as a file would be, and each model refuses the other kind."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.generator import Generator
from cogtune.processing.processor import CogVLM2Processor
from cogtune.serve.app import ServerOptions, make_app
from cogtune.serve.pictures import PictureLimits
from tests.support.clips import write_clip
from tests.unit.serve.test_pictures import data_url

DECODING = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CogVLM2Processor]:
    folder = make_tiny(tmp_path_factory.mktemp("video") / "tiny", vision_experts=False)
    return load_model(folder), CogVLM2Processor.from_pretrained(folder)


def _client(parts: tuple[Any, CogVLM2Processor]) -> TestClient:
    options = ServerOptions(
        model="tiny", decoding=DECODING, most_tokens=400, pictures=PictureLimits(pixels=48 * 32, bytes=1_000_000)
    )
    return TestClient(make_app(InferenceEngine(*parts, slots=1, columns=600), options))


@pytest.fixture(scope="module")
def client(video: tuple[Any, CogVLM2Processor]) -> Iterator[TestClient]:
    with _client(video) as found:
        yield found


def _url(content: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"


def _ask(client: TestClient, *parts: tuple[str, str]) -> Any:
    content = [{"type": "text", "text": "What happens?"}, *({"type": kind, kind: {"url": url}} for kind, url in parts)]
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})


def _refused(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def test_a_clip_is_answered_as_its_file_is(client: TestClient, video: Any, clip: Path) -> None:
    answer = _ask(client, ("video_url", _url(clip.read_bytes())))
    assert answer.status_code == 200, answer.text
    wanted = Generator(*video).answer(clip, "What happens?", decoding=DECODING)
    assert answer.json()["choices"][0]["message"]["content"].strip() == wanted
    scored = client.post(
        "/v1/score",
        json={"video": _url(clip.read_bytes()), "questions": [{"question": "Moving?", "choices": ["Yes", "No"]}]},
    )
    assert scored.status_code == 200
    assert scored.json()["data"][0]["best"] in ("Yes", "No")


def test_what_is_no_clip_is_refused_by_name(client: TestClient, clip: Path, tmp_path: Path) -> None:
    good, before = _url(clip.read_bytes()), set(Path(tempfile.gettempdir()).glob("cogtune-clip-*"))
    cut = _url(clip.read_bytes()[:100])
    large = _url(write_clip(tmp_path / "large.mp4", 4, size=(96, 64)).read_bytes())
    for parts, code, told in (
        ((("video_url", good), ("video_url", good)), "invalid_value", "2 clips; a request is about one"),
        ((("video_url", cut),), "clip-unreadable", "the clip: "),
        ((("video_url", large),), "clip-too-large", "the clip: 96 x 64 pixels"),
        ((("video_url", "file:///etc/passwd"),), "image-url", "a clip is a data: URL"),
        ((("video_url", "https://example.com/a.mp4"),), "image-host", "clips are not fetched from 'example.com'"),
        ((("image_url", data_url()),), "data-media-pictures", "send video_url"),
    ):
        status, found, message = _refused(_ask(client, *parts))
        assert (status, found) == (400, code), message
        assert told in message
        assert tempfile.gettempdir() not in message
    assert set(Path(tempfile.gettempdir()).glob("cogtune-clip-*")) == before


def test_a_model_of_pictures_refuses_clips_and_says_which_reads_them(tiny_checkpoint: Path, clip: Path) -> None:
    with _client((load_model(tiny_checkpoint), CogVLM2Processor.from_pretrained(tiny_checkpoint))) as client:
        status, code, message = _refused(_ask(client, ("video_url", _url(clip.read_bytes()))))
    assert (status, code) == (400, "data-media-clips")
    assert "--variant caption" in message
