"""The HTTP application: one page a language, of which the address without one is the visitor's."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.requests import Request

from cogtune.language import LANGUAGES, VARIABLE, Language, short_name
from cogtune.web.guard import Guarded
from cogtune.web.page import PageOptions, Stops, make_page, page_settings

_FORMS = 2**16
"""Bytes of an upload's form beside its file."""


def make_app(options: PageOptions, keys: Sequence[str], upload_bytes: int, waiting: int, at_once: int) -> FastAPI:
    """Return the application: a page a language, ``/en`` and ``/zh``, of which ``/`` is the visitor's.

    Args:
        keys: of which a visitor has to give one; none: everybody on this machine is welcome.
        upload_bytes: the largest file that is taken.
        waiting: the most questions that wait; further ones are refused.
        at_once: questions that are answered at the same time.
    """
    import gradio

    app = FastAPI(title="cogtune", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guarded, keys=keys, most=upload_bytes + _FORMS)

    @app.get("/")
    def choose(request: Request) -> RedirectResponse:
        return RedirectResponse(f"/{_language(request.headers.get('accept-language', ''))}/")

    @app.get("/health")
    def health() -> PlainTextResponse:
        return PlainTextResponse("ok")

    stops = Stops()
    for language, other in (("en", "zh"), ("zh", "en")):
        page = make_page(options, language, f"/{other}/", stops)  # type: ignore[arg-type]  # both are languages
        page.queue(max_size=waiting, default_concurrency_limit=at_once)
        app = gradio.mount_gradio_app(app, page, f"/{language}", max_file_size=upload_bytes, **page_settings())
    return app


def _language(accepted: str) -> Language:
    """Return the language that the operator chose, else the first of the browser's that the page has."""
    chosen = [os.environ.get(VARIABLE, "")] + [part.partition(";")[0] for part in accepted.split(",")]
    found = [name for name in (short_name(one.strip()) for one in chosen) if name in LANGUAGES]
    return found[0] if found else "en"  # type: ignore[return-value]  # one of them
