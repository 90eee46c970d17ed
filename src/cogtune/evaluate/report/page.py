"""The report: one HTML file with everything in it, in both languages, that opens from disk."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.evaluate.breakdown import DIMENSIONS
from cogtune.evaluate.metrics import find_metric
from cogtune.evaluate.report import sections
from cogtune.evaluate.report.gallery import gallery
from cogtune.evaluate.report.words import both, in_language, number, pair, shown
from cogtune.evaluate.run_folder import RunFolder
from cogtune.evaluate.verdict import GROUP_NAMES
from cogtune.language import language, phrase
from cogtune.system import files

_CODE = re.compile("`([^`<]+)`")
_ASSETS = Path(__file__).parent / "assets"
_NAMES = {"tuned": phrase("tuned"), "base": phrase("base")}
_CONTROLS = {"blank": phrase("{name}, pictures blanked"), "swap": phrase("{name}, pictures swapped")}


@dataclass(frozen=True)
class Report:
    """What a report shows; any part may be missing.

    Attributes:
        title: what the report is about, such as the output folder's name.
        run: a training; ``other``: one whose losses are drawn beside it.
        result: the content of ``eval.json``; ``records``: the lines of ``records.jsonl``.
        notes: sentences, HTML in both languages.
        extra: further sections, title and HTML.
    """

    title: str
    run: RunFolder | None = None
    other: RunFolder | None = None
    result: dict[str, Any] | None = None
    records: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()
    extra: Sequence[tuple[str, str]] = ()

    @property
    def verdict(self) -> list[str]:
        """The sentences of the verdict in the user's language; none without compared answers."""
        return [] if self.result is None else list(self.result["verdict"][language()])


def write(path: Path, report: Report) -> None:
    """Write the report."""
    files.write_text(path, render(report))


def render(report: Report) -> str:
    """Return the page."""
    script = (_ASSETS / "report.js").read_text(encoding="utf-8")
    style = (_ASSETS / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [_head(report), *(_section(title, body) for title, body in _body(report) if body)]
    return (
        f'<!doctype html>\n<html lang="{language()}"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{shown(report.title)} - cogtune</title>\n<style>{style}</style></head>\n"
        f"<body><main>{chr(10).join(parts)}</main>\n<script>{script}</script></body></html>\n"
    )


def _head(report: Report) -> str:
    switch = (
        '<nav><button type=button data-lang=en aria-pressed=false>English</button>'
        '<button type=button data-lang=zh aria-pressed=false>中文</button></nav>'
    )  # fmt: skip
    lead = ""
    if report.result is not None:
        said = report.result["verdict"]
        lines = [pair(shown(en), shown(zh)) for en, zh in zip(said["en"], said["zh"], strict=True)]
        lead = "".join(f"<p class=lead>{line}</p>" for line in lines)
    elif report.run is not None:
        lead = f"<p class=lead>{both('No answers were compared: the training had no validation questions.')}</p>"
    marked = [_CODE.sub(r"<code>\1</code>", note) for note in report.notes]
    notes = "".join(f"<p class=note role=note>{note}</p>" for note in marked)
    failed = "" if report.run is None else sections.unfinished(report.run)
    warned = "" if report.run is None else sections.warnings(report.run)
    return f"<header>{switch}<h1><bdi>{shown(report.title)}</bdi></h1>{failed}{lead}{notes}{warned}</header>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{both(title)}</h2>{body}</section>"


def _body(report: Report) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    if report.result is not None:
        parts += [(phrase("Values"), _values(report.result)), (phrase("Groups"), _groups(report.result))]
    if report.run is not None:
        parts.append((phrase("Curves"), sections.curves(report.run, report.other)))
    if report.result is not None and report.records:
        first = report.result["metrics"][0]
        names = [_name(model) for model in report.result["models"]]
        exif = str(report.result["data"].get("exif", "ignore"))
        shown_cards = gallery(report.records, names, first["name"], first["higher_is_better"], exif)
        parts.append((phrase("Pictures, questions, answers"), shown_cards))
        parts.append((phrase("Lengths of answers"), _lengths(report)))
    if report.run is not None:
        parts += [
            (phrase("What ran"), sections.what_ran(report.run)),
            (phrase("Left out, cut, repaired"), sections.data_report(report.run)),
            (phrase("The plan and what was measured"), sections.plan_report(report.run)),
        ]
    elif report.result is not None:
        parts.append((phrase("What ran"), _evaluated(report.result)))
    return [*parts, *report.extra]


def _name(model: dict[str, Any]) -> str:
    name = both(_NAMES[model["name"]]) if model["name"] in _NAMES else f"<bdi>{shown(model['name'])}</bdi>"
    if model.get("control"):
        template = _CONTROLS[model["control"]]
        return both(template, name=model["name"]) if model["name"] not in _NAMES else _of_own(template, model["name"])
    return name


def _of_own(template: str, name: str) -> str:
    """A control's name around a name of ours, each in both languages."""
    return pair(*(in_language(one, template, name=in_language(one, _NAMES[name])) for one in ("en", "zh")))


def _values(result: dict[str, Any]) -> str:
    """Every metric of every model, with intervals, and differences with their certainty."""
    metrics = result["metrics"]
    heads = "".join(
        f"<th scope=col>{both(find_metric(one['name']).title)}"
        f"<br><small>{both('{count:,} answers', count=one['values'][0]['records'])}</small></th>"
        for one in metrics
    )
    rows = []
    for place, model in enumerate(result["models"]):
        cells = "".join(f"<td>{_value(one['values'][place])}{_difference(one, place)}</td>" for one in metrics)
        first = metrics[0]["values"][place]["value"] if metrics[0]["higher_is_better"] else None
        bar = "" if first is None else f"<div class=bar style='width:{100 * min(1.0, max(0.0, first)):.1f}%'></div>"
        style = "first" if place == 0 else "other"
        rows.append(f'<tr class="{style}"><th scope=row>{_name(model)}{bar}</th>{cells}</tr>')
    explained = "".join(
        f"<li>{both(find_metric(one['name']).title)}: {both(find_metric(one['name']).about)}</li>" for one in metrics
    )
    summary = f"<summary>{both('what the numbers are')}</summary>"
    about = f"<details>{summary}<ul>{explained}</ul><p>{both(_ABOUT)}</p></details>"
    table = f"<table class=values><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=wide>{table}</div>{about}"


_ABOUT = phrase(
    "Values are points (hundredths), in brackets 95 % intervals by a bootstrap over pictures. A difference is called"
    " certain where its interval and a paired test over pictures both exclude none."
)


def _value(value: dict[str, Any]) -> str:
    text = f"<b>{number(100 * value['value'])}</b>"
    if value["low"] is not None:
        text += f" <small>({number(100 * value['low'])} – {number(100 * value['high'])})</small>"
    return text


def _difference(metric: dict[str, Any], place: int) -> str:
    """How much the first model exceeds this one."""
    if place == 0:
        return ""
    found = metric["differences"][place - 1]
    points = _signed(-found["value"])
    if found["certain"]:
        return f"<br><small>{both('{points} against the first row: certain', points=points)}</small>"
    return f"<br><small>{both('{points} against the first row: could be chance', points=points)}</small>"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}" if abs(value) >= 0.0005 else "0.0"


