"""Pictures of requests: what is opened, and what is never dialled."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from PIL import Image

from cogtune.serve import pictures
from cogtune.serve.pictures import PictureLimits, open_pictures
from cogtune.serve.refusals import Refusal

LIMITS = PictureLimits(pixels=10_000, bytes=50_000, hosts=("pictures.example",), seconds=2)


def data_url(mode: str = "RGB", size: tuple[int, int] = (8, 6), kind: str = "png") -> str:
    """A small picture as a data URL."""
    content = io.BytesIO()
    Image.new(mode, size, 1).save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "png"), ("L", "png"), ("P", "gif"), ("RGBA", "webp"), ("1", "bmp")])
def test_pictures_of_any_kind_become_rgb(mode: str, kind: str) -> None:
    (found,) = open_pictures([data_url(mode, kind=kind)], LIMITS)
    assert (found.mode, found.size) == ("RGB", (8, 6))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("data:image/png;base64,!!!!", "base64 is wrong"),
        ("data:image/png,plain", "data URL"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "not a picture of a known format"),
        (data_url()[:-40] + "=" * 0, "base64 is wrong|incomplete|cannot be read"),
        (data_url(size=(200, 100)), "20000 pixels together"),
        ("data:image/png;base64," + "A" * 100_000, "larger than"),
        ("file:///etc/passwd", "data: URL"),
        ("/etc/passwd", "data: URL"),
        ("ftp://pictures.example/a.png", "data: URL"),
        ("", "data: URL"),
    ],
)
def test_what_is_no_picture_is_refused(address: str, words: str) -> None:
    with pytest.raises(Refusal, match=words) as caught:
        open_pictures([address], LIMITS)
    assert caught.value.status == 400


def test_the_pixels_of_all_pictures_count_together() -> None:
    with pytest.raises(Refusal, match="14000 pixels together"):
        open_pictures([data_url(size=(100, 70))] * 2, LIMITS)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://2130706433/a.png",
        "http://0x7f000001/a.png",
        "http://0177.0.0.1/a.png",
        "http://pictures.example@127.0.0.1/a.png",
        "http://user:word@pictures.example/a.png",
        "http://pictures.example.evil.example/a.png",
        "http://evil.example/pictures.example",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://pictures.example:99999999/a.png",
    ],
)
def test_hosts_that_nobody_allowed_are_never_dialled(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("dialled")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(Refusal):
        open_pictures([address], LIMITS)
    with pytest.raises(Refusal, match="not fetched from"):
        open_pictures(["https://pictures.example/a.png"], PictureLimits())  # off unless asked for


@pytest.mark.parametrize(
    "resolved",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "0.0.0.0"],
)
def test_an_allowed_name_that_resolves_privately_is_not_dialled(resolved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dial(*_: Any, **__: Any) -> None:
        raise AssertionError("dialled")

    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (resolved, 80))
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [public, entry])
    monkeypatch.setattr(socket, "create_connection", dial)
    with pytest.raises(Refusal, match="not a public host"):
        open_pictures(["http://pictures.example/a.png"], LIMITS)


def _dialled(place: tuple[str, int]) -> socket.socket:
    found = socket.socket()
    found.connect(place)
    return found


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header(
                "Location", {"good": "/a.png", "bad": "http://127.0.0.1/a.png"}.get(self.path[4:], self.path)
            )
            self.end_headers()
            return
        content = base64.b64decode(data_url().partition(",")[2])
        if self.path == "/large":
            content = bytes(100_000)
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that stands for pictures.example; its loopback address is taken for a public one."""
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = ("127.0.0.1", server.server_port)
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", place)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry])
    monkeypatch.setattr(socket, "create_connection", lambda _, **__: _dialled(place))
    monkeypatch.setattr(pictures, "_is_global", lambda address: True)
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_pictures_of_allowed_hosts_are_fetched(host: int) -> None:
    for path in ("a.png", "to/good"):
        (found,) = open_pictures([f"http://pictures.example/{path}"], LIMITS)
        assert found.size == (8, 6)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("to/bad", "not fetched from"),
        ("to/loop", "redirects"),
        ("missing", "answers 404"),
        ("large", "larger than"),
    ],
)
def test_what_a_host_answers_is_checked(host: int, path: str, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        open_pictures([f"http://pictures.example/{path}"], LIMITS)
