"""Who may use the page, how much may be sent, and what a browser is told."""

from __future__ import annotations

import base64

import httpx
import pytest

from cogtune.web.guard import Guarded

KEYS = ("first", "second")


async def _page(scope, receive, send) -> None:
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-security-policy", b"none")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def _answer(keys: tuple[str, ...], host: str = "localhost:7860", content: object = b"", **headers: str):
    transport = httpx.ASGITransport(Guarded(_page, keys, 1000))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        return await client.post("/en/", content=content, headers=headers)


def _basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def run(coroutine):
    import asyncio

    return asyncio.run(coroutine)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (_basic("anyone:second"), 200), (_basic("first:first"), 200), ("Bearer first", 200), ("bearer  second ", 200),
        ("", 401), (_basic("first"), 401), (_basic(":"), 401), ("Basic !!!", 401), ("Bearer third", 401),
        ("Basic", 401), ("Digest first", 401),
    ],
)  # fmt: skip
def test_a_key_is_needed_where_there_is_one(given: str, status: int) -> None:
    answer = run(_answer(KEYS, host="pictures.example", authorization=given))
    assert answer.status_code == status
    assert ("www-authenticate" in answer.headers) == (status == 401)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:7860", 200), ("[::1]:7860", 200), ("[::1]", 200), ("evil.example", 421),
     ("localhost.evil.example", 421), ("127.0.0.1.evil.example:7860", 421)],
)  # fmt: skip
def test_without_keys_it_answers_to_this_machines_names_only(host: str, status: int) -> None:
    assert run(_answer((), host=host)).status_code == status


def test_what_is_sent_is_bounded_whatever_its_header_says() -> None:
    async def pieces():
        for _ in range(20):
            yield b"x" * 100

    assert run(_answer((), content=b"x" * 1000)).text == "1000"
    assert run(_answer((), content=b"x" * 1001)).status_code == 413
    assert run(_answer((), content=pieces())).status_code == 413


def test_a_browser_is_told_to_load_nothing_else() -> None:
    policy = run(_answer(())).headers.get_list("content-security-policy")
    assert len(policy) == 1
    assert "default-src 'self'" in policy[0]
    assert "http" not in policy[0]
