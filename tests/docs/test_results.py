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
    (tmp_path / "sample.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_renders_a_table_in_both_languages(results):
    text = "before\n<!-- result: sample -->\nold\n<!-- end -->\nafter"
    assert rendering.render(text, results) == (
        "before\n<!-- result: sample -->\n| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n| c | 2.5 |\n<!-- end -->\nafter"
    )
    assert "| 名称 | 数 |" in rendering.render(text, results, chinese=True)


def test_renders_values_inside_a_sentence(results):
    text = (
        "in <!-- result: sample.runs.0.seconds --><!-- end --> s,\n"
        "<!-- result: sample.tuned.accuracy .1% -->?<!-- end --> right."
    )
    assert rendering.render(text, results) == (
        "in <!-- result: sample.runs.0.seconds -->12<!-- end --> s,\n"
        "<!-- result: sample.tuned.accuracy .1% -->97.3%<!-- end --> right."
    )


def test_rendering_twice_changes_nothing(results):
    once = rendering.render("<!-- result: sample --><!-- end -->", results)
    assert rendering.render(once, results) == once


@pytest.mark.parametrize("mark", ["missing", "sample.tuned.recall", "sample.runs.3.seconds"])
def test_a_mark_that_names_nothing_is_an_error(results, mark):
    with pytest.raises(rendering.StaleMarkError, match=mark.split(".")[0]):
        rendering.render(f"<!-- result: {mark} --><!-- end -->", results)


def test_a_result_without_a_table_is_an_error(results):
    (results / "plain.json").write_text("{}", encoding="utf-8")
    with pytest.raises(rendering.StaleMarkError, match="table"):
        rendering.render("<!-- result: plain --><!-- end -->", results)


def test_an_optional_mark_says_that_its_file_is_absent(results):
    text = "a <!-- result?: later.x -->old<!-- end --> b\n<!-- result?: later -->\nold\n<!-- end -->"
    assert rendering.render(text, results) == (
        "a <!-- result?: later.x -->(not measured yet)<!-- end --> b\n"
        "<!-- result?: later -->\n(not measured yet)\n<!-- end -->"
    )
    assert "（尚未测量）" in rendering.render(text, results, chinese=True)


def test_an_optional_mark_is_an_ordinary_one_where_the_file_is(results):
    assert rendering.render("<!-- result?: sample.runs.0.seconds -->old<!-- end -->", results) == (
        "<!-- result?: sample.runs.0.seconds -->12<!-- end -->"
    )


def score(right):
    kinds = {
        "yes or no": {"right": 3, "total": 4, "accuracy": 0.75},
        "colour": {"right": 1, "total": 4, "accuracy": 0.25},
    }
    return {"accuracy": right / 8, "right": right, "total": 8, "by_kind": kinds}


def test_the_demos_record_becomes_a_table_with_the_tuned_model_last(tmp_path):
    record = {
        "scores": {"always “no”": score(2), "base": score(1), "tuned": score(7), "blind": score(4)},
        "machine": {"cores": 2, "cpu": "A CPU"},
        "total_seconds": 201.4,
        "date": "2026-01-02T03:04:05+00:00",
    }
    (tmp_path / "demo.json").write_text(json.dumps(record), encoding="utf-8")
    lines = rendering.render("<!-- result?: demo --><!-- end -->", tmp_path).splitlines()
    assert lines[1] == "| right answers | all | yes or no | colour |"
    assert [line.split(" | ")[1] for line in lines[3:7]] == ["12.5 %", "25.0 %", "50.0 %", "87.5 %"]
    assert lines[6].startswith("| fine-tuned |")
    assert lines[8] == "Of 8 test questions; 201 s in all on 2 CPU cores (A CPU), 2026-01-02."
    assert "| 微调后 | 87.5 % |" in rendering.render("<!-- result?: demo --><!-- end -->", tmp_path, chinese=True)
