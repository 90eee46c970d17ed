from __future__ import annotations

import pytest

from cogtune.errors import InputError
from cogtune.processing.prompt import build_prompt

HISTORY = [("What is it?", "A bus."), ("Where?", "On\na road.")]

EXPECTED = {
    "chat": "Question: What is it? Answer: A bus.\nQuestion: Where? Answer: On\na road.\nQuestion: Why? Answer:",
    "vqa": "Question: What is it? Short answer: A bus.\nQuestion: Where? Short answer: On\na road.\n"
    "Question: Why? Short answer:",
    "base": "Why?",
}


@pytest.mark.parametrize("template", EXPECTED)
def test_published_templates(template):
    assert build_prompt("Why?", HISTORY, template) == EXPECTED[template]


@pytest.mark.parametrize(
    ("template", "text"), [("chat", "Question: a Answer:"), ("vqa", "Question: a Short answer:"), ("base", "a")]
)
def test_without_history(template, text):
    assert build_prompt("a", (), template) == text


def test_nothing_is_stripped_or_formatted():
    assert build_prompt(" {x}\n", [("%s ", " b ")]) == "Question: %s  Answer:  b \nQuestion:  {x}\n Answer:"


def test_unknown_template_names_the_known():
    with pytest.raises(InputError, match=r"'llama' is not a template; there are chat, vqa, base"):
        build_prompt("q", (), "llama")


@pytest.mark.parametrize("history", [["ab"], [("q",)], [("q", "a", "b")], [("q", None)], [{"q": 1, "a": 2}], "ab"])
def test_history_is_pairs_of_text(history):
    with pytest.raises(InputError, match=r"history item 1 .* not a \(question, answer\) pair"):
        build_prompt("q", history)


def test_history_is_checked_even_where_the_template_has_no_room_for_it():
    with pytest.raises(InputError):
        build_prompt("q", ["ab"], "base")
    assert build_prompt("q", [["a list", "is a pair too"]], "base") == "q"


def test_query_is_text():
    with pytest.raises(InputError, match="the query is int"):
        build_prompt(3)
