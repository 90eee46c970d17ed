"""The page: its parts, and what happens when they are used. One page a language, of the same parts."""

from __future__ import annotations

import html
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from cogtune.data.formats.pictures import PICTURE_SUFFIXES
from cogtune.errors import CogtuneError, render
from cogtune.generate.choices import ChoiceScores, ClosedQuestion
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.language import Language, speaking, tr
from cogtune.processing.clip import SUFFIXES as CLIP_SUFFIXES
from cogtune.web.answers import Turn, closed_questions, history_of, score, stream

_SHOWN = 480
"""Pixels of the longer side of a picture on the page."""
_CSS = """
.cogtune-bar {background: var(--neutral-200); border-radius: 4px; height: 12px; min-width: 60px}
.cogtune-bar > div {background: var(--primary-500); border-radius: 4px; height: 12px}
.cogtune-scores table {width: 100%; border-collapse: collapse}
.cogtune-scores :is(table, tr, td, th) {border: 0 !important}
.cogtune-scores :is(td, th) {padding: 2px 8px 2px 0 !important; text-align: left; white-space: nowrap}
.cogtune-scores td:first-child {white-space: normal; width: 20%}
#examples .grid-container {grid-template-columns: repeat(auto-fill, minmax(max(90px, 15%), 1fr)) !important}
#examples .grid-wrap, #seen .fixed-height {max-height: none; min-height: 0}
footer {display: none !important}
"""


@dataclass(frozen=True)
class PageOptions:
    """Settings of the page.

    Attributes:
        title: the model's name.
        sides: the base and its adapters by name, those that a question can be asked of.
        beside: the two that are shown at first: the one that answers, and the one beside it, if any.
        see: returns what the model is shown of a file: a picture, or the frames of a clip.
        clips: a video model's page takes clips.
        decoding: how tokens are chosen until the visitor says otherwise.
        most_tokens: of one answer.
        seconds: time limit of one answer.
        examples: (file, question) pairs to begin with.
    """

    title: str
    sides: Mapping[str, Generator]
    beside: tuple[str, str | None]
    see: Callable[[Path], list[Image.Image]]
    clips: bool = False
    decoding: Decoding = field(default_factory=Decoding)
    most_tokens: int = 2048
    seconds: float = 120.0
    examples: Sequence[tuple[Path, str]] = ()


class Stops:
    """Which visitors asked their answer to stop, by the browser's session."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, session: str | None) -> threading.Event:
        """Return a new event; an answer that the same visitor still waits for is stopped."""
        self.stop(session)
        with self._lock:
            return self._events.setdefault(session or "", threading.Event())

    def stop(self, session: str | None) -> None:
        """End the visitor's answer, if there is one."""
        with self._lock:
            event = self._events.pop(session or "", None)
        if event is not None:
            event.set()


def _tell(error: CogtuneError, language: Language, file: str | Path | None = None) -> None:
    """Show an error on the page, as text. What is on the page stays, which it does not under a `gradio.Error`.

    ``file``: what was uploaded, whose folder on this machine is nobody's business.
    """
    with speaking(language):
        said = render(error.code, error.message, error.hint)
    if file is not None:
        said = said.replace(f"{Path(file).parent}{os.sep}", "")
    gr.Warning(html.escape(said).replace("\n", "<br>"), duration=20)


def _spoken(steps: Iterator[dict[str, str]], language: Language) -> Iterator[dict[str, str]]:
    """Yield what ``steps`` does, whose messages are in a language. Each step may run in another context."""
    while True:
        with speaking(language):
            texts = next(steps, None)
        if texts is None:
            return
        yield texts


