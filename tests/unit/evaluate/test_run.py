"""Evaluations of predictions files: what is compared, said and refused. No model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import cogtune
from cogtune.data.records import Question
from cogtune.errors import ConfigError, DataError, SetupError
from cogtune.evaluate import choose as choosing
from cogtune.evaluate.questions import blanked, collect, number, swapped
from cogtune.language import speaking
from tests.support.data_folders import dialogue, write_folder, write_lines


def predictions(path: Path, answers: list[str], rights: list[str | None], **more: Any) -> Path:
    """A predictions file of single questions, two about each picture."""
    lines = [
        {"id": f"set/{at // 2}#{at % 2}", "image": f"pictures/{at // 2}.png", "turn": 0, "question": f"What is {at}?",
         "answer": answer, "reference": right, **more}
        for at, (answer, right) in enumerate(zip(answers, rights, strict=True))
    ]  # fmt: skip
    return write_lines(path, lines)


def evaluated(tmp_path: Path, **options: Any) -> cogtune.evaluate.Evaluation:
    return cogtune.evaluate(**({"output": tmp_path / "out"} | options))


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """Forty questions: the first file is right in all, the other in half, not evenly over the pictures."""
    rights = ["cat" if at < 10 or at % 3 == 0 else "dog" for at in range(38)] + ["dog", "cat"]
    return {
        "predictions": predictions(tmp_path / "good.jsonl", rights, rights),
        "against": str(predictions(tmp_path / "half.jsonl", ["Cat."] * 40, rights)),
    }


def test_a_comparison_has_difference_interval_and_what_could_be_seen(tmp_path, two):
    found = evaluated(tmp_path, **two)
    assert (found.value("exact"), found.value("exact", 1)) == (1.0, 0.5)
    assert re.fullmatch(
        r"good.jsonl beats half.jsonl by 50.0 points of exact match \(95 % interval 3\d.\d to 6\d.\d; with 40 answers"
        r" about 20 pictures, less than 2\d.\d points could not be told from chance\)",
        found.verdict,
    )
    with speaking("zh"):
        assert found.verdict.startswith("good.jsonl比half.jsonl高 50.0 个百分点（完全匹配；95 % 区间")
    stored = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found.to_dict()))
    assert stored["metrics"][0]["differences"][0]["certain"] is True
    assert [model["name"] for model in stored["models"]] == ["good.jsonl", "half.jsonl"]
    lines = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 40
    assert json.loads(lines[10])["scores"]["exact"] == [1.0, 0.0]


def test_several_models_make_a_table(tmp_path, two):
    rights = [json.loads(line)["reference"] for line in two["predictions"].read_text().splitlines()]
    third = predictions(tmp_path / "third.jsonl", ["dog"] * 40, rights)
    found = evaluated(tmp_path, predictions=two["predictions"], against=[two["against"], str(third)])
    assert [line.split()[0] for line in found.lines()[1:4]] == ["good.jsonl", "half.jsonl", "third.jsonl"]
    assert len(found.verdict.splitlines()) == 2
    assert any(line.split() == ["cat", "20", "100.0", "100.0", "0.0"] for line in found.lines())


def test_equal_answers_are_called_equal(tmp_path, two):
    found = evaluated(tmp_path, predictions=two["predictions"], against=str(two["predictions"]))
    assert found.verdict == "good.jsonl and good.jsonl (2) score the same in exact match on all 40 answers"


def test_what_could_be_chance_is_not_called_better(tmp_path):
    rights = ["cat"] * 20
    one = predictions(tmp_path / "one.jsonl", ["cat"] * 10 + ["dog"] * 10, rights)
    other = predictions(tmp_path / "other.jsonl", ["dog"] * 8 + ["cat"] * 12, rights)
    found = evaluated(tmp_path, predictions=one, against=str(other))
    assert found.verdict.startswith("one.jsonl and other.jsonl cannot be told apart: -10.0 points of exact match")


def test_four_pictures_are_too_few_whatever_their_interval_says(tmp_path):
    """It said that they cannot be told apart, and gave an interval and a smallest difference that said they can."""
    rights = ["cat"] * 8
    one = predictions(tmp_path / "one.jsonl", rights, rights)
    other = predictions(tmp_path / "other.jsonl", ["dog", "cat", "dog", "cat", "dog", "cat", "dog", "dog"], rights)
    said = evaluated(tmp_path, predictions=one, against=str(other)).verdict
    assert "cannot be told apart: +62.5 points of exact match (95 % interval +" in said
    assert "but 4 of 4 pictures differ, and p = 0.1" in said  # 2 of the 16 ways to swap their answers: 0.125
    assert "could not be told from chance" not in said


def test_predictions_of_other_data_are_refused(tmp_path, two):
    rights = ["cat"] * 40
    other = predictions(tmp_path / "other.jsonl", ["cat"] * 40, rights)
    with pytest.raises(DataError, match=r"other.jsonl:11: set/5#0 is not in the data, or asks or answers") as caught:
        evaluated(tmp_path, predictions=two["predictions"], against=str(other))
    assert caught.value.code == "predictions-other-data"
    data = write_folder(tmp_path / "data", {"a": dialogue("What is it?", "A cat.")})
    with pytest.raises(DataError, match=r"good.jsonl:1: set/0#0 is not in the data"):
        evaluated(tmp_path, data=data, predictions=two["predictions"])


def test_the_data_that_was_predicted_is_taken(tmp_path):
    """Further right answers come from the data; the file has one."""
    folder = write_folder(tmp_path / "data", {"a": [dialogue("What?", "a cat"), dialogue("What?", "a kitten")]})
    lines = [
        {"id": f"data/a#{at}", "image": "a.png", "turn": 0, "question": "What?", "answer": "kitten", "reference": right}
        for at, right in enumerate(["a cat", "a kitten"])
    ]
    file = write_lines(tmp_path / "answers.jsonl", lines)
    found = evaluated(tmp_path, data=folder, predictions=file)
    assert len(found.asked.questions) == 1
    assert found.value("exact") == 1.0
    assert found.data["joined"] == 1


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [(lambda rows: [*rows, rows[0]], r":41: set/0#0 is in line 1 too", "data-duplicate-id"),
     (lambda rows: [*rows, "{"], r":41: not a prediction record", "predictions-other-data"),
     (lambda rows: [*rows, "[1]"], r":41: not a prediction record", "predictions-other-data"),
     (lambda rows: [*rows, '{"id": "x"}'], r":41: not a prediction record", "predictions-other-data"),
     (lambda rows: [*rows[:2], rows[2].replace('"reference": "', '"reference": ["'). replace('"}', '"]}')],
      r":3: not a prediction record \(reference\)", "predictions-other-data"),
     (lambda rows: rows[:30], "half.jsonl has no answer to 10 of 40 questions; the first is set/15#0",
      "predictions-incomplete")],
)  # fmt: skip
def test_broken_files_are_refused_by_line(tmp_path, two, change, message, code):
    file = Path(two["against"])
    file.write_text("\n".join(change(file.read_text().splitlines())), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        evaluated(tmp_path, **two)
    assert caught.value.code == code


def test_unanswered_questions_are_left_out_where_that_is_asked_for(tmp_path, two):
    file = Path(two["against"])
    file.write_text("\n".join(file.read_text().splitlines()[:38]), encoding="utf-8")
    found = evaluated(tmp_path, **two, keys={"data.on_bad": "skip"})
    assert len(found.asked.questions) == 38


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: there is no such file"):
        evaluated(tmp_path, predictions=tmp_path / "nowhere.jsonl")


def test_metrics_that_do_not_fit_are_named_with_those_that_do(tmp_path, two):
    with pytest.raises(ConfigError, match=r"iou fits none of the 40 records \(short answers\)") as caught:
        evaluated(tmp_path, **two, metrics="iou")
    assert "these fit: exact, anls, token_f1" in caught.value.hint
    assert caught.value.code == "metric-fits-none"
    with pytest.raises(ConfigError, match="no metric is called `accuracy`"):
        evaluated(tmp_path, **two, metrics="accuracy")


def test_a_missing_package_is_named_or_its_metric_left_out(tmp_path, two, monkeypatch):
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="anls needs the package rapidfuzz"):
        evaluated(tmp_path, **two, metrics="anls")
    long = "a man rides a wave on a surfboard in the sea"
    file = predictions(tmp_path / "long.jsonl", [long] * 4, [long] * 4)
    found = evaluated(tmp_path, predictions=file, output=tmp_path / "long")
    assert [one.metric.name for one in found.results] == ["token_f1", "cider"]
    assert any('pip install "cogtune[metrics]"' in note for note in found.notes)


def test_records_without_a_right_answer_are_counted(tmp_path):
    file = predictions(tmp_path / "some.jsonl", ["cat"] * 5, ["cat", None, "cat", "", " \n"])
    found = evaluated(tmp_path, predictions=file)
    assert (len(found.asked.questions), found.data["unanswered"]) == (2, 3)
    none = predictions(tmp_path / "none.jsonl", ["cat"], [None])
    with pytest.raises(DataError, match=r"no question has an answer to compare with \(1 have none\)"):
        evaluated(tmp_path, predictions=none)


def test_right_answers_in_two_languages(tmp_path):
    """Each is compared as it is written; groups tell the languages apart."""
    file = predictions(tmp_path / "both.jsonl", ["红色", "red", "蓝色。", "Blue"], ["红色", "red", "蓝色", "blue"])
    found = evaluated(tmp_path, predictions=file)
    assert found.value("exact") == 1
    assert {name: count for name, (count, _) in found.results[0].groups["language"].items()} == {
        "Chinese": 2, "not Chinese": 2}  # fmt: skip


def test_contradictions_are_refused(tmp_path, two):
    with pytest.raises(ConfigError, match="a control asks the model again"):
        evaluated(tmp_path, **two, controls="blank")
    with pytest.raises(ConfigError, match="no control is called `black`"):
        evaluated(tmp_path, **two, controls="black")
    with pytest.raises(ConfigError, match=r"generate.temperature: evaluation takes the likeliest"):
        evaluated(tmp_path, **two, keys={"temperature": 0.5})
    with pytest.raises(ConfigError, match="no model is named"):
        evaluated(tmp_path)
    with pytest.raises(ConfigError, match="neither an adapter, a model's folder nor a predictions file"):
        evaluated(tmp_path, predictions=two["predictions"], against=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="there is no adapter whose base"):
        evaluated(tmp_path, predictions=two["predictions"], against="base")


def question(name: str, text: str, *images: str) -> Question:
    return Question(name, 0, tuple(map(Path, images)), text, "cat", (), ("cat",))


def test_swapped_pictures_are_anothers_and_each_is_used_once():
    asked = [question(f"{at}", "What?", f"{at // 2}.png") for at in range(6)]
    asked += [question("two", "What?", "a.png", "b.png"), question("none", "What?")]
    found = swapped(asked)
    assert [one.images[0].name for one in found[:6]] == ["1.png", "1.png", "2.png", "2.png", "0.png", "0.png"]
    assert found[6:] == asked[6:]
    assert {one.images for one in blanked(asked, Path("w.png"))} == {(Path("w.png"),), (Path("w.png"),) * 2, ()}


def test_equal_questions_about_one_picture_are_one_with_several_right_answers():
    assert number([question("a", "x", "1.png"), question("b", "y", "1.png"), question("c", "x")]).pictures == [0, 0, 1]
    assert collect([]).questions == []
