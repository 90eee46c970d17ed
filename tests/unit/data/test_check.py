"""What ``data check`` finds, and that it agrees with what training does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.cli.main import main
from cogtune.data.check import CheckReport, check
from cogtune.data.dataset import TrainRows
from cogtune.data.split import read_and_split
from cogtune.data.statistics import Answers, Histogram, script_of
from cogtune.errors import CheckpointError, DataError
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.token_file import find_token_file
from tests.support.bad_inputs import CASES, BadInput, make_place
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_label, write_lines


def noise(path: Path, seed: int) -> Path:
    """A picture that no other seed makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((16, 16), 80).save(path)
    with path.open("ab") as file:
        file.write(b"\0" * seed)
    return path


def folder(root: Path, count: int = 12) -> Path:
    for n in range(count):
        noise(root / "images" / f"{n:03}.bmp", n)
        write_label(root / "labels" / f"{n:03}.json", dialogue(f"What is {n}?", f"Number {n}."))
    return root


def checked(*paths: Any, model: Path | None = None, **values: Any) -> CheckReport:
    return check(section(*paths, **values), 0, find_token_file(None if model is None else str(model)))


def codes(report: CheckReport, level: str) -> list[str]:
    return sorted({finding.code for finding in report.findings if finding.level == level})


def test_a_good_set_has_no_findings(tmp_path: Path) -> None:
    report = checked(folder(tmp_path / "set"))
    assert report.ok
    assert report.findings == []
    assert report.counts["pictures"] == report.counts["questions"] == 12
    assert report.counts["train_pictures"] + report.counts["validation_pictures"] == 12
    assert report.languages == {"Latin": 24}


def test_lengths_are_those_of_training(tmp_path: Path, tiny_checkpoint: Path) -> None:
    root = folder(tmp_path / "set")
    long = dialogue("q" * 400, "a", "r", "b" * 90, "s", "c" * 30)
    write_label(root / "labels" / "003.json", long)
    data = section(root, max_input_len=100, max_output_len=60, validation_share=0)
    report = check(data, 0, find_token_file(str(tiny_checkpoint)))
    processor = CogVLM2Processor.from_pretrained(tiny_checkpoint)
    rows = TrainRows(read_and_split(data, 0).train, processor.encoder, data, processor.image_size)
    assert report.exact
    assert report.budget == {**rows.report.budget.to_dict(), "trained": rows.report.budget.trained}
    assert (report.rows.number, report.rows.total, report.rows.most) == (
        rows.report.rows, rows.report.tokens, rows.report.longest_row)  # fmt: skip
    assert report.budget["dropped_long_prompt"] == report.budget["dropped_long_answer"] == 1


def test_without_a_tokenizer_lengths_are_marked_as_estimates(tmp_path: Path, tiny_checkpoint: Path) -> None:
    root = folder(tmp_path / "set")
    report = checked(root)
    assert not report.exact
    assert report.to_dict()["lengths"] == "estimated"
    assert checked(root, model=tiny_checkpoint / "tokenizer.json").exact
    assert not checked(root, model=tmp_path / "nowhere").exact