class _Page:
    """What happens when the parts of a page are used."""

    def __init__(self, options: PageOptions, language: Language, stops: Stops) -> None:
        self.options, self.language, self.stops = options, language, stops

    def show(self, file: str | None) -> tuple[list[Image.Image], list[Turn]]:
        """Return what the model sees of a file, and an empty conversation."""
        return ([] if file is None else self.thumbnails(Path(file))), []

    def thumbnails(self, path: Path) -> list[Image.Image]:
        """Return what the model sees of a file, smaller; nothing, and a message, if it cannot be read."""
        try:
            with speaking(self.language):
                found = self.options.see(path)
        except CogtuneError as error:
            _tell(error, self.language, path)
            return []
        for image in found:
            image.thumbnail((_SHOWN, _SHOWN))
        return found

    def example(self, picked: gr.SelectData) -> tuple[str, str]:
        """Return file and question of an example."""
        path, question = self.options.examples[picked.index]
        return str(path), question

    def ask(
        self,
        request: gr.Request,
        file: str | None,
        turns: list[Turn],
        question: str,
        first: str,
        second: str | None,
        *sampling: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the answers of both sides: (conversation, first chat, second chat, question box)."""
        names = [first, *([second] if second and second != first else [])]
        event = self.stops.begin(request.session_hash)
        turn = Turn(question.strip())
        try:
            with speaking(self.language):
                decoding, seed = self._decoding(*sampling)
                sides = {name: self.options.sides[name] for name in names}
                shown = None if file is None else Path(file)
                steps = stream(sides, shown, turns, turn.question, decoding, seed, event, self.options.seconds)
            for texts in _spoken(steps, self.language):
                turn.answers = texts
                now = [*turns, turn]
                yield now, chat(now, first), chat(now, names[-1]), ""
        except CogtuneError as error:
            _tell(error, self.language, file)
            yield gr.skip(), chat(turns, first), chat(turns, names[-1]), question
        finally:
            event.set()

    def _decoding(self, greedy: bool, temperature: float, top_p: float, top_k: float, tokens: float, seed: float | None
                  ) -> tuple[Decoding, int]:  # fmt: skip
        drawn = random.getrandbits(31) if seed is None or seed < 0 else int(seed)
        most = max(1, min(int(tokens), self.options.most_tokens))
        if greedy:
            return Decoding(most), drawn
        return Decoding(most, True, float(temperature), float(top_p), int(top_k)), drawn

    def stop(self, request: gr.Request) -> None:
        """End the answer under way; what came so far stays."""
        self.stops.stop(request.session_hash)

    def sides(self, turns: list[Turn], first: str, second: str | None) -> tuple[Any, Any]:
        """Return both chats as the chosen models have them; the second is there if it is another."""
        there = bool(second) and second != first
        return (
            gr.update(value=chat(turns, first), label=first),
            gr.update(value=chat(turns, second or first), label=second, visible=there),
        )

    def closed(self, file: str | None, questions: str, choices: str, first: str, second: str | None) -> str:
        """Return the probabilities of closed questions as bars."""
        names = [first, *([second] if second and second != first else [])]
        sides = {name: self.options.sides[name] for name in names}
        try:
            with speaking(self.language):
                asked = closed_questions(questions, choices)
                return bars(asked, score(sides, None if file is None else Path(file), asked))
        except CogtuneError as error:
            _tell(error, self.language, file)
            return ""


def chat(turns: Sequence[Turn], side: str) -> list[dict[str, str]]:
    """Return a conversation as the chat component takes it; a side that was not asked shows the other's answer."""
    known = dict(history_of(turns, side))
    messages = []
    for turn in turns:
        answer = turn.answers.get(side, known.get(turn.question, ""))
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer or "…"}]
    return messages


def bars(questions: Sequence[ClosedQuestion], scores: Mapping[str, Sequence[ChoiceScores]]) -> str:
    """Return a table of probabilities with a bar each, as HTML."""
    parts = ['<div class="cogtune-scores">']
    for number, question in enumerate(questions):
        parts.append(f"<h4>{html.escape(question.query)}</h4><table>")
        heads = "".join(f'<th colspan="2">{html.escape(side)}</th>' for side in scores)
        parts.append(f"<tr><th></th>{heads}</tr>")
        for place, choice in enumerate(question.choices):
            parts.append(f"<tr><td>{html.escape(choice)}</td>")
            for found in scores.values():
                share = found[number].probabilities[place]
                text = f"{100 * share:.1f} %"
                best = f"<b>{text}</b>" if found[number].best == choice else text
                parts.append(
                    f'<td>{best}</td><td style="width: {80 // len(scores)}%"><div class="cogtune-bar">'
                    f'<div style="width: {100 * share:.1f}%"></div></div></td>'
                )
            parts.append("</tr>")
        parts.append("</table>")
    said = tr("Normalised over the answers given, and not calibrated: a model that favours one favours it here too.")
    return "".join([*parts, f"<p><small>{html.escape(said)}</small></p></div>"])


def make_page(options: PageOptions, language: Language, other: str, stops: Stops) -> gr.Blocks:
    """Return the page in a language; ``other``: address of the page in the other one."""
    page = _Page(options, language, stops)
    with speaking(language), gr.Blocks(title=f"cogtune: {options.title}", analytics_enabled=False,
                                       delete_cache=(3600, 3600)) as blocks:  # fmt: skip
        _parts(page, options, other)
        blocks.unload(page.stop)  # a visitor who leaves frees the slots
    return blocks


