"""Groups of records whose scores are shown separately: by question, length, label, language, folder and turn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from cogtune.data.records import Question, file_of
from cogtune.evaluate.metric import kind_of
from cogtune.evaluate.text import has_cjk, normalise, words
from cogtune.language import phrase

_MOST = 12  # groups of one kind; the rest is joined
_LABELS = 30  # different right answers up to which each is a label
_YES_NO = frozenset({"yes", "no", "true", "false", "是", "否", "不是", "有", "没有", "对", "不对"})
_ASKS_ZH = ("什么颜色", "多少", "几", "哪里", "哪", "谁", "为什么", "怎么", "什么", "是否", "吗")
_ASK = re.compile(r"(?:how|what|which|where|who|whose|when|why)\b", re.I)
OTHER = phrase("other")
DIMENSIONS = {
    "type": phrase("question"),
    "length": phrase("length of the right answer"),
    "label": phrase("right answer"),
    "language": phrase("language"),
    "folder": phrase("folder"),
    "turn": phrase("turn"),
    "set": phrase("validation set"),
}
LENGTHS = (phrase("1 word"), phrase("2 to 5 words"), phrase("6 to 20 words"), phrase("over 20 words"))
YES_NO = phrase("yes or no")
LANGUAGES = (phrase("Chinese"), phrase("not Chinese"))
TURNS = (phrase("first"), phrase("later"))


def groups(questions: Sequence[Question], sets: Sequence[str] = ()) -> dict[str, dict[str, list[int]]]:
    """Return, for each kind of group that divides the records, group -> positions of its records, largest first.

    ``sets``: the validation set of each record, if there are several.
    """
    ways: dict[str, Callable[[Question], str]] = {
        "type": question_type, "length": _length, "language": _language, "folder": _folder,
        "turn": lambda question: TURNS[min(question.turn, 1)],
    }  # fmt: skip
    labels = [normalise(question.references[0]) for question in questions]
    if len(set(labels)) <= _LABELS and all(kind_of(question.references) != "box" for question in questions):
        ways["label"] = lambda question: normalise(question.references[0])
    found = {}
    for way in DIMENSIONS:
        if way in ways:
            divided = _divided([ways[way](question) for question in questions])
            if len(divided) > 1:
                found[way] = divided
    if len(set(sets)) > 1:
        found["set"] = _divided(sets)
    return found


def question_type(question: Question) -> str:
    """Return what a question asks for, by its words: yes or no, or its question words (``what color``, ``几``)."""
    if all(normalise(reference) in _YES_NO for reference in question.references):
        return YES_NO
    text = question.question
    if has_cjk(text):
        return next((ask for ask in _ASKS_ZH if ask in text), OTHER)
    asked = _ASK.search(text)
    return " ".join(words(text[asked.start() :])[:2]) if asked else " ".join(words(text)[:2]) or OTHER


def _length(question: Question) -> str:
    count = max(len(words(reference)) for reference in question.references)
    return LENGTHS[0 if count <= 1 else 1 if count <= 5 else 2 if count <= 20 else 3]


def _language(question: Question) -> str:
    return LANGUAGES[0 if has_cjk(question.question + question.references[0]) else 1]


def _folder(question: Question) -> str:
    return "/".join(file_of(question.images[0]).parent.parts[-2:]) if question.images else OTHER


def _divided(names: Sequence[str]) -> dict[str, list[int]]:
    largest = [name for name, _ in Counter(names).most_common(_MOST + 1)]
    kept = set(largest if len(largest) <= _MOST else largest[: _MOST - 1])
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name if name in kept else OTHER, []).append(place)
    return dict(sorted(found.items(), key=lambda item: (item[0] == OTHER, -len(item[1]), item[0])))
