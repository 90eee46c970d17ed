"""The page of ``cogtune web``, used as a visitor does: by a real browser without a screen.

``make test-web`` runs these. They need gradio, playwright and a Chromium, and are skipped where one is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'cogtune[web]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make test-web` does it")
BROWSER = os.environ.get("COGTUNE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if BROWSER is None:
    pytest.skip("no Chromium: install Debian's package chromium, or set COGTUNE_CHROMIUM", allow_module_level=True)

import uvicorn  # noqa: E402

from cogtune.generate.choices import ClosedQuestion  # noqa: E402
from cogtune.generate.decode_steps import DecodeSteps  # noqa: E402
from cogtune.generate.decoding import Decoding  # noqa: E402
from cogtune.generate.loading import load_generator  # noqa: E402
from cogtune.processing.image import read_image  # noqa: E402
from cogtune.web.app import make_app  # noqa: E402
from cogtune.web.page import PageOptions  # noqa: E402
from tests.support.adapters import write_adapter  # noqa: E402

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
TOKENS, QUESTION = 12, "What is this?"


@pytest.fixture(scope="module")
def generator(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: write_adapter(tiny_checkpoint, folder / name, size=size)
                for name, size in (("cats", 0.4), ("dogs", 0.9))}  # fmt: skip
    found = load_generator(tiny_checkpoint, adapters=adapters, keys={"device": "cpu"})
    yield found
    found.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.fixture(scope="module")
def start(generator: Any, picture: Path) -> Iterator[Callable[..., str]]:
    """Starts servers of the page; each returns its address."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []
    sides = {"base": generator.with_adapter(None)} | {n: generator.with_adapter(n) for n in ("cats", "dogs")}

    def begin(keys: tuple[str, ...] = (), **more: Any) -> str:
        given = {"decoding": Decoding(TOKENS), "examples": [(picture, "Which colour?")]} | more
        options = PageOptions("tiny", sides, ("cats", "base"), lambda path: [read_image(path)], **given)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        app = make_app(options, keys, upload_bytes=100_000, waiting=8, at_once=4)
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.05)
        return f"http://127.0.0.1:{port}"

    yield begin
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def address(start: Callable[..., str]) -> str:
    return start()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