def _parts(page: _Page, options: PageOptions, other: str) -> None:
    word = {"en": "中文", "zh": "English"}[page.language]
    gr.HTML(f'<h2>cogtune · {html.escape(options.title)} <small>· <a href="{other}">{word}</a></small></h2>')
    turns = gr.State([])
    names, (first_name, second_name) = list(options.sides), options.beside
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            suffixes = list(CLIP_SUFFIXES if options.clips else PICTURE_SUFFIXES)
            label = tr("Clip: drop one here, or click") if options.clips else tr("Picture: drop one here, or click")
            file = gr.File(label=label, file_types=suffixes, height=120, elem_id="file")
            seen = gr.Gallery(label=tr("What the model is shown"), columns=2 if options.clips else 1,
                              height=300 if options.clips else "auto",
                              elem_id="seen", object_fit="contain", interactive=False, buttons=[])  # fmt: skip
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                first = gr.Dropdown(names, value=first_name, label=tr("Answers"), elem_id="first")
                besides = [(tr("(nothing)"), ""), *((name, name) for name in names)]
                second = gr.Dropdown(besides, value=second_name or "", label=tr("Beside it"), elem_id="second")
            with gr.Row():
                plain: dict[str, Any] = {"height": 320, "render_markdown": False, "feedback_options": None,
                                         "buttons": ["copy"], "min_width": 240}  # fmt: skip
                one = gr.Chatbot(label=first_name, elem_id="chat-first", **plain)
                two = gr.Chatbot(label=second_name, elem_id="chat-second", visible=second_name is not None, **plain)
            question = gr.Textbox(label=tr("Question"), lines=1, max_lines=6, elem_id="question", autofocus=True)
            with gr.Row():
                ask = gr.Button(tr("Ask"), variant="primary", elem_id="ask", min_width=80)
                stop = gr.Button(tr("Stop"), elem_id="stop", min_width=80)
                clear = gr.Button(tr("Start over"), elem_id="clear", min_width=120)
            sampling = _sampling(options)
            asked, choices, button, table = _closed_parts()
    if options.examples:
        shown = [(page.thumbnails(path)[0], text) for path, text in options.examples]
        examples = gr.Gallery(shown, label=tr("Examples from the data"), columns=6, height="auto", interactive=False,
                              allow_preview=False, object_fit="contain", buttons=[], elem_id="examples")  # fmt: skip
        examples.select(page.example, None, [file, question], api_visibility="private")
    file.change(page.show, file, [seen, turns], api_visibility="private").then(
        page.sides, [turns, first, second], [one, two], api_visibility="private"
    )
    asking: dict[str, Any] = {
        "fn": page.ask,
        "inputs": [file, turns, question, first, second, *sampling],
        "outputs": [turns, one, two, question],
        "api_visibility": "private",
    }
    ask.click(**asking)
    question.submit(**asking)
    stop.click(page.stop, queue=False, api_visibility="private")
    for over in (clear.click, one.clear, two.clear):
        over(page.stop, queue=False, api_visibility="private").then(
            lambda: ([], [], []), None, [turns, one, two], api_visibility="private"
        )
    for chosen in (first, second):
        chosen.change(page.sides, [turns, first, second], [one, two], api_visibility="private")
    button.click(page.closed, [file, asked, choices, first, second], table, api_visibility="private")


def _sampling(options: PageOptions) -> list[Any]:
    now = options.decoding
    with gr.Accordion(tr("How tokens are chosen"), open=False, elem_id="sampling"):
        greedy = gr.Checkbox(not now.sample, label=tr("Always the likeliest token (greedy)"), elem_id="greedy")
        with gr.Row():
            tokens = gr.Number(min(now.max_new_tokens, options.most_tokens), label=tr("Most tokens"), minimum=1,
                               maximum=options.most_tokens, precision=0, min_width=120)  # fmt: skip
            temperature = gr.Slider(0.05, 2, now.temperature, step=0.05, label=tr("Temperature"), min_width=120)
            top_p = gr.Slider(0.05, 1, now.top_p, step=0.05, label="top_p", min_width=120)
            top_k = gr.Number(now.top_k, label=tr("top_k (0: off)"), minimum=0, precision=0, min_width=120)
            seed = gr.Number(-1, label=tr("Seed (-1: a new one each time)"), precision=0, min_width=120)
    return [greedy, temperature, top_p, top_k, tokens, seed]


def _closed_parts() -> tuple[Any, Any, Any, Any]:
    with gr.Accordion(tr("Closed questions"), open=False, elem_id="closed"):
        asked = gr.Textbox(label=tr("Questions, one a line"), lines=3, elem_id="closed-questions")
        choices = gr.Textbox(tr("yes, no"), label=tr("Possible answers, joined by commas"), elem_id="closed-choices")
        button = gr.Button(tr("Probabilities"), elem_id="score")
        table = gr.HTML(elem_id="scores")
    return asked, choices, button, table


def page_settings() -> dict[str, Any]:
    """Return what mounting a page takes: fonts of the visitor's machine, no links, nothing recorded."""
    fonts = ("system-ui", "sans-serif")
    theme = gr.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace"))
    return {
        "theme": theme, "css": _CSS, "footer_links": [], "run_history": False, "enable_monitoring": False,
        "ssr_mode": False, "pwa": False, "mcp_server": False, "show_error": True,
    }  # fmt: skip