def _groups(result: dict[str, Any]) -> str:
    metric = result["metrics"][0]
    names = "".join(f"<th scope=col>{_name(model)}</th>" for model in result["models"])
    tables = []
    for way, parts in metric["groups"].items():
        rows = "".join(
            f"<tr><th scope=row>{_group(name)}</th><td>{found['records']:,}</td>"
            f"{''.join(f'<td>{number(100 * value)}</td>' for value in found['values'])}</tr>"
            for name, found in parts.items()
        )
        head = f"<tr><th scope=col>{both(DIMENSIONS[way])}</th><th scope=col>{both('answers')}</th>{names}</tr>"
        tables.append(f"<div class=wide><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>")
    if not tables:
        return ""
    return f"<p>{both(find_metric(metric['name']).title)}</p><div class=groups>{''.join(tables)}</div>"


def _group(name: str) -> str:
    return both(name) if name in GROUP_NAMES else f"<bdi>{shown(name)}</bdi>"


_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def _lengths(report: Report) -> str:
    """Histograms of the words of right answers and of the first model's answers."""
    from cogtune.evaluate.text import words

    assert report.result is not None
    found = []
    for title, texts in (
        (phrase("words of the right answer"), [record["references"][0] for record in report.records]),
        (phrase("words of the answer"), [record["answers"][0] for record in report.records]),
    ):
        counts: dict[str, int] = {}
        lengths = [len(words(text)) for text in texts]
        for low, high in zip(_EDGES, (*_EDGES[1:], 10**9), strict=True):
            name = f"{low}" if high - low == 1 else f"{low}-{high - 1}" if high < 10**9 else f"{low}+"
            counts[name] = sum(low <= length < high for length in lengths)
        used = [name for name, count in counts.items() if count]
        kept = list(counts)[list(counts).index(used[0]) : list(counts).index(used[-1]) + 1] if used else []
        found.append(sections.histogram(title, {name: counts[name] for name in kept}, both("answers")))
    return f"<div class=groups>{''.join(found)}</div>"


def _evaluated(result: dict[str, Any]) -> str:
    """What an evaluation without a training asked, and of which models."""
    data = result["data"]
    asked = both("{count:,} about {pictures:,} pictures", count=data["questions"], pictures=data["pictures"])
    rows = [
        (both("data"), shown(", ".join(data["paths"]))),
        (both("fingerprint of the data"), data["fingerprint"] and f"<code>{shown(data['fingerprint'][:16])}</code>"),
        (both("questions"), asked),
        (both("further right answers"), number(data["joined"], 0) if data["joined"] else ""),
        (both("without a right answer, left out"), number(data["unanswered"], 0) if data["unanswered"] else ""),
    ]
    for model in result["models"]:
        source = [str(model[key]) for key in ("adapter", "model", "predictions") if model.get(key)]
        rows.append((_name(model), shown(" · ".join(source))))
    return sections.table(rows)
