"""Check that a merged model answers as its adapter did: stored questions are asked again, directly and by HTTP."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import mimetypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.adapters.adapter_folder import find_adapter
from cogtune.checkpoint.fingerprint import adapter_fingerprint
from cogtune.data.records import Question
from cogtune.errors import ConfigError, DataError
from cogtune.evaluate.predictions import read_predictions
from cogtune.generate.loading import load_generator
from cogtune.language import english, phrase, tr
from cogtune.system.terminal import typed

if TYPE_CHECKING:
    from cogtune.generate.generator import Generator

_TAKEN = ("model.template", "model.dtype", "model.rope_precision", "max-new-tokens")
"""Settings of a predictions file that the merged model is asked with."""
_NAME = "merged"
_WAYS = {"merged": phrase("merged"), "served": phrase("served")}


@dataclass(frozen=True)
class Difference:
    """A stored question that is answered otherwise. ``way``: ``merged`` or ``served``."""

    way: str
    question: str
    stored: str
    found: str


@dataclass(frozen=True)
class SelfCheck:
    """Result of `check_answers`. ``served``: whether the server was asked too."""

    asked: int
    served: bool
    differences: tuple[Difference, ...]

    def lines(self) -> list[str]:
        """Return what to tell the user: the outcome, then up to five differences."""
        differ = len({one.question for one in self.differences})
        ways = tr("directly and served") if self.served else tr("directly")
        if not differ:
            return [tr("{asked} of {asked} stored answers are given again, {ways}", asked=self.asked, ways=ways)]
        shown = [
            tr("{way}: {question}: {found!r} instead of {stored!r}", way=tr(_WAYS[one.way]), question=one.question,
               found=one.found, stored=one.stored)
            for one in self.differences[:5]
        ]  # fmt: skip
        head = tr("{differ} of {asked} stored answers are not given again, {ways}", differ=differ, asked=self.asked,
                  ways=ways)  # fmt: skip
        return [head, *shown]


def check_answers(
    folder: Path, predictions: Path, count: int = 16, progress: Callable[[str], None] = lambda line: None
) -> SelfCheck:
    """Ask a merged model the first questions of a predictions file again.

    Args:
        folder: the merged model.
        predictions: what `cogtune predict` wrote with the adapter: greedy, with its ``.meta.json``.
        count: how many questions, from the first; those that follow another in a conversation are left out.

    Raises:
        ConfigError: the file's answers were sampled.
        DataError: not a predictions file, or no question that can be asked again.
    """
    keys = _keys(predictions)
    questions, answers = read_predictions(predictions, None)
    chosen = [place for place, question in enumerate(questions) if question.turn == 0 and place in answers][:count]
    if not chosen:
        raise DataError(
            tr("{path}: no question that can be asked by itself", path=predictions),
            hint=tr("give a file of `cogtune predict` with first questions"),
        )
    generator = load_generator(folder, keys=keys, progress=progress)
    try:
        asked = [questions[place] for place in chosen]
        found = {
            "merged": generator.answer_batch(
                [([str(image) for image in one.images], one.question, ()) for one in asked]
            )
        }
        serves = all(importlib.util.find_spec(name) for name in ("fastapi", "openai", "prometheus_client"))
        if serves:
            with english():
                found["served"] = asyncio.run(_served(generator, asked, int(keys["max-new-tokens"])))
    finally:
        generator.close()
    differences = [
        Difference(way, question.question, answers[place], given)
        for way, texts in found.items()
        for place, question, given in zip(chosen, asked, texts, strict=True)
        if given != answers[place]
    ]
    return SelfCheck(len(chosen), serves, tuple(differences))


def require_checkable(predictions: Path, adapter: Path) -> None:
    """Check a predictions file before the merge, which takes long.

    Args:
        predictions: as for `check_answers`.
        adapter: the adapter that is merged, or the output folder of its training.

    Raises:
        AdapterError: no adapter. ConfigError: answers that were drawn at random, chosen, or another adapter's.
        DataError: not a predictions file.
    """
    meta = _meta(predictions)
    decides: Mapping[str, Any] = meta["decides"]
    _keys(predictions)
    if decides.get("choices"):
        raise ConfigError(
            tr("{path}: its answers were chosen among --choices; --check asks in words", path=predictions),
            hint=tr("predict without --choices"),
            code="config-value",
        )
    own = find_adapter(adapter)
    if decides.get("adapter") != adapter_fingerprint(own):
        other = (meta.get("made_with") or {}).get("adapter")
        made = tr("make the file with `cogtune predict --adapter {adapter}`", adapter=typed(adapter))
        if isinstance(other, str) and os.path.abspath(other) == os.path.abspath(own):  # trained further, or copied over
            raise ConfigError(
                tr("{path}: its answers are from before that adapter changed: {other}", path=predictions, other=other),
                hint=made,
                code="config-value",
            )
        raise ConfigError(
            tr(
                "{path}: its answers are those of {other}, not of the adapter in {adapter}, whose weights differ",
                path=predictions,
                other=other or tr("the base model"),
                adapter=adapter,
            ),
            hint=tr("merge that one, or {made}", made=made) if other else made,
            code="config-value",
        )


def _meta(predictions: Path) -> Mapping[str, Any]:
    """Return what decided the stored answers, and what they were made with."""
    meta = predictions.with_name(predictions.name + ".meta.json")
    hint = tr("`cogtune predict` writes it beside its answers; keep both")
    lines = predictions.with_name(predictions.name + ".jsonl")
    if lines.is_file():
        hint = tr("give the lines that the table was made of: {lines}", lines=lines)
    if not meta.is_file():
        raise DataError(tr("{meta}: no such file", meta=meta), hint=hint)
    try:
        found: Mapping[str, Any] = json.loads(meta.read_text(encoding="utf-8"))
        int(found["decides"]["max-new-tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(tr("{meta}: cannot be read: {error}", meta=meta, error=error), hint=hint) from error
    return found


def _keys(predictions: Path) -> dict[str, Any]:
    """Return the settings that the stored answers were given with."""
    decides = _meta(predictions)["decides"]
    if decides.get("temperature") or decides.get("sample"):
        raise ConfigError(
            tr("{path}: its answers were drawn at random, and are not given again", path=predictions),
            hint=tr("predict without --temperature"),
            code="config-value",
        )
    taken = {key: decides[key] for key in _TAKEN if decides.get(key) is not None}
    return taken | {"max-new-tokens": int(decides["max-new-tokens"])}


async def _served(generator: Generator, questions: list[Question], tokens: int) -> list[str]:
    """Return the server's answers, which runs in this process, on no port."""
    import httpx

    from cogtune.serve.app import ServerOptions, make_app

    app = make_app(generator.engine, ServerOptions(_NAME, template=generator.template, decoding=generator.decoding))
    found = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://here") as client:
        for one in questions:
            parts: list[dict[str, Any]] = [{"type": "text", "text": one.question}]
            parts += [{"type": "image_url", "image_url": {"url": _data_url(Path(str(image)))}} for image in one.images]
            call = {"model": _NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens,
                    "temperature": 0}  # fmt: skip
            answer = await client.post("/v1/chat/completions", json=call, timeout=None)
            content = answer.json()
            if answer.status_code != 200:
                found.append(f"{answer.status_code}: {content['error']['message']}")
            else:
                found.append(content["choices"][0]["message"]["content"].strip())
    return found


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
