"""The report: one safe file in two languages, made of whatever is there."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cogtune
from cogtune.cli.main import main
from cogtune.errors import DataError
from cogtune.evaluate.report.chart import Frame, Line, line_chart
from cogtune.evaluate.report.load import report_of, write_report
from cogtune.evaluate.report.page import render
from cogtune.evaluate.report.pictures import Pictures
from cogtune.evaluate.runs import differing, find_runs
from cogtune.processing.clip import read_clip
from cogtune.processing.frames import Sampling
from tests.support.data_folders import write_lines

NASTY = '<script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31mred\x1b[0m "quotes" \u202egnp.exe & 中文'


def make_run(folder: Path, *, finished: bool = True, answers: bool = True, lr: float = 1e-4, text: str = "cat") -> Path:
    """A training's output folder as training writes it."""
    folder.mkdir(parents=True)
    for name in range(4):
        Image.new("RGB", (20, 10), "red").save(folder.parent / f"{name}.png")
    (folder / "config.yaml").write_text(
        f"model: {{path: base}}\ndata: {{path: [{{path: data}}]}}\nlora: {{rank: 8, targets: [experts]}}\n"
        f"train: {{lr: {lr}, output: {folder}}}\neval: {{metrics: []}}\n"
    )
    run: dict[str, Any] = {"total_steps": 20, "batch_size": 1, "ranks": 1, "accumulation": 2}
    if finished:
        run["result"] = {"step": 20, "best_step": 20, "best_metric": "loss", "best_value": 0.5, "adapter": "the best"}
    (folder / "run.json").write_text(json.dumps(run))
    data = {"bad": {NASTY: 3}, "bad_examples": [NASTY], "repaired": {"trailing comma": 1}, "train_pictures": 5,
            "validation_pictures": 2, "turns": 9, "row_lengths": {"train": {"ranges": {"128-255": 4, "256-511": 1}}},
            "train_rows": {"trimmed": 2}, "fingerprint": "0" * 64}  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "versions.json").write_text(json.dumps({"cogtune": "1", "torch": "2", "device": "A card"}))
    plan = {"phases": {"train": {"allocated": 3 * 2**30}}, "seconds": {"step": 0.5, "answering": 2.0}}
    (folder / "plan.json").write_text(json.dumps(plan))
    answered = {"kind": "answers", "records": 4, "seconds": 1.5}
    lines: list[dict[str, Any]] = [{**answered, "step": 0, "values": {"exact": 0.25}}]
    for step in (10, 20):
        lines.append({"kind": "train", "step": step, "loss": 5 / step, "lr": lr, "grad_norm": 1.0,
                      "samples_per_second": 3.5, "tokens_per_second": 9.0, "memory_gib": 2.5})  # fmt: skip
        lines.append({"kind": "validation", "step": step, "loss": 6 / step, "best": True})
    lines.append({**answered, "step": 20, "values": {"exact": 0.75}})
    write_lines(folder / "metrics.jsonl", lines)
    log = "2026-01-01 10:00:00,000 INFO step 10/20\n2026-01-01 10:01:05,000 INFO step 20/20\n"
    failed = "2026-01-01 10:02:00,000 ERROR error[out-of-memory]: no\nhint: less\n"
    (folder / "run.log").write_text(log + ("" if finished else failed))
    if answers:
        for step, given in ((0, ["dog"] * 3 + ["cat"]), (20, [text] * 3 + ["dog"])):
            about = {"turn": 0, "question": NASTY, "references": ["cat"]}
            rows = [
                {"id": f"d/{at}#0", "images": [str(folder.parent / f"{at}.png")], "answer": answer, **about}
                for at, answer in enumerate(given)
            ]
            write_lines(folder / "answers" / f"step-{step:06}.jsonl", rows)
    return folder


