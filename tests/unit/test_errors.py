"""What the command line prints of an error, in both languages."""

from __future__ import annotations

import pytest

from cogtune.errors import DataError, InputError, Stopped, language, render

FOUND = DataError("labels/7.json: 3 messages", hint="a conversation ends with the assistant", code="data-turns")


def test_english_is_the_message_and_the_hint(monkeypatch):
    monkeypatch.delenv("COGTUNE_LANG", raising=False)
    assert FOUND.render() == (
        "error[data-turns]: labels/7.json: 3 messages\nhint: a conversation ends with the assistant"
    )
    assert render("usage", "no such command") == "error[usage]: no such command"


@pytest.mark.parametrize("value", ["zh", "zh_CN.UTF-8", "ZH-tw"])
def test_chinese_says_cause_and_remedy_and_keeps_the_details(monkeypatch, value):
    monkeypatch.setenv("COGTUNE_LANG", value)
    cause, details, remedy, hint = FOUND.render().splitlines()
    assert cause == "错误[data-turns]：user 与 assistant 没有交替，或最后一个问题没有回答"
    assert details == "详情：labels/7.json: 3 messages"
    assert remedy == "处理：修正对话"
    assert hint == "提示：a conversation ends with the assistant"


def test_a_link_of_the_page_is_a_path_on_the_terminal(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert "处理：见数据格式（docs/zh/guides/data.md）" in render("data-no-images", "x")


def test_another_language_is_refused_with_the_ones_there_are(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "fr")
    with pytest.raises(InputError, match="fr; there is en and zh"):
        language()
    assert FOUND.render().startswith("error[data-turns]")  # an error of a library call is still readable


def test_an_empty_variable_is_english(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "")
    assert language() == "en"


def test_a_stopped_run_keeps_its_code(monkeypatch):
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert Stopped(15, "step 3 is saved").render().startswith("错误[stopped]")
