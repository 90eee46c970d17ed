"""`cogtune predict` as it is typed: a file of records that continues, and refuses to become a mixture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.cli import shares
from cogtune.cli.main import main
from cogtune.features import index
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.loading import load_generator
from cogtune.model.modeling import CogVLM2Model
from cogtune.train.feature_cache import fill_cache
from tests.support.adapters import write_adapter
from tests.support.data_folders import dialogue, write_folder, write_label, write_lines
from tests.support.training import make_config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "data",
        {"a": [dialogue("a0?", "A0", "a1?", "A1"), dialogue("b0?", "B0")], "c": dialogue("c0?", "C0", "c1?", "C1")},
    )


def predict(base: Path, data: Path, output: Path, *more: object) -> int:
    chosen = ["--model", base, "--data", data, "--output", output, "--max-new-tokens", 6, "--device", "cpu", *more]
    return main(["predict", *map(str, chosen)])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_batches_of_any_size_give_the_same_file_and_an_interrupted_one_is_continued(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_checkpoint, data, tmp_path / "one.jsonl", "--batch-size", 1) == 0
    assert predict(tiny_checkpoint, data, tmp_path / "all.jsonl", "--batch-size", 8) == 0
    whole = (tmp_path / "all.jsonl").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes() == whole
    assert [line["reference"] for line in records(tmp_path / "all.jsonl")] == ["A0", "A1", "B0", "C0", "C1"]
    assert set(records(tmp_path / "all.jsonl")[0]) == {"id", "image", "turn", "question", "answer", "reference"}
    (tmp_path / "all.jsonl").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert predict(tiny_checkpoint, data, tmp_path / "all.jsonl", "--batch-size", 2) == 0
    assert (tmp_path / "all.jsonl").read_bytes() == whole
    assert "continuing after 2 answers" in capsys.readouterr().out
    assert predict(tiny_checkpoint, data, tmp_path / "all.jsonl") == 0
    assert "complete, 5 answers; nothing to do" in capsys.readouterr().out


def test_guesses_that_are_never_made_are_said(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look_up = ("--generate.prompt_lookup_num_tokens", 3, "--batch-size")
    for rows, more, said in ((1, (), None), (2, (), "2 answers are under way"), (1, ("--temperature", 1), "sampled")):
        assert predict(tiny_checkpoint, data, tmp_path / f"{said}.jsonl", *look_up, rows, *more) == 0
        err = capsys.readouterr().err
        assert ("prompt_lookup_num_tokens" in err) == (said is not None)
        assert said is None or said in err


def test_pictures_in_trainings_cache_need_no_tower(
    tiny_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same file as with the tower. A damaged one's picture is computed; with an adapter on the tower all are."""
    cache, computed = tmp_path / "cache", []
    encode = CogVLM2Model.encode_images
    monkeypatch.setattr(
        CogVLM2Model, "encode_images", lambda self, pixels: (computed.append(len(pixels)), encode(self, pixels))[1]
    )
    assert predict(tiny_checkpoint, data, tmp_path / "live.jsonl", "--data.cache_dir", cache) == 0
    assert (sum(computed), "training's cache" in capsys.readouterr().out) == (2, False)
    monkeypatch.setattr(index, "_SETTLED_NANOSECONDS", 0)  # the pictures are as new as this test
    fill_cache(make_config(tiny_checkpoint, data, tmp_path / "unused", data__cache_dir=cache))
    computed.clear()
    assert predict(tiny_checkpoint, data, tmp_path / "cached.jsonl", "--data.cache_dir", cache) == 0
    assert "2 of 2 pictures have features in training's cache" in capsys.readouterr().out
    assert computed == []
    assert (tmp_path / "cached.jsonl").read_bytes() == (tmp_path / "live.jsonl").read_bytes()
    features = next(cache.glob("*/??/[!.]*"))
    content = bytearray(features.read_bytes())
    content[-9] ^= 255
    features.write_bytes(content)
    assert predict(tiny_checkpoint, data, tmp_path / "damaged.jsonl", "--data.cache_dir", cache) == 0
    assert computed == [1]
    assert (tmp_path / "damaged.jsonl").read_bytes() == (tmp_path / "live.jsonl").read_bytes()
    computed.clear()
    adapter = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=("vision-tower",), size=0.3)
    assert predict(tiny_checkpoint, data, tmp_path / "a.jsonl", "--data.cache_dir", cache, "--adapter", adapter) == 0
    assert sum(computed) == 2


