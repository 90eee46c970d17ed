"""Numbers on the pages are the ones in benchmarks/results, and the renderer that puts them there does its work."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
from fnmatch import fnmatch
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks import render as rendering
from benchmarks.quality_view import difference, packed
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


def test_a_shown_command_is_taken_by_its_script(monkeypatch):
    """Not run: the script stops where it has parsed its arguments."""

    class Parsed(Exception):
        pass

    def stop(*given):
        parse(*given)
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^`python -m (benchmarks\.\w+) ?(.*)`$", text, re.MULTILINE)
    assert shown
    for script, words in shown:
        monkeypatch.setattr("sys.argv", [script, *shlex.split(words)])
        with pytest.raises(Parsed):
            runpy.run_module(script, run_name="__main__")


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_results_page_names_every_file_and_its_command(page):
    text = (ROOT / "benchmarks" / page).read_text(encoding="utf-8")
    named = {pattern.removeprefix("results/") for pattern in re.findall(r"`([\w/*-]+\.json)`", text)}
    files = {file.name for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert {file for file in files if not any(fnmatch(file, pattern) for pattern in named)} == set()
    assert {pattern for pattern in named if not any(fnmatch(file, pattern) for file in files)} == set()
    scripts = re.findall(r"python -m benchmarks\.(\w+)", text)
    assert [script for script in scripts if not (ROOT / "benchmarks" / f"{script}.py").is_file()] == []


def test_nothing_below_the_tests_imports_them():
    """What both need lives in `cogtune`; tests import benchmarks only to test them."""
    importing = re.compile(r"^\s*(?:from|import) tests\b", re.M)
    files = [file for folder in ("src", "benchmarks", "scripts") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert [name(file) for file in files if importing.search(file.read_text(encoding="utf-8"))] == []


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


@pytest.mark.parametrize("text", ["<!-- result?: sample.tuned:.1f -->8<!-- end -->", "<!-- result: sample -->8"])
def test_what_is_nearly_a_mark_is_an_error(results, text):
    with pytest.raises(rendering.StaleMarkError, match="is no mark"):
        rendering.render(text, results)


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


def bench_file(folder, name, kind, rows, **more):
    versions = {"torch": "2.11", "transformers": "5.17", "peft": "0.21"}
    content = {"kind": kind, "command": "cogtune bench", "date": "2026-11-25T08:00:00", "commit": "abcdef0123456",
               "card": "NVIDIA H100", "machine": "x86_64", "versions": versions, "rows": rows, **more}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def step_row(name, milliseconds, batch=1, **more):
    return {"name": name, "median_ms": milliseconds, "min_ms": milliseconds, "max_ms": milliseconds, "changes": {},
            "batch_size": batch, "samples_per_second": 1000 * batch / milliseconds, "answers_per_second": 1.0,
            "lora_mfu": 0.5, "allocated_gib": 9.0, "reserved_gib": 10.0, **more}  # fmt: skip


def shown(folder, name, *, chinese=False):
    return rendering.render(f"<!-- result: {name} --><!-- end -->", folder, chinese=chinese)


def test_steps_are_compared_per_sample_with_the_baseline(tmp_path):
    rows = [step_row("other", 400.0), step_row("baseline", 1600.0), step_row("cached", 320.0, batch=2)]
    rows += [{"name": "broken", "error": "OutOfMemoryError: no room\nmore"}]
    bench_file(tmp_path, "speed", "train", rows)
    lines = {line.split(" | ")[0]: line for line in shown(tmp_path, "speed").splitlines()}
    assert "| 10.00x |" in lines["| `cached`"]  # 1600 for one against 320 for two
    assert "| 4.00x |" in lines["| `other`"]
    assert "| OutOfMemoryError: no room | - |" in lines["| `broken`"]
    assert "NVIDIA H100, torch 2.11" in shown(tmp_path, "speed")
    assert "<details><summary>Command</summary>\n\n`cogtune bench`\n\n</details>" in shown(tmp_path, "speed")
    assert "提交 abcdef0123" in shown(tmp_path, "speed", chinese=True)


def test_the_planners_word_is_counted(tmp_path):
    rows = [step_row("batch-1", 1.0, plan={"reserved_gib": 10.4}), step_row("batch-8", 1.0, reserved_gib=20.0,
            plan={"reserved_gib": 18.9})]  # fmt: skip
    bench_file(tmp_path, "sweep-memory", "sweep-memory", rows)
    text = shown(tmp_path, "sweep-memory")
    assert "at 1 of 2 points" in text
    assert "| -5.5 % | outside |" in text


def test_fit_shows_plan_and_cap_and_no_goal(tmp_path):
    plan = {"reserved_gib": 10.0, "load_reserved_gib": 10.4}
    row = {"name": "nf4", "cap_gib": 11, "peak_reserved_gib": 10.2, "driver_gib": 10.9, "plan": plan,
           "median_ms": 300.0, "load_s": 12.0, "command": "cogtune bench train"}  # fmt: skip
    bench_file(tmp_path, "fit", "fit", [row, {"name": "fails", "error": "x"}])
    text = shown(tmp_path, "fit")
    assert "| `nf4` | 10.20 | 10.40 | 10.90 | 11 | 300.0 | 12.0 |" in text
    assert "| `fails` | x | - | - | - | - | - |" in text


def test_a_sweep_is_a_table_and_a_drawing(tmp_path):
    rows = [step_row(f"text-{n}", float(n), plan={"reserved_gib": 11.0}) for n in (100, 200, 400)]
    check = {"series": "text", "allowed": 1.3, "median_ms": [[200, 1.4]], "median_ms_over": [200],
             "allocated_gib": [[200, 1.0]], "allocated_gib_over": []}  # fmt: skip
    bench_file(tmp_path, "sweep-text", "sweep-text", rows, check=check)
    text = shown(tmp_path, "sweep-text")
    assert "+10.0 %" in text
    assert "1.40x the line" in text
    assert "above: time: 200." in text
    ((file, drawing),) = rendering.plots(tmp_path).items()
    assert f"plots/{file.name}" in text
    assert drawing.count("<circle") == 6
    assert rendering.plots() == {f: f.read_text(encoding="utf-8") for f in rendering.plots()}  # the committed ones


def test_other_measurements_show_their_own_numbers(tmp_path):
    bench_file(tmp_path, "loader", "loader", [{"name": "jpeg", "wait_share": 0.01}, {"name": "cached", "taken": None}])
    assert "| jpeg | 0.01 | - |" in shown(tmp_path, "loader")


def test_many_cards_show_scaling_and_the_worst_card(tmp_path):
    own = {
        "ranks": 2,
        "rows_per_step": 2,
        "samples_per_second": 30.0,
        "median_ms": 66.7,
        "start_s": 40.0,
        "save_s": 1.5,
    }
    own |= {"card_mib": [20000, 21000], "host_anonymous_gib": 5.0, "plan": {"median_ms": 70.0, "driver_mib": 22000}}
    rows = [{"name": "cache", "wall_s": 9.0}, {"name": "ddp", **own}, {"name": "zero3", "error": "x"}]
    losses = {"compared": ["ddp", "fsdp2"], "largest_difference": 0.01, "allowed": 0.02}
    bench_file(tmp_path, "eight-cards", "cards", rows, scaling={"ddp": 1.95}, losses=losses)
    text = shown(tmp_path, "eight-cards")
    assert "| `ddp` | 2 | 2 | 30.00 | 1.95x | 67 (70) | 21000 (22000) | 5.0 | 40 / 1.5 |  |" in text
    assert "differ by at most 0.0100" in text


def seed_rows(right, losses):
    """Seeds of a row by which of its answers are right."""
    return [{"seed": number, "steps": 20, "accuracy": sum(hits) / len(hits), "loss": loss,
             "right": packed(np.array(hits, bool))}
            for number, (hits, loss) in enumerate(zip(right, losses, strict=True))]  # fmt: skip


def quality_row(name, right):
    changes = {} if name == "plain" else {"quant.experts": name}
    seeds = seed_rows(right, [0.1, 0.2, 0.3][: len(right)])
    return {"name": name, "changes": changes, "dtype": "bfloat16", "total": len(right[0]), "seeds": seeds,
            "untuned": {"accuracy": 0.5, "loss": 0.25}, "settings": {"train": {"batch_size": 32}}}  # fmt: skip


def test_number_formats_are_compared_with_the_plain_row(tmp_path):
    plain = [[1] * 90 + [0] * 10] * 3
    worse = [[1] * 80 + [0] * 20, [1] * 80 + [0] * 20, [0] + [1] * 79 + [0] * 20]
    # the gap is 10 drawings and a third of one: 1.96 * 0.3022 / 10 for drawings, 2.776 * 0.0033 for seeds
    rows = [quality_row("nf4", worse), quality_row("plain", plain), {"name": "x", "changes": {"a": "b"}, "error": "oh"}]
    bench_file(tmp_path, "quality", "quality", rows)
    text = shown(tmp_path, "quality")
    assert "| `quant.experts=nf4` | 50.00 % (0.2500) | 79.67 % (79.00 - 80.00) | -10.33 ± 6.00 | 0.2000" in text
    assert "| not quantised | 50.00 % (0.2500) | 90.00 % (90.00 - 90.00) | - |" in text
    assert "| oh |" in text
    assert "trained on 640 drawings, tested on 100; after training the mean of 3 seeds" in text
    assert "±7.9 points" in text
    only = rendering.render("<!-- result: quality cached --><!-- end -->", tmp_path)
    assert "not quantised" in only
    assert "nf4" not in only
    row = quality_row("nf4", worse[:1])
    assert difference(row, quality_row("plain", plain[:1])) == (pytest.approx(-10), None)


def test_the_interval_of_a_difference_holds_the_true_one_as_often_as_it_says():
    each = [NormalDist().cdf(1.5 * share / (2 + 0.15**2) ** 0.5) for share in (0.9, 1.0)]
    true, rng, held = 100 * (each[0] - each[1]), np.random.default_rng(0), 0
    for _ in range(200):
        hard, shares = rng.normal(size=500), rng.normal([[0.9], [1.0]], 0.1, size=(2, 3))
        sides = [[hard + rng.normal(size=500) < 1.5 * share for share in shares[side]] for side in (0, 1)]
        points, half = difference(*(quality_row(name, sides[side]) for side, name in enumerate(("nf4", "plain"))))
        held += abs(points - true) < half
    assert held >= 180


def test_a_language_models_loss_is_shown_by_format(tmp_path):
    row = {"format": "none", "dtype": "float32", "loss": 2.5, "perplexity": 12.18, "passages": [2.4, 2.6]}
    more = {"format": "nf4", "more": {"loss": 0.1, "half": 0.02}}
    bench_file(tmp_path, "text-loss", "text-loss", [row, row | more], tokens=512)
    text = shown(tmp_path, "text-loss")
    assert "| not quantised | float32 | 2.5000 | 12.18 | - |" in text
    assert "| `nf4` | float32 | 2.5000 | 12.18 | +0.1000 ± 0.0200 |" in text
    assert "512 tokens of 2 passages" in text


def test_errors_are_shown_by_layer_or_by_linear_layer(tmp_path):
    path = "model.layers.0.mlp.vision_mlp.up_proj"
    found = {"alone": {"output": 0.04, "input gradient": 0.05}, "whole": {"output": 0.1, "LoRA A gradient": 0.2}}
    layer = {"worst output": 0.1, "LoRA gradients": 0.3}
    against = {"bfloat16": {"loss": 0.01, "linears": {path: found}, "layers": {"model.layers.0": layer}}}
    rows = [{"part": "full-width", "form": "float32", "against": {}}]
    rows += [{"part": "full-width", "form": "fp8", "against": against}]
    bench_file(tmp_path, "parity", "parity", rows)
    assert "| fp8 / bfloat16 | `layers.0` | 4 % | 5 % | 10 % | - | 30 % | 1 % |" in shown(tmp_path, "parity")
    text = rendering.render("<!-- result: parity linears --><!-- end -->", tmp_path)
    assert "| `layers.0.mlp.vision_mlp.up_proj` | 4 % | 5 % | 10 % | - | 20 % | - |" in text
