"""The gallery: pictures with questions, right answers and every model's answer; worst regressions first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogtune.evaluate.boxes import find_boxes
from cogtune.evaluate.report.pictures import Pictures
from cogtune.evaluate.report.words import both, plain, shown
from cogtune.evaluate.verdict import GROUP_NAMES
from cogtune.language import phrase

BUDGET = 7_000_000  # bytes of the gallery; the page stays under 10 MB
_MOST = 1200  # cards; more are slow to lay out
_TIE = 1e-9
_LONGEST = 1500  # characters of a text
_BOXES = '<p class="legend boxes"><span><i></i>{}</span><span><i class=given></i>{}</span></p>'
CHANGES = {
    "worse": phrase("worse"),
    "better": phrase("better"),
    "same": phrase("same"),
    "right": phrase("right"),
    "wrong": phrase("wrong"),
}
_SIGNS = {"worse": "▼", "better": "▲", "same": "=", "right": "✓", "wrong": "✗"}


def gallery(
    records: Sequence[dict[str, Any]], names: Sequence[str], metric: str, higher: bool, exif: str = "ignore"
) -> str:
    """Return the gallery's controls and cards.

    Args:
        records: lines of ``records.jsonl``.
        names: HTML of the models' names, in the order of the answers.
        metric: the one whose values sort the cards; ``higher``: whether more is better.
        exif: as the model saw the pictures.
    """
    judged = [(record, *_judged(record, metric, higher)) for record in records]
    judged.sort(key=lambda one: one[2])
    pictures = Pictures(exif)
    cards, size = [], 0
    for record, change, _ in judged[:_MOST]:
        card = _card(record, change, names, metric, pictures)
        size += len(card.encode())
        if size + pictures.size > BUDGET:
            break
        cards.append(card)
    taken = judged[: len(cards)]
    kinds = sorted({change for _, change, _ in taken}, key=list(CHANGES).index)
    types = sorted({str(record.get("type", "")) for record, _, _ in taken})
    left = ""
    if len(cards) < len(judged):
        counts = {"shown": len(cards), "count": len(judged)}
        left = f"<p>{both('{shown} of {count} records are shown.', **counts)}</p>"
    keys = f"<p class=keys><kbd>j</kbd> <kbd>k</kbd> {both('next, previous card')} <kbd>/</kbd> {both('text')}</p>"
    boxes = "" if '<rect class="' not in "".join(cards) else _BOXES.format(both("right answer"), names[0])
    body = f"{keys}{boxes}<div class=cards id=cards>{''.join(cards)}</div>"
    return f"{pictures.definitions()}{_controls(kinds, types)}{left}{body}"


def _judged(record: dict[str, Any], metric: str, higher: bool) -> tuple[str, tuple[float, str]]:
    """How a record changed from the second model to the first, and the key that sorts it: worst change first."""
    values = record["scores"].get(metric)
    if not values:
        return "same", (0.0, record["id"])
    sign = 1 if higher else -1
    if len(values) == 1:
        good = sign * values[0]
        return ("right" if good >= (1 if higher else 0) else "wrong"), (good, record["id"])
    gain = sign * (values[0] - values[1])
    change = "better" if gain > _TIE else "worse" if gain < -_TIE else "same"
    return change, (gain if gain < 0 else _late(gain), record["id"])


def _late(gain: float) -> float:
    """Improvements follow the regressions, the largest first; what did not change comes last."""
    return 2.0 - min(gain, 1.0) if gain > 0 else 3.0


def _card(record: dict[str, Any], change: str, names: Sequence[str], metric: str, pictures: Pictures) -> str:
    values = record["scores"].get(metric) or [None] * len(names)
    answers = "".join(
        f"<div><dt>{name}{_value(value)}</dt><dd><bdi>{_cut(answer) or '&nbsp;'}</bdi></dd></div>"
        for name, answer, value in zip(names, record["answers"], values, strict=True)
    )
    references = " | ".join(dict.fromkeys(record["references"]))
    kind, drawn = str(record.get("type", "")), _shown_pictures(record, pictures)
    film = " class=film" if any(map(pictures.is_film, record["images"])) else ""
    return (
        f'<article tabindex=0{film} data-change="{change}" data-type="{shown(kind)}">{drawn}<div>'
        f'<p class="change {change}"><span aria-hidden=true>{_SIGNS[change]}</span> {both(CHANGES[change])}</p>'
        f"<h4><bdi>{_cut(record['question'])}</bdi></h4>"
        f"<dl><div class=reference><dt>{both('right answer')}</dt><dd><bdi>{_cut(references)}</bdi></dd></div>"
        f"{answers}</dl>"
        f"<p class=id><bdi>{shown(record['id'])}</bdi></p></div></article>"
    )


def _value(value: float | None) -> str:
    return "" if value is None else f" <small>{100 * value:.0f}</small>"


def _cut(text: str) -> str:
    return shown(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …")


def _shown_pictures(record: dict[str, Any], pictures: Pictures) -> str:
    """The pictures of a record; boxes of right answer and answer over the last one."""
    boxes = [("right", find_boxes(record["references"][0])), ("given", find_boxes(record["answers"][0]))]
    label, last = plain("picture of {name}", name=record["id"]), len(record["images"]) - 1
    drawn = [pictures.drawn(name, label, boxes if place == last else ()) for place, name in enumerate(record["images"])]
    gone = f"<p class=gone>{both('the picture is not here any more')}</p>"
    return f"<div class=pictures>{''.join(one or gone for one in drawn)}</div>" if drawn else ""


def _controls(kinds: Sequence[str], types: Sequence[str]) -> str:
    buttons = "".join(
        f'<button type=button data-show="{kind}" aria-pressed=false>{both(CHANGES[kind])}</button>' for kind in kinds
    )
    options = "".join(f'<option value="{shown(kind)}">{_option(kind)}</option>' for kind in types)
    return (
        f'<form id=filter role=search aria-label="{plain("filter the records")}">'
        f'<span class=buttons><button type=button data-show="" aria-pressed=true>{both("all")}</button>{buttons}</span>'
        f'<label>{both("question")} <select id=type><option value="">–</option>{options}</select></label>'
        f'<label>{both("text")} <input id=text type=search></label>'
        f'<output id=count aria-live=polite></output></form>'
    )  # fmt: skip


def _option(kind: str) -> str:
    return plain(kind) if kind in GROUP_NAMES else shown(kind)
