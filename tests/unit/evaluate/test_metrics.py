"""Every metric says what its reference program says, to 1e-6; what those say is in `tests/golden/metrics.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cogtune.errors import ConfigError
from cogtune.evaluate.answer_metrics import exact_match, token_f1
from cogtune.evaluate.boxes import find_boxes, matched_overlaps, overlap
from cogtune.evaluate.metric import kind_of, statistics_of
from cogtune.evaluate.metrics import find_metric, known
from cogtune.evaluate.numbers import find_number
from cogtune.evaluate.text import normalise, words, written_words
from cogtune.evaluate.vqa import normalise_vqa, vqa_accuracy

STORED = json.loads((Path(__file__).parents[2] / "golden" / "metrics.json").read_text(encoding="utf-8"))
TEN = [["yes"] * 10]


def corpus(name: str, data: list[tuple[str, list[str]]]) -> tuple[float, list[float]]:
    """A metric's value over records, and each record's."""
    metric = find_metric(name)
    found = statistics_of(metric, [answer for answer, _ in data], [right for _, right in data])
    return float(metric.value(found.sum(0))), [metric.record(row) for row in found]


@pytest.mark.parametrize(("answer", "people", "score"), STORED["vqa"])
def test_vqa_accuracy(answer, people, score):
    assert vqa_accuracy(answer, people) == pytest.approx(score, abs=1e-6)


def test_every_word_that_vqa_rewrites_is_rewritten():
    assert {text: normalise_vqa(text) for text, _ in STORED["vqa_words"]} == dict(STORED["vqa_words"])


@pytest.mark.parametrize(("name", "stored"), [("anls", "anls"), ("rouge_l", "rouge_l"), ("meteor", "meteor")])
def test_means_of_packages(name, stored):
    data = [(answer, right) for answer, right, _ in STORED[stored]]
    assert corpus(name, data)[1] == pytest.approx([score for *_, score in STORED[stored]], abs=1e-6)


def test_exact_match_and_f1_are_squads():
    for answer, right, exact, f1 in STORED["squad_f1"]:
        assert max(exact_match(answer, one) for one in right) == exact, answer
        assert max(token_f1(answer, one) for one in right) == pytest.approx(f1, abs=1e-6), answer


def test_numbers_are_relaxed_as_chartqas():
    for answer, right, score in STORED["numeric"]:
        assert corpus("numeric", [(answer, [right])])[0] == score, (answer, right)
    assert corpus("numeric:0.01", [("10.4", ["10"])])[0] == 0
    assert corpus("numeric:0", [("12 cars", ["twelve"]), ("3", ["three"]), ("三", ["3"])])[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "stored"),
    [("bleu", "bleu"), ("bleu", "bleu_zh"), ("cider", "cider"), ("cider", "cider_zh"),
     ("cer", "cer"), ("cer", "cer_zh"), ("wer", "wer")],
)  # fmt: skip
def test_values_of_a_corpus(name, stored):
    """Not the mean of its records': counts are summed first."""
    data = [(answer, [right] if isinstance(right, str) else right) for answer, right in STORED[stored]["data"]]
    value, records = corpus(name, data)
    assert value == pytest.approx(STORED[stored]["score"], abs=1e-6)
    if "scores" in STORED[stored]:
        assert records == pytest.approx(STORED[stored]["scores"], abs=1e-6)


def test_boxes():
    for one, other, value in STORED["iou"]:
        assert overlap(tuple(one), tuple(other)) == pytest.approx(value, abs=1e-6)
    assert find_boxes("the dog [[010,020,300,400]] and two cats [[1,2,3,4;5,6,7,8]], not [[9,9,9,9]] or [[1,2]]") == [
        (10, 20, 300, 400), (1, 2, 3, 4), (5, 6, 7, 8)]  # fmt: skip
    small, large, far = (0, 0, 10, 10), (0, 0, 10, 20), (500, 500, 600, 600)
    assert matched_overlaps([large, small], [small, far]) == [1.0, 0.0]
    assert matched_overlaps([], [small]) == [0.0]
    assert corpus("iou", [("[[0,0,10,20]]", ["[[0,0,10,10]]"]), ("nowhere", ["[[0,0,10,10]]"])])[0] == 0.25
    assert corpus("box_accuracy", [("[[0,0,10,20]]", ["[[0,0,10,10]]"])])[0] == 1


def test_chinese_is_divided_into_characters():
    assert words("两只 cats，在Paris的café！") == ["两", "只", "cats", "在", "paris", "的", "café"]
    assert written_words("第3号楼, No. 7") == ["第", "3", "号", "楼", ",", "No.", "7"]
    assert corpus("wer", [("今天天汽好", ["今天天气好"])])[0] == pytest.approx(0.2)
    assert corpus("token_f1", [("红色公交车", ["公交车"])])[0] == pytest.approx(0.75)
    assert corpus("rouge_l", [("红公交车", ["公交车"])])[0] == pytest.approx(6 / 7)


def test_answers_that_differ_stay_different():
    assert normalise("The Red Bus.") == normalise("red bus")
    assert normalise("“猫”。") == normalise("猫") == "猫"
    assert len({normalise(text) for text in ("3.5", "35", "-35", "3:5", "3,5")}) == 5
    assert normalise("A") == "a"
    assert normalise("１２") == "12"
    assert [find_number(text) for text in ("1,200 people", "5 %", "three", "２", "3 of 4", "no", "1.5e3")] == [
        1200, 0.05, 3, 2, None, None, 1500]  # fmt: skip


def test_several_right_answers_count_the_best():
    assert corpus("exact", [("cat", ["dog", "Cat."])])[0] == 1
    assert corpus("cer", [("kat", ["catalogue", "cat"])])[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("references", "kind"),
    [(["[[0,0,5,5]]"], "box"), (["3"], "number"), (["12 cars"], "number"), (["yes"], "short"),
     (["红色的公交"], "short"),
     (["a man riding a wave on a surfboard"], "long"), (["yes", "a man riding a wave on a surfboard"], "long")],
)  # fmt: skip
def test_kinds_of_records(references, kind):
    assert kind_of(references) == kind


def test_which_metrics_fit():
    fitting = {name: metric.fits for name, metric in known().items()}
    assert [name for name, fits in fitting.items() if fits(["[[0,0,5,5]]"])] == ["exact", "iou", "box_accuracy"]
    assert "vqa" in [name for name, fits in fitting.items() if fits(TEN[0])]
    assert not fitting["vqa"](["yes"])
    assert not fitting["numeric"](["yes"])
    assert fitting["cider"](["a man riding a wave on a surfboard"])


def test_odd_answers_have_scores_of_every_metric():
    """Empty, very long and strange answers give finite numbers."""
    for name, metric in known().items():
        right = {"iou": ["[[0,0,5,5]]"], "box_accuracy": ["[[0,0,5,5]]"]}.get(name, ["three words here and many more"])
        found = statistics_of(metric, ["", "x" * 3000, "\x1b[31m <b>", "好"], [right] * 4)
        assert np.isfinite(found).all(), name
        assert math.isfinite(float(metric.value(found.sum(0)))), name
        assert all(math.isfinite(metric.record(row)) for row in found), name


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="no metric is called `blue`") as caught:
        find_metric("blue")
    assert "bleu" in str(caught.value)
    with pytest.raises(ConfigError, match="no tolerance"):
        find_metric("numeric:much")