def test_another_adapter_setting_or_data_is_refused_by_name(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    adapter = write_adapter(tiny_checkpoint, tmp_path / "adapter", size=0.3)
    assert predict(tiny_checkpoint, data, output, "--adapter", adapter) == 0
    before = output.read_bytes()
    for more, named in [
        ([], "adapter: "),
        (["--adapter", adapter, "--own-history"], "own-history: false there, true now"),
        (["--adapter", adapter, "--temperature", "0.5"], "sample: false there, true now"),
        (["--adapter", adapter, "--model.template", "vqa"], "model.template: null there, vqa now"),
    ]:
        capsys.readouterr()
        assert predict(tiny_checkpoint, data, output, *more) == 2
        assert named in capsys.readouterr().err
    write_label(data / "labels" / "c.json", dialogue("c0?", "C0"))
    assert predict(tiny_checkpoint, data, output, "--adapter", adapter) == 2
    assert "data: " in capsys.readouterr().err
    assert output.read_bytes() == before
    own = tmp_path / "own.jsonl"
    assert predict(tiny_checkpoint, data, own, "--adapter", adapter, "--own-history", "--temperature", "0.5") == 0
    assert len(records(own)) == 4


def test_bad_data_is_exit_2_or_skipped(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "labels" / "c.json").write_text("{")
    output = tmp_path / "answers.jsonl"
    assert predict(tiny_checkpoint, data, output) == 2
    assert "c.json" in capsys.readouterr().err
    assert not output.exists()
    assert predict(tiny_checkpoint, data, output, "--data.on_bad", "skip", "--data.max_bad_share", "0.5") == 0
    assert [line["question"] for line in records(output)] == ["a0?", "a1?", "b0?"]
    assert "left out" in capsys.readouterr().out
    assert predict(tiny_checkpoint, tmp_path / "no", output) == 2
    assert predict(tiny_checkpoint, data, output, "--data.on_bad", "perhaps") == 2
    assert "data.on_bad" in capsys.readouterr().err


def test_a_trainings_file_and_keys_say_what_flags_say(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys that only training has are ignored; typed here, they are refused."""
    assert predict(tiny_checkpoint, data, tmp_path / "flags.jsonl", "--model.template", "vqa") == 0
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tiny_checkpoint}, template: vqa}}\ndata: {{path: {data}, turns: one_random}}\n"
        "lora: {rank: 2}\ntrain: {output: nowhere}\ngenerate: {max_new_tokens: 6, device: cpu, batch_size: 2}\n"
    )
    assert main(["predict", str(file), "--output", str(tmp_path / "file.jsonl")]) == 0
    assert (tmp_path / "file.jsonl").read_bytes() == (tmp_path / "flags.jsonl").read_bytes()
    assert main(["predict", str(file), "--output", str(tmp_path / "file.jsonl"), "--temperature", "0.5"]) == 2
    assert "sample: false there, true now" in capsys.readouterr().err
    assert main(["predict", str(file), "--output", str(tmp_path / "x.jsonl"), "--data.turns", "all"]) == 2
    assert "it belongs to another command: `cogtune train --help`" in capsys.readouterr().err


def test_choices_are_scored_as_one_tree_whatever_the_batch_size_and_the_start(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole.jsonl"
    assert predict(tiny_checkpoint, data, whole, "--choices", "A0,B0,no", "--batch-size", 1) == 0
    assert "5 of 5 questions are closed" in capsys.readouterr().out
    found = records(whole)
    wanted = load_generator(tiny_checkpoint, keys={"device": "cpu"}).score(
        found[0]["image"],
        [
            ClosedQuestion("a0?", ("A0", "B0", "no")),
            ClosedQuestion("a1?", ("A0", "B0", "no"), (("a0?", "A0"),)),
            ClosedQuestion("b0?", ("A0", "B0", "no")),
        ],
    )
    for line, scores in zip(found, wanted, strict=False):
        assert line["choices"] == ["A0", "B0", "no"]
        assert line["probabilities"] == pytest.approx(scores.probabilities, abs=1e-6)
        assert (line["answer"], line["calibrated"]) == (scores.best, False)
    content = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    assert predict(tiny_checkpoint, data, cut, "--choices", "A0,B0,no") == 0
    for lines in (1, 4):
        cut.write_bytes(b"".join(line + b"\n" for line in content.splitlines()[:lines]))
        assert predict(tiny_checkpoint, data, cut, "--choices", "A0,B0,no") == 0
        assert cut.read_bytes() == content
    assert predict(tiny_checkpoint, data, cut, "--choices", "A0,no") == 2
    assert "choices: " in capsys.readouterr().err
    for wrong in ("yes", "yes,yes", "", ","):
        assert predict(tiny_checkpoint, data, tmp_path / "x.jsonl", "--choices", wrong) == 2
        assert "at least two different ones" in capsys.readouterr().err


def test_what_cannot_be_meant_is_refused_before_anything_is_read(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that does not say what to write, and ``data`` among other choices."""
    for name, instead in (("answers.txt", "answers.jsonl"), ("answers", "answers.jsonl"), ("a.json", "a.jsonl")):
        assert predict(tiny_checkpoint, data, tmp_path / name) == 2
        said = capsys.readouterr().err
        assert "ends in .jsonl, .csv or .parquet" in said
        assert f"--output {tmp_path / instead}\n" in said
    assert predict(tiny_checkpoint, data, tmp_path / "x.jsonl", "--choices", "data,yes") == 2
    assert "--choices data,yes: data means those that the records name" in capsys.readouterr().err
    assert predict(tiny_checkpoint, data, tmp_path / "x.jsonl", "--choices", "yes,no", "--quant.stream", "all") == 2
    told = capsys.readouterr()
    assert "leave out --parallel.tensor and --quant.stream all" in told.err
    assert not told.out, "nothing was read or loaded"
    assert not list(tmp_path.glob("[ax]*"))


def test_records_name_their_own_choices(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(data / "images" / "a.jpg")
    rows = [
        {"image": picture, "question": "Is it red?", "choices": ["yes", "no"]},
        {"image": picture, "question": "What is it?"},
        {"image": picture, "question": "Which?", "choices": "a bus, a dog"},
        {"image": picture, "messages": [{"role": "user", "content": "Where?", "choices": ["here", "there"]}]},
    ]
    for name, chosen in (("flat", rows[:3]), ("messages", rows[3:])):
        source = write_lines(tmp_path / f"{name}.jsonl", chosen)
        assert predict(tiny_checkpoint, source, tmp_path / f"{name}.out.jsonl", "--choices", "data") == 0
    found = records(tmp_path / "flat.out.jsonl") + records(tmp_path / "messages.out.jsonl")
    assert [line.get("choices") for line in found] == [["yes", "no"], None, ["a bus", "a dog"], ["here", "there"]]
    assert "2 of 3 questions are closed" in capsys.readouterr().out
    assert predict(tiny_checkpoint, data, tmp_path / "x.jsonl", "--choices", "data") == 2
    assert "no record names its choices" in capsys.readouterr().err
    write_lines(tmp_path / "flat.jsonl", [rows[0] | {"choices": ["yes"]}])
    assert predict(tiny_checkpoint, tmp_path / "flat.jsonl", tmp_path / "x.jsonl", "--choices", "data") == 2
    assert "different ones were expected" in capsys.readouterr().err


def test_tables_are_read_and_written(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet

    picture = data / "images" / "a.jpg"
    (tmp_path / "asked.csv").write_text(f'image,question,choices\n{picture},"Red, or not?","yes,no"\n{picture},Why?,\n')
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [str(picture)] * 2, "question": ["Red, or not?", "Why?"],
                       "choices": [["yes", "no"], None]}),
        tmp_path / "asked.parquet",
    )  # fmt: skip
    tables = []
    for kind in ("csv", "parquet"):
        output = tmp_path / f"answers.{kind}"
        assert predict(tiny_checkpoint, tmp_path / f"asked.{kind}", output, "--choices", "data") == 0
        lines = records(tmp_path / f"answers.{kind}.jsonl")
        if kind == "parquet":
            assert pyarrow.parquet.read_table(output).to_pylist() == [{**line, "choices": line.get("choices"),
                "probabilities": line.get("probabilities"), "calibrated": line.get("calibrated")}
                for line in lines]  # fmt: skip
        else:
            rows = list(csv.DictReader(output.open(encoding="utf-8", newline="")))
            assert [row["question"] for row in rows] == ["Red, or not?", "Why?"]
            assert json.loads(rows[0]["probabilities"]) == lines[0]["probabilities"]
            assert [row["answer"] for row in rows] == [line["answer"] for line in lines]
        tables.append([{name: line.get(name) for name in ("question", "answer", "probabilities")} for line in lines])
    assert tables[0] == tables[1]
    output.unlink()
    capsys.readouterr()
    assert predict(tiny_checkpoint, tmp_path / "asked.parquet", output, "--choices", "data") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert output.is_file()
    mine = tmp_path / "mine.csv"
    mine.write_text("my own\n")
    assert predict(tiny_checkpoint, data, mine) == 2
    assert mine.read_text() == "my own\n"


def test_a_bad_picture_is_a_counted_line(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is none, and one that is not there; whatever else is answered stays."""
    good, output = tmp_path / "good.jsonl", tmp_path / "answers.jsonl"
    assert predict(tiny_checkpoint, data, good) == 0
    (data / "images" / "c.jpg").write_bytes(b"no picture")
    assert predict(tiny_checkpoint, data, output) == 0
    said = capsys.readouterr().out
    assert "2 could not be asked" in said
    assert said.count("c.jpg") == 1  # two questions, one picture
    found = records(output)
    assert [line.get("error") for line in found] == [None] * 3 + ["image-unreadable"] * 2
    assert found[:3] == records(good)[:3]
    before = output.read_bytes()
    assert predict(tiny_checkpoint, data, output) == 0
    assert output.read_bytes() == before
    assert predict(tiny_checkpoint, data, tmp_path / "x.jsonl", "--data.on_bad", "error") == 2
    assert "c.jpg" in capsys.readouterr().err
    rows = [{"image": str(data / "images" / name), "question": "What?", "choices": ["a", "b"]}
            for name in ("a.jpg", "none.jpg", "a.jpg")]  # fmt: skip
    source = write_lines(tmp_path / "rows.jsonl", rows)
    assert predict(tiny_checkpoint, source, tmp_path / "closed.jsonl", "--choices", "data") == 0
    assert [line.get("error") for line in records(tmp_path / "closed.jsonl")] == [None, None, "image-missing"]
    write_lines(source, rows[1:2])
    assert predict(tiny_checkpoint, source, tmp_path / "none.jsonl") == 2
    assert "none.jpg" in capsys.readouterr().err


def test_several_cards_write_the_file_of_one_also_when_one_was_killed(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of their own are started and ended in `test_shares`; here each share runs in this one."""
    (data / "images" / "c.jpg").write_bytes(b"no picture")
    one, several = tmp_path / "one.parquet", tmp_path / "several.parquet"
    assert predict(tiny_checkpoint, data, one, "--choices", "A0,no") == 0
    ran: list[str] = []

    class Ended:
        returncode = 0

        def poll(self) -> int:
            return 0

        def wait(self, timeout: float | None = None) -> int:
            return 0

    def start(words: list[str], number: int, count: int) -> Ended:
        ran.append(f"{number}/{count}")
        assert main(["predict", *words, "--share", ran[-1]]) == 0
        return Ended()

    monkeypatch.setattr(shares, "_start", start)
    monkeypatch.setattr(shares, "_POLL_SECONDS", 0)
    words = ["--choices", "A0,no", "--share", "0/2"]
    assert predict(tiny_checkpoint, data, several, *words) == 0
    part = tmp_path / "several.parquet.0-of-2.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    part.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # as a kill leaves it
    assert predict(tiny_checkpoint, data, several, "--choices", "A0,no", "--cards", 2) == 0
    assert ran == ["0/2", "1/2"]
    assert (tmp_path / "several.parquet.jsonl").read_bytes() == (tmp_path / "one.parquet.jsonl").read_bytes()
    assert several.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob("*-of-*"))
