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
from cogtune.system import files

_ROWS = {"base": "tiny base, untuned", "blind": "tuned, every picture blanked", "tuned": "tuned"}
_ORDER = {"base": 1, "blind": 2, "tuned": 3}  # baselines that need no picture come first


def write(
    file: Path, record: dict[str, Any], examples: Sequence[ShownPicture], metrics: Sequence[dict[str, Any]]
) -> None:
    """Write the page for the demo's record, its examples and the run's metrics."""
    files.write_text(file, render(record, examples, metrics))


def render(record: dict[str, Any], examples: Sequence[ShownPicture], metrics: Sequence[dict[str, Any]]) -> str:
    """Return the page's HTML."""
    scores, data = record["scores"], record["data"]
    body = [
        "<h1>cogtune demo</h1>",
        f"<p class=lead>A tiny CogVLM2 was fine-tuned with LoRA on {data['train']['pictures']:,} pictures with "
        f"{data['train']['questions']:,} questions, in {record['times']['fine-tuning']['seconds']:.0f} s. On "
        f"{data['test']['questions']:,} questions about {data['test']['pictures']:,} pictures it had not seen, right "
        f"answers went from {_percent(scores['base'])} to <b>{_percent(scores['tuned'])}</b>; with the pictures "
        f"blanked, they are {_percent(scores['blind'])}.</p>",
        "<h2>Accuracy</h2>",
        _accuracy(scores),
        "<h2>Loss</h2>",
        _curve(metrics),
        "<h2>Pictures, questions, answers</h2>",
        "<p>Test pictures at even distances through the set, with one question of each kind.</p>",
        f"<div class=cards>{''.join(_card(example) for example in examples)}</div>",
        "<h2>The merged model</h2>",
        _merged(record["merged_answers"]),
        "<h2>Time</h2>",
        _times(record),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cogtune demo</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body>{chr(10).join(body)}</body></html>\n"
    )


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['accuracy']:.2f} %"


def _accuracy(scores: dict[str, dict[str, Any]]) -> str:
    kinds = [kind for kind in KINDS if kind in scores["tuned"]["by_kind"]]
    totals = [f"{kind}<br><small>{scores['tuned']['by_kind'][kind]['total']:,}</small>" for kind in kinds]
    head = "".join(
        f"<th>{title}</th>" for title in ["", f"all<br><small>{scores['tuned']['total']:,}</small>", *totals]
    )
    rows = []
    for name in sorted(scores, key=lambda name: _ORDER.get(name, 0)):
        found = scores[name]
        label = escape(_ROWS.get(name, f"no picture, no model: {name}"))
        bar = f"<div class=bar style='width:{100 * found['accuracy']:.2f}%'></div>"
        cells = "".join(f"<td>{_percent(found['by_kind'][kind])}</td>" for kind in kinds)
        rows.append(f"<tr class={'tuned' if name == 'tuned' else 'other'}><th>{label}{bar}</th>"
                    f"<td><b>{_percent(found)}</b></td>{cells}</tr>")  # fmt: skip
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class=wide><table class=scores>{table}</table></div>"


def _curve(metrics: Sequence[dict[str, Any]]) -> str:
    points = {kind: [(line["step"], line["loss"]) for line in metrics if line["kind"] == kind]
              for kind in ("train", "validation")}  # fmt: skip
    return loss_chart([Line("training", "training", points["train"]),
                       Line("validation pictures", "validation", points["validation"], dots=True)])  # fmt: skip


def _card(example: ShownPicture) -> str:
    rows = []
    for (question, reference), base, tuned in zip(
        example.questions, example.answers["base"], example.answers["tuned"], strict=True
    ):
        both = _answer("base", base, reference) + _answer("tuned", tuned, reference)
        rows.append(f"<dt>{escape(question)}</dt><dd>{both}</dd>")
    image = f'<img src="{_data_uri(example.image)}" alt="test picture {escape(example.picture.name)}">'
    return f"<figure>{image}<dl>{''.join(rows)}</dl></figure>"


def _answer(who: str, answer: str, reference: str) -> str:
    right = answer == reference
    note = "" if right else f" <small>(right: {escape(reference)})</small>" if who == "tuned" else ""
    return f"<div class={'right' if right else 'wrong'}><small>{who}</small> {escape(answer) or '&nbsp;'}{note}</div>"


def _merged(answers: Sequence[dict[str, str]]) -> str:
    items = [
        f"<li>picture {escape(one['picture'])}: {escape(one['question'])} <b>{escape(one['answer'])}</b> "
        f"<small>(right: {escape(one['reference'])})</small></li>"
        for one in answers
    ]
    return f"<ul>{''.join(items)}</ul>"


def _times(record: dict[str, Any]) -> str:
    rows = [(name, time["seconds"]) for name, time in record["times"].items()]
    rows.append(("everything, imports included", record["total_seconds"]))
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{seconds:.1f} s</td></tr>" for name, seconds in rows)
    machine, versions = record["machine"], record["versions"]
    note = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}"
    )
    return f"<div class=wide><table>{cells}</table></div><p><small>{escape(note)}</small></p>"


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