class Reader(HTMLParser):
    """Checks that tags close, and keeps texts, scripts, identities and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_training_has_verdict_curves_gallery_and_counts(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "out")).read_text(encoding="utf-8")
    for shown in ("tuned and base cannot be told apart: +50.0 points of exact match", "微调后与基座分不出高下",
                  "A card", "LoRA of rank 8 on experts", "65 s", "128-255", "trailing comma",
                  "3.0", "2.5"):  # fmt: skip
        assert shown in page, shown
    assert page.count("<polyline") >= 4
    assert [re.findall(r'data-change="(\w+)"', page)] == [["worse", "better", "better", "better"]]


def test_markup_and_terminal_escapes_are_text(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "out", text=NASTY)).read_text(encoding="utf-8")
    reader = Reader(page)
    scripts = [tag for tag, _ in reader.tags if tag == "script"]
    assert len(scripts) == 1
    assert not [tag for tag, _ in reader.tags if tag in ("img", "iframe", "link", "object")]
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert any("<script>alert(1)</script>" in text and "␛[31mred" in text for text in reader.texts)


def test_it_needs_nothing_from_elsewhere_and_allows_one_script(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "out")).read_text(encoding="utf-8")
    reader = Reader(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#p")), (tag, value)
    assert not re.search(r"@import|url\(", page)
    (policy,) = (attributes["content"] for _, attributes in reader.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "script-src 'sha256-" in policy


def test_every_word_stands_there_in_both_languages(tmp_path: Path) -> None:
    page = render(report_of(make_run(tmp_path / "out")))
    english, chinese = (re.findall(rf'<span lang="{name}">(.*?)</span>', page, re.S) for name in ("en", "zh"))
    assert len(english) == len(chinese) > 50
    assert all(re.search("[\u4e00-\u9fff]", text) for text in chinese)


def test_a_run_that_crashed_has_a_report_that_says_so(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "out", finished=False)).read_text(encoding="utf-8")
    assert "This run did not finish: its last logged step is 20 of 20." in page
    assert "error[out-of-memory]: no\nhint: less" in page
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    (empty / "config.yaml").write_text("model: [")
    (empty / "metrics.jsonl").write_text('{"kind": "tr')
    assert "did not finish" in write_report(empty).read_text(encoding="utf-8")


def test_two_trainings_side_by_side(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", text="dog", lr=2e-4)
    page = render(report_of(one, other))
    assert "tuned and other cannot be told apart" in page
    assert "training</span>" in page
    lost = make_run(tmp_path / "lost", answers=False)
    assert "<polyline" in render(report_of(one, lost))


def test_an_evaluation_has_a_report_without_a_training(tmp_path: Path) -> None:
    rows = [{"id": f"d/{at}", "image": "gone.png", "turn": 0, "question": "Where?", "answer": "[[0,0,500,900]]",
             "reference": "[[0,0,500,500]]"} for at in range(4)]  # fmt: skip
    cogtune.evaluate(predictions=write_lines(tmp_path / "p.jsonl", rows), output=tmp_path / "eval")
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert "the picture is not here any more" in page
    assert "boxes at IoU 0.5" in page


def test_boxes_are_drawn_over_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (400, 200), "white").save(tmp_path / "w.png")
    row = {"id": "d/1", "image": str(tmp_path / "w.png"), "turn": 0, "question": "Where?", "answer": "[[0,0,500,900]]",
           "reference": "[[0,0,500,500]]"}  # fmt: skip
    cogtune.evaluate(predictions=write_lines(tmp_path / "p.jsonl", [row]), output=tmp_path / "eval")
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert '<rect class="right" x="0.0" y="0.0" width="112.0" height="56.0"/>' in page
    assert '<rect class="given" x="0.0" y="0.0" width="112.0" height="100.8"/>' in page
    assert 'class="legend boxes"' in page


def test_a_clip_is_a_strip_of_frames_without_boxes(tmp_path: Path) -> None:
    """Its four frames at even distances, with a gap between them, across the whole card."""
    from tests.support.clips import shade, write_clip  # skips where there is no PyAV

    clip = write_clip(tmp_path / "clip.mp4", 24, size=(96, 64))
    row = {"id": "d/1", "video": str(clip), "image": str(clip), "turn": 0, "question": "What?", "answer": "[[0,0,9,9]]",
           "reference": "[[0,0,500,500]]"}  # fmt: skip
    cogtune.evaluate(predictions=write_lines(tmp_path / "p.jsonl", [row]), output=tmp_path / "eval")
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert "<article tabindex=0 class=film" in page
    assert "<rect" not in page
    source = re.search(r'href="data:image/webp;base64,([^"]+)"', page)
    assert source is not None
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(source[1]))).convert("L"), dtype=float)
    width = strip.shape[1] / 4
    shades = [strip[8:-8, int((place + 0.3) * width) : int((place + 0.7) * width)].mean() for place in range(4)]
    frames = read_clip(clip, Sampling("uniform", 4)).frames
    assert shades == pytest.approx([shade(frame.index) for frame in frames], abs=6)  # two lossy codecs


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither the output folder of a training nor of an evaluation") as caught:
        write_report(tmp_path)
    assert caught.value.code == "not-a-run"


@pytest.mark.parametrize(
    ("file", "text"),
    [("metrics.jsonl", '{"kind": "validation", "step": 2, "loss": 1.0, "sets": {"a": 3}}'),
     ("metrics.jsonl", '{"kind": "answers", "step": 2, "values": {"exact": "all"}}'),
     ("metrics.jsonl", '{"kind": "warning", "step": 2, "code": "watch-loss-flat", "cause": "lr", "values": [1]}'),
     ("data.json", '{"bad": 3}'), ("data.json", '{"train_rows": [], "row_lengths": 4, "train_pictures": "x"}'),
     ("run.json", '{"result": {"step": "x", "best_step": [], "best_value": "y"}, "total_steps": "z"}')],
)  # fmt: skip
def test_values_that_no_run_writes_are_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str
) -> None:
    """What can be shown is shown, in a report and a list; else the folder is named."""
    make_run(tmp_path / "run")
    (tmp_path / "run" / file).write_text(text + "\n", encoding="utf-8")
    for words in (["report", "run"], ["runs", "."], ["compare", "run", "run"]):
        code = main([words[0], *(str(tmp_path / word) for word in words[1:])])
        error = capsys.readouterr().err
        assert (code, "error[not-a-run]" in error, "Traceback" in error) in ((0, False, False), (2, True, False)), error


def test_many_records_stay_below_ten_megabytes(tmp_path: Path) -> None:
    rows = [{"id": f"d/{at}", "image": None, "turn": 0, "question": "What? " * 200, "answer": "x" * 4000,
             "reference": "cat"} for at in range(1500)]  # fmt: skip
    cogtune.evaluate(predictions=write_lines(tmp_path / "p.jsonl", rows), metrics="exact", output=tmp_path / "eval")
    page = tmp_path / "eval" / "report.html"
    assert page.stat().st_size < 10_000_000
    assert "of 1500 records are shown" in page.read_text(encoding="utf-8")


def test_runs_are_listed_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a" / "one")
    make_run(tmp_path / "b" / "two", finished=False, lr=2e-4)
    runs = find_runs(tmp_path)
    assert [(Path(run.path).name, run.state, run.step) for run in runs] == [
        ("one", "finished", 20),
        ("two", "failed", 20),
    ]
    assert differing(runs) == {"train.lr": [1e-4, 2e-4]}
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "25.0 -> 75.0" in said
    assert "train.lr" in said
    assert main(["compare", runs[0].path, runs[1].path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differing"] == {"train.lr": [1e-4, 2e-4]}
    assert found["runs"][0]["values"] == {"exact": 0.75}
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert main(["compare", str(tmp_path), runs[0].path]) == 2
    assert main(["report", runs[0].path]) == 0


def test_a_list_of_runs_has_verdicts_in_the_user_s_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were English in a Chinese table. What programs read stays English."""
    make_run(tmp_path / "one")
    (tmp_path / "one" / "eval").mkdir()
    said = {"verdict": {"en": ["tuned beats base"], "zh": ["微调后比基座好"]}}
    (tmp_path / "one" / "eval" / "eval.json").write_text(json.dumps(said), encoding="utf-8")
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert main(["runs", str(tmp_path)]) == 0
    assert "one：微调后比基座好" in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["verdict"] == ["tuned beats base"]


def test_a_chart_of_zeros_is_drawn() -> None:
    svg = line_chart([Line("", "one", [(0.0, 0.0), (5.0, 0.0)])], Frame("zeros"))
    assert re.search(r'points="52.0,226.0 708.0,226.0"', svg)


def test_a_picture_with_boxes_lies_as_the_model_saw_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 200), "white").save(tmp_path / "w.png", exif=exif)
    for way, size in (("ignore", 'width="112.0" height="56.0"'), ("apply", 'width="56.0" height="112.0"')):
        pictures = Pictures(way)
        assert f'<rect class="right" x="0.0" y="0.0" {size}/>' in pictures.drawn(
            str(tmp_path / "w.png"), "w", [("right", [(0, 0, 500, 500)])]
        )
