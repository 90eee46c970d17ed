"""Numbers on the pages are the ones in benchmarks/results, and the renderer that puts them there does its work."""

from __future__ import annotations

import json

import pytest

from benchmarks import render as rendering
from tests.docs.pages import ROOT, name

PAGES = list(rendering.pages())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_is_current(page):
    before = page.read_text(encoding="utf-8")
    after = rendering.render(before, chinese=rendering.is_chinese(page))
    assert after == before, f"{name(page)} is not current: `make render`"


def test_results_are_json_objects_that_say_how_they_were_made():
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"command", "date"} <= content.keys(), file.name


@pytest.fixture
def results(tmp_path):
    table = {"columns": ["name", "n"], "columns_zh": ["名称", "数"], "rows": [["a|b", 1], ["c", 2.5]]}
    content = {"table": table, "tuned": {"accuracy": 0.97312}, "runs": [{"seconds": 12}]}
    (tmp_path / "demo.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_renders_a_table_in_both_languages(results):
    text = "before\n<!-- result: demo -->\nold\n<!-- end -->\nafter"
    assert rendering.render(text, results) == (
        "before\n<!-- result: demo -->\n| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n| c | 2.5 |\n<!-- end -->\nafter"
    )
    assert "| 名称 | 数 |" in rendering.render(text, results, chinese=True)


def test_renders_values_inside_a_sentence(results):
    text = (
        "in <!-- result: demo.runs.0.seconds --><!-- end --> s: <!-- result: demo.tuned.accuracy .1% -->?<!-- end -->."
    )
    assert rendering.render(text, results) == (
        "in <!-- result: demo.runs.0.seconds -->12<!-- end --> s: "
        "<!-- result: demo.tuned.accuracy .1% -->97.3%<!-- end -->."
    )


def test_rendering_twice_changes_nothing(results):
    once = rendering.render("<!-- result: demo --><!-- end -->", results)
    assert rendering.render(once, results) == once


@pytest.mark.parametrize("mark", ["missing", "demo.tuned.recall", "demo.runs.3.seconds"])
def test_a_mark_that_names_nothing_is_an_error(results, mark):
    with pytest.raises(rendering.StaleMarkError, match=mark.split(".")[0]):
        rendering.render(f"<!-- result: {mark} --><!-- end -->", results)


def test_a_result_without_a_table_is_an_error(results):
    (results / "plain.json").write_text("{}", encoding="utf-8")
    with pytest.raises(rendering.StaleMarkError, match="table"):
        rendering.render("<!-- result: plain --><!-- end -->", results)