def test_pictures_and_records_that_come_twice(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    shutil.copy(root / "images" / "002.bmp", root / "images" / "007.bmp")
    write_label(root / "labels" / "007.json", dialogue("What is 2?", "Seven."))
    write_label(root / "labels" / "004.json", [dialogue("q", "a"), dialogue("q", "a")])
    report = checked(root, validation_share=0)
    assert report.ok
    assert codes(report, "warning") == ["duplicate-picture", "duplicate-record", "other-answer"]
    by_code = {finding.code: finding for finding in report.warnings}
    assert "002.bmp" in by_code["duplicate-picture"].what
    assert by_code["duplicate-record"].where.endswith("004.json, record 2")
    assert by_code["other-answer"].where.endswith("007.json")


def test_captions_of_one_picture_are_no_contradiction(tmp_path: Path) -> None:
    captions = {"captions": [{"role": "caption", "content": text} for text in ("one", "two")]}
    assert checked(write_folder(tmp_path / "set", {"1": captions}), validation_share=0).findings == []


def test_the_same_picture_on_both_sides(tmp_path: Path) -> None:
    root, held = folder(tmp_path / "set"), folder(tmp_path / "held", 3)
    shutil.copy(root / "images" / "005.bmp", held / "images" / "001.bmp")
    report = checked(root, validation=[held])
    assert report.ok
    (leak,) = [finding for finding in report.warnings if finding.code == "validation-leak"]
    assert leak.where.endswith("held/images/001.bmp")
    assert "set/images/005.bmp" in leak.what
    same = checked(root, validation=[root])
    assert codes(same, "error") == ["data-overlap"]


def test_every_problem_is_listed_with_its_record(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "images" / "001.bmp").write_bytes(b"nothing")
    (root / "images" / "002.bmp").unlink()
    write_label(root / "labels" / "003.json", [dialogue("q", "a"), dialogue("q", " ")])
    write_label(root / "labels" / "004.json", {"conversations": [{"role": "robot", "content": "x"}]})
    report = checked(root)
    assert not report.ok
    assert codes(report, "error") == ["data-content", "data-role", "image-missing", "image-unreadable"]
    assert any(finding.where.endswith("003.json, record 2") for finding in report.errors)
    skipped = checked(root, on_bad="skip", max_bad_share=0.5)
    assert skipped.ok
    assert codes(skipped, "warning") == ["data-content", "data-role", "image-missing", "image-unreadable"]
    assert codes(checked(root, on_bad="skip"), "error") == ["data-bad-share"]


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"long_prompt": "error", "max_input_len": 9}, "data-too-long"),
        ({"long_answer": "error", "max_output_len": 3}, "data-too-long"),
        ({"max_row_tokens": 20}, "data-max-row-tokens"),
        ({"max_input_len": 3}, "data-nothing-left"),
        ({"validation_share": 0.999999}, "data-split"),
    ],
)
def test_settings_that_would_stop_training(
    tmp_path: Path, tiny_checkpoint: Path, values: dict[str, Any], code: str
) -> None:
    root = folder(tmp_path / "set")
    report = checked(root, model=tiny_checkpoint, **values)
    assert code in codes(report, "error")
    data = section(root, **values)
    processor = CogVLM2Processor.from_pretrained(tiny_checkpoint)
    with pytest.raises(Exception) as caught:  # noqa: PT011  (any of our errors; its code is what counts)
        TrainRows(read_and_split(data, 0).train, processor.encoder, data, processor.image_size)
    assert caught.value.code == code


def test_an_answer_that_is_nearly_all_answers(tmp_path: Path) -> None:
    lines = [{"image": None, **dialogue(f"Is it {n}?", "no" if n == 3 else "Yes.")} for n in range(40)]
    report = checked(write_lines(tmp_path / "set.jsonl", lines))
    assert report.closed.closed
    assert report.closed.to_dict()["shares"]["yes"] == 0.975
    assert codes(report, "warning") == ["few-pictures", "one-answer"]


def test_an_unreadable_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError):
        find_token_file(str(tmp_path))


def test_histogram_ranges() -> None:
    histogram = Histogram()
    for value in (0, 1, 3, 8, 9, 15, 5000):
        histogram.add(value)
    ranges = dict(histogram.ranges())
    assert ranges["0"] == ranges["1"] == ranges["2-3"] == 1
    assert ranges["4-7"] == 0
    assert ranges["8-15"] == 3
    assert ranges["4096+"] == 1
    assert histogram.to_dict()["most"] == 5000


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("hello", "Latin"),
        ("这是一辆 bus", "Chinese"),
        ("これは漢字", "Japanese"),
        ("버스", "Korean"),
        ("12 + 3?", "none"),
        ("автобус", "Cyrillic"),
        ("Größe", "Latin"),
        ("…", "none"),
    ],
)
def test_writing(text: str, script: str) -> None:
    assert script_of(text) == script


def test_long_answers_are_not_closed() -> None:
    answers = Answers()
    for n in range(50):
        answers.add(f"A picture of {n} things on a table.")
    assert not answers.closed


# ---- the command


