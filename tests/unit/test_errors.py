"""What the command line prints of an error, in both languages."""

from __future__ import annotations

import pytest

from cogtune.errors import DataError, InputError, Stopped, check_language, render

FOUND = DataError("labels/7.json: 3 messages", hint="a conversation ends with the assistant", code="data-turns")


def test_english_is_the_message_and_the_hint(monkeypatch):
    monkeypatch.delenv("COGTUNE_LANG", raising=False)
    assert FOUND.render() == (
        "error[data-turns]: labels/7.json: 3 messages\nhint: a conversation ends with the assistant"
    )
    assert render("usage", "no such command") == "error[usage]: no such command"


def test_chinese_is_as_short(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert render("data-turns", "对话 3", "改对话") == "错误[data-turns]：对话 3\n提示：改对话"
    assert render("data-turns", "对话 3") == "错误[data-turns]：对话 3"
    assert str(DataError("三条消息", hint="以回答结束")) == "三条消息\n提示：以回答结束"
    assert FOUND.render().startswith("error[data-turns]"), "an error is shown in the language it was written in"


def test_another_language_is_refused_with_the_ones_there_are(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "fr")
    with pytest.raises(InputError, match="fr; there is en and zh"):
        check_language()
    assert FOUND.render().startswith("error[data-turns]")  # an error of a library call is still readable


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "")
    check_language()


def test_a_stopped_run_keeps_its_code(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert Stopped(15, "step 3 is saved").render().startswith("错误[stopped]")
