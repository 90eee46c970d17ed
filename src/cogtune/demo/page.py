"""The demo's page: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from cogtune.demo.base import STYLE
from cogtune.demo.chart import Line, loss_chart
from cogtune.demo.examples import ShownPicture
from cogtune.demo.score import KINDS
from cogtune.language import html_language, phrase, tr
from cogtune.system import files

_ROWS = {
    "base": phrase("tiny base, untuned"),
    "blind": phrase("tuned, every picture blanked"),
    "tuned": phrase("tuned"),
}
_ORDER = {"base": 1, "blind": 2, "tuned": 3}  # baselines that need no picture come first


def write(
    file: Path, record: dict[str, Any], examples: Sequence[ShownPicture], metrics: Sequence[dict[str, Any]]
) -> None:
    """Write the page for the demo's record, its examples and the run's metrics."""
    files.write_text(file, render(record, examples, metrics))


def render(record: dict[str, Any], examples: Sequence[ShownPicture], metrics: Sequence[dict[str, Any]]) -> str:
    """Return the page's HTML."""
    scores = record["scores"]
    body = [
        f"<h1>{tr('cogtune demo')}</h1>",
        f"<p class=lead>{_lead(record)}</p>",
        f"<h2>{tr('Accuracy')}</h2>",
        _accuracy(scores),
        f"<h2>{tr('Loss')}</h2>",
        _curve(metrics),
        f"<h2>{tr('Pictures, questions, answers')}</h2>",
        f"<p>{tr('Test pictures at even distances through the set, with one question of each kind.')}</p>",
        f"<div class=cards>{''.join(_card(example) for example in examples)}</div>",
        f"<h2>{tr('The merged model')}</h2>",
        _merged(record["merged_answers"]),
        f"<h2>{tr('Time')}</h2>",
        _times(record),
    ]
    return (
        f'<!doctype html>\n<html lang="{html_language()}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{tr('cogtune demo')}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body>{chr(10).join(body)}</body></html>\n"
    )


def _lead(record: dict[str, Any]) -> str:
    scores, data = record["scores"], record["data"]
    return tr(
        "A tiny CogVLM2 was fine-tuned with LoRA on {pictures:,} pictures with {questions:,} questions, in"
        " {seconds:.0f} s. On {asked:,} questions about {unseen:,} pictures it had not seen, right answers went from"
        " {base} to <b>{tuned}</b>; with the pictures blanked, they are {blind}.",
        pictures=data["train"]["pictures"],
        questions=data["train"]["questions"],
        seconds=record["times"]["fine-tuning"]["seconds"],
        asked=data["test"]["questions"],
        unseen=data["test"]["pictures"],
        base=_percent(scores["base"]),
        tuned=_percent(scores["tuned"]),
        blind=_percent(scores["blind"]),
    )


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['accuracy']:.2f} %"


def _accuracy(scores: dict[str, dict[str, Any]]) -> str:
    kinds = [kind for kind in KINDS if kind in scores["tuned"]["by_kind"]]
    totals = [f"{tr(kind)}<br><small>{scores['tuned']['by_kind'][kind]['total']:,}</small>" for kind in kinds]
    head = "".join(
        f"<th>{title}</th>" for title in ["", f"{tr('all')}<br><small>{scores['tuned']['total']:,}</small>", *totals]
    )
    rows = []
    for name in sorted(scores, key=lambda name: _ORDER.get(name, 0)):
        found = scores[name]
        label = escape(tr(_ROWS[name]) if name in _ROWS else tr("no picture, no model: {name}", name=tr(name)))
        bar = f"<div class=bar style='width:{100 * found['accuracy']:.2f}%'></div>"
        cells = "".join(f"<td>{_percent(found['by_kind'][kind])}</td>" for kind in kinds)
        rows.append(f"<tr class={'tuned' if name == 'tuned' else 'other'}><th>{label}{bar}</th>"
                    f"<td><b>{_percent(found)}</b></td>{cells}</tr>")  # fmt: skip
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class=wide><table class=scores>{table}</table></div>"


def _curve(metrics: Sequence[dict[str, Any]]) -> str:
    points = {kind: [(line["step"], line["loss"]) for line in metrics if line["kind"] == kind]
              for kind in ("train", "validation")}  # fmt: skip
    return loss_chart([Line(tr("training"), "training", points["train"]),
                       Line(tr("validation pictures"), "validation", points["validation"], dots=True)])  # fmt: skip


def _card(example: ShownPicture) -> str:
    rows = []
    for (question, reference), base, tuned in zip(
        example.questions, example.answers["base"], example.answers["tuned"], strict=True
    ):
        both = _answer(tr("base"), base, reference) + _answer(tr("tuned"), tuned, reference, corrected=True)
        rows.append(f"<dt>{escape(question)}</dt><dd>{both}</dd>")
    image = (
        f'<img src="{_data_uri(example.image)}" alt="{escape(tr("test picture {name}", name=example.picture.name))}">'
    )
    return f"<figure>{image}<dl>{''.join(rows)}</dl></figure>"


def _answer(who: str, answer: str, reference: str, *, corrected: bool = False) -> str:
    right = answer == reference
    note = f" <small>{_right(reference)}</small>" if corrected and not right else ""
    return f"<div class={'right' if right else 'wrong'}><small>{who}</small> {escape(answer) or '&nbsp;'}{note}</div>"


def _right(reference: str) -> str:
    return escape(tr("(right: {reference})", reference=reference))


def _merged(answers: Sequence[dict[str, str]]) -> str:
    items = [
        f"<li>{escape(tr('picture {name}', name=one['picture']))}: {escape(one['question'])} "
        f"<b>{escape(one['answer'])}</b> <small>{_right(one['reference'])}</small></li>"
        for one in answers
    ]
    return f"<ul>{''.join(items)}</ul>"


def _times(record: dict[str, Any]) -> str:
    rows = [(tr(name), time["seconds"]) for name, time in record["times"].items()]
    rows.append((tr("everything, imports included"), record["total_seconds"]))
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{seconds:.1f} s</td></tr>" for name, seconds in rows)
    machine, versions = record["machine"], record["versions"]
    note = tr(
        "{cpu}, {cores} cores, {threads} threads; Python {python}, torch {torch}, transformers {transformers},"
        " peft {peft}",
        **{name: machine[name] for name in ("cpu", "cores", "threads")},
        **{name: versions[name] for name in ("python", "torch", "transformers", "peft")},
    )
    return f"<div class=wide><table>{cells}</table></div><p><small>{escape(note)}</small></p>"


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