def test_command_agrees_with_training_about_every_mistake_in_the_data(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """For each mistake in the data that `cogtune train` refuses, `cogtune data check` exits with 2 as well."""
    kinds = (
        "picture",
        "images folder",
        "label",
        "JSON",
        "record",
        "turns",
        "role",
        "content",
        "data folder",
        "budgets",
    )
    cases = [case for case in CASES if any(kind in case.name for kind in kinds)]
    compared = [_agrees(case, tmp_path / str(number), tiny_checkpoint) for number, case in enumerate(cases)]
    assert compared.count(True) >= 18
    assert [case.name for case, agrees in zip(cases, compared, strict=True) if agrees is False] == []


def _agrees(case: BadInput, root: Path, checkpoint: Path) -> bool | None:
    """None: the mistake is one of another command."""
    root.mkdir()
    place = make_place(root, checkpoint)
    command, *arguments = case.prepare(place)
    return main(["data", "check", *arguments, "--json"]) == 2 if command == "train" else None


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "set")
    (root / "labels" / "001.json").write_text("{")
    assert main(["data", "check", str(root), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [error["code"] for error in found["errors"]] == ["data-bad-json"]
    assert found["errors"][0]["where"].endswith("001.json")


def test_command_takes_a_configuration(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "set")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tiny_checkpoint}}}\ndata: {{path: {root}, max_input_len: 3}}\n")
    assert main(["data", "check", str(file)]) == 2
    assert "data-nothing-left" in capsys.readouterr().out
    assert main(["data", "check", str(file), "--data.max_input_len", "50"]) == 0
    printed = capsys.readouterr().out
    assert "training would start" in printed
    assert "ESTIMATED" not in printed


def test_command_needs_no_torch(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write_lines(tmp_path / "set.jsonl", [{"image": "a.png", **dialogue("q", "a")}])
    code = (
        "import sys; from cogtune.cli.main import main\n"
        f"code = main(['data', 'check', {str(path)!r}, '--model', {str(tiny_checkpoint)!r}, '--json'])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_training_still_raises_for_data_that_overlaps(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    with pytest.raises(DataError):
        read_and_split(section(root, validation=[root]), 0)


def llava(root: Path, picture: str, count: int = 3) -> Path:
    """Records that name pictures by paths, in LLaVA's format."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]
    records = [{"id": f"p{n}", "image": picture.format(n), "conversations": turns} for n in range(count)]
    root.mkdir(parents=True, exist_ok=True)
    (root / "llava.json").write_text(json.dumps(records))
    return root / "llava.json"


def test_pictures_that_all_lie_elsewhere_are_a_wrong_root(tmp_path: Path) -> None:
    file = llava(tmp_path / "records", "pictures/{}.png")
    with pytest.raises(DataError) as raised:
        read_and_split(section(file), 0)
    assert "--data.image_root DIR" in (raised.value.hint or "")
    assert checked(file).hints == {"image-missing": raised.value.hint}
    skipping = {"on_bad": "skip", "max_bad_share": 1.0}
    assert any("--data.image_root DIR" in hint for hint in checked(file, **skipping).hints.values())
    for n in range(2):
        write_image(tmp_path / "elsewhere" / "pictures" / f"{n}.png")
    some = checked(file, image_root=[tmp_path / "elsewhere"])
    assert some.hints == {"image-missing": "add the picture, or remove the label"}, "one of three is missing"


def test_command_names_each_problem_once_and_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(llava(tmp_path, "{}.png"))]) == 2
    said = capsys.readouterr().out
    assert said.count("1.png does not exist") == 1
    assert said.count("image-missing") == 1
    assert "hint: none of the pictures was found" in said


def test_json_is_english_in_every_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert main(["data", "check", str(llava(tmp_path, "{}.png")), "--json"]) == 2
    assert "does not exist" in json.loads(capsys.readouterr().out)["errors"][0]["what"]
    assert main(["data", "check", str(tmp_path / "nowhere"), "--json"]) == 2
    assert main(["data", "check", str(tmp_path / "llava.json")]) == 2
    assert "不存在" in capsys.readouterr().out