class Visit:
    """A tab with the page, and everything it asked the network for or complained about."""

    def __init__(self, browser: Any, address: str, path: str = "/en/", **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.goto(address + path)
        self.page.wait_for_selector("#question textarea")

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#file input[type=file]", str(path))

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def chat(self, side: str) -> list[str]:
        found = self.page.query_selector_all(f"#chat-{side} .message")
        texts = [one.inner_text().strip() for one in found]
        return texts[::2] if texts[::2] == texts[1::2] else texts  # the element and its wrapper have the class

    def until(self, holds: Callable[[], bool], what: str = "") -> None:
        deadline = time.monotonic() + 60
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: {self.chat('first')} {self.chat('second')} {self.said}")
            self.page.wait_for_timeout(50)

    def choose(self, box: str, name: str) -> None:
        self.page.click(f"#{box} input")
        self.page.click(f"[role=option]:has-text('{name}')")


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    found = Visit(browser, address)
    yield found
    found.context.close()


def shown(text: str) -> str:
    """A text as a browser's inner text has it."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def same(found: str, wanted: str) -> bool:
    return shown(found).replace(" ", "") == shown(wanted).replace(" ", "")


def test_upload_ask_and_see_both_answers(visit: Visit, generator: Any, picture: Path, address: str) -> None:
    visit.upload(picture)
    visit.page.wait_for_selector("#seen img")
    wanted = {name: generator.with_adapter(name).answer(str(picture), QUESTION, decoding=Decoding(TOKENS))
              for name in (None, "cats")}  # fmt: skip
    assert wanted[None] != wanted["cats"]
    visit.ask(QUESTION)
    visit.until(lambda: len(visit.chat("first")) == 2 and same(visit.chat("first")[1], wanted["cats"]), "cats")
    visit.until(lambda: len(visit.chat("second")) == 2 and same(visit.chat("second")[1], wanted[None]), "base")
    assert visit.chat("first")[0] == QUESTION
    # a second question has the first one as its history, each side its own
    history = [(QUESTION, wanted["cats"])]
    again = generator.with_adapter("cats").answer(str(picture), "And why?", history, Decoding(TOKENS))
    visit.ask("And why?")
    visit.until(lambda: len(visit.chat("first")) == 4 and same(visit.chat("first")[3], again), "history")
    outside = [url for url in visit.asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside
    assert not [text for text in visit.said if "Content Security Policy" in text or "CORS" in text]


def test_another_adapter_is_asked_when_it_is_chosen(visit: Visit, generator: Any, picture: Path) -> None:
    visit.choose("first", "dogs")
    visit.choose("second", "(nothing)")
    visit.until(lambda: not visit.page.is_visible("#chat-second"))
    visit.ask("Hello there")
    wanted = generator.with_adapter("dogs").answer(None, "Hello there", decoding=Decoding(TOKENS))
    visit.until(lambda: len(visit.chat("first")) == 2 and same(visit.chat("first")[1], wanted), "dogs")
    visit.choose("second", "cats")
    visit.until(lambda: visit.page.is_visible("#chat-second"))
    visit.page.click("#clear")
    visit.until(lambda: visit.chat("first") == [])
    visit.ask("Hello there")
    other = generator.with_adapter("cats").answer(None, "Hello there", decoding=Decoding(TOKENS))
    visit.until(lambda: len(visit.chat("second")) == 2 and same(visit.chat("second")[1], other), "cats")


@pytest.fixture
def endless(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on to their last token, slowly."""
    step = DecodeSteps.step
    monkeypatch.setattr(generator.engine, "ends", frozenset())
    monkeypatch.setattr(DecodeSteps, "step", lambda *given: (time.sleep(0.02), step(*given))[1])


def test_an_answer_stops_and_a_visitor_who_leaves_frees_the_slots(
    browser: Any, start: Callable[..., str], generator: Any, endless: None
) -> None:
    visit = Visit(browser, start(decoding=Decoding(3000)))
    visit.ask("Tell me all")
    visit.until(lambda: generator.engine.running == 2)
    visit.until(lambda: len(visit.chat("first")) == 2 and len(visit.chat("first")[1]) > 3)
    visit.page.click("#stop")
    visit.until(lambda: generator.engine.running == 0, "stop")
    visit.page.wait_for_timeout(300)
    assert len(visit.chat("first")[1]) > 3  # what came so far stays
    visit.ask("And again")
    visit.until(lambda: generator.engine.running == 2)
    visit.context.close()
    deadline = time.monotonic() + 30
    while generator.engine.running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert generator.engine.running == 0


def test_closed_questions_have_bars(visit: Visit, generator: Any, picture: Path) -> None:
    visit.upload(picture)
    visit.page.wait_for_selector("#seen img")
    visit.page.click("#closed button")
    visit.page.fill("#closed-questions textarea", "Is it red?\nIs it <b>big</b>?")
    visit.page.fill("#closed-choices textarea", "yes, no, perhaps")
    visit.page.click("#score")
    visit.page.wait_for_selector("#scores .cogtune-bar")
    found = visit.page.inner_text("#scores")
    for name in (None, "cats"):
        questions = [ClosedQuestion(text, ("yes", "no", "perhaps")) for text in ("Is it red?", "Is it <b>big</b>?")]
        for scores in generator.with_adapter(name).score(str(picture), questions):
            for share in scores.probabilities:
                assert f"{100 * share:.1f} %" in found
    assert "Is it <b>big</b>?" in found
    assert "not calibrated" in found
    visit.page.fill("#closed-choices textarea", "yes")
    visit.page.click("#score")
    visit.page.wait_for_selector("text=at least two different answers")


def test_chinese_examples_and_what_is_no_picture(
    browser: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COGTUNE_LANG", raising=False)
    visit = Visit(browser, address, "/", locale="zh-CN")
    assert visit.page.url.startswith(f"{address}/zh/")
    assert "提问" in visit.page.inner_text("#ask")
    visit.page.click("#examples button:has(img)")
    visit.page.wait_for_selector("#seen img")
    assert visit.page.input_value("#question textarea") == "Which colour?"
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    visit.page.click("#file [aria-label='Clear'], #file [aria-label='清除'], #file button[title]")
    visit.page.wait_for_selector("#file input[type=file]", state="attached")
    visit.upload(bad)
    visit.page.wait_for_selector("text=image-unreadable")
    assert str(tmp_path.parent) not in visit.page.inner_text("body")
    assert "/bad.png" not in visit.page.inner_text("body")
    visit.ask("  ")
    visit.page.wait_for_selector("text=问题是空的")
    visit.page.click("a:has-text('English')")
    visit.page.wait_for_selector("text=How tokens are chosen")
    visit.context.close()


def test_a_key_is_asked_for_as_a_password(browser: Any, start: Callable[..., str]) -> None:
    address = start(keys=("secret",))
    context = browser.new_context()
    assert context.request.get(f"{address}/en/").status == 401
    context.close()
    visit = Visit(browser, address, http_credentials={"username": "me", "password": "secret"})
    visit.ask("Hello there")
    visit.until(lambda: len(visit.chat("first")) == 2)
    visit.context.close()


def test_a_file_that_is_too_large_is_not_taken(visit: Visit, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(os.urandom(300_000))
    visit.upload(large)
    visit.page.wait_for_selector("text=/exceeds|too large|larger|Error/i")
    assert visit.page.query_selector("#seen img") is None


WHOLE = "found => found.every(one => one.scrollWidth <= one.clientWidth && one.scrollHeight <= one.clientHeight)"


def test_it_fits_a_phone(browser: Any, start: Callable[..., str], picture: Path) -> None:
    """Also the pictures in their frames: the sixth example and the lower edge of the shown one were out of sight."""
    visit = Visit(browser, start(examples=[(picture, "Which colour?")] * 12))
    visit.upload(picture)
    visit.page.wait_for_selector("#seen img")
    for width in (1280, 390):
        visit.page.set_viewport_size({"width": width, "height": 844})
        visit.page.wait_for_timeout(300)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.page.eval_on_selector_all("#examples .grid-wrap, #seen .grid-wrap, #seen, #clear", WHOLE)
    visit.context.close()


def test_the_command_starts_it_and_cleans_up(tiny_checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_checkpoint, tmp_path / "cats" / "adapter", size=0.4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "uploads").mkdir()
    command = [sys.executable, "-m", "cogtune", "web", "--model", str(tiny_checkpoint), "--adapter", str(adapter)]
    more = ["--data", str(picture.parent), "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "uploads")}
    process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/en/", timeout=10)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        assert page.status_code == 200
        assert "cats" in page.text
        assert list((tmp_path / "uploads").glob("cogtune-web-*"))
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert not list((tmp_path / "uploads").glob("cogtune-web-*"))
